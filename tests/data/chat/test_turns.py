from __future__ import annotations

from typing import Any

import pytest

from lora.data.chat.template import ChatTemplate
from lora.data.chat.turns import render_conversation
from lora.data.reading.formats import Example
from lora.errors import DataError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def turns(*contents: str, system: bool = False) -> list[dict[str, Any]]:
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": "S"}, *messages] if system else messages


def learned(
    source: str, messages: list[dict[str, Any]], n_prompt_messages: int = 0
) -> tuple[list[tuple[str, list[str]]], int]:
    """Each text with its learned parts, and the number of turns that were lost."""
    example = Example(
        "f:1", "messages", messages=tuple(messages), n_prompt_messages=n_prompt_messages
    )
    found = render_conversation(ChatTemplate(source, TOKENS), example)
    return [(t.text, [t.text[a:b] for a, b in t.spans]) for t in found.texts], found.n_lost_turns


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("chatml", ["b<|im_end|>\n", "d<|im_end|>\n"]),
        ("llama3", ["b<|eot_id|>", "d<|eot_id|>"]),
        ("mistral", [" b</s>", " d</s>"]),
        ("gemma", ["b<end_of_turn>\n", "d<end_of_turn>\n"]),
        ("zephyr", ["b</s>\n", "d</s>\n"]),
        ("marked", ["b<|im_end|>", "d<|im_end|>"]),
    ],
)
@pytest.mark.parametrize("system", [False, True])
def test_all_answers_are_targets_in_one_text(
    templates: dict[str, str], name: str, answers: list[str], system: bool
) -> None:
    messages = turns("a", "b", "c", "d", system=system and name != "gemma")
    whole = ChatTemplate(templates[name], TOKENS).render(messages)
    assert learned(templates[name], messages) == ([(whole, answers)], 0)


def test_answers_of_the_prompt_are_not_targets(templates: dict[str, str]) -> None:
    messages = turns("a", "b", "c", "d")
    for name in ("chatml", "marked"):
        ((_, answers),), _ = learned(templates[name], messages, n_prompt_messages=3)
        assert [a.strip() for a in answers] == ["d<|im_end|>"]


def test_a_conversation_may_end_in_a_question_or_begin_with_an_answer(
    templates: dict[str, str],
) -> None:
    ((text, answers),), lost = learned(templates["chatml"], turns("a", "b", "c"))
    assert (answers, lost) == (["b<|im_end|>\n"], 0)
    assert text.endswith("user\nc<|im_end|>\n")
    greeting = [{"role": "assistant", "content": "hi"}, *turns("a", "b")]
    ((_, answers),), lost = learned(templates["zephyr"], greeting)
    assert ([a.strip() for a in answers], lost) == (["<|assistant|>\nhi</s>", "b</s>"], 0)


def test_tool_calls_are_targets_and_their_results_are_not(templates: dict[str, str]) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        *turns("a"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "d"},
    ]
    ((_, answers),), _ = learned(templates["chatml"], messages)
    assert answers == [
        '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><|im_end|>\n',
        "d<|im_end|>\n",
    ]


def test_turns_that_change_when_others_follow_are_targets_as_the_model_writes_them(
    templates: dict[str, str],
) -> None:
    messages = turns("a", "<think>x</think>b", "c", "<think>y</think>d")
    texts, lost = learned(templates["thinking"], messages)
    assert lost == 0
    assert [answers for _, answers in texts] == [
        ["y</think>d<|im_end|>\n"],
        ["x</think>b<|im_end|>\n"],
    ]
    template = ChatTemplate(templates["thinking"], TOKENS)
    assert [text for text, _ in texts] == [template.render(messages), template.render(messages[:2])]


def test_turns_without_the_thinking_that_the_prompt_asks_for_are_targets(
    templates: dict[str, str],
) -> None:
    texts, lost = learned(templates["thinking"], turns("a", "b", "c", "d"))
    assert lost == 0
    ((_, answers),) = texts
    assert answers == ["b<|im_end|>\n", "d<|im_end|>\n"]


