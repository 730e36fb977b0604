"""`lora.generate` and `lora.evaluate`: text in, text out; wrong input is refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import lora
from lora.data.prompting.prompt_format import save_prompt_format
from lora.data.tokenizers.subword import TextTokenizer
from lora.decoder.decoder import Decoder
from lora.errors import ConfigError, DataError, ModelError, UnknownSettingError
from lora.runs.directory import create_run
from lora.runs.record import PromptFormat, RunRecord

TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
ROWS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}"}]}
    for n in range(4)
]


@pytest.fixture
def tokenizer(byte_tokenizer: Callable[[str], TextTokenizer]) -> TextTokenizer:
    return byte_tokenizer(TEMPLATE)


@pytest.fixture
def model(byte_model: Callable[[int], Decoder]) -> Decoder:
    return byte_model(1)


def test_a_string_gives_a_string_and_a_list_a_list(
    model: Decoder, tokenizer: TextTokenizer
) -> None:
    one = lora.generate(model, tokenizer, "hello", max_new_tokens=5)
    assert isinstance(one, str)
    chat = [{"role": "user", "content": "hello"}]
    assert lora.generate(model, tokenizer, ["hello", chat], max_new_tokens=5) == [one, one]
    assert lora.generate(model, tokenizer, [], max_new_tokens=5) == []


def test_system_and_raw_change_the_prompt(model: Decoder, tokenizer: TextTokenizer) -> None:
    asked = dataclasses.replace(lora.SamplingConfig(), max_new_tokens=8)
    told = lora.generate(model, tokenizer, "hello", system="be brief", sampling=asked)
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert [told] == lora.generate(model, tokenizer, [chat], sampling=asked)
    raw = lora.generate(model, tokenizer, "user: hello\n", raw=True, sampling=asked)
    assert raw == lora.generate(model, tokenizer, "hello", sampling=asked)


@pytest.mark.parametrize(
    ("prompts", "settings", "kind", "words"),
    [
        ([3], {}, DataError, "of type int"),
        ([[]], {}, DataError, "of type list"),
        ([[{"role": "user", "content": "x"}]], {"raw": True}, ConfigError, "raw=True"),
        ([[{"role": "user", "content": "x"}]], {"system": "s"}, ConfigError, "system"),
        ("x", {"max_tokens": 3}, UnknownSettingError, "here it is 'max_new_tokens'"),
        ("x", {"temperature": -1.0}, ConfigError, "temperature"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    model: Decoder,
    tokenizer: TextTokenizer,
    prompts: Any,
    settings: dict[str, Any],
    kind: type[Exception],
    words: str,
) -> None:
    with pytest.raises(kind, match=words):
        lora.generate(model, tokenizer, prompts, **settings)


def test_another_librarys_objects_are_refused(model: Decoder, tokenizer: TextTokenizer) -> None:
    with pytest.raises(ModelError, match=r"Cannot use a Linear here.*its own generate\(\)"):
        lora.generate(nn.Linear(2, 2), tokenizer, "x")  # type: ignore[call-overload]
    with pytest.raises(ModelError, match="Cannot use a str as tokenizer"):
        lora.generate(model, "gpt2", "x")  # type: ignore[call-overload]


def test_evaluation_is_that_of_the_parts(model: Decoder, tokenizer: TextTokenizer) -> None:
    found = lora.evaluate(model, tokenizer, ROWS, answers=2)
    assert (found.scores.n_answers, len(found.answers)) == (2, 2)
    assert found.scores.max_length == lora.DataConfig().max_length
    named = lora.evaluate(model, tokenizer, ROWS, metrics="exact-match")
    assert named.scores.n_answers == 4
    config = lora.DataConfig(max_length=12, learn_on="all")
    cut = lora.evaluate(model, tokenizer, ROWS, data_config=config).scores
    assert cut.n_cut_examples == 4
    assert cut.loss != found.scores.loss
    same = lora.evaluate(model, tokenizer, ROWS, max_length=12, learn_on="all").scores
    assert same == cut


def test_evaluation_takes_the_settings_of_the_adapters_run(
    model: Decoder, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    lora.apply_lora(model)
    lora.save_adapter(model, tmp_path / "run" / "adapter")
    lora.remove_lora(model)
    (tmp_path / "run").rename(tmp_path / "kept")
    record = RunRecord(
        kind="finetune", data_config=dataclasses.asdict(lora.DataConfig(max_length=12))
    )
    with create_run(tmp_path, "run", record=record):
        pass
    (tmp_path / "kept" / "adapter").rename(tmp_path / "run" / "adapter")
    lora.load_adapter(model, tmp_path / "run" / "adapter")
    assert lora.evaluate(model, tokenizer, ROWS).scores.max_length == 12
    assert lora.evaluate(model, tokenizer, ROWS, max_length=64).scores.max_length == 64


def test_what_cannot_be_evaluated_is_refused(model: Decoder, tokenizer: TextTokenizer) -> None:
    with pytest.raises(ConfigError, match="answers=-1"):
        lora.evaluate(model, tokenizer, ROWS, answers=-1)
    with pytest.raises(ConfigError, match=r"metrics='blue'.*Did you mean 'bleu'"):
        lora.evaluate(model, tokenizer, ROWS, metrics="blue")
    with pytest.raises(UnknownSettingError, match="here it is 'max_length'"):
        lora.evaluate(model, tokenizer, ROWS, cutoff_len=9)
    with pytest.raises(ConfigError, match="Cannot evaluate with special_tokens"):
        lora.evaluate(model, tokenizer, ROWS, special_tokens=("<|x|>",))


def test_an_adapter_is_asked_as_it_was_trained(
    model: Decoder, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    lora.apply_lora(model)
    lora.save_adapter(model, tmp_path)
    save_prompt_format(PromptFormat(style="raw", completions="raw"), tmp_path)
    lora.remove_lora(model)
    lora.load_adapter(model, tmp_path)
    raw = lora.generate(model, tokenizer, "hello", raw=True, max_new_tokens=8)
    assert lora.generate(model, tokenizer, "hello", max_new_tokens=8) == raw
    assert lora.generate(model, tokenizer, "hello", raw=False, max_new_tokens=8) != raw
