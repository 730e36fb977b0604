"""Which layers of a model LoRA goes to: by name ending, full name, pattern, or all linears."""

from __future__ import annotations

import re
from typing import Protocol, runtime_checkable

from torch import nn

from lora.config import LoRAConfig
from lora.errors import TargetError, did_you_mean
from lora.layers.build import has_computed_weight, is_adaptable

ALL_LINEAR = "all-linear"

_PLAIN_NAME = re.compile(r"[\w.-]+")


@runtime_checkable
class HasOutputHead(Protocol):
    """A language model that knows its output head: transformers' models, our decoders."""

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the linear that makes logits, or None."""


def output_head_name(model: nn.Module) -> str | None:
    """Return the full name of the linear that makes logits, if the model says which it is."""
    if not isinstance(model, HasOutputHead):
        return None
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None)


def find_targets(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Return the full names of the layers that `config` takes in, in the model's order.

    Raises TargetError for a name, pattern or exclusion that matches nothing, and for quantised
    layers among them.
    """
    computed = [
        name for name, module in model.named_modules() if name and has_computed_weight(module)
    ]
    linears = [name for name, module in model.named_modules() if name and is_adaptable(module)]
    linears += computed  # which are refused below, unless they are left out
    if config.targets == ALL_LINEAR:
        head = output_head_name(model)
        names = [name for name in linears if name != head]
    else:
        names = _match_all(config.targets, linears, "target")
    if config.exclude:
        excluded = set(_match_all(config.exclude, linears, "excluded name"))
        names = [name for name in names if name not in excluded]
    _refuse_computed_weights(model, [name for name in names if name in computed])
    if config.layers is not None:
        _check_layers(config.layers, names)
        names = [name for name in names if _block_number(name) in config.layers]
    for pattern in (config.rank_pattern, config.alpha_pattern):
        if pattern:
            _match_all(tuple(pattern), names, "pattern")
    if not names:
        raise TargetError(
            f"LoRA was asked for targets={config.targets!r}, exclude={config.exclude!r}, "
            f"layers={config.layers!r}: no linear layer of this {type(model).__name__} is left. "
            f"{_endings(linears)} Name at least one of them."
        )
    _refuse_shared(model, names)
    return names


def matches(name: str, target: str) -> bool:
    """Whether `target` is the full `name` or its ending after a dot."""
    return name == target or name.endswith("." + target)


def _match_all(targets: str | tuple[str, ...], linears: list[str], what: str) -> list[str]:
    if isinstance(targets, str) and not _PLAIN_NAME.fullmatch(targets):
        found = {name for name in linears if re.fullmatch(targets, name)}
        if not found:
            raise _no_match(what, targets, linears)
        return [name for name in linears if name in found]
    found = set()
    for target in (targets,) if isinstance(targets, str) else targets:
        matched = {name for name in linears if matches(name, target)}
        if not matched:
            raise _no_match(what, target, linears)
        found |= matched
    return [name for name in linears if name in found]


def _no_match(what: str, target: str, linears: list[str]) -> TargetError:
    endings = sorted({name.rpartition(".")[2] for name in linears})
    near = did_you_mean(target.rpartition(".")[2], endings)
    return TargetError(
        f"{what} {target!r} matches no linear layer. {_endings(linears)}{near} "
        f"Pass targets={ALL_LINEAR!r} to adapt all of them."
    )


def _endings(linears: list[str]) -> str:
    endings = sorted({name.rpartition(".")[2] for name in linears})
    if not endings:
        return "The model has no linear layers inside that LoRA can wrap."
    return f"The model's linear layers end in: {', '.join(endings)}."


def _check_layers(layers: tuple[int, ...], names: list[str]) -> None:
    blocks = sorted({number for number in map(_block_number, names) if number is not None})
    missing = [number for number in layers if number not in blocks]
    if missing:
        seen = f"numbers {blocks[0]} to {blocks[-1]}" if blocks else "no numbered blocks"
        raise TargetError(
            f"layers={layers!r} was asked for, and the layers to choose from have {seen}: "
            f"{missing[0]} is not among them. Change layers."
        )


def _refuse_computed_weights(model: nn.Module, names: list[str]) -> None:
    if not names:
        return
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    kind = type(model.get_submodule(names[0])).__name__
    raise TargetError(
        f"LoRA was asked for {names[0]!r}{more}, a {kind}: its weight is quantised or computed, "
        "and plain linears are needed. Load the base without quantisation (GGUF files are "
        "dequantised when lora reads them), or leave these layers out (exclude)."
    )


def _refuse_shared(model: nn.Module, names: list[str]) -> None:
    """One module under two names would be adapted under the first only."""
    chosen = {id(model.get_submodule(name)): name for name in names}
    for name, module in model.named_modules(remove_duplicate=False):
        first = chosen.get(id(module), name)
        if first != name:
            raise TargetError(
                f"LoRA was asked for {first!r}, which is the same module as {name!r}. "
                "Leave it out of the targets (exclude), or give each place a module of its own."
            )


def _block_number(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
