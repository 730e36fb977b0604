from __future__ import annotations

import dataclasses
import json
from datetime import datetime
from pathlib import Path

import pytest
import torch

from lora.config import DataConfig
from lora.data.prepare import prepare_data
from lora.data.sequences.batches import IGNORE, BatchStream, ordered_batches
from lora.data.tokenizers.subword import TextTokenizer
from lora.errors import DataError

ROWS = [{"instruction": f"Add {n} and 3.", "output": f"The sum is {n + 3}."} for n in range(60)]
CONFIG = DataConfig(max_length=128, eval_fraction=0.1)


def test_a_file_becomes_training_and_validation_sequences(
    chatml_tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    said: list[str] = []
    data = prepare_data(path, chatml_tokenizer, CONFIG, seed=1, on_message=said.append)
    assert said == ["conversations are formatted with the model's chat template"]
    assert (len(data.train_examples), len(data.validation_examples)) == (54, 6)
    assert data.validation is not None
    assert data.train.sequence_length == 128
    assert data.train.n_target_tokens == data.train_encoded.documents.n_target_tokens
    batch = next(BatchStream(data.train, 4, seed=1))
    assert batch.input_ids.shape == (4, 128)
    n_validation = sum(int((b.labels != IGNORE).sum()) for b in ordered_batches(data.validation, 4))
    assert n_validation == data.validation.n_target_tokens > 0
    assert (batch.input_ids[batch.document_ids < 0] == chatml_tokenizer.pad_id).all()


def test_the_same_arguments_give_the_same_sequences(chatml_tokenizer: TextTokenizer) -> None:
    first, again, other = (
        prepare_data(ROWS, chatml_tokenizer, CONFIG, seed=s).train for s in (1, 1, 2)
    )
    batches = [rows.batch(range(len(rows))).input_ids for rows in (first, again, other)]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


def test_sequences_of_another_day_differ_unless_the_day_is_given(tokenizer: TextTokenizer) -> None:
    source = "{% for m in messages %}{{ strftime_now('%d %m %Y') + m.content }}{% endfor %}"
    dated = dataclasses.replace(tokenizer, chat_template=source)
    days = [datetime(2024, 7, 26), datetime(2024, 7, 26), datetime(2024, 7, 27)]
    first, again, other = (prepare_data(ROWS, dated, CONFIG, seed=1, now=day) for day in days)
    assert first.now == days[0]
    assert first.train.fingerprint() == again.train.fingerprint() != other.train.fingerprint()
    today = prepare_data(ROWS, dated, CONFIG, seed=1).now
    assert abs((datetime.now() - today).total_seconds()) < 60


def test_given_validation_data_leave_the_training_data_whole(tokenizer: TextTokenizer) -> None:
    validation = [{"text": "the dog"}]
    said: list[str] = []
    data = prepare_data(
        ROWS, tokenizer, CONFIG, seed=1, validation_source=validation, on_message=said.append
    )
    assert len(data.train_examples) == 60
    assert data.validation is not None
    assert len(data.validation) == 1
    assert data.tokenizer.chat_template is not None  # the plain format, to be saved
    assert "plain format" in said[0]
    assert data.template_origin is not None


def test_validation_examples_that_are_also_training_examples_are_reported(
    tokenizer: TextTokenizer,
) -> None:
    said: list[str] = []
    validation = [{**ROWS[3], "id": 7}, {"text": "the dog"}, ROWS[4]]
    prepare_data(ROWS, tokenizer, CONFIG, 1, validation_source=validation, on_message=said.append)
    assert "2 of 3 validation examples are also training examples" in said[0]


def test_there_may_be_no_validation(tokenizer: TextTokenizer) -> None:
    config = DataConfig(max_length=64, eval_fraction=0, packing=False)
    data = prepare_data([{"text": "the dog"}], tokenizer, config, seed=1)
    assert data.validation is None
    assert data.template_origin is None
    assert data.train.sequence_length == 8


def test_validation_examples_without_targets_are_reported(tokenizer: TextTokenizer) -> None:
    said: list[str] = []
    data = prepare_data(
        [{"text": "the dog"}],
        tokenizer,
        CONFIG,
        1,
        validation_source=[{"text": ""}],
        on_message=said.append,
    )
    assert data.validation is None
    assert "no validation: none of the validation examples" in said[0]


def test_data_without_targets_are_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(DataError, match="none of 54 examples has one"):
        prepare_data(
            [{"messages": [{"role": "user", "content": str(n)}]} for n in range(60)],
            tokenizer,
            CONFIG,
            seed=1,
        )


def test_tokens_without_an_embedding_row_are_named_before_training(
    tokenizer: TextTokenizer,
) -> None:
    rows = [{"text": f"The quick brown fox <|eot_id|> jumps {n} times."} for n in range(9)]
    number = tokenizer.ids_of(["<|eot_id|>"])[0]
    with pytest.raises(
        DataError, match=rf"token '<.eot_id.>', in row \d, has the id {number}, and"
    ):
        prepare_data(rows, tokenizer, DataConfig(), 0, n_rows=number)
    prepare_data(rows, tokenizer, DataConfig(), 0, n_rows=number + 1)
    grown = DataConfig(special_tokens=("<|eot_id|>",))
    prepare_data(rows, tokenizer, grown, 0, n_rows=number)


def test_a_pad_token_without_an_embedding_row_pads_nothing(tokenizer: TextTokenizer) -> None:
    padded = tokenizer.with_tokens(["<new-pad>"])
    padded = dataclasses.replace(padded, pad_token="<new-pad>")
    notes = list[str]()
    n_rows = tokenizer.vocab_size
    rows = [{"text": f"The quick brown fox {n}."} for n in range(9)]
    data = prepare_data(rows, padded, DataConfig(), 0, n_rows=n_rows, on_message=notes.append)
    assert any("'<new-pad>'" in note and "pads" in note for note in notes)
    assert data.tokenizer.pad_token == "<new-pad>"


def test_training_and_validation_sequences_have_one_length(tokenizer: TextTokenizer) -> None:
    rows = [{"text": "a few words of text " * n} for n in (1, 2, 3)]
    short = prepare_data(rows[:1], tokenizer, DataConfig(), 0, validation_source=rows)
    assert short.validation is not None
    assert short.train.sequence_length == short.validation.sequence_length < 512
    assert short.train.sequence_length % 64 == 0
    batch = short.train.batch([0])
    assert batch.input_ids.shape[1] == short.train.sequence_length
