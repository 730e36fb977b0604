"""Calling linears that read the same input as one operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn


class SharedInputLinear(nn.Module):
    """A linear that can be computed in one operation with others of its class."""

    def forward_all(self, layers: Sequence[SharedInputLinear], x: Tensor) -> list[Tensor]:
        """Return layer(x) for each of `layers`, of which this is the first."""
        raise NotImplementedError


def call_linears(x: Tensor, *linears: nn.Module) -> list[Tensor]:
    """Return linear(x) for each: on a CPU as one operation where that is possible."""
    first = linears[0]
    if isinstance(first, SharedInputLinear) and x.is_cpu and not torch.is_autocast_enabled("cpu"):
        # A hook must see its own linear called, and types may differ in what they compute.
        are_alike = all(type(linear) is type(first) for linear in linears)
        if are_alike and not any(m._forward_hooks or m._forward_pre_hooks for m in linears):
            return first.forward_all(cast(Sequence[SharedInputLinear], linears), x)
    return [linear(x) for linear in linears]
