"""Samples during training: the right prompts, no random numbers, no run lost when they fail."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from lora.config import SamplingConfig
from lora.data.chat.prompts import Prompt
from lora.data.reading.formats import example_from_row
from lora.data.tokenizers.subword import TextTokenizer
from lora.decoder.decoder import Decoder
from lora.distributed.world import World
from lora.errors import CheckpointError, ModelError, TrainingError
from lora.inference.generate import generate
from lora.inference.samples import SampleRecorder, choose_prompts
from lora.runs.directory import create_run
from lora.runs.disk import read_rows
from lora.runs.progress import NoProgress
from tests.heard import Heard

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ strftime_now('%Y ') + m.role + ': ' + m.content }}{% endfor %}"
)
CHAT = {
    "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi you"}]
}


@pytest.fixture
def tokenizer(byte_tokenizer: Callable[[str], TextTokenizer]) -> TextTokenizer:
    return byte_tokenizer(TEMPLATE)


@pytest.fixture
def model(byte_model: Callable[[int], Decoder]) -> Decoder:
    return byte_model(2)


def examples(*rows: dict[str, Any]) -> list[Any]:
    return [example_from_row(row, f"row {n}") for n, row in enumerate(rows, 1)]


def test_chats_completions_and_texts_give_prompts(tokenizer: TextTokenizer) -> None:
    text = "The beginning of a text that goes on and on and on to its end, far away."
    given = examples(CHAT, {"prompt": "2 + 3 =", "completion": " 5"}, {"text": text})
    chat, completion, plain = choose_prompts(given, tokenizer, 9, max_tokens=99)
    assert (chat.text, chat.reference) == ("hello", "hi you")
    assert (completion.text, completion.reference) == ("2 + 3 =", " 5")
    assert plain.text == text[:32]
    assert plain.reference == text[32:64]
    assert tokenizer.decode(plain.ids) == plain.text
    (short,) = choose_prompts(examples({"text": "abcd"}), tokenizer, 1, max_tokens=99)
    assert (short.text, short.reference) == ("ab", "cd")


def test_examples_without_a_prompt_are_skipped(tokenizer: TextTokenizer) -> None:
    tools = {"messages": [{"role": "tool", "content": "x"}, CHAT["messages"][1]]}
    silent = {"messages": CHAT["messages"][:1]}
    long = {"prompt": "x" * 50, "completion": "y"}
    given = examples(tools, silent, long, {"text": "a"}, CHAT)
    chosen = choose_prompts(given, tokenizer, 2, max_tokens=40)
    assert [prompt.text for prompt in chosen] == ["hello"]
    assert choose_prompts(given, tokenizer, 0, max_tokens=40) == []
    assert len(choose_prompts(given * 9, tokenizer, 2, max_tokens=40)) == 2


def test_the_template_sees_the_runs_date(tokenizer: TextTokenizer) -> None:
    (prompt,) = choose_prompts(
        examples(CHAT), tokenizer, 1, max_tokens=99, now=datetime(1987, 5, 4)
    )
    assert tokenizer.decode(prompt.ids).startswith("1987 user: hello")


def test_answers_are_shown_and_recorded(
    model: Decoder, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    prompts = [Prompt(tokenizer.encode("ab"), "ab", "\x1b[2J wanted"), Prompt([7], "c", None)]
    expected = generate(model, [p.ids for p in prompts], SamplingConfig(max_new_tokens=5))
    heard = Heard()
    with create_run(tmp_path, "run") as run:
        sampler = SampleRecorder(model, prompts, tokenizer, run, heard, 5)
        sampler(0)
        sampler(4)
        rows = read_rows(run.folder / "samples.jsonl")
        run.cut_metrics_after(3)
        assert [row["step"] for row in read_rows(run.folder / "samples.jsonl")] == [0, 0]
    assert [row["step"] for row in rows] == [0, 0, 4, 4]
    assert rows[0] == {
        "step": 0,
        "prompt": "ab",
        "answer": tokenizer.decode(expected[0]),
        "reference": "\x1b[2J wanted",
        "tokens": 5,
        "ended": False,
    }
    assert rows[1]["reference"] is None
    assert "step 0, prompt: ab\n  answer: " in heard.said[0]
    assert "  reference: \\x1b[2J wanted" in heard.said[0]
    assert "wanted" not in heard.said[1]
    told = [line for line in heard.said if "2 samples take" in line]
    assert len(told) == 1
    assert "samples=0 turns them off" in told[0]


def test_an_answer_may_end_by_itself(
    model: Decoder, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    (first,) = generate(model, [[5]], SamplingConfig(max_new_tokens=4))
    stopping = TextTokenizer(tokenizer.backend, stop_ids=(first[2],))
    with create_run(tmp_path, "run") as run:
        SampleRecorder(model, [Prompt([5], "x")], stopping, run, NoProgress(), 4)(1)
        (row,) = read_rows(run.folder / "samples.jsonl")
    assert row["tokens"] == first.index(first[2])
    assert row["ended"]


def test_no_random_numbers_are_drawn_and_modes_stay(
    model: Decoder, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    model.train()
    model.trunk.blocks()[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    with create_run(tmp_path, "run") as run:
        SampleRecorder(model, [Prompt([5], "x")], tokenizer, run, NoProgress(), 4)(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    loss = model(torch.tensor([[5, 6, 7]])).sum()
    loss.backward()  # nothing of inference mode is left in the model
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "error", [ModelError("not finite"), torch.OutOfMemoryError("full"), CheckpointError("disk")]
)
def test_a_failure_ends_the_samples_and_not_the_run(
    model: Decoder,
    tokenizer: TextTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    calls: list[int] = []

    def fail(*_: object, **__: object) -> None:
        calls.append(1)
        raise error

    monkeypatch.setattr("lora.inference.samples.generate", fail)
    heard = Heard()
    with create_run(tmp_path, "run") as run:
        sampler = SampleRecorder(model, [Prompt([5], "x")], tokenizer, run, heard, 4)
        sampler(3)
        sampler(6)
    assert calls == [1]
    assert heard.said == [f"note: no samples from step 3 on: {error}"]
    assert not (run.folder / "samples.jsonl").exists()


@pytest.mark.parametrize(
    "error", [ModelError("not finite"), torch.OutOfMemoryError("CUDA out of memory.")]
)
def test_with_sharded_weights_all_processes_go_on_or_none(
    model: Decoder,
    tokenizer: TextTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    """The logits are those of all processes, memory runs out in one of them."""
    counted = []

    def fail(*_: object, free_bytes: int, **__: object) -> None:
        counted.append(free_bytes)
        raise error

    monkeypatch.setattr("lora.inference.samples.generate", fail)
    monkeypatch.setattr(World, "gather", lambda _, value, what: [value, 1000])
    heard = Heard()
    with create_run(tmp_path, "run") as run:
        sampler = SampleRecorder(
            model, [Prompt([5], "x")], tokenizer, run, heard, 4, World(rank=0, size=2)
        )
        if isinstance(error, ModelError):
            sampler(3)
        else:
            with pytest.raises(TrainingError, match=r"sharded weights: memory ran out.*samples 0"):
                sampler(3)
    assert counted == [1000]


def test_bugs_are_not_hidden(
    model: Decoder, tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr("lora.inference.samples.generate", fail)
    with create_run(tmp_path, "run") as run:
        sampler = SampleRecorder(model, [Prompt([5], "x")], tokenizer, run, NoProgress(), 4)
        with pytest.raises(TypeError, match="a bug"):
            sampler(3)
