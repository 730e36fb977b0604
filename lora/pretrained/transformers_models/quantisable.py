"""Which linears of a transformers' model can be quantised, and why the others stay as they are.

Those of the text part's blocks alone: the head stays, as with bitsandbytes, and so do projections
beside the blocks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lora.layers.build import has_own_forward, is_adaptable
from lora.layers.conv1d import is_conv1d
from lora.layers.uncalled import find_weights_read
from lora.pretrained.transformers_models.config import Traits
from lora.pretrained.transformers_models.model import TransformersModel

ROUTERS = ("gate", "router", "router_gate", "modality_router")
"""Last parts of the names of linears that choose experts: a rounded score takes another one."""
_READ = "the model's code reads the weight itself"
_ROUTER = "chooses experts"
_EXPERTS = "experts, which are no linear layers"


@dataclass(frozen=True)
class QuantisableLinears:
    """The linears of a model's blocks, parted into those that can be quantised and others."""

    names: tuple[str, ...]
    plain: dict[str, str] = field(default_factory=dict)
    """Why a linear, or another tensor of weights, stays in the compute dtype; by its name."""
    plain_fraction: float = 0.0
    """Of the blocks' parameters, those in `plain`."""

    def describe(self) -> str:
        """Return what stays plain in one line, "" if nothing does; names of one kind once."""
        why: dict[str, Counter[str]] = {}
        for name, reason in self.plain.items():
            why.setdefault(reason, Counter())[name.rpartition(".")[2]] += 1
        parts = [
            f"{', '.join(sorted(ends))} ({_counted(sum(ends.values()))}: {reason})"
            for reason, ends in why.items()
        ]
        if not parts:
            return ""
        return f"{'; '.join(parts)}: {100 * self.plain_fraction:.0f}% of the blocks' parameters"


def find_quantisable(theirs: Any) -> QuantisableLinears:
    """Return which linears of transformers' model `theirs` can be quantised, in its order."""
    blocks = TransformersModel(theirs, Traits()).blocks()
    inside = set(blocks.modules())
    modules = {name: module for name, module in theirs.named_modules() if module in inside}
    linears = {name: module for name, module in modules.items() if is_adaptable(module)}
    plain = dict.fromkeys(find_weights_read(theirs, linears), _READ)
    wide = {*(theirs._keep_in_fp32_modules or ()), *(theirs._keep_in_fp32_modules_strict or ())}
    for name, module in linears.items():
        parts = name.split(".")
        if _is_router(theirs, name):
            plain[name] = _ROUTER
        elif wide.intersection(parts):
            plain[name] = "transformers keeps it in fp32"
        elif inputs_of(module) % 2:
            plain[name] = f"an odd number of inputs, {inputs_of(module)}"
    names = tuple(name for name in linears if name not in plain)
    for name, module in modules.items():
        if has_own_forward(module):
            plain[name] = _ROUTER if _is_router(theirs, name) else "no plain linear layer"
        elif name not in linears:
            stacked = [n for n, p in module.named_parameters(recurse=False) if p.dim() > 2]
            experts = stacked if "Experts" in type(module).__name__ else []
            plain |= {f"{name}.{tensor}": _EXPERTS for tensor in experts}
    total = sum(p.numel() for p in blocks.parameters())
    return QuantisableLinears(names, plain, _size_of(theirs, plain) / max(1, total))


def inputs_of(linear: nn.Module) -> int:
    """Return I of a linear, or of a Conv1D, whose weight is (I, O)."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0 if is_conv1d(linear) else 1]


def _counted(n_tensors: int) -> str:
    return "1 tensor" if n_tensors == 1 else f"{n_tensors} tensors"


def _is_router(theirs: Any, name: str) -> bool:
    owner, _, own = name.rpartition(".")
    return own in ROUTERS or "Router" in type(theirs.get_submodule(owner)).__name__


def _size_of(theirs: Any, names: dict[str, str]) -> int:
    """Return the parameters of modules, and of tensors, called `names`."""
    return sum(
        parameter.numel()
        for name, parameter in theirs.named_parameters()
        if name in names or name.rpartition(".")[0] in names
    )