def test_answers_follow_the_prompt_where_the_system_message_is_left_out_later(
    templates: dict[str, str],
) -> None:
    messages = turns("a", "b", "c", "[INST]d", system=True)
    texts, lost = learned(templates["last_system"], messages)
    assert lost == 0
    assert texts == [
        ("<s>[INST]a[/INST] b</s>[INST]S: c[/INST] [INST]d</s>", [" [INST]d</s>"]),
        ("<s>[INST]S: a[/INST] b</s>", [" b</s>"]),
    ]
    template = ChatTemplate(templates["last_system"], TOKENS)
    for (text, _), n in zip(texts, (4, 2), strict=True):
        assert text.startswith(template.render(messages[:n], add_generation_prompt=True))
    ((_, answers),), _ = learned(templates["last_system"], turns("a", "b", "c", "d"))
    assert answers == [" b</s>", " d</s>"]
    again, _ = learned(templates["last_system"], turns("a", "b", "a", "d", system=True))
    assert [answers for _, answers in again] == [[" d</s>"], [" b</s>"]]


def test_answers_without_a_word_in_the_text_are_lost() -> None:
    parts = "{% for m in messages %}{{ m.role }}: {{ m.content[0].text }};{% endfor %}"
    assert learned(parts, turns("a", "b")) == ([("user: ;assistant: ;", [])], 1)
    marked = "{% for m in messages %}{% generation %}<{{ m.text }}>{% endgeneration %}{% endfor %}"
    assert learned(marked, turns("a", "b", "c", "d")) == ([("<><><><>", [])], 2)
    last = "{% for m in messages %}{% generation %}<{{ m.content if loop.last else '' }}>"
    last += "{% endgeneration %}{% endfor %}"
    ((text, answers),), lost = learned(last, turns("a", "b", "c", "d"))
    assert (text, answers, lost) == ("<><><><d>", ["<>", "<>", "<>", "<d>"], 1)
    assert learned(parts, turns("a", "!?"))[1] == 1
    assert learned(parts, turns("a", " \n"))[1] == 0
    shouting = "{% for m in messages %}{{ m.content | upper }};{% endfor %}"
    assert [learned(shouting, turns("a", answer))[1] for answer in ("b 3", "!?")] == [0, 0]


def test_turns_that_cannot_be_found_are_counted() -> None:
    numbered = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert learned(numbered, turns("a", "b")) == ([("2ab", [])], 1)
    silent = "{{ messages | length }}{% for m in messages %}.{{ m.content if m.role != 'user' }}"
    assert learned(silent + "{% endfor %}", turns("ab", "c")) == ([("2..c", [])], 1)
    at_once = "{% if messages | length < 4 %}{{ raise_exception('short') }}{% endif %}text"
    assert learned(at_once, turns("a", "b", "c", "d")) == ([("text", [])], 2)


def test_there_are_no_targets_without_answers(templates: dict[str, str]) -> None:
    for name in ("chatml", "marked"):
        whole = ChatTemplate(templates[name], TOKENS).render(turns("a"))
        assert learned(templates[name], turns("a")) == ([(whole, [])], 0)


def test_a_rejection_of_the_whole_conversation_is_an_error(templates: dict[str, str]) -> None:
    with pytest.raises(DataError, match="Roles must alternate"):
        learned(templates["gemma"], [*turns("a"), *turns("a", "b")])


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "gemma", "zephyr", "marked"])
def test_an_answer_that_a_loss_flag_turns_off_is_context(
    templates: dict[str, str], name: str
) -> None:
    messages = turns("a", "WRONG", "c", "d", "e", "WRONG", "g", "h")
    example = Example("f:1", "messages", messages=tuple(messages), off_flags={1: "w", 5: "w"})
    found = render_conversation(ChatTemplate(templates[name], TOKENS), example)
    assert found.n_lost_turns == 0
    (text,) = found.texts
    assert text.text.count("WRONG") == 2
    answers = [text.text[slice(*span)] for span in text.spans]
    assert [answer.strip()[0] for answer in answers] == ["d", "h"]
