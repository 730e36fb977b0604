"""What a chat template has no place for is refused with a way out, or counted: never just lost."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from lora.config import DataConfig
from lora.data.chat.choose_template import SHIPPED_TEMPLATES, choose_template
from lora.data.chat.dropped_fields import DroppedFieldFinder
from lora.data.chat.template import ChatTemplate
from lora.data.inspection import inspect_data
from lora.data.reading.formats import example_from_row
from lora.data.tokenizers.subword import TextTokenizer

TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "utc"}}}
ASK = {"role": "user", "content": "time?"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT, NOON = {"role": "tool", "content": "12:00"}, {"role": "assistant", "content": "noon"}
TOOL_ROW = {"messages": [ASK, CALLS, RESULT, NOON], "tools": TOOLS}
LEGACY_ROW = {
    "messages": [
        ASK,
        {"role": "assistant", "content": None, "function_call": {"name": "clock"}},
        {"role": "function", "name": "clock", "content": "12:00"},
        NOON,
    ]
}
REASONING_ROWS = [
    {"messages": [ASK, {"role": "assistant", "content": "FOUR", key: "Add the second pair."}]}
    for key in ("reasoning_content", "thinking", "reasoning")
]
# SmolLM2's shape: role and content, and nothing else.
SMOL = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture
def smol(tokenizer: TextTokenizer) -> TextTokenizer:
    return dataclasses.replace(tokenizer, chat_template=SMOL)


def dropped(source: str, row: dict[str, Any], **options: Any) -> list[str]:
    finder, template = DroppedFieldFinder(), ChatTemplate(source, TOKENS)
    found = finder.find(template, example_from_row(row, "f:1"), **options)
    assert finder.find(template, example_from_row(row, "f:2"), **options) == found  # remembered
    return [field for _, field in found]


def test_fields_are_found_by_changing_them(templates: dict[str, str]) -> None:
    assert dropped(SMOL, TOOL_ROW) == ["tool_calls", "tools"]
    assert dropped(SMOL, LEGACY_ROW) == ["tool_calls"]
    assert [dropped(SMOL, row) for row in REASONING_ROWS] == [
        ["reasoning_content"],
        ["thinking"],
        ["reasoning"],
    ]
    assert dropped(templates["chatml"], TOOL_ROW) == ["tools"]
    assert dropped(templates["llama3"], TOOL_ROW) == []
    spoken = {"messages": [ASK, {**CALLS, "content": "Let me see."}, RESULT, NOON]}
    assert dropped(templates["llama3"], spoken) == ["content"]
    assert dropped(SMOL, {"messages": [ASK, NOON], "documents": [{"text": "t"}]}) == ["documents"]


@pytest.mark.parametrize("blank", [" ", "null", [], None])
def test_blank_tools_and_reasoning_are_not_missed(blank: Any) -> None:
    answer = {**NOON, "tool_calls": blank, "reasoning_content": " ", "thinking": None}
    assert dropped(SMOL, {"messages": [ASK, answer], "tools": blank}) == []


def test_messages_of_a_role_that_the_template_leaves_out_are_found(
    templates: dict[str, str],
) -> None:
    row = {"messages": [ASK, NOON, RESULT, {"role": "user", "content": "and?"}, NOON]}
    assert dropped(templates["zephyr"], row) == ["content"]
    assert dropped(templates["chatml"], row) == []


def test_what_shows_in_the_prompt_or_at_its_own_turn_only_is_not_dropped(
    templates: dict[str, str],
) -> None:
    system = {"role": "system", "content": "S"}
    two = [system, ASK, NOON, ASK, NOON]
    assert dropped(templates["last_system"], {"messages": two}) == []
    # Shows the reasoning of the last turn only.
    thinking = (
        "{% for m in messages %}{{ m.role + m.content }}"
        "{% if loop.last %}{{ m.reasoning_content }}{% endif %}{% endfor %}"
    )
    reasoned = {**NOON, "reasoning_content": "R"}
    row = {"messages": [ASK, reasoned, ASK, reasoned]}
    assert dropped(thinking, row) == []
    assert dropped(thinking, row, whole=True) == ["reasoning_content"]


@pytest.mark.parametrize("learn_on", ["assistant", "all"])
def test_dropped_fields_are_refused_with_the_way_out(smol: TextTokenizer, learn_on: Any) -> None:
    rows = [{"messages": [ASK, NOON]}, TOOL_ROW, TOOL_ROW, *REASONING_ROWS]
    report = inspect_data(rows, smol, DataConfig(learn_on=learn_on))
    (error,) = report.errors
    assert "row 2 and 1 more: the chat template has no place for tool_calls, tools" in error
    assert "row 4: the chat template has no place for reasoning_content" in error
    assert "row 6: the chat template has no place for reasoning" in error
    assert "Set chat_template to smollm2-tools" in error
    assert "or set allow_dropped_fields" in error


def test_only_models_with_its_format_are_pointed_to_the_shipped_template(
    chatml_tokenizer: TextTokenizer, smol: TextTokenizer
) -> None:
    (error,) = inspect_data([TOOL_ROW], chatml_tokenizer, DataConfig()).errors
    assert "smollm2-tools" not in error
    assert "Set chat_template to a file" in error
    (error,) = inspect_data([{**TOOL_ROW, "documents": [{"a": 1}]}], smol, DataConfig()).errors
    assert "no place for documents, tool_calls, tools" in error
    assert "smollm2-tools" not in error


@pytest.mark.parametrize("learn_on", ["assistant", "all"])
def test_allowed_losses_are_counted_and_leave_no_empty_answer(
    smol: TextTokenizer, learn_on: Any
) -> None:
    config = DataConfig(learn_on=learn_on, allow_dropped_fields=True)
    report = inspect_data([TOOL_ROW, LEGACY_ROW, *REASONING_ROWS], smol, config, n_previews=9)
    assert report.errors == []
    assert report.dropped_fields == {
        "tool_calls": 2,
        "tools": 1,
        "reasoning_content": 1,
        "thinking": 1,
        "reasoning": 1,
    }
    assert "no place for them: tool_calls (2), tools (1), reasoning_content" in report.warnings[0]
    for preview in report.previews:
        text = "".join(part for part, _ in preview.spans)
        assert "assistant\n<|im_end|>" not in text
    if learn_on == "assistant":
        targets = ["".join(t for t, is_on in p.spans if is_on) for p in report.previews]
        assert targets == ["noon<|im_end|>"] * 2 + ["FOUR<|im_end|>"] * 3


def test_a_conversation_of_nothing_but_a_lost_call_is_left_out(smol: TextTokenizer) -> None:
    config = DataConfig(allow_dropped_fields=True)
    rows = [{"messages": [ASK, CALLS]}, {"messages": [CALLS]}, {"messages": [ASK, NOON]}]
    report = inspect_data(rows, smol, config)
    assert report.counts.n_nothing_to_learn == 2
    assert report.errors == []


@pytest.mark.parametrize("name", SHIPPED_TEMPLATES)
def test_the_shipped_template_is_the_models_own_with_a_place_for_tools(
    smol: TextTokenizer, name: str
) -> None:
    with_tools, origin = choose_template(smol, Path(name))
    assert name in origin
    source = with_tools.chat_template or ""
    shipped, own = ChatTemplate(source, TOKENS), ChatTemplate(SMOL, TOKENS)
    system = {"role": "system", "content": "Be brief."}
    for messages in ([ASK], [ASK, NOON], [system, ASK, NOON, ASK], [ASK, NOON, RESULT, NOON]):
        for ask in (False, True):
            assert shipped.render(messages, add_generation_prompt=ask) == own.render(
                messages, add_generation_prompt=ask
            )
    report = inspect_data(
        [TOOL_ROW, LEGACY_ROW, *REASONING_ROWS],
        smol,
        DataConfig(chat_template=Path(name)),
        n_previews=9,
    )
    assert report.errors == report.warnings == []
    targets = ["".join(t for t, is_on in p.spans if is_on) for p in report.previews]
    called = '<tool_call>\n{"name": "clock", "arguments": {"zone": "utc"}}\n</tool_call><|im_end|>'
    assert targets[0] == f"{called}noon<|im_end|>"
    assert targets[1].startswith('<tool_call>\n{"name": "clock", "arguments": {}}')
    assert targets[2] == "<think>\nAdd the second pair.\n</think>\n\nFOUR<|im_end|>"
    assert '"name": "clock", "parameters"' in report.previews[0].spans[0][0]


def test_the_default_model_is_asked_as_before_with_the_shipped_template(
    smollm2_tokenizer: TextTokenizer,
) -> None:
    shipped, _ = choose_template(smollm2_tokenizer, Path("smollm2-tools"))
    own = ChatTemplate(smollm2_tokenizer.chat_template or "", TOKENS)
    other = ChatTemplate(shipped.chat_template or "", TOKENS)
    for messages in ([ASK], [ASK, NOON, ASK], [{"role": "system", "content": "S"}, ASK]):
        assert own.render(messages, add_generation_prompt=True) == other.render(
            messages, add_generation_prompt=True
        )
    assert shipped.stop_ids == smollm2_tokenizer.stop_ids
