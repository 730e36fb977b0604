"""Masks that processes draw together are those that one process draws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lora.device import Share
from lora.distributed.dropout import SharedDropouts

SEED = 3


def outputs(share: Share, x: Tensor, n_sequences: int, step: int = 1) -> Tensor:
    """Return what two dropouts in a row leave of `x`, and one more of ones as large."""
    model = nn.Sequential(nn.Dropout(0.3), nn.Sequential(nn.Dropout(0.1)))
    torch.manual_seed(SEED)
    with SharedDropouts(model, share, n_sequences, seed=5).drawn_together(step):
        dropped: Tensor = model(x)
    assert type(model[0]) is nn.Dropout
    return dropped


@pytest.mark.parametrize("n_processes", [2, 3])
def test_masks_of_the_parts_are_that_of_the_whole(n_processes: int) -> None:
    x = torch.randn(8, 5, 7, generator=torch.Generator().manual_seed(1))
    whole = outputs(Share(), x, 8)
    states, parts = [], []
    for rank in range(n_processes):
        share = Share(rank, n_processes)
        own = x[share.part(8)]
        padded = torch.cat((own, x.new_ones(share.largest(8) - len(own), 5, 7)))
        dropped = outputs(share, padded, 8)
        states.append(torch.get_rng_state())
        parts.append(dropped[: len(own)])
        assert not dropped[len(own) :].any()
    assert torch.equal(torch.cat(parts), whole)
    assert all(torch.equal(state, states[0]) for state in states)


def test_inputs_without_sequences_leave_the_generators_alike() -> None:
    """Experts get tokens, in each process another number of them."""
    x = torch.ones(50, 7)
    first, again = (outputs(Share(0, 2), x, 8) for _ in range(2))
    state = torch.get_rng_state()
    second, later = outputs(Share(1, 2), x[:31], 8), outputs(Share(0, 2), x, 8, step=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first[:31], second)
    assert not torch.equal(first, later)
    assert first.unique().tolist() == pytest.approx([0.0, 1 / 0.7 / 0.9])


def test_in_evaluation_nothing_is_dropped() -> None:
    model, x = nn.Sequential(nn.Dropout(0.5)).eval(), torch.ones(4, 3)
    with SharedDropouts(model, Share(0, 2), 8, seed=5).drawn_together(1):
        assert torch.equal(model(x), x)
