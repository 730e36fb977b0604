"""Experts of mixture-of-experts models: not adapted, and said so; PEFT's readings of their names.

transformers 5 stacks all experts of a block into parameters (E, O, I), which are no linear layers.
For some architectures PEFT 0.21 turns targets with the names that experts had before into these
parameters, and so takes a dense or shared linear of such a name for experts. Source: PEFT's
transformers_weight_conversion.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from weakref import WeakKeyDictionary

from torch import nn

from lora.decoder.language_model import transformers_network
from lora.errors import TargetError
from lora.layers.build import has_own_forward, is_adaptable
from lora.layers.uncalled import find_uncalled
from lora.lora_module import LoRALayer, n_values
from lora.terminal import escaping_log

PEFT_EXPERT_NAMES = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}
"""Last parts of names that PEFT takes for experts, by the architecture that a model follows."""
_EXPERTS = re.compile(r"(.*\.)?experts\..*")
_ONE_EXPERT = re.compile(r"(.*\.)?experts\.\d+\..*\.lora_[AB]\..*")

log = escaping_log(__name__)
_told: WeakKeyDictionary[nn.Module, set[tuple[str, ...]]] = WeakKeyDictionary()
"""What was logged of a model."""


def find_expert_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return those of `names` that PEFT takes for the experts of `model`."""
    endings = _expert_endings(model)
    return [name for name in names if name.rpartition(".")[2] in endings]


def _expert_endings(model: nn.Module) -> frozenset[str]:
    network = transformers_network(model)
    conversions = sys.modules.get("transformers.conversion_mapping")  # since transformers 5
    if network is None or conversions is None:
        return frozenset()
    # The table that PEFT reads too, and adds mixtral to.
    table = {**conversions._MODEL_TO_CONVERSION_PATTERN, "mixtral": "mixtral"}
    followed = table.get(network.config.model_type, "")
    return PEFT_EXPERT_NAMES.get(followed, frozenset())


def refuse_expert_names(model: nn.Module, names: Iterable[str]) -> None:
    """Raise TargetError if PEFT would read LoRA on `names` as LoRA on experts."""
    taken = find_expert_names(model, names)
    if taken:
        more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
        raise TargetError(
            f"Cannot adapt {taken[0]!r}{more} of a {type(model).__name__}: PEFT would read their "
            "LoRA as that of the experts, which have the same names. Allowed: linears of other "
            'names. Leave these out (exclude), or use targets="all-linear", which does.'
        )


def describe_experts(model: nn.Module) -> str:
    """Return in a sentence that the experts of `model` are not adapted; "" if it has none."""
    name = next((name for name, _ in model.named_parameters() if _is_stacked(model, name)), None)
    if name is None:
        return ""
    return f" Experts and routers here are no linear layers ({name}), and are not adapted."


def is_first_note(model: nn.Module, *note: str) -> bool:
    """Whether `note` was not yet logged of `model`; from now on it was.

    The candidates of a sweep adapt the same model.
    """
    told = _told.setdefault(model, set())
    is_first = note not in told
    told.add(note)
    return is_first


def note_left_out(model: nn.Module, adapted: Sequence[str], *, is_all_linear: bool) -> None:
    """Log which experts of `model`, and which linears of "all-linear", are not in `adapted`.

    Once for a model, and not of one without values, which is planned and not trained.
    """
    is_planned = any(parameter.is_meta for parameter in model.parameters())
    if is_planned or not is_first_note(model, "left out", *adapted):
        return
    sizes = {name: n_values(parameter) for name, parameter in model.named_parameters()}
    total = sum(sizes.values())
    experts = [name for name in sizes if _is_stacked(model, name)]
    if experts:
        log.warning(
            "%d tensors of experts (%s, for one), %.0f%% of the parameters, are not adapted: they "
            "are no linear layers; LoRA is on %s",
            *(len(experts), experts[0], 100 * sum(map(sizes.__getitem__, experts)) / total),
            ", ".join(sorted({name.rpartition(".")[2] for name in adapted})),
        )
    if is_all_linear:
        _note_linears(model, set(adapted), total)


def _note_linears(model: nn.Module, adapted: set[str], total: int) -> None:
    """Log which linears "all-linear" leaves out, and why; the model has `total` parameters."""
    modules = {name: module for name, module in model.named_modules() if name}
    linears = [name for name, module in modules.items() if is_adaptable(module)]
    own_forward = [name for name, module in modules.items() if has_own_forward(module)]
    for names, why in (
        (
            find_expert_names(model, linears),
            "PEFT would read LoRA there as that of the experts, which have the same names",
        ),
        (
            find_uncalled(model, linears),
            "the model reads the weight without calling the layer, so LoRA would have no effect",
        ),
        (own_forward, "what is computed there is no plain linear layer"),
    ):
        left_out = sorted(set(names) - adapted)
        if left_out:
            own = sum(n_values(p) for n in left_out for p in model.get_submodule(n).parameters())
            log.warning(
                "%s, %.0f%% of the parameters: not adapted, because %s",
                *(_counted(left_out), 100 * own / total, why),
            )


def _counted(linears: Sequence[str]) -> str:
    if len(linears) == 1:
        return f"1 linear ({linears[0]})"
    return f"{len(linears)} linears ({linears[0]}, for one)"


def _is_stacked(model: nn.Module, name: str) -> bool:
    """Whether the parameter `name` holds several experts."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, LoRALayer) or is_adaptable(owner):
        return False  # an expert that is a linear of its own
    return _EXPERTS.fullmatch(name) is not None or "Experts" in type(owner).__name__


def why_not_expert_tensors(model: nn.Module, tensors: Iterable[str]) -> str | None:
    """Return why the file's `tensors` of single experts do not fit `model`, or None if they do."""
    single = [name for name in tensors if _ONE_EXPERT.fullmatch(name)]
    if not single or not any(_is_stacked(model, name) for name, _ in model.named_parameters()):
        return None
    return (
        f"{len(single)} tensors adapt experts one by one ({min(single)}), as transformers before 5 "
        "had them; this model holds them stacked. PEFT converts such a file when it loads it: "
        "merge the adapter there (merge_and_unload), or train it again without experts"
    )
