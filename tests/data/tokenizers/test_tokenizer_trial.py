from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from lora.data.tokenizers import tokenizer_trial
from lora.data.tokenizers.subword import TextTokenizer, load_tokenizer
from lora.data.tokenizers.text_growth import why_it_grows
from lora.errors import DataError
from lora.runs.disk import CACHE_VARIABLE

DOUBLE = [{"type": "Replace", "pattern": {"String": "q"}, "content": "qq"}] * 40
RELEASED: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
    "albert": [
        {"type": "Replace", "pattern": {"String": "``"}, "content": '"'},
        {"type": "Replace", "pattern": {"String": "''"}, "content": '"'},
        {"type": "NFKD"},
        {"type": "StripAccents"},
        {"type": "Lowercase"},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
    ],
    "clip": [
        {"type": "NFC"},
        {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
        {"type": "Lowercase"},
    ],
    "spelling": [
        {"type": "Replace", "pattern": {"String": chr(0x400 + n)}, "content": "ab"}
        for n in range(80)
    ],
    "bytes": [{"type": "NFC"}, {"type": "ByteLevel"}],
    "bert": [{"type": "BertNormalizer", "lowercase": True}],
}


def write(folder: Path, **parts: Any) -> Path:
    """A tokenizer.json whose parts can be anything."""
    vocabulary = {"<unk>": 0, "q": 1, "a": 2, "</s>": 3}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    folder.mkdir(parents=True, exist_ok=True)
    contents = {**json.loads(backend.to_str()), **parts}
    (folder / "tokenizer.json").write_text(json.dumps(contents))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokenizers"


def sequence(steps: list[Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": steps}


HUGE_CHARSMAP = base64.b64encode(b"\xff\xff\xff\xff").decode()
LONG_CHARSMAP = base64.b64encode(b"\0\0\0\0" + b"z" * 5000 + b"\0").decode()


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
            "library panics: Precompiled",
        ),
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": HUGE_CHARSMAP}},
            "memory than .* MB, or crashes it: it ended by SIGABRT",
        ),
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": LONG_CHARSMAP}},
            "replaces a character with 5,000 bytes",
        ),
        ({"normalizer": sequence(DOUBLE)}, r"normalizers can make a text 1\.1e\+12 times as long"),
        (
            {"normalizer": sequence([{"type": "ByteLevel"}] * 30)},
            "normalizers can make a text .* times as long",
        ),
        (
            {
                "decoder": {
                    "type": "Sequence",
                    "decoders": [
                        {"type": "Replace", "pattern": {"Regex": "[q]"}, "content": "qq"},
                    ]
                    * 40,
                }
            },
            "decoders can make a text .* times as long",
        ),
        (
            {"normalizer": sequence([{"type": "Prepend", "prepend": "a" * 9999}])},
            "9,999 times as long",
        ),
        (
            {
                "added_tokens": [
                    {
                        "id": 4,
                        "content": "x" * 70_000,
                        "single_word": False,
                        "lstrip": False,
                        "rstrip": False,
                        "normalized": False,
                        "special": True,
                    }
                ]
            },
            "a token of 70,000 characters",
        ),
    ],
)
def test_a_file_that_ends_the_library_is_refused(
    tmp_path: Path, own_cache: Path, parts: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=rf"Cannot load the tokenizer .*tokenizer\.json: .*{words}"):
        load_tokenizer(write(tmp_path / "model", **parts))
    assert not own_cache.exists()


@pytest.mark.parametrize("name", RELEASED)
def test_normalizers_of_released_models_pass(name: str) -> None:
    assert why_it_grows(sequence(RELEASED[name]), "normalizer") is None
    nested = sequence([sequence(RELEASED[name])])
    assert why_it_grows(nested, "normalizer") is None


