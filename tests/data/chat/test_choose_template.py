from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lora.data.chat.choose_template import (
    PLAIN_TEMPLATE,
    begin_ids,
    choose_template,
    compile_template,
)
from lora.data.tokenizers.subword import TextTokenizer
from lora.errors import DataError

CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
    {"role": "tool", "content": "r"},
]


def test_what_begins_a_text_is_found(
    tokenizer: TextTokenizer, bos_tokenizer: TextTokenizer
) -> None:
    assert begin_ids(tokenizer) == []
    assert begin_ids(bos_tokenizer) == [bos_tokenizer.bos_id]


def test_the_models_own_template_is_taken(chatml_tokenizer: TextTokenizer) -> None:
    assert choose_template(chatml_tokenizer, None) == (
        chatml_tokenizer,
        "the model's chat template",
    )


def test_a_file_takes_precedence_over_the_models_own(
    chatml_tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("\ufeff{{ messages[0].content }}<|eot_id|>", encoding="utf-8")
    chosen, origin = choose_template(chatml_tokenizer, path)
    assert chosen.chat_template == "{{ messages[0].content }}<|eot_id|>"
    assert str(path) in origin
    # The new template's turns end in another token, which stops an answer too.
    assert chosen.backend.token_to_id("<|eot_id|>") in chosen.stop_ids
    assert set(chatml_tokenizer.stop_ids) <= set(chosen.stop_ids)


def test_the_plain_format_marks_answers_and_asks_for_them(tokenizer: TextTokenizer) -> None:
    chosen, _ = choose_template(tokenizer, None)
    assert chosen.chat_template == PLAIN_TEMPLATE
    template = compile_template(chosen)
    text, spans = template.render_with_spans(CHAT)
    assert text == ("s\n\n### Instruction:\nq\n\n### Response:\na</s>\n\n### Result:\nr\n\n")
    assert [text[a:b] for a, b in spans] == ["a</s>"]
    asked = template.render(CHAT[:2], add_generation_prompt=True)
    assert text.startswith(asked)
    assert asked.endswith("### Response:\n")


def test_the_plain_format_begins_as_the_tokenizer_does(bos_tokenizer: TextTokenizer) -> None:
    chosen, _ = choose_template(bos_tokenizer, None)
    assert compile_template(chosen).render(CHAT[1:2]) == "<s>### Instruction:\nq\n\n"
    bare = dataclasses.replace(bos_tokenizer, eos_token=None)
    chosen, _ = choose_template(bare, None)
    assert compile_template(chosen).render(CHAT[2:3]) == "<s>### Response:\na\n\n"


def test_the_plain_format_is_the_same_in_transformers(tokenizer: TextTokenizer) -> None:
    module = pytest.importorskip("transformers.utils.chat_template_utils")
    texts, _ = module.render_jinja_template([CHAT], chat_template=PLAIN_TEMPLATE, eos_token="</s>")
    chosen, _ = choose_template(tokenizer, None)
    assert texts == [compile_template(chosen).render(CHAT)]


def test_the_plain_format_refuses_tool_calls(tokenizer: TextTokenizer) -> None:
    call = {"function": {"name": "f", "arguments": {}}}
    chosen, _ = choose_template(tokenizer, None)
    with pytest.raises(DataError, match="has no tool calls: give a chat_template"):
        compile_template(chosen).render(
            [{"role": "assistant", "content": "", "tool_calls": [call]}]
        )


@pytest.mark.parametrize(
    ("data", "words"),
    [(None, "No such file"), (b"\xff", "not UTF-8"), (b"x" * 300_000, "more than 262,144 bytes")],
)
def test_files_that_are_no_template_are_refused(
    tokenizer: TextTokenizer, tmp_path: Path, data: bytes | None, words: str
) -> None:
    path = tmp_path / "own.jinja"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError, match=rf"own\.jinja.*{words}"):
        choose_template(tokenizer, path)


def test_no_template_is_an_error(tokenizer: TextTokenizer) -> None:
    with pytest.raises(DataError, match="the model has no chat template"):
        compile_template(tokenizer)
