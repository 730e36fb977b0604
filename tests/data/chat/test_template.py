from __future__ import annotations

import json
import time
from datetime import datetime
from typing import Any

import pytest

from lora.data.chat import template_environment
from lora.data.chat.template import ChatTemplate
from lora.errors import DataError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
USER, ANSWER = (
    {"role": "user", "content": 'Hi <there> & "you" ünï \n '},
    {
        "role": "assistant",
        "content": "  Hello\n",
    },
)
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "<3>&é'"}}}
TOOL_TURNS = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "5", "name": "add"},
    ANSWER,
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds <a> & b"}}]
CONVERSATIONS = {
    "one turn": [USER, ANSWER],
    "system": [SYSTEM, USER, ANSWER],
    "open": [USER, ANSWER, USER],
    "tools": TOOL_TURNS,
    "reasoning": [USER, {**ANSWER, "thinking": "hm"}],
}


def transformers_text(source: str, messages: list[Any], **options: Any) -> str:
    """What transformers makes of it; a refusal in its own words."""
    module = pytest.importorskip("transformers.utils.chat_template_utils")
    import jinja2

    try:
        texts, _ = module.render_jinja_template(
            [messages], chat_template=source, **{**TOKENS, **options}
        )
    except (jinja2.TemplateError, TypeError) as error:
        return f"refused: {error}"
    return str(texts[0])


def our_text(source: str, messages: list[Any], **options: Any) -> str:
    try:
        return ChatTemplate(source, TOKENS).render(messages, **options)
    except DataError as error:
        return "refused: " + str(error).split("rejects the conversation: ")[1]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize(
    "name", ["chatml", "llama3", "mistral", "gemma", "zephyr", "marked", "thinking"]
)
def test_text_equals_transformers(templates: dict[str, str], name: str, conversation: str) -> None:
    messages = CONVERSATIONS[conversation]
    tools = TOOLS if conversation == "tools" else None
    for prompts in (False, True):
        options: dict[str, Any] = {"tools": tools, "add_generation_prompt": prompts}
        ours = our_text(templates[name], messages, **options)
        assert ours == transformers_text(templates[name], messages, **options)
        assert "Hi <there>" in ours or ours.startswith("refused: ")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages | tojson }}",
        "{{ messages | tojson(indent=2, ensure_ascii=True, sort_keys=True) }}",
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
        "  {% if true %}\n    a\n  {% endif %}\nb\n",
        "{%- generation -%} x {%- endgeneration -%} y\n",
        "{{ dict(a=1) }} {{ namespace(self=3).self }} {{ missing }} {{ documents }} {{ tools }}",
        "{{ messages[0].content.strip().upper() }} {{ 'ab' * 3 }} {{ 2 ** 10 }}",
        "{{ messages[0].missing.deeper }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__ }}",
        "{{ 'a' + 1 }}",
        "{{ sep_token }}{{ eos_token }}{{ messages[1].reasoning_content }}",
        "{% macro tag(x) %}<{{ x }}>{% endmacro %}{{ tag(messages[1].content) | trim }}",
    ],
)
def test_language_equals_transformers(source: str) -> None:
    for messages in (CONVERSATIONS["one turn"], CONVERSATIONS["reasoning"]):
        assert our_text(source, messages) == transformers_text(source, messages)


@pytest.mark.parametrize(
    "source", ["{{ namespace(_a=1) }}", "{% set n = namespace() %}{% set n._a = 1 %}"]
)
def test_namespaces_refuse_private_names_as_transformers_does(source: str) -> None:
    assert "refused: a namespace cannot have names such as '_a'" in our_text(source, [USER])
    assert "refused: Chat templates cannot store" in transformers_text(source, [USER])


def test_documents_reach_the_template() -> None:
    documents = [{"title": "t", "text": "<x>"}]
    source = "{% for d in documents %}{{ d.title }}: {{ d.text }}{% endfor %}"
    assert our_text(source, [USER], documents=documents) == "t: <x>"
    assert transformers_text(source, [USER], documents=documents) == "t: <x>"


