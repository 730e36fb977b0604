"""The frozen weights of a sharded model: where they come from, and filling this process's shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora.decoder.decoder import Decoder
from lora.decoder.quantised.base import PackedRows, QuantisedWeight
from lora.device import Share
from lora.distributed.shards import Rows, read_packed
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
    for name, rows, target, _ in _reads(matrix, unit):
        own[target].copy_(base.rows(name, rows))


def fill_packed_part(
    matrix: ShardedMatrix,
    unit: int,
    shard: Tensor,
    base: ShardedBase,
    dtype: torch.dtype,
    modules: Sequence[QuantisedWeight],
) -> list[list[PackedRows]]:
    """The same with codes; `modules` are those of the unit's sources, in order.

    Returns for each of them what this process has of its scales. Values are rounded to `dtype`
    first, as those of an unsharded model are. Raises ModelError if one is not finite.
    """
    own, like = matrix.own_part(shard), torch.empty(0, dtype=dtype, device=base.device)
    found: list[list[PackedRows]] = [[] for _ in modules]
    for name, rows, target, index in _reads(matrix, unit):
        part = read_packed(modules[index], name, rows, base.rows, like)
        own[target] = part.codes
        found[index].append(replace(part, codes=part.codes.new_empty(0)))
    return found


def _reads(matrix: ShardedMatrix, unit: int) -> Iterator[tuple[str, slice, slice, int]]:
    """Yield a parameter's name, its rows to read, which of this process's rows they are, and the
    index of the parameter."""
    own, at_once = matrix.own_rows, max(1, READ_BYTES // max(1, 4 * matrix.inputs))
    for index, (name, rows) in enumerate(matrix.sources[unit]):
        start, stop = max(own.start, rows.start), min(own.stop, rows.stop)
        for begin in range(start, stop, at_once):
            end = min(begin + at_once, stop)
            here = slice(begin - rows.start, end - rows.start)
            yield name, here, slice(begin - own.start, end - own.start), index
