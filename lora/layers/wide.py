"""Whole modules that train in fp32 within a model of a narrower dtype (`modules_to_save`).

Their values are fp32 because a step of AdamW is often smaller than half a rounding in bf16. What
they compute keeps the dtype that it had, so that the modules around them need not know.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_MARK = "narrow_dtype"


def keep_outputs_narrow(model: nn.Module) -> torch.dtype | None:
    """Changes `model` in place, before whole modules that train in it become fp32.

    Their outputs keep the dtype that they have now. Returns it; None: nothing is narrow, or all of
    `model` trains, and becomes fp32 together.
    """
    if all(p.requires_grad for p in model.parameters()):
        return None
    found = None
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and all(p.requires_grad for p in own) and own[0].dtype.itemsize < 4:
            found = own[0].dtype
            if _MARK not in vars(module):
                module.register_forward_pre_hook(_widen)
                module.register_forward_hook(_narrow)
            setattr(module, _MARK, found)
    return found


def outside_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of what `module` computes: its parameters', or a narrower one."""
    owner = next(m for m in module.modules() if any(True for _ in m.parameters(recurse=False)))
    own = next(owner.parameters(recurse=False)).dtype
    narrow: torch.dtype = vars(owner).get(_MARK, own)
    return narrow if narrow.itemsize < own.itemsize else own  # the model was cast meanwhile


def _widen(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    own = next(module.parameters()).dtype
    return tuple(_cast(value, own) for value in inputs)


def _narrow(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    return _cast(output, outside_dtype(module))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    is_tensor = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if is_tensor else value