@pytest.mark.parametrize(
    "steps",
    [
        [{"type": "Replace", "pattern": {"Regex": f"[{n}]|x"}, "content": "xx"} for n in range(9)],
        [{"type": "Replace", "pattern": {"String": "ab"}, "content": "abab"}] * 9,
        [{"type": "Replace", "pattern": {"String": ""}, "content": "yz"}] * 9,
        [
            step
            for a, b in ("pr", "rp") * 9
            for step in [{"type": "Replace", "pattern": {"String": a}, "content": b + b}]
        ],
        [
            {"type": "NFKD"},
            {"type": "Replace", "pattern": {"String": "\u0635"}, "content": "\ufdfa"},
        ]
        * 9,
        [{"type": "Lowercase"}] * 999,
        [{"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 99}],
    ],
)
def test_steps_that_feed_each_other_are_found(steps: list[dict[str, Any]]) -> None:
    assert why_it_grows(sequence(steps), "normalizer") is not None


@pytest.mark.parametrize("junk", [None, 3, "x", [], {}, {"normalizers": 3}, {"pattern": [1]}])
def test_junk_for_a_normalizer_is_left_to_the_library(junk: Any) -> None:
    assert why_it_grows(junk, "normalizer") is None
    assert why_it_grows({"normalizers": [junk, {"type": "NFC"}]}, "normalizer") is None


def test_a_file_is_tried_once(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = list[bytes]()
    run = tokenizer_trial._try_in_subprocess

    def count(module: str, data: bytes, limit: int) -> str | None:
        tries.append(data)
        return run(module, data, limit)

    monkeypatch.setattr(tokenizer_trial, "_try_in_subprocess", count)
    first, copy = write(tmp_path / "a"), write(tmp_path / "b")
    other = write(tmp_path / "c", normalizer={"type": "NFC"})
    for folder in (first, first, copy, other):
        load_tokenizer(folder)
    assert len(tries) == 2
    assert len(list(own_cache.iterdir())) == 2


def test_without_a_place_for_digests_it_is_tried_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    assert load_tokenizer(write(tmp_path / "model")).encode("a") == [2]


def test_a_trial_that_takes_too_long_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorter = "import lora.data.tokenizers.tokenizer_trial as t; t.MAX_TRIAL_S = 0.01; from"
    start = tokenizer_trial._START.replace("from", shorter)
    monkeypatch.setattr(tokenizer_trial, "_START", start)
    began_s = time.monotonic()
    with pytest.raises(DataError, match="takes more than 120 s"):
        load_tokenizer(write(tmp_path / "model"))
    assert time.monotonic() - began_s < 20


class PanicException(BaseException):
    """Named as the library's own, which cannot be made here."""


class Panicking:
    """A backend that panics on every text."""

    def encode(self, *_: Any, **__: Any) -> Any:
        raise PanicException("called unwrap on None")

    encode_batch = encode_batch_fast = decode = encode


def test_a_panic_on_a_text_is_an_error_with_words() -> None:
    tokenizer = TextTokenizer(Panicking())  # type: ignore[arg-type]
    calls = (
        lambda: tokenizer.encode("x"),
        lambda: tokenizer.encode_fast(["x"]),
        lambda: tokenizer.encode_with_offsets(["x"]),
        lambda: tokenizer.decode([1]),
    )
    for call in calls:
        with pytest.raises(DataError, match="library panics: called unwrap on None"):
            call()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], "dropout": 0.5},
            "BPE dropout of 0.5 is off",
        ),
        (
            {
                "type": "Unigram",
                "vocab": [["<unk>", 0], ["a", -1], ["b", -1], ["ab", -1]],
                "unk_id": 0,
                "alpha": 0.1,
                "nbest_size": 64,
            },
            "sampling of subwords .* is off",
        ),
    ],
)
def test_sampling_of_tokens_is_off_with_a_note(
    tmp_path: Path, model: dict[str, Any], words: str
) -> None:
    tokenizer = load_tokenizer(write(tmp_path / "model", model=model))
    assert len({tuple(tokenizer.encode("ab" * 50)) for _ in range(8)}) == 1
    if model["type"] == "BPE":
        (note,) = tokenizer.notes
        assert words in note
        tokenizer.save(tmp_path / "saved")
        assert load_tokenizer(tmp_path / "saved").notes == ()
