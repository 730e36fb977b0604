"""Tensors of several processes: gradients are summed, and what rank 0 has is sent to the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lora.distributed.world import World

MAX_BUCKET_BYTES = 2**25
"""Of small gradients that travel together: enough for a network's full rate, and no second copy of
all gradients. A larger gradient travels alone, from where it lies."""


_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of a number."""


@torch.no_grad()
def sum_gradients(
    parameters: Sequence[nn.Parameter], totals: Tensor, world: World, what: str
) -> Tensor:
    """Changes the gradients of `parameters` in place: they become the sums over all processes.

    Returns the sums of `totals` (n,). A parameter that has a gradient in some of the processes gets
    one in all; one that has none anywhere keeps None, as in one process.
    """
    has_gradient = totals.new_tensor([p.grad is not None for p in parameters])
    sums = torch.cat((totals, has_gradient))
    world.sum(sums, what)
    with world.waits(what):  # on a GPU the host waits here, not where the sum was queued
        counts = sums[len(totals) :].tolist()
    gradients = []
    for parameter, count in zip(parameters, counts, strict=True):
        if count:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            world.sum(bucket[0], what)
            continue
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        world.sum(flat, what)
        parts = flat.split([gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view(gradient.shape))
    return sums[: len(totals)]


def broadcast_tensors(tensors: Mapping[str, Tensor], world: World, what: str) -> dict[str, Tensor]:
    """Return the tensors of rank 0, on the CPU in the other processes, whose own are not used."""
    if world.is_alone:
        return dict(tensors)
    kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    received = {}
    for name, (dtype, shape) in world.from_main(kinds, what).items():
        own = tensors[name].contiguous() if world.is_main else torch.empty(shape, dtype=dtype)
        # As bytes: gloo does not know every dtype.
        world.broadcast(own.reshape(-1).view(torch.uint8), what)
        received[name] = own
    return received


@torch.no_grad()
def broadcast_trained(model: nn.Module, world: World, what: str) -> None:
    """Changes `model` in place: what trains becomes that of rank 0."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            world.broadcast(parameter.data, what)


@torch.no_grad()
def ranks_that_differ(tensors: Iterable[Tensor], world: World, what: str) -> list[int]:
    """Return the ranks whose `tensors` have other bits than rank 0's."""
    if world.is_alone:
        return []
    # Sums of the bits as integers: exact in any order, which those of numbers are not.
    sums = [t.detach().contiguous().view(_INTEGER[t.element_size()]).sum() for t in tensors]
    # The host waits once for the device, not for every tensor.
    of_all = world.gather(torch.stack(sums).tolist() if sums else [], what)
    return [rank for rank, of_rank in enumerate(of_all) if of_rank != of_all[0]]


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the gradients in order, neighbours of one dtype together up to MAX_BUCKET_BYTES."""
    bucket: list[Tensor] = []
    n_bytes = 0
    for gradient in gradients:
        fits = n_bytes + gradient.nbytes <= MAX_BUCKET_BYTES
        if bucket and not (fits and gradient.dtype == bucket[0].dtype):
            yield bucket
            bucket, n_bytes = [], 0
        bucket.append(gradient)
        n_bytes += gradient.nbytes
    if bucket:
        yield bucket