def test_generation_blocks_give_the_spans_that_transformers_gives(
    templates: dict[str, str],
) -> None:
    module = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [SYSTEM, USER, ANSWER, USER, ANSWER]
    texts, indices = module.render_jinja_template(
        [messages], chat_template=templates["marked"], return_assistant_tokens_mask=True, **TOKENS
    )
    template = ChatTemplate(templates["marked"], TOKENS)
    assert template.has_generation_blocks
    text, spans = template.render_with_spans(messages)
    assert text == texts[0] == template.render(messages)
    assert spans == indices[0]
    assert [text[a:b] for a, b in spans] == ["  Hello\n<|im_end|>"] * 2


def test_spans_inside_macros_are_found() -> None:
    source = (
        "{% macro turn(m) %}[{% generation %}{{ m.content }}{% endgeneration %}]{% endmacro %}"
        "{% for m in messages %}{{ turn(m) }}{% endfor %}"
    )
    text, spans = ChatTemplate(source).render_with_spans(
        [{"role": "a", "content": c} for c in "xy"]
    )
    assert text == "[x][y]"
    assert spans == [(1, 2), (4, 5)]


def test_special_tokens_that_are_missing_print_nothing() -> None:
    assert ChatTemplate("[{{ bos_token }}]", {}).render([USER]) == "[]"


def test_the_date_can_be_given() -> None:
    source = "{{ strftime_now('%d %b %Y') }}"
    held = ChatTemplate(source, now=datetime(2024, 7, 26))
    assert held.render([USER]) == "26 Jul 2024"
    assert ChatTemplate(source).render([USER]) == datetime.now().strftime("%d %b %Y")


def test_a_refusal_has_the_templates_words(templates: dict[str, str]) -> None:
    with pytest.raises(DataError, match=r"my\.jinja rejects .*System role not supported"):
        ChatTemplate(templates["gemma"], TOKENS, name="my.jinja").render([SYSTEM, USER])


def test_no_jinja_is_refused_with_its_line() -> None:
    with pytest.raises(DataError, match=r"my\.jinja: line 2: .*unknown tag 'en'\. Give"):
        ChatTemplate("a\n{% en %}", name="my.jinja")


@pytest.mark.parametrize(
    "opens", [("{{ ", "(", "1", ")", " }}"), ("", "{% if 1 %}", "", "{% endif %}", "")]
)
def test_deep_nesting_is_refused(opens: tuple[str, ...]) -> None:
    before, begin, middle, end, after = opens
    with pytest.raises(DataError, match="nested too deeply"):
        ChatTemplate(before + begin * 3000 + middle + end * 3000 + after)
    loops = "{% for x in messages %}" * 30 + "{% endfor %}" * 30
    with pytest.raises(DataError, match="nested too deeply"):
        ChatTemplate(loops)


