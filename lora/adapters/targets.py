"""Find the layers that LoRA adapts: by name ending, full name, regular expression, or all.

And the modules that train fully beside it, by name ending or full name.
"""

from __future__ import annotations

import re
from typing import Protocol, runtime_checkable

from torch import nn

from lora.adapters.experts import describe_experts, find_expert_names, refuse_expert_names
from lora.adapters.patterns import NameMatcher
from lora.config import LoRAConfig
from lora.decoder.language_model import LanguageModel, transformers_network
from lora.decoder.quantised.base import base_kind
from lora.errors import TargetError, did_you_mean
from lora.layers.build import has_computed_weight, has_own_forward, is_adaptable
from lora.layers.uncalled import find_uncalled

ALL_LINEAR = "all-linear"

_PLAIN_NAME = re.compile(r"[\w.-]+")


@runtime_checkable
class HasOutputHead(Protocol):
    """A language model that returns its output head: transformers' models, our decoders."""

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the linear that makes logits, or None."""


def output_head_name(model: nn.Module) -> str | None:
    """Return the full name of the linear that makes logits, if the model says which it is."""
    if not isinstance(model, HasOutputHead):
        return None
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None)


def find_targets(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Return the full names of the layers that `config` selects, in the model's order.

    Of a multimodal model behind our interface only the text part is looked at.
    "all-linear" leaves out the head, linears that PEFT would take for experts, linears that the
    model does not call, and linears of transformers that compute something else.

    Raises TargetError for a target, exclusion or pattern that matches nothing, and for layers among
    those selected that are quantised, that PEFT would take for experts, or that are not called.
    """
    computed = [
        name for name, module in model.named_modules() if name and has_computed_weight(module)
    ]
    linears = [name for name, module in model.named_modules() if name and is_adaptable(module)]
    linears += computed  # refused below, unless they are excluded
    text, head = text_part(model), output_head_name(model)
    linears = [name for name in linears if name.startswith(text) or name == head]
    if config.targets == ALL_LINEAR:
        mistaken = {head, *find_expert_names(model, linears), *find_uncalled(model, linears)}
        mistaken |= {name for name in computed if has_own_forward(model.get_submodule(name))}
        names = [name for name in linears if name not in mistaken]
    else:
        if ALL_LINEAR in config.targets and not isinstance(config.targets, str):
            raise TargetError(_not_alone(config.targets, linears))
        try:
            names = _match_all("adapt", config.targets, linears)
        except TargetError as error:
            raise TargetError(f"{error}{describe_experts(model)}") from None
    if config.exclude:
        excluded = set(_match_all("exclude", config.exclude, linears))
        names = [name for name in names if name not in excluded]
    _refuse_computed_weights(model, [name for name in names if name in computed])
    refuse_expert_names(model, names)
    _refuse_uncalled(model, names)
    if config.layers is not None:
        _check_layers(config.layers, names)
        names = [name for name in names if _block_number(name) in config.layers]
    for what, pattern in (("rank", config.rank_pattern), ("alpha", config.alpha_pattern)):
        if pattern:
            _match_all(f"set the {what} of", tuple(pattern), names)
    if not names:
        raise TargetError(
            f"Cannot adapt this {type(model).__name__} with targets={config.targets!r}, "
            f"exclude={config.exclude!r}, layers={config.layers!r}: no linear layer is left. "
            f"{_list_linears(linears)} Select at least one of them."
        )
    refuse_shared(model, names)
    return names


