from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.data.sequences.packing import pack, packed_length, unpacked_layout
from lora.errors import DataError

LENGTH = 40
lengths_of_documents = st.lists(st.integers(1, LENGTH), max_size=200)


@given(lengths_of_documents, st.integers(0, 9), st.sampled_from([1, 7, 64]))
def test_each_document_is_there_once_and_no_sequence_overflows(
    lengths: list[int], seed: int, window: int
) -> None:
    array = np.array(lengths, np.int64)
    layout = pack(array, LENGTH, seed, window_documents=window)
    assert sorted(layout.members.tolist()) == list(range(len(lengths)))
    sequences = np.split(layout.members, layout.starts[1:-1]) if lengths else []
    assert all(0 < array[sequence].sum() <= LENGTH for sequence in sequences)
    assert layout.n_sequences == len(sequences)


def test_the_fullest_sequence_with_room_is_taken() -> None:
    # Longest first: 6 and 5 open sequences with room 4 and 5; 4 fits both, best beside 6; then 3
    # goes beside 5.
    layout = pack(np.array([3, 4, 5, 6]), 10, seed=0)
    sequences = [
        set(sequence.tolist()) for sequence in np.split(layout.members, layout.starts[1:-1])
    ]
    assert sorted(sequences, key=min) == [{0, 2}, {1, 3}]


def test_sequences_are_filled_well() -> None:
    lengths = np.random.default_rng(0).integers(10, 300, 5000)
    assert lengths.sum() / (pack(lengths, 512, seed=0).n_sequences * 512) > 0.99


def test_seed_decides_the_layout() -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 300)
    first, again, other = (pack(lengths, 40, seed=s, window_documents=32) for s in (1, 1, 2))
    np.testing.assert_array_equal(first.members, again.members)
    np.testing.assert_array_equal(first.starts, again.starts)
    assert not np.array_equal(first.members, other.members)


def test_the_unpacked_layout_keeps_the_order() -> None:
    layout = unpacked_layout(np.array([3, 1, 2]), 3)
    assert layout.members.tolist() == [0, 1, 2]
    assert layout.starts.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("lengths", [[3, 0], [3, 41]])
def test_documents_that_fit_no_sequence_are_refused(lengths: list[int]) -> None:
    for lay_out in (lambda a: pack(a, LENGTH, 0), lambda a: unpacked_layout(a, LENGTH)):
        with pytest.raises(DataError, match=r"40 tokens.*1 to 40.*[Tt]runcate"):
            lay_out(np.array(lengths))


def test_a_hundred_thousand_documents_pack_in_seconds() -> None:
    lengths = np.random.default_rng(0).integers(20, 400, 100_000)
    began_s = time.perf_counter()
    pack(lengths, 2048, seed=0)
    assert time.perf_counter() - began_s < 5


def test_a_length_beyond_all_documents_costs_no_memory() -> None:
    lengths = np.array([5, 3, 9, 1], np.int64)
    tracemalloc.start()
    layout = pack(lengths, 10**12, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6
    assert layout.n_sequences == 1
    assert layout.members.tolist() == pack(lengths, 1000, seed=0).members.tolist()


def test_sequences_far_longer_than_the_documents_are_cut_to_what_these_fill() -> None:
    lengths = np.full(20_000, 50)
    layout = pack(lengths, 10**8, seed=0)
    assert layout.n_sequences == 3  # windows of 8,192 documents
    assert packed_length(layout, lengths, 10**8) == 8192 * 50
    few = pack(lengths[:10], 10**8, seed=0)
    assert packed_length(few, lengths[:10], 10**8) == 512  # a multiple of 64


@pytest.mark.parametrize(
    ("longest", "n_documents", "asked", "expected"),
    [
        (20, 3, 512, 64),  # all in one sequence of 60 tokens
        (20, 6, 512, 128),
        (150, 40, 512, 512),  # sequences of 450 tokens are full
        (150, 40, 500, 500),  # never more than is given
        (20, 3, 32, 32),
    ],
)
def test_short_data_are_not_padded_to_the_maximum(
    longest: int, n_documents: int, asked: int, expected: int
) -> None:
    lengths = np.full(n_documents, longest)
    assert packed_length(pack(lengths, asked, seed=0), lengths, asked) == expected