def test_a_template_of_any_size_is_refused() -> None:
    with pytest.raises(DataError, match=r"300,000 bytes. Allowed: 262,144"):
        ChatTemplate("x" * 300_000)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ 'a' ~ 1 ~ missing }}", "a1"),
        ("{{ 'a' + 'b' }}{{ 7 % 4 }}{{ [1] + [2] }}", "ab3[1, 2]"),
        ("{{ '%s-%03d' % ('a', 5) }}{{ '%s' | format('b') }}", "a-005b"),
        ("{{ '{:>5}|{}'.format('a', 10**10) }}", "    a|10000000000"),
        ("{{ 'a'.ljust(3) }}|{{ 'a' | center(3) }}|{{ ['a', 1] | join(', ') }}", "a  | a |a, 1"),
        ("{{ 'aXb'.replace('X', '--') }}{{ 'aXb' | replace('X', '+') }}", "a--ba+b"),
        ("{% for i in [1, 2] recursive %}{{ i }}{% else %}none{% endfor %}", "12"),
        ("{% for i in [] %}{{ i }}{% else %}none{% endfor %}", "none"),
        ("{{ [1, 2, 3] | batch(2) | list }}{{ {'a': 1} | tojson }}", '[[1, 2], [3]]{"a": 1}'),
        ("{{ [1, 2, 3] | slice(2) | list }}", "[[1, 2], [3]]"),
        ("{{ messages | map(attribute='role') | join('|') }}", "user"),
    ],
)
def test_limits_leave_ordinary_templates_alone(source: str, expected: str) -> None:
    assert ChatTemplate(source).render([USER]) == expected


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for i in range(10**9) %}{% endfor %}", "too big|Range"),
        ("{{ 'x' * 10**12 }}", "too large"),
        ("{{ 10**9 * [1] }}", "too large"),
        ("{{ 10**9999999 }}", "too large"),
        ("{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "67,108,864 characters"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
            "{% endfor %}{% endfor %}{% endfor %}",
            "more than 0 s",
        ),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion|more than 0 s"),
        (
            "{% set a = [1] * 99999 %}{% for i in a %}{% for j in a %}{% endfor %}{% endfor %}",
            "more than 0 s",
        ),
        ("{{ lipsum(10**9) }}", "undefined"),
        (
            "{% set ns = namespace(a='x') %}"
            "{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
            "~ with values that are too large",
        ),
        (
            "{% set ns = namespace(a='x') %}"
            "{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
            r"\+ with values that are too large",
        ),
        ("{{ 'x'.ljust(10**10) }}", "10,000,000,000 characters, which is too large"),
        ("{{ 'x' | center(10**10) }}", "10,000,000,000 characters, which is too large"),
        ("{{ 'x' | indent(10**10, true) }}", "10,000,000,000 characters, which is too large"),
        ("{{ messages | tojson(indent=10**10) }}", "10,000,000,000 characters"),
        ("{{ [] | batch(10**10, 'x') | list }}", "which is too large"),
        ("{{ '%9999999999d' % 1 }}", "formats to a width that is too large"),
        ("{{ '{:>9999999999}'.format(1) }}", "formats to a width that is too large"),
        ("{{ '{:>{}}'.format(1, 10**10) }}", "which is too large"),
        ("{{ '%*d' % (10**10, 1) }}", "which is too large"),
        ("{% set a = 'x' * 99999 %}{{ a.replace('x', a) }}", "replace with values"),
        ("{% set a = 'x' * 99999 %}{{ a | replace('x', a) }}", "replace with values"),
        ("{% set a = 'x' * 99999 %}{{ ([a] * 9999) | join }}", "join with values"),
        ("{% set a = 'x' * 99999 %}{{ a.join([a] * 9999) }}", "join with values"),
    ],
)
def test_runaway_templates_are_stopped(
    monkeypatch: pytest.MonkeyPatch, source: str, words: str
) -> None:
    if "more than 0" in words:
        monkeypatch.setattr(template_environment, "MAX_RENDER_S", 0.2)
    began_s = time.monotonic()
    with pytest.raises(DataError, match=words):
        ChatTemplate(source).render([USER])
    assert time.monotonic() - began_s < 10


def test_marks_of_our_own_in_a_conversation_are_refused_where_they_would_move_spans() -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    messages = [{"role": "assistant", "content": "a\ufdd0b\ufdd1c"}]
    with pytest.raises(DataError, match=r"U\+FDD0 or U\+FDD1.*Remove them"):
        ChatTemplate(source).render_with_spans(messages)
    assert ChatTemplate(source).render(messages) == "a\ufdd0b\ufdd1c"


def test_half_a_character_that_a_template_makes_is_refused() -> None:
    with pytest.raises(DataError, match=r"output of my\.jinja has '.ud800' at character 1"):
        ChatTemplate("a{{ '\\ud800' }}", name="my.jinja").render([USER])


def test_failures_inside_a_template_are_refusals() -> None:
    with pytest.raises(DataError, match="rejects the conversation: at least one item"):
        ChatTemplate("{{ cycler() }}").render([USER])


def test_messages_stay_as_they_were() -> None:
    messages = json.loads(json.dumps(TOOL_TURNS))
    source = "{% set m = messages[0] %}{% set m = dict(role='x') %}{{ m.role }}"
    ChatTemplate(source).render(messages)
    assert messages == TOOL_TURNS
