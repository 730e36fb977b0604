from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora.data.sequences.batches import (
    IGNORE,
    Batch,
    BatchStream,
    TokenSequences,
    build_sequences,
    ordered_batches,
)
from lora.data.sequences.documents import Documents, DocumentsBuilder
from lora.errors import DataError

LENGTH, PAD = 24, 99_999


def build_documents(lengths: list[int], seed: int = 0) -> Documents:
    """Documents whose every token id says which document and position it comes from."""
    draw = np.random.default_rng(seed)
    builder = DocumentsBuilder()
    for number, length in enumerate(lengths):
        ids = [number * 100 + n for n in range(length)]
        builder.add(ids, draw.random(length) < 0.5, example=number)
    return builder.build()


def sequences_of(lengths: list[int], *, packing: bool = True, seed: int = 0) -> TokenSequences:
    documents = build_documents(lengths)
    return build_sequences(documents, LENGTH, packing=packing, pad_id=PAD, seed=seed)


def documents_in(batch: Batch) -> list[tuple[list[int], list[int], list[int]]]:
    """Ids, labels and positions of each document of a batch."""
    found = []
    for row in range(len(batch.input_ids)):
        for number in range(int(batch.document_ids[row].max()) + 1):
            here = batch.document_ids[row] == number
            fields = (batch.input_ids, batch.labels, batch.position_ids)
            found.append(tuple(field[row][here].tolist() for field in fields))
    return found  # type: ignore[return-value]


@given(st.lists(st.integers(1, LENGTH), min_size=1, max_size=60), st.booleans())
def test_sequences_hold_each_document_whole_and_apart(lengths: list[int], packing: bool) -> None:
    sequences = sequences_of(lengths, packing=packing)
    documents = sequences.documents
    batch = sequences.batch(range(len(sequences)))
    found = {tuple(ids): (labels, positions) for ids, labels, positions in documents_in(batch)}
    assert len(found) == len(lengths)
    for number, length in enumerate(lengths):
        ids, learned = documents.tokens(number)
        labels, positions = found[tuple(ids.tolist())]
        # What is learned is the document's own next token, and its last token predicts nothing.
        wanted = np.where(learned[1:], ids[1:], IGNORE).tolist()
        assert labels == [*wanted, IGNORE]
        assert positions == list(range(length))


@given(st.lists(st.integers(1, LENGTH), min_size=1, max_size=60))
def test_padding_is_marked_in_every_field(lengths: list[int]) -> None:
    batch = sequences_of(lengths).batch(range(len(sequences_of(lengths))))
    padding = batch.document_ids < 0
    assert int((~padding).sum()) == sum(lengths)
    assert (batch.input_ids[padding] == PAD).all()
    assert (batch.labels[padding] == IGNORE).all()
    assert (batch.position_ids[padding] == 0).all()
    for row in padding:  # padding stands at the end
        assert not (row[:-1] & ~row[1:]).any()


def test_fields_are_int64_of_the_right_shape() -> None:
    batch = sequences_of([5, 9, 20]).batch([0, 1])
    for tensor in (batch.input_ids, batch.labels, batch.position_ids, batch.document_ids):
        assert tensor.shape == (2, LENGTH)
        assert tensor.dtype == torch.int64


def test_without_packing_sequences_are_no_longer_than_the_longest_document() -> None:
    assert sequences_of([3, 9], packing=False).sequence_length == 16
    assert sequences_of([3, LENGTH], packing=False).sequence_length == LENGTH


def test_target_tokens_are_counted() -> None:
    sequences = sequences_of([5, 9, 20])
    batch = sequences.batch(range(len(sequences)))
    n_targets = int((batch.labels != IGNORE).sum())
    assert n_targets == sequences.n_target_tokens == sequences.documents.n_target_tokens > 0
    assert 0 < sequences.fill_fraction <= 1
    assert torch.equal(batch.to("cpu").labels, batch.labels)


def sequence_keys(batch: Batch) -> list[tuple[int, ...]]:
    return [tuple(row) for row in batch.input_ids.tolist()]


def test_each_epoch_holds_every_sequence_once_in_another_order() -> None:
    sequences = sequences_of([LENGTH] * 7)
    stream = BatchStream(sequences, 2, seed=5)
    seen = [key for batch in itertools.islice(stream, 7) for key in sequence_keys(batch)]
    first, second = seen[:7], seen[7:]
    assert set(first) == set(second) == set(sequence_keys(sequences.batch(range(7))))
    assert first != second


def test_sequences_of_a_run_do_not_depend_on_the_batch_size() -> None:
    sequences = sequences_of([LENGTH] * 7)
    streams = [BatchStream(sequences, size, seed=5) for size in (1, 3, 7)]
    seen = [
        [k for b in itertools.islice(s, n) for k in sequence_keys(b)]
        for s, n in zip(streams, (21, 7, 3), strict=True)
    ]
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("done", [0, 1, 4, 11])
def test_a_resumed_stream_continues_exactly(done: int) -> None:
    sequences = sequences_of([LENGTH] * 7)
    stream = BatchStream(sequences, 3, seed=5)
    for _ in range(done):
        next(stream)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = BatchStream(sequences, 3, seed=5)
    resumed.load_state_dict(state)
    for _ in range(6):
        assert sequence_keys(next(stream)) == sequence_keys(next(resumed))


def test_a_state_of_other_data_or_another_seed_is_refused() -> None:
    state = BatchStream(sequences_of([LENGTH] * 7), 3, seed=5).state_dict()
    with pytest.raises(DataError, match=r"seed was 5 and is 6.*rows_per_epoch was 7 and is 8"):
        BatchStream(sequences_of([LENGTH] * 8), 3, seed=6).load_state_dict(state)


def test_a_state_of_changed_tokens_or_labels_is_refused() -> None:
    lengths = [LENGTH] * 7
    state = BatchStream(sequences_of(lengths), 3, seed=5).state_dict()
    changed = build_sequences(
        build_documents(lengths, seed=1), LENGTH, packing=True, pad_id=PAD, seed=0
    )
    with pytest.raises(
        DataError, match=r"Cannot continue the batch order of the run: fingerprint was"
    ):
        BatchStream(changed, 3, seed=5).load_state_dict(state)


def test_a_stream_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="no sequences"):
        BatchStream(sequences_of([]), 3, seed=5)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
def test_ordered_batches_hold_every_sequence_once_and_end_in_padding(batch_size: int) -> None:
    sequences = sequences_of([LENGTH] * 7)
    batches = list(ordered_batches(sequences, batch_size))
    assert {len(b.input_ids) for b in batches} == {batch_size}
    real = [key for b in batches for key in sequence_keys(b) if key[0] != PAD]
    assert real == sequence_keys(sequences.batch(range(7)))
    assert sum(int((b.labels != IGNORE).sum()) for b in batches) == sequences.n_target_tokens


def test_labels_never_cross_documents_even_where_all_are_targets() -> None:
    builder = DocumentsBuilder()
    for number, length in enumerate([4, 6, 3]):
        builder.add([number * 10 + i for i in range(length)], np.ones(length, bool), example=number)
    sequences = build_sequences(builder.build(), 13, packing=True, pad_id=PAD, seed=0)
    batch = sequences.batch([0])
    inputs, labels = batch.input_ids[0], batch.labels[0]
    learned = labels != IGNORE
    assert int(learned.sum()) == 3 + 5 + 2
    assert (labels[learned] // 10 == inputs[learned] // 10).all()
    assert (labels[learned] == inputs[learned] + 1).all()
