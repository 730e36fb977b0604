"""Read and write PEFT's `adapter_config.json`: what changes the result is honoured or refused.

Source of the format and of its rules for matching names: PEFT's LoraConfig, version 0.21. The rules
differ from ours in details, so they are followed here exactly, and what is written is checked
against them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lora.adapters.apply import AppliedLoRA, lora_layers
from lora.adapters.experts import find_expert_names
from lora.adapters.patterns import NameMatcher
from lora.adapters.peft_fields import ANY_LAYER, AT_END, IN_LAYERS, IN_SAVED, check_fields
from lora.adapters.targets import ALL_LINEAR, matches, output_head_name
from lora.config import LoRAConfig
from lora.errors import AdapterError, TargetError, did_you_mean
from lora.layers.build import is_adaptable
from lora.layers.conv1d import LoRAConv1D
from lora.layers.token_tables import find_token_tables
from lora.lora_module import LoRALayer

_HEADS_OF_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Names that PEFT adds to modules_to_save, whichever the model has."""
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


@dataclass(frozen=True)
class PeftDescription:
    """The fields of `adapter_config.json` that change what an adapter computes."""

    rank: int
    alpha: float
    dropout: float
    rslora: bool
    targets: str | tuple[str, ...]
    """Name endings, or one regular expression for full names, or "all-linear"."""
    saved: tuple[str, ...] = ()
    """`modules_to_save`: names of fully trained modules."""
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    """The block numbers that targets given by name ending are limited to; empty means all."""
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    task: str | None = None
    """task_type."""
    ties: bool = False
    """ensure_weight_tying: tied tables that train share what they train."""
    matcher: NameMatcher = field(default_factory=NameMatcher, compare=False, repr=False)
    """Raises TargetError, as do all methods, when patterns take too long."""

    def takes(self, name: str) -> bool:
        """Whether PEFT adapts the module called `name`; not for "all-linear"."""
        if isinstance(self.exclude, str):
            excluded = self.matcher.fullmatch(self.exclude, name)
        else:
            excluded = any(matches(name, ending) for ending in self.exclude)
        find = self.matcher.match
        inside = any(find(IN_SAVED.format(saved), name) is not None for saved in self.saved)
        if excluded or inside:
            return False
        if isinstance(self.targets, str):
            return self.matcher.fullmatch(self.targets, name)
        if name in self.targets:
            return True  # PEFT does not apply `layers` to full names
        return any(matches(name, ending) for ending in self.targets) and self._in_layers(name)

    def _in_layers(self, name: str) -> bool:
        found = None
        patterns = [IN_LAYERS.format(word) for word in self.layers_pattern] or [ANY_LAYER]
        for pattern in patterns:
            found = found or self.matcher.match(pattern, name)
        number = (found[0] or "") if found else ""  # a pattern with groups may find no number
        return not self.layers or (number.isdecimal() and int(number) in self.layers)

    def saves(self, name: str) -> bool:
        """Whether PEFT trains the module called `name` fully (`modules_to_save`)."""
        return any(f"base_model.model.{name}".endswith(ending) for ending in self.saved)

    def rank_of(self, name: str) -> int:
        return _of_name(name, self.rank_pattern, self.rank, self.matcher)

    def alpha_of(self, name: str) -> float:
        return _of_name(name, self.alpha_pattern, self.alpha, self.matcher)

    def scaling_of(self, name: str) -> float:
        rank = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(rank) if self.rslora else rank)


def describe_adapter(
    model: nn.Module, applied: AppliedLoRA, base_name: str | None
) -> dict[str, Any]:
    """Return `adapter_config.json`'s content for the LoRA on `model`.

    Raises AdapterError if PEFT's rules cannot tell the adapted layers from the others.
    """
    return _to_dict(_describe(model, applied), model, base_name)


def read_description(
    described: dict[str, Any], model: nn.Module
) -> tuple[LoRAConfig | None, list[str]]:
    """Return the LoRAConfig that `described` means for `model` (adapted or not), and all faults.

    The config lists its layers by full name. It is None if there are faults.
    """
    description, faults = parse_description(described)
    if description is None:
        return None, faults
    try:
        names, saved, faults = find_described(model, description)
        config = build_config(description, names, saved) if names and not faults else None
    except TargetError as error:  # of patterns that take too long
        return None, [str(error)]
    return config, faults


