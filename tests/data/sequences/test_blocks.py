"""Blocks of a text: reproducible, independent of the split, resumable."""

from __future__ import annotations

import pytest
import torch

from lora.data.sequences.blocks import BlockStream, ordered_blocks
from lora.errors import DataError

CPU = torch.device("cpu")


def test_targets_are_the_inputs_one_later() -> None:
    stream = BlockStream(torch.arange(100), 8, 4, seed=0, device=CPU)
    for _ in range(20):
        inputs, targets = next(stream)
        assert inputs.shape == targets.shape == (4, 8)
        assert torch.equal(targets, inputs + 1)
        assert targets.max() < 100


def test_every_start_is_drawn_and_the_shortest_text_works() -> None:
    stream = BlockStream(torch.arange(12), 8, 16, seed=0, device=CPU)
    starts = {int(row[0]) for _ in range(20) for row in next(stream)[0]}
    assert starts == {0, 1, 2, 3}
    BlockStream(torch.arange(9), 8, 1, seed=0, device=CPU).__next__()
    with pytest.raises(DataError, match=r"8 tokens.*block_size \+ 1 = 9"):
        BlockStream(torch.arange(8), 8, 1, seed=0, device=CPU)


def test_the_blocks_do_not_depend_on_the_batch_size() -> None:
    tokens = torch.arange(5000)
    whole = BlockStream(tokens, 8, 1200, seed=3, device=CPU)
    parts = BlockStream(tokens, 8, 300, seed=3, device=CPU)
    expected = next(whole)[0]
    assert torch.equal(torch.cat([next(parts)[0] for _ in range(4)]), expected)
    other = BlockStream(tokens, 8, 1200, seed=4, device=CPU)
    assert not torch.equal(next(other)[0], expected)


def test_a_stream_continues_where_its_state_says() -> None:
    tokens = torch.arange(1000)
    stream = BlockStream(tokens, 8, 100, seed=3, device=CPU)
    for _ in range(11):
        next(stream)
    state = stream.state_dict()
    expected = [next(stream)[0] for _ in range(3)]
    again = BlockStream(tokens, 8, 100, seed=3, device=CPU)
    again.load_state_dict(state)
    assert all(torch.equal(next(again)[0], want) for want in expected)


def test_ordered_blocks_cover_the_text_once_or_spread_over_it() -> None:
    tokens = torch.arange(101)
    rows = torch.cat([inputs for inputs, _ in ordered_blocks(tokens, 10, 3, 10_000, CPU)])
    assert torch.equal(rows.flatten(), torch.arange(100))
    spread = torch.cat([inputs for inputs, _ in ordered_blocks(tokens, 10, 3, 30, CPU)])
    assert spread[:, 0].tolist() == [0, 40, 90]
