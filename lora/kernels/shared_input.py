"""Linears that read the same input, called together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn


class SharedInputLinear(nn.Module):
    """A linear that can be one operation with others of its kind."""

    def forward_all(self, layers: Sequence[SharedInputLinear], x: Tensor) -> list[Tensor]:
        """Return layer(x) for each of `layers`, of which this is the first."""
        raise NotImplementedError


def call_linears(x: Tensor, *linears: nn.Module) -> list[Tensor]:
    """Return linear(x) for each: as one operation on a CPU where they can be that.

    They are called one by one where somebody watches one by a hook, or autocast changes types.
    """
    first = linears[0]
    if isinstance(first, SharedInputLinear) and x.is_cpu and not torch.is_autocast_enabled("cpu"):
        are_alike = all(type(linear) is type(first) for linear in linears)
        if are_alike and not any(m._forward_hooks or m._forward_pre_hooks for m in linears):
            return first.forward_all(cast(Sequence[SharedInputLinear], linears), x)
    return [linear(x) for linear in linears]