def parse_description(values: dict[str, Any]) -> tuple[PeftDescription | None, list[str]]:
    """Return what `values` of `adapter_config.json` describe, or None and all faults."""
    faults = check_fields(values)
    if faults:
        return None, faults
    layers: Any = values.get("layers_to_transform")
    description = PeftDescription(
        rank=int(values["r"]),
        alpha=float(values["lora_alpha"]),
        dropout=float(values.get("lora_dropout") or 0.0),
        rslora=bool(values.get("use_rslora")),
        targets=_names(values["target_modules"]),
        saved=tuple(values.get("modules_to_save") or ()),
        exclude=_names(values.get("exclude_modules")),
        layers=(layers,) if isinstance(layers, int) else tuple(layers or ()),
        layers_pattern=_as_tuple(values.get("layers_pattern")),
        rank_pattern={k: int(v) for k, v in (values.get("rank_pattern") or {}).items()},
        task=values.get("task_type"),
        ties=bool(values.get("ensure_weight_tying")),
        alpha_pattern={k: float(v) for k, v in (values.get("alpha_pattern") or {}).items()},
    )
    return description, []


def find_described(
    model: nn.Module, description: PeftDescription
) -> tuple[list[str], list[str], list[str]]:
    """Return the names PEFT adapts in `model`, those of fully trained modules, and all faults."""
    modules = base_modules(model)
    linears = [n for n, m in modules.items() if isinstance(m, LoRALayer) or is_adaptable(m)]
    if description.targets == ALL_LINEAR:
        outside = replace(description, targets=r".*")
        head = output_head_name(model)
        names = [name for name in linears if name != head and outside.takes(name)]
    else:
        names = [name for name in modules if description.takes(name)]
    # Our decoder has modules without parameters where another family has a norm.
    saved = [n for n, m in modules.items() if description.saves(n) and has_state(m)]
    faults = (
        [] if names else [f"target_modules={description.targets!r} matches no layer of this model"]
    )
    for name in sorted(set(names) - set(linears)):
        kind = type(modules[name]).__name__
        faults.append(f"target {name!r} is of type {kind}, allowed are linear layers")
    faults += _wrong_ties(model, names + saved) if description.ties else []
    of_task = _HEADS_OF_TASK.get(str(description.task), ())
    for name in description.saved:
        if name in of_task and any(s.endswith(other) for s in saved for other in of_task):
            continue  # PEFT lists all names that such a head may have
        if not any(f"base_model.model.{module}".endswith(name) for module in modules):
            near = did_you_mean(name, {module.rpartition(".")[2] for module in modules})
            faults.append(f"modules_to_save={name!r} is no module of this model.{near}")
    return names, saved, faults


def _wrong_ties(model: nn.Module, trained: list[str]) -> list[str]:
    try:
        tables = find_token_tables(model)
    except TargetError:
        return []
    shared = [name for name in trained if tables.is_tied and name in tables.by_name]
    why = "the embedding and the head would share one trained copy"
    return [f"ensure_weight_tying=True with {', '.join(shared)}: {why}"] if shared else []


def build_config(description: PeftDescription, names: list[str], saved: list[str]) -> LoRAConfig:
    """Return the LoRAConfig for the layers `names` and the fully trained modules `saved`."""
    # LoRAConfig takes a name for an ending too, and the first match counts: a name that is the
    # ending of another must come after it, and the other must be listed.
    is_clear = not any(other != name and matches(other, name) for name in names for other in names)
    names_first = names if is_clear else sorted(names, key=lambda name: (-len(name), name))
    ranks = {name: description.rank_of(name) for name in names_first}
    alphas = {name: description.alpha_of(name) for name in names_first}
    rank, alpha = (description.rank, description.alpha) if is_clear else (None, None)
    return LoRAConfig(
        rank=description.rank,
        alpha=description.alpha,
        dropout=description.dropout,
        targets=tuple(names),
        modules_to_save=tuple(saved),
        rslora=description.rslora,
        rank_pattern={name: own for name, own in ranks.items() if own != rank},
        alpha_pattern={name: own for name, own in alphas.items() if own != alpha},
    )


