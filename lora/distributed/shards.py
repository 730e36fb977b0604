"""Weights that are split over processes by rows: read by rows, read whole by rank 0, and restored.

No process ever holds a whole model: rank 0 reads one tensor after the other, part by part, and
writes the file that one process would have written.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lora.decoder.quantised.base import PackedRows, QuantisedWeight
from lora.device import Share
from lora.distributed.world import World
from lora.runs.tensor_files import TensorParts

Rows = Callable[[str, slice], Tensor]
"""(a parameter's full name, rows along its first dimension) -> those rows, on the CPU.

In any floating-point dtype, or codes of a weight that the files have packed, with the buffers that
its scales are; the tensor is the caller's own.
"""
ALL_ROWS = slice(None)
MAX_PART_BYTES = 2**26
"""Of a tensor that travels between processes at once."""

ValueT = TypeVar("ValueT")


def shard_of(count: int, share: Share) -> slice:
    """Return which of `count` rows a process stores, as FSDP2 splits them (torch.chunk).

    All shards but the last ones have one size; these may be empty.
    """
    each = share.largest(count)
    return slice(min(share.rank * each, count), min((share.rank + 1) * each, count))


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's rows of a sharded tensor, a view; any other tensor as it is."""
    loaded = sys.modules.get("torch.distributed.tensor")
    if loaded is not None and isinstance(tensor, loaded.DTensor):
        local: Tensor = tensor.to_local()
        return local
    return tensor


def gather_shards(whole: Tensor, own: Tensor, world: World, what: str) -> None:
    """Changes `whole` (N · n,) in place: every process's `own` (n,), in order of rank.

    Both are contiguous. `what` is waited for, in words; on a GPU the host does not wait.
    """
    if world.is_alone:
        whole.copy_(own)
        return
    try:
        from torch.distributed import all_gather_single as gather
    except ImportError:  # its name before torch 2.13
        from torch.distributed import all_gather_into_tensor as gather
    with world.waits(what):
        gather(whole, own, group=world.device_group)


def read_packed(
    module: QuantisedWeight, name: str, part: slice, rows: Rows, like: Tensor
) -> PackedRows:
    """Return `part` of the rows of a quantised weight, which is called `name`.

    Quantised here from values that were rounded to the dtype of `like`, as the whole weight would
    be; or as the files have them. They come to the device of `like`. Raises ModelError if a value
    is not finite.
    """
    if module.comes_packed:
        codes = rows(name, part).to(like.device)
        return PackedRows(codes, like.new_empty(0, dtype=torch.float32), 0)
    values = rows(name, module.rows_to_read(part)).to(like)
    return module.quantise_rows(values, part, name)


def set_whole_scales(
    module: QuantisedWeight,
    name: str,
    own: Sequence[PackedRows],
    rows: Rows,
    device: torch.device,
    world: World,
) -> None:
    """Changes `module`, whose weight is called `name`, in place: it gets the scales of all rows.

    `own` are the rows that this process has read. Called by all processes for the same weight.
    """
    if module.comes_packed:
        for key in module.packed_names:
            buffer = rows(f"{name.removesuffix('weight')}{key}", ALL_ROWS)
            setattr(module, key, buffer.to(device))
        return
    whole = torch.zeros(module.n_scales, device=device)
    for part in own:
        whole[part.first_scale : part.first_scale + len(part.scales)] = part.scales
    world.sum(whole, "the scales of quantised weights")  # a process has zeros for others' rows
    module.set_scales(whole)


@contextmanager
def gathered_tables(model: nn.Module) -> Iterator[None]:
    """Within the block every process has the embedding and the head of a model of FSDP2 whole.

    All processes of the model enter it. Other models stay as they are.
    """
    if not _has_fsdp(model):
        yield
        return
    cast(Any, model).unshard()
    try:
        yield
    finally:
        let_go_tables(model)


def let_go_tables(model: nn.Module) -> None:
    """Changes a model of FSDP2 in place: its parameters are shards again, all of them.

    A forward pass that no backward pass follows leaves embedding and head whole: of the weights
    that they had then. Other models stay as they are.
    """
    if _has_fsdp(model):
        cast(Any, model).reshard()


def _has_fsdp(model: nn.Module) -> bool:
    loaded = sys.modules.get("torch.distributed.fsdp")  # its import takes longer than a second
    return loaded is not None and isinstance(model, loaded.FSDPModule)


class ShardReader:
    """Lets rank 0 read sharded tensors whole, in any order, while the others send their rows.

    Args:
        own: by name, this process's rows, in its memory; all processes have the same names.
        n_rows: of the whole tensors.
        world: the processes.
    """

    def __init__(self, own: Mapping[str, Tensor], n_rows: Mapping[str, int], world: World) -> None:
        self._own, self._n_rows, self._world = own, n_rows, world
        self._sent: Iterator[Tensor] = iter(())

    @classmethod
    def of_model(cls, model: nn.Module, world: World) -> ShardReader:
        """Return the reader of all parameters of a sharded model, by their names."""
        let_go_tables(model)
        named = dict(model.named_parameters())
        own = {name: local_part(parameter).detach() for name, parameter in named.items()}
        return cls(own, {name: len(parameter) for name, parameter in named.items()}, world)

    def whole(self, name: str) -> ShardedParts:
        """Return the tensor `name` as a file's writer takes it."""
        own = self._own[name]
        shape = (self._n_rows[name], *own.shape[1:])
        return ShardedParts(own.dtype, shape, lambda: self.read(name), self)

    def on_main(self, function: Callable[[], ValueT], what: str) -> ValueT:
        """Return what `function` returns on rank 0, which alone calls it and reads tensors in it.

        An error that lora raises on purpose is raised on every rank.
        """
        world = self._world

        def read() -> ValueT:
            try:
                return function()
            finally:
                self._end_tensor()
                world.from_main(None, what)

        if not world.is_main:
            while (name := world.from_main(None, what)) is not None:
                for _ in self._exchange(name):
                    pass
        return world.on_main(read, what)

    def read(self, name: str) -> Iterator[Tensor]:
        """Yield the tensor's rows in order, on rank 0 within `on_main`."""
        self._end_tensor()
        self._world.from_main(name, "the next tensor to save")
        self._sent = self._exchange(name)
        while (part := next(self._sent, None)) is not None:  # if the reader stops, the rest arrives
            yield part

    def _end_tensor(self) -> None:
        """Receive what was not read of a tensor: the others send all of it."""
        for _ in self._sent:
            pass

    @torch.no_grad()
    def _exchange(self, name: str) -> Iterator[Tensor]:
        own, count, world = self._own[name].detach(), self._n_rows[name], self._world
        for rank in range(world.size):
            rows = shard_of(count, Share(rank, world.size))
            for part in _parts(rows, own):
                if rank == world.rank:
                    sent = own[part.start - rows.start : part.stop - rows.start].contiguous()
                else:
                    sent = own.new_empty(part.stop - part.start, *own.shape[1:])
                world.broadcast(_as_bytes(sent), f"rows of {name}", rank)
                yield sent


@dataclass(frozen=True)
class ShardedParts(TensorParts):
    """A tensor of which every process has some rows; its parts are for rank 0."""

    reader: ShardReader


def on_main_with(
    tensors: Iterable[object], world: World, function: Callable[[], ValueT], what: str
) -> ValueT:
    """Return `world.on_main(function, what)`; `function` may read those of `tensors` that are
    sharded."""
    for tensor in tensors:
        if isinstance(tensor, ShardedParts):
            return tensor.reader.on_main(function, what)
    return world.on_main(function, what)


@torch.no_grad()
def scatter_rows(whole: Tensor | None, own: Tensor, n_rows: int, world: World, what: str) -> None:
    """Changes `own` in place: it becomes this process's rows of rank 0's `whole` (n_rows, …)."""
    rows = shard_of(n_rows, world.share)
    for part in _parts(slice(0, n_rows), own):
        sent = own.new_empty(part.stop - part.start, *own.shape[1:])
        if whole is not None:
            sent.copy_(whole[part])
        world.broadcast(_as_bytes(sent), what)
        start, stop = max(part.start, rows.start), min(part.stop, rows.stop)
        if start < stop:
            own[start - rows.start : stop - rows.start] = sent[
                start - part.start : stop - part.start
            ]


def _parts(rows: slice, like: Tensor) -> Iterator[slice]:
    """Yield `rows` cut into pieces of at most MAX_PART_BYTES of tensors like this."""
    row_bytes = max(1, math.prod(like.shape[1:]) * like.itemsize)
    step = max(1, MAX_PART_BYTES // row_bytes)
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)  # gloo does not know every dtype