def find_saved(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Return the full names of the modules that `config` trains fully (`modules_to_save`).

    Raises TargetError for a name that matches none with parameters.
    """
    modules = [n for n, m in model.named_modules() if n and any(True for _ in m.parameters())]
    saved: list[str] = []
    for wanted in config.modules_to_save:
        found = [name for name in modules if matches(name, wanted)]
        if not found:
            with_weights = {n.rpartition(".")[0] for n, _ in model.named_parameters()}
            near = did_you_mean(wanted, {n.rpartition(".")[2] for n in with_weights})
            raise TargetError(
                f"Cannot train {wanted!r} fully (modules_to_save): this {type(model).__name__} has "
                f"no module with parameters of this name.{near} Name one such as an embedding."
            )
        saved += [name for name in found if name not in saved]
    return saved


def check_saved(model: nn.Module, saved: list[str], adapted: list[str]) -> None:
    """Raise TargetError for quantised `saved` modules, or that hold others or `adapted` ones."""
    _refuse_quantised(model, saved)
    for outer in saved:
        both = [name for name in adapted if name == outer or name.startswith(outer + ".")]
        if both:
            raise TargetError(
                f"Cannot adapt {both[0]!r}: it is both a LoRA target and in modules_to_save "
                f"({outer!r}). A layer trains either fully or through LoRA: remove it from one."
            )
        nested = [name for name in saved if name.startswith(outer + ".")]
        if nested:
            raise TargetError(
                f"Cannot train both {nested[0]!r} and {outer!r} fully (modules_to_save): the "
                "second contains the first. Name one of the two."
            )


def _refuse_quantised(model: nn.Module, saved: list[str]) -> None:
    for name in saved:
        kind = base_kind(model.get_submodule(name))
        if kind is not None:
            raise TargetError(
                f"Cannot train {name!r} fully (modules_to_save): its weights are stored in {kind}, "
                f"which cannot train. Adapt it through LoRA, or load the base without {kind}."
            )


def text_part(model: nn.Module) -> str:
    """Return how the names of the language model in a multimodal one begin; "" for all others."""
    network = transformers_network(model) if isinstance(model, LanguageModel) else None
    if network is None or network.config.get_text_config() is network.config:
        return ""
    text = network.get_decoder()
    return next((f"{name}." for name, module in model.named_modules() if module is text), "")


def matches(name: str, target: str) -> bool:
    """Whether `target` is the full `name` or its ending after a dot."""
    return name == target or name.endswith("." + target)


def _match_all(verb: str, targets: str | tuple[str, ...], linears: list[str]) -> list[str]:
    """Return the names that `targets` match. Raises TargetError that says what cannot be done."""
    if isinstance(targets, str) and not _PLAIN_NAME.fullmatch(targets):
        matcher = NameMatcher()
        found = {name for name in linears if matcher.fullmatch(targets, name)}
        if not found:
            raise _no_match(verb, targets, linears)
        return [name for name in linears if name in found]
    found = set()
    for target in (targets,) if isinstance(targets, str) else targets:
        matched = {name for name in linears if matches(name, target)}
        if not matched:
            raise _no_match(verb, target, linears)
        found |= matched
    return [name for name in linears if name in found]


def _no_match(verb: str, target: str, linears: list[str]) -> TargetError:
    is_name = _PLAIN_NAME.fullmatch(target) is not None
    seen = "no linear layer has this name" if is_name else "it matches no linear layer's full name"
    near = _fused_hint(target, linears) or did_you_mean(
        target.rpartition(".")[2], _endings(linears)
    )
    advice = f' targets="{ALL_LINEAR}" adapts all of them.' if verb == "adapt" else ""
    return TargetError(f"Cannot {verb} {target!r}: {seen}. {_list_linears(linears)}{near}{advice}")


def _not_alone(targets: tuple[str, ...], linears: list[str]) -> str:
    others = ", ".join(repr(name) for name in targets if name != ALL_LINEAR)
    where = f"beside {others}" if others else "in a list"
    return (
        f"Cannot adapt {ALL_LINEAR!r} {where}: it stands alone, as a "
        f"string, for all linears but the output head. {_list_linears(linears)} Name those to "
        f"adapt one by one, or use targets={ALL_LINEAR!r}."
    )


def _fused_hint(target: str, linears: list[str]) -> str:
    """Return which linear here has the target as a part of it, in words; "" if none has."""
    ending = target.rpartition(".")[2]
    for parts, wholes, what in _FUSED:
        whole = next((name for name in wholes if name in _endings(linears)), None)
        if ending in parts and whole is not None:
            return f" {what} are one linear here: adapt {whole!r}."
    return ""


_FUSED = (
    (
        ("q_proj", "k_proj", "v_proj"),
        ("qkv_proj", "query_key_value", "c_attn", "Wqkv"),
        "Queries, keys and values",
    ),
    (("gate_proj", "up_proj"), ("gate_up_proj",), "Gate and up"),
)
"""Linears of Llama, and what other architectures have in place of several of them."""


def _endings(names: list[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _list_linears(linears: list[str]) -> str:
    if not linears:
        return "The model has no linear layers inside that LoRA can wrap."
    return f"Linear layers here: {', '.join(_endings(linears))}."


def _check_layers(layers: tuple[int, ...], names: list[str]) -> None:
    blocks = sorted({number for number in map(_block_number, names) if number is not None})
    missing = [number for number in layers if number not in blocks]
    if missing:
        allowed = f"{blocks[0]} to {blocks[-1]}" if blocks else "none, no block has a number"
        raise TargetError(
            f"Cannot limit LoRA to layers={layers!r}: no selected linear is in block {missing[0]}. "
            f"Allowed: {allowed}. Change layers, or leave it out to adapt every block."
        )


def _refuse_computed_weights(model: nn.Module, names: list[str]) -> None:
    if not names:
        return
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    module = model.get_submodule(names[0])
    kind, why = type(module).__name__, "its weight is quantised or computed"
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        why += ", or it has a forward of its own"
    raise TargetError(
        f"Cannot adapt {names[0]!r}{more}, a {kind}: {why}. "
        "Allowed: plain linears. Load the base without quantisation (GGUF files are dequantised "
        "when lora reads them), or leave these layers out (exclude)."
    )


def _refuse_uncalled(model: nn.Module, names: list[str]) -> None:
    uncalled = find_uncalled(model, names)
    if uncalled:
        more = f" and {len(uncalled) - 1} more" if len(uncalled) > 1 else ""
        owner = type(model.get_submodule(uncalled[0].rpartition(".")[0])).__name__
        raise TargetError(
            f"Cannot adapt {uncalled[0]!r}{more}: {owner} reads its weight without calling the "
            "layer, so that LoRA would have no effect. Leave these out (exclude), or use "
            f'targets="{ALL_LINEAR}", which does.'
        )


def refuse_shared(model: nn.Module, names: list[str]) -> None:
    """Raise TargetError for a module with two names: it would be adapted under the first only."""
    chosen = {id(model.get_submodule(name)): name for name in names}
    for name, module in model.named_modules(remove_duplicate=False):
        first = chosen.get(id(module), name)
        if first != name:
            raise TargetError(
                f"Cannot adapt {first!r}: it is the same module as {name!r}. Leave it out of the "
                "targets (exclude), or give each name a module of its own."
            )


def _block_number(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
