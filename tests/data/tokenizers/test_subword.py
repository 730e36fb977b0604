"""TextTokenizer and load_tokenizer: what a folder says, what is missing, what ends an answer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from lora.data.tokenizers.subword import TextTokenizer, find_stop_ids, load_tokenizer
from lora.errors import DataError

TEXTS = [
    "def f(x):\n    return x ** 2  # squared\n",
    "naïve café — “quoted” … Ω≈ç√∫ 日本語 한국어 עברית",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b \u00a0",
    "      many     spaces\t\ttabs \n\n\n newlines \r\n",
    "1234567890 3.14159 1e-9 0xFF",
    "",
    " ",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"


def build_backend() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    return backend


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Return a function: contents of the JSON files by name -> a folder with tokenizer.json."""

    def make(**files: Any) -> Path:
        build_backend().save(str(tmp_path / "tokenizer.json"))
        files.setdefault("tokenizer_config", {"eos_token": "<|endoftext|>"})
        for name, value in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
        return tmp_path

    return make


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_comes_back(make_folder: Callable[..., Path], text: str) -> None:
    tokenizer = load_tokenizer(make_folder())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_offsets_are_characters_and_cover_the_text(make_folder: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(make_folder())
    for text in TEXTS:
        encoded = tokenizer.backend.encode(text, add_special_tokens=False)
        ids, spans = encoded.ids, encoded.offsets
        assert ids == tokenizer.encode(text)
        covered = {index for start, end in spans for index in range(start, end)}
        assert covered == set(range(len(text)))
        assert [start for start, _ in spans] == sorted(start for start, _ in spans)
        for number, (start, end) in zip(ids, spans, strict=True):
            piece = tokenizer.decode([number], skip_special_tokens=False)
            if "\ufffd" not in piece:
                assert piece == text[start:end]


def test_a_batch_is_what_its_texts_are_alone(make_folder: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(make_folder())
    found = [encoded.ids for encoded in tokenizer.encode_fast(TEXTS)]
    assert found == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_fast([]) == []


def test_special_tokens_in_a_text_are_one_token_each(make_folder: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(make_folder())
    ids = tokenizer.encode("a<|im_end|>b")
    assert ids[1] == tokenizer.backend.token_to_id("<|im_end|>")
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|im_end|>b"


def test_names_are_read_from_both_files_and_null_names_nothing(
    make_folder: Callable[..., Path],
) -> None:
    folder = make_folder(
        tokenizer_config={
            "eos_token": {"content": "<|im_end|>", "lstrip": False},
            "bos_token": None,
        },
        special_tokens_map={"bos_token": "<|im_start|>", "eos_token": "<|endoftext|>"},
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_id == tokenizer.backend.token_to_id("<|im_end|>")
    assert tokenizer.bos_token == "<|im_start|>"
    assert tokenizer.pad_token is None
    assert tokenizer.pad_id is None


def test_vocab_size_counts_added_tokens(make_folder: Callable[..., Path]) -> None:
    folder = make_folder()
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    before = load_tokenizer(folder).vocab_size
    backend.add_special_tokens(["<new>"])
    backend.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).vocab_size == before + 1


def test_stops_are_the_end_of_text_of_generation_and_of_the_turn(
    make_folder: Callable[..., Path],
) -> None:
    folder = make_folder(
        tokenizer_config={"eos_token": "<|endoftext|>", "chat_template": TEMPLATE},
        generation_config={"eos_token_id": [0, 7, 10**6]},
    )
    # 0 is <|endoftext|>, 2 is <|im_end|>, which the template uses; 10**6 is no token.
    assert load_tokenizer(folder).stop_ids == (0, 2, 7)


def test_a_template_with_no_known_end_adds_no_stop(make_folder: Callable[..., Path]) -> None:
    folder = make_folder(
        tokenizer_config={"eos_token": "<|endoftext|>", "chat_template": "{{ messages }}"},
        generation_config={"eos_token_id": 0},
    )
    assert load_tokenizer(folder).stop_ids == (0,)


def test_a_plain_word_that_looks_like_an_end_is_none() -> None:
    backend = Tokenizer(models.BPE(vocab={"</s>": 0, "a": 1, "<|end|>": 2}, merges=[]))
    backend.add_tokens([AddedToken("<|end|>", special=False)])
    assert find_stop_ids(backend, "a", "a</s>") == (1,)
    assert find_stop_ids(backend, "a", "a<|end|>") == (1, 2)


@pytest.mark.parametrize("where", ["jinja", "config", "named"])
def test_the_chat_template_is_found(make_folder: Callable[..., Path], where: str) -> None:
    config: dict[str, Any] = {"eos_token": "<|endoftext|>"}
    if where == "config":
        config["chat_template"] = TEMPLATE
    if where == "named":
        named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]
        config["chat_template"] = named
    folder = make_folder(tokenizer_config=config)
    if where == "jinja":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert load_tokenizer(folder).chat_template == TEMPLATE


def test_saved_and_loaded_is_the_same(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder(
        tokenizer_config={
            "eos_token": "<|im_end|>",
            "bos_token": "<|im_start|>",
            "pad_token": "<|endoftext|>",
            "chat_template": TEMPLATE,
        },
        generation_config={"eos_token_id": [9]},
    )
    tokenizer = load_tokenizer(folder)
    tokenizer.save(tmp_path / "new" / "place")
    again = load_tokenizer(tmp_path / "new" / "place")
    assert again.backend.to_str() == tokenizer.backend.to_str()
    for name in ("bos_token", "eos_token", "pad_token", "chat_template", "stop_ids"):
        assert getattr(again, name) == getattr(tokenizer, name), name
    assert again.stop_ids == (2, 9)


def test_saving_leaves_a_generation_config_that_is_there(
    make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_folder(generation_config={"eos_token_id": 0, "temperature": 0.6})
    load_tokenizer(folder).save(folder)
    kept = json.loads((folder / "generation_config.json").read_text())
    assert kept == {"eos_token_id": 0, "temperature": 0.6}


def test_transformers_reads_what_was_saved(
    make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    config = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    tokenizer = load_tokenizer(make_folder(tokenizer_config=config))
    tokenizer.save(tmp_path / "saved")
    other = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in TEXTS:
        assert other.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert other.eos_token_id == tokenizer.eos_id
    assert other.chat_template == TEMPLATE


def test_truncation_and_padding_in_the_file_are_switched_off(
    make_folder: Callable[..., Path],
) -> None:
    folder = make_folder()
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(folder / "tokenizer.json"))
    text = "a long enough text"
    assert load_tokenizer(folder).encode(text) == build_backend().encode(text).ids


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], ["no tokenizer", "tokenizer.json is needed"]),
        (["vocab.json", "merges.txt"], ["only merges.txt, vocab.json", "save_pretrained"]),
        (
            ["tokenizer.model"],
            ["only tokenizer.model", "pip install sentencepiece", "without a fast version"],
        ),
    ],
)
def test_a_missing_file_is_an_error_with_how_to_create_it(
    tmp_path: Path, names: list[str], words: list[str]
) -> None:
    for name in names:
        (tmp_path / name).write_text("")
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path)
    assert all(word in str(caught.value) for word in words)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("tokenizer.json", b"{", "Cannot load the tokenizer"),
        ("tokenizer.json", b"{}", "Cannot load the tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "Cannot load the tokenizer"),
        ("tokenizer_config.json", b"[1]", "holds a list"),
        ("tokenizer_config.json", b"{,}", "as JSON"),
        ("tokenizer_config.json", b"[" * 100_000, "as JSON"),
        ("generation_config.json", b"\xff", "as JSON"),
        ("chat_template.jinja", b"\xff\xfe", "as text: "),
    ],
)
def test_a_damaged_file_is_named(
    make_folder: Callable[..., Path], name: str, content: bytes, word: str
) -> None:
    folder = make_folder()
    (folder / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_tokenizer(folder)
    assert name in str(caught.value)
    assert word in str(caught.value)


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_a_named_token_must_exist(make_folder: Callable[..., Path], name: str) -> None:
    folder = make_folder(tokenizer_config={name: "<nope>"})
    with pytest.raises(DataError, match=f"{name} is '<nope>'"):
        load_tokenizer(folder)


def test_a_padding_token_that_does_not_exist_is_none(make_folder: Callable[..., Path]) -> None:
    assert load_tokenizer(make_folder(tokenizer_config={"pad_token": "[PAD]"})).pad_token is None


@pytest.mark.parametrize("method", ["encode", "encode_fast"])
def test_a_lone_surrogate_is_named(make_folder: Callable[..., Path], method: str) -> None:
    tokenizer: TextTokenizer = load_tokenizer(make_folder())
    text = "good \ud83d bad"
    argument: Any = ["fine", text] if method == "encode_fast" else text
    with pytest.raises(DataError, match=r"character 5 is a lone surrogate"):
        getattr(tokenizer, method)(argument)


def test_a_text_must_be_a_string(make_folder: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(make_folder())
    with pytest.raises(DataError, match="of type int"):
        tokenizer.encode_fast(["a", 3])  # type: ignore[list-item]


def test_added_tokens_are_never_split_and_shown(make_folder: Callable[..., Path]) -> None:
    before = load_tokenizer(make_folder())
    size = before.vocab_size
    added = before.with_tokens(["<|tool|>", "<|im_end|>", "def"])
    assert (before.vocab_size, added.vocab_size) == (size, size + 1 + (not before_knows(before)))
    assert before.n_known is None
    assert added.n_known == size
    tool, end, word = added.ids_of(["<|tool|>", "<|im_end|>", "def"])
    assert tool == size
    assert end == before.ids_of(["<|im_end|>"])[0]
    ids = added.encode("x<|tool|>undefined<|tool|>")
    assert ids.count(tool) == 2
    assert ids.count(word) == 1
    assert added.decode(ids) == "x<|tool|>undefined<|tool|>"
    assert tool not in before.encode("<|tool|>")


def before_knows(tokenizer: TextTokenizer) -> bool:
    return tokenizer.backend.token_to_id("def") is not None


def test_an_added_end_of_a_turn_ends_answers(make_folder: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(make_folder())
    tokenizer = dataclasses.replace(tokenizer, chat_template="{{ x }}<|eot_id|>")
    added = tokenizer.with_tokens(["<|eot_id|>"])
    assert set(added.stop_ids) - set(tokenizer.stop_ids) == set(added.ids_of(["<|eot_id|>"]))


def test_added_tokens_come_back_from_a_folder(
    make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    added = load_tokenizer(make_folder()).with_tokens(["<|tool|>"])
    added.save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again.encode("a<|tool|>b") == added.encode("a<|tool|>b")
    assert again.with_tokens(["<|tool|>"]).n_known is None


def test_a_token_that_is_not_found_as_one_is_refused(make_folder: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(make_folder())
    tokenizer.backend.add_tokens([AddedToken("<|w|>", single_word=True)])
    with pytest.raises(
        DataError, match=r"special token '<\|w\|>': .* 'a<\|w\|>b' into .*<\|word\|>"
    ):
        tokenizer.with_tokens(["<|w|>"])
