"""Finds where a loss or gradient that is not finite comes from: which sequence, which layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora.decoder.decoder import Decoder
from lora.distributed.shards import local_part
from lora.distributed.world import ALONE, World


@dataclass(frozen=True)
class Finding:
    """Where a value that is not finite appears first."""

    sentence: str
    sequences: tuple[tuple[int, int], ...] = ()
    """(micro-batch, index of the sequence in it), both from 0, where they are known."""
    is_of_data: bool = True
    """Whether the batch can have caused it: damaged weights are damaged whatever they read."""
    is_certain: bool = True
    """Whether it appeared again when the batch was run again."""


_NOTHING = Finding(
    "It did not appear again when the batch was run module by module.", is_certain=False
)
_ONLY_FORWARD = Finding(
    "The outputs of all modules are finite when the batch is run again, so it seems to begin in "
    "the backward pass, which sharded weights do not allow to be run module by module.",
    is_certain=False,
)


def find_nonfinite(
    model: nn.Module,
    batches: Sequence[Any],
    loss_fn: Callable[[nn.Module, Any], tuple[Tensor, Tensor]],
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    together: World = ALONE,
) -> Finding:
    """Return where NaN or infinity appears first when `batches` are run again.

    Checks the weights first, then each module's output in the order of computation, then the
    parameters' gradients. The model is left as it was, without gradients. The processes of
    `together` share the weights out: each runs the model as often as the others.
    """
    what = "where the loss is not finite"
    # Whose frozen weights are gathered block by block has others' in their memory between passes.
    is_forward_only = isinstance(model, Decoder) and model.is_forward_only
    # float8 has no isfinite, and fp8 weights were checked when they were quantised.
    own = (
        (name, local_part(p))
        for name, p in model.named_parameters()
        if p.element_size() > 1 and (p.requires_grad or not is_forward_only)
    )
    named = next((name for name, part in own if not bool(torch.isfinite(part).all())), None)
    for name in together.gather(named, what):
        if name is not None:
            return Finding(f"The weights themselves are not finite: {name}.", is_of_data=False)
    seen = None
    for micro, batch in enumerate(batches):
        found = _first_output(model, batch, loss_fn, autocast)
        if found is not None and seen is None:
            where, sequences = found
            seen = Finding(
                f"It appears first in {where}, micro-batch {micro + 1} of {len(batches)}.",
                tuple((micro, index) for index in sequences),
            )
        if seen is not None and together.is_alone:
            break
    if together.any(seen is not None, what):
        return seen or _NOTHING
    if is_forward_only:
        return _ONLY_FORWARD
    for batch in batches:
        with autocast():
            loss_sum, _ = loss_fn(model, batch)
        loss_sum.sum().backward()
    damaged = [
        name
        for name, p in model.named_parameters()
        if p.grad is not None and not bool(torch.isfinite(local_part(p.grad)).all())
    ]
    model.zero_grad(set_to_none=True)
    if damaged:  # the backward pass begins at the end, so the last one is the first
        return Finding(f"The loss is finite; its gradient is not, first in {damaged[-1]}.")
    return _NOTHING


def find_in_all(
    model: nn.Module,
    batches: Sequence[Any],
    loss_fn: Callable[[nn.Module, Any], tuple[Tensor, Tensor]],
    autocast: Callable[[], AbstractContextManager[object]],
    n_sequences: int,
    world: World,
) -> Finding:
    """Return what `find_nonfinite` finds in all processes: the first in words, all sequences.

    `batches` are this process's parts of micro-batches of `n_sequences`; the sequences that are
    returned are counted in the whole micro-batch.
    """
    if world.is_alone:
        return find_nonfinite(model, batches, loss_fn, autocast)
    # Each process stops at what it finds: what dropout draws there must not tell them apart.
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # Where weights are gathered, every process runs the model as often as the others.
        is_sharded = isinstance(model, Decoder) and model.is_sharded
        together = world if is_sharded else ALONE
        found = find_nonfinite(model, batches, loss_fn, autocast, together)
    first = world.share.part(n_sequences).start
    own = tuple((micro, first + index) for micro, index in found.sequences)
    findings = world.gather(replace(found, sequences=own), "where the loss is not finite")
    certain = [(rank, each) for rank, each in enumerate(findings) if each.is_certain]
    if not certain:
        return found
    rank, chosen = certain[0]
    return replace(
        chosen,
        sentence=f"On rank {rank}: {chosen.sentence}",
        sequences=tuple(sorted(pair for _, each in certain for pair in each.sequences)),
    )


def _first_output(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[[nn.Module, Any], tuple[Tensor, Tensor]],
    autocast: Callable[[], AbstractContextManager[object]],
) -> tuple[str, list[int]] | None:
    """Return the first module whose output is not finite, and the sequences (indices) it is of."""
    found: list[tuple[str, list[int]]] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and output.is_floating_point():
                damaged = ~torch.isfinite(output.detach())
                if bool(damaged.any()):
                    indices = damaged.flatten(1).any(1).nonzero().flatten().tolist()
                    where = f"{name or 'the model'} ({_name_sequences(indices, len(output))})"
                    found.append((where, indices))

        return look

    hooks = [m.register_forward_hook(watch(name)) for name, m in model.named_modules()]
    try:
        with torch.no_grad(), autocast():
            loss_sum, _ = loss_fn(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not found and not bool(torch.isfinite(loss_sum).all()):
        return "the loss itself", []
    return found[0] if found else None


def _name_sequences(indices: list[int], n_sequences: int) -> str:
    shown = ", ".join(str(index + 1) for index in indices[:8])
    return f"sequence {shown}{', …' if len(indices) > 8 else ''} of {n_sequences}"
