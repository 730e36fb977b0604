"""Prompts of examples: every learned answer has a prompt, after the turns before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora.data.chat.choose_template import choose_template
from lora.data.chat.prompts import Prompt, chat_prompt, example_prompt, example_prompts
from lora.data.reading.formats import example_from_row
from lora.data.tokenizers.subword import TextTokenizer

TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "Hello there!"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
]


def prompts_of(row: dict[str, Any], tokenizer: TextTokenizer) -> list[Prompt]:
    return example_prompts(example_from_row(row, "f:7"), tokenizer)


def test_every_assistant_turn_is_asked_after_those_before_it(
    chatml_tokenizer: TextTokenizer,
) -> None:
    first, second = prompts_of({"messages": TURNS}, chatml_tokenizer)
    assert (first.text, first.reference, first.turn) == ("Hello there!", "Hello!", 1)
    assert (second.text, second.reference, second.turn) == (TURNS[2]["content"], "Paris.", 2)
    assert first.ids == chat_prompt(TURNS[:1], chatml_tokenizer).ids
    assert second.ids == chat_prompt(TURNS[:3], chatml_tokenizer).ids
    assert first.source == second.source == "f:7"
    last = example_prompt(example_from_row({"messages": TURNS}, "f:7"), chatml_tokenizer)
    assert last is not None
    assert last.ids == second.ids


def test_turns_that_are_not_learned_are_not_asked(chatml_tokenizer: TextTokenizer) -> None:
    off = [TURNS[0], {**TURNS[1], "train": False}, *TURNS[2:]]
    (only,) = prompts_of({"messages": off}, chatml_tokenizer)
    assert (only.reference, only.turn) == ("Paris.", 1)
    greeting = [TURNS[1], *TURNS[2:]]
    (only,) = prompts_of({"messages": greeting}, chatml_tokenizer)
    assert only.reference == "Paris."
    (only,) = prompts_of({"prompt": TURNS[:3], "completion": TURNS[3:]}, chatml_tokenizer)
    assert only.reference == "Paris."
    assert prompts_of({"text": "Paris."}, chatml_tokenizer) == []


def test_a_completion_is_the_reference_of_its_prompt(chatml_tokenizer: TextTokenizer) -> None:
    (only,) = prompts_of({"prompt": "The capital is ", "completion": "Paris."}, chatml_tokenizer)
    assert (only.text, only.reference, only.source) == ("The capital is ", "Paris.", "f:7")


def test_the_reference_of_a_tool_call_is_what_the_model_would_write(
    smollm2_tokenizer: TextTokenizer,
) -> None:
    tokenizer, _ = choose_template(smollm2_tokenizer, Path("smollm2-tools"))
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    messages = [
        {"role": "user", "content": "Is it warm in Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3 degrees"},
        {"role": "assistant", "content": "No, 3 degrees."},
    ]
    asked, told = prompts_of({"messages": messages}, tokenizer)
    assert asked.reference is not None
    assert asked.reference.startswith("<tool_call>")
    assert asked.reference.endswith("</tool_call>")
    assert '"name": "weather"' in asked.reference
    assert '"Oslo"' in asked.reference
    assert told.reference == "No, 3 degrees."


def test_a_call_that_the_template_leaves_out_is_not_asked(
    smollm2_tokenizer: TextTokenizer,
) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    messages = [
        {"role": "user", "content": "Is it warm?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3 degrees"},
        {"role": "assistant", "content": "No."},
    ]
    (told,) = prompts_of({"messages": messages}, smollm2_tokenizer)
    assert (told.reference, told.turn) == ("No.", 1)