def _describe(model: nn.Module, applied: AppliedLoRA) -> PeftDescription:
    """Return PEFT's description of the LoRA on `model`.

    Raises AdapterError if PEFT's rules cannot tell the adapted layers from the others.
    """
    layers, config = lora_layers(model), applied.config
    saved, modules = tuple(sorted(applied.originals)), base_modules(model)
    description = PeftDescription(
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        rslora=config.rslora,
        targets=_shortest(list(layers), [name for name in modules if name not in layers]),
        saved=saved,
        rank_pattern=_shortest_pattern({n: x.rank for n, x in layers.items()}, config.rank),
        alpha_pattern=_shortest_pattern({n: x.alpha for n, x in layers.items()}, config.alpha),
    )
    faults = find_expert_names(model, layers)
    faults += [n for n in modules if description.takes(n) != (n in layers)]
    with_state = [n for n, m in modules.items() if has_state(m)]
    faults += [n for n in with_state if description.saves(n) != (n in saved)]
    faults += [n for n in layers if not math.isclose(description.scaling_of(n), layers[n].scaling)]
    faults += [n for n in layers if description.rank_of(n) != layers[n].rank]
    if faults:
        raise AdapterError(
            f"Cannot save the adapter in PEFT's format: by its rules for names {faults[0]!r} would "
            "be taken for a layer of similar name, or not be found. Adapt other layers, or rename "
            "the model's modules."
        )
    return description


def _to_dict(
    description: PeftDescription, model: nn.Module, base_name: str | None
) -> dict[str, Any]:
    """Return `description` as the content of `adapter_config.json`."""
    transposed = any(isinstance(layer, LoRAConv1D) for layer in lora_layers(model).values())
    targets = description.targets
    return {
        "alpha_pattern": {k: _number(v) for k, v in description.alpha_pattern.items()},
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _number(description.alpha),
        "lora_dropout": description.dropout,
        "modules_to_save": list(description.saved) or None,
        "peft_type": "LORA",
        "r": description.rank,
        "rank_pattern": description.rank_pattern,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "task_type": _task_of(model),
        "use_dora": False,
        "use_rslora": description.rslora,
    }


def _task_of(model: nn.Module) -> str:
    """Return PEFT's task_type, by the name that transformers gives a class."""
    kind = type(model).__name__
    return next((t for ending, t in _TASKS.items() if kind.endswith(ending)), "CAUSAL_LM")


def has_state(module: nn.Module) -> bool:
    """Whether `module` has parameters or buffers that a file would hold."""
    return next(iter(module.state_dict()), None) is not None


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the submodules of `model` by name, except those inside LoRA layers."""
    inside = tuple(f"{name}." for name in lora_layers(model))
    return {n: m for n, m in model.named_modules() if n and not n.startswith(inside)}


def _shortest(names: list[str], others: Iterable[str]) -> str | tuple[str, ...]:
    """Return endings, full names or a pattern: the first that matches `names` and no `others`."""
    endings = tuple(sorted({name.rpartition(".")[2] for name in names}))
    for targets in (endings, tuple(sorted(names))):
        if not any(matches(other, target) for other in others for target in targets):
            return targets
    return "(?:" + "|".join(re.escape(name) for name in sorted(names)) + ")"


def _shortest_pattern(values: dict[str, Any], default: float) -> dict[str, Any]:
    """Return the values other than `default` by name ending if that is clear, else by full name."""
    by_ending = {name.rpartition(".")[2]: value for name, value in values.items()}
    for pattern in (by_ending, values):
        short = {key: pattern[key] for key in sorted(pattern) if pattern[key] != default}
        matcher = NameMatcher()
        if all(_of_name(name, short, default, matcher) == own for name, own in values.items()):
            return short
    # The first match counts, and PEFT and we write keys in alphabetical order: each key is tied to
    # its full name, so that the order is of no importance.
    return {f"^{name}": values[name] for name in sorted(values) if values[name] != default}


def _of_name(name: str, pattern: dict[str, Any], default: Any, matcher: NameMatcher) -> Any:
    found = (v for key, v in pattern.items() if matcher.match(AT_END.format(key), name) is not None)
    return next(found, default)


def _names(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value or ())


def _as_tuple(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value
