"""The frozen weights of a sharded model: where they come from, and filling this process's shard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora.decoder.decoder import Decoder
from lora.decoder.quantised.fp8 import Fp8Weight
from lora.device import Share
from lora.distributed.shards import Rows, gather_shards
from lora.distributed.world import ALONE, World
from lora.errors import ModelError
from lora.fast.sharded.layout import ShardedMatrix

READ_BYTES = 2**27
"""Rows that are read at once, so that a shard is filled without a second one beside it."""


@dataclass(frozen=True)
class ShardedBase:
    """What the sharded step needs of a model whose frozen parameters are on the meta device."""

    rows: Rows
    """Reads rows of the frozen parameters."""
    device: torch.device
    """Of this process."""
    world: World = ALONE
    share: Share | None = None
    """Among how many processes; None: those of `world`. For plans, which have no processes."""

    @property
    def split(self) -> Share:
        """How the weights are split."""
        return self.share or self.world.share


def planned_base(size: int) -> ShardedBase:
    """Return a base without values, for sizes: as the first of `size` processes holds it."""
    return ShardedBase(_no_rows, torch.device("meta"), share=Share(0, size))


def _no_rows(name: str, rows: slice) -> Tensor:
    raise ModelError(f"Cannot read {name}: this model was made to be planned, not trained.")


def load_small(model: Decoder, base: ShardedBase, dtype: torch.dtype) -> None:
    """Changes `model` in place: norms and biases, which every process holds whole, are read."""

    def read() -> None:
        for name, parameter in list(model.named_parameters()):
            if parameter.is_meta and parameter.ndim == 1:
                owner, _, leaf = name.rpartition(".")
                values = base.rows(name, slice(0, len(parameter)))
                values = values.to(device=base.device, dtype=dtype)
                own = nn.Parameter(values, requires_grad=False)
                setattr(model.get_submodule(owner), leaf, own)

    if base.device.type != "meta":
        base.world.on_all(read, "the norms of all processes")


def fill_part(matrix: ShardedMatrix, unit: int, shard: Tensor, base: ShardedBase) -> None:
    """Changes `shard`, the unit's bytes of this process, in place: its rows of W."""
    own = matrix.own_part(shard)[:, : matrix.inputs]
    for name, rows, target in _reads(matrix, unit):
        own[target].copy_(base.rows(name, rows))


def fill_fp8_part(
    matrix: ShardedMatrix,
    unit: int,
    shard: Tensor,
    base: ShardedBase,
    dtype: torch.dtype,
    scales: Tensor,
) -> None:
    """The same with codes; `scales` (rows, 1), of this process, become theirs.

    Values are rounded to `dtype` first, as those of an unsharded model are. Raises ModelError if
    one is not finite.
    """
    own = matrix.own_part(shard)
    for name, rows, target in _reads(matrix, unit):
        values = base.rows(name, rows).to(device=base.device, dtype=dtype)
        # Rows are quantised one by one, so that a part of them gets the codes of the whole.
        own[target], scales[target] = Fp8Weight.quantise_finite(values, name, first_row=rows.start)


def _reads(matrix: ShardedMatrix, unit: int) -> Iterator[tuple[str, slice, slice]]:
    """Yield a parameter's name, its rows to read, and which of this process's rows they are."""
    own, at_once = matrix.own_rows, max(1, READ_BYTES // max(1, 4 * matrix.inputs))
    for name, rows in matrix.sources[unit]:
        start, stop = max(own.start, rows.start), min(own.stop, rows.stop)
        for begin in range(start, stop, at_once):
            end = min(begin + at_once, stop)
            here = slice(begin - rows.start, end - rows.start)
            yield name, here, slice(begin - own.start, end - own.start)


def gather_scales(matrix: ShardedMatrix, own: Tensor, base: ShardedBase) -> Tensor:
    """Return the scales (L, O, 1) of all processes; `own` (L, rows, 1) are this one's, padded."""
    world = base.world
    whole = own.new_empty(world.size, *own.shape)  # (N, L, rows, 1)
    gather_shards(whole.view(-1), own.view(-1), world, "the scales of fp8 weights")
    return whole.transpose(0, 1).flatten(1, 2)[:, : matrix.outputs].contiguous()  # (L, O, 1)
