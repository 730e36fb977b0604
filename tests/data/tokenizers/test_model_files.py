from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora.data.tokenizers.model_files import read_tokenizer_files
from lora.errors import DataError

NAMED = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (-1, r"eos_token_id=-1: allowed: ids from 0 to 4,294,967,295"),
        ([2, 2**32], r"eos_token_id=\[2, 4294967296\]"),
        (10**400, r"eos_token_id=10{59}…: allowed"),
        ([True], r"eos_token_id=\[True\]"),
        ("2", r"eos_token_id='2'"),
        (2.5, r"eos_token_id=2\.5"),
        ([[2]], r"eos_token_id=\[\[2\]\]"),
    ],
)
def test_ids_that_no_token_has_are_refused(tmp_path: Path, ids: Any, words: str) -> None:
    with pytest.raises(DataError, match=rf"generation_config\.json: {words}"):
        read_tokenizer_files(write(tmp_path, generation_config={"eos_token_id": ids}))


@pytest.mark.parametrize(
    "template",
    [[["default", "x"]], [{"name": ["default"], "template": "x"}], {"default": "x"}, 3, ["x"]],
)
def test_templates_of_no_known_form_are_refused(tmp_path: Path, template: Any) -> None:
    with pytest.raises(DataError, match=r"chat_template=.*allowed: a string, or a list of objects"):
        read_tokenizer_files(write(tmp_path, tokenizer_config={"chat_template": template}))


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    write(
        tmp_path,
        tokenizer_config={"eos_token": ["</s>"], "chat_template": 1},
        special_tokens_map={"pad_token": 0},
        generation_config={"eos_token_id": -1},
    )
    words = (
        r"(?s)tokenizer_config\.json: eos_token=.*special_tokens_map\.json: pad_token=0.*"
        r"chat_template=1.*eos_token_id=-1"
    )
    with pytest.raises(DataError, match=words):
        read_tokenizer_files(tmp_path)


def test_what_good_files_say(tmp_path: Path) -> None:
    write(
        tmp_path,
        tokenizer_config={"eos_token": {"content": "</s>"}, "chat_template": NAMED},
        special_tokens_map={"eos_token": "<e>", "bos_token": "<s>"},
        generation_config={"eos_token_id": [2, 7]},
    )
    found = read_tokenizer_files(tmp_path)
    assert found.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": None}
    assert (found.chat_template, found.eos_ids, found.notes) == ("D", (2, 7), ())


def test_files_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    text = "\ufeff" + json.dumps({"bos_token": "<s>"})
    (tmp_path / "tokenizer_config.json").write_text(text, encoding="utf-8")
    assert read_tokenizer_files(tmp_path).special_tokens["bos_token"] == "<s>"


def test_named_templates_without_a_default_are_noted(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config={"chat_template": NAMED[:1]})
    found = read_tokenizer_files(tmp_path)
    assert found.chat_template is None
    assert "has the chat templates tools and none called default" in found.notes[0]
