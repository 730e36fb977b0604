"""The character model's text: read, checked, turned into the tokens of the right vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora.data.reading.embedded import Corpus, code, corpus_from_file, prose
from lora.data.tokenizers.characters import CharTokenizer
from models.bigram_lm_v2 import BigramLanguageModel, BigramSizes, load_bigram, read_state
from models.classic_settings import ClassicSettings

EVAL_TOKENS = 50_000
SAMPLE_CHARACTERS = 240


@dataclass(frozen=True)
class Text:
    """A corpus as tokens, with its tokenizer."""

    tokenizer: CharTokenizer
    train: Tensor
    validation: Tensor
    described: str
    prompt: str


def read_text(
    data_path: str,
    base_path: Path | None,
    *,
    adapts: bool,
    on_message: Callable[[str], None] = print,
) -> Text:
    """Return the run's text as tokens of the base's vocabulary, or of its own for a new base.

    `on_message` is called with a note on unknown characters. Raises DataError for a text that is
    missing or has too many of them.
    """
    if data_path:
        corpus = corpus_from_file(Path(data_path))
    else:
        corpus = code() if adapts else prose()
    if base_path is not None:
        tokenizer = load_vocabulary(base_path, corpus)
    elif data_path:
        tokenizer = CharTokenizer.from_text(corpus.train + corpus.validation)
    else:
        tokenizer = CharTokenizer()
    note = tokenizer.check(corpus.train + corpus.validation, corpus.described)
    if note:
        on_message(note)
    train, validation = (
        torch.from_numpy(tokenizer.encode(t)) for t in (corpus.train, corpus.validation)
    )
    prompt = corpus.validation[:32] if data_path else ("def " if adapts else "The ")
    return Text(tokenizer, train, validation, corpus.described, prompt)


def load_base(
    settings: ClassicSettings, base_path: Path, on_message: Callable[[str], None] = print
) -> tuple[BigramLanguageModel, Text]:
    """Return the base and the run's text in the base's vocabulary."""
    if base_path.is_dir() or not base_path.exists():
        model = load_bigram(base_path)
        return model, read_text(settings.data_path, base_path, adapts=True, on_message=on_message)
    text = read_text(settings.data_path, base_path, adapts=True, on_message=on_message)
    sizes = BigramSizes(
        text.tokenizer.vocab_size,
        settings.n_embd,
        settings.n_head,
        settings.n_layer,
        settings.block_size,
        settings.dropout,
    )
    return load_bigram(base_path, sizes), text


def write_sample(model: BigramLanguageModel, text: Text, device: torch.device) -> str:
    """Return the model's continuation of the text's prompt, from the same seed each time."""
    start = torch.from_numpy(text.tokenizer.encode(text.prompt))[None].to(device)
    generator = torch.Generator(device).manual_seed(1)
    tokens = model.generate(start, SAMPLE_CHARACTERS, temperature=0.8, generator=generator)
    return text.tokenizer.decode(tokens[0].tolist())


def load_vocabulary(base_path: Path, corpus: Corpus) -> CharTokenizer:
    """Return the base's vocabulary: `vocab.json` beside its weights, or the text's own.

    A bare state dict has none: then it is the fixed one if its size fits, else the text's.
    """
    beside = (base_path if base_path.is_dir() else base_path.parent) / "vocab.json"
    if beside.is_file() or base_path.is_dir():
        return CharTokenizer.load(beside)
    rows = _count_rows(base_path)
    fixed = CharTokenizer()
    return (
        fixed
        if rows == fixed.vocab_size
        else CharTokenizer.from_text(corpus.train + corpus.validation)
    )


def _count_rows(path: Path) -> int:
    """Return V of a bare state dict, from its token embedding."""
    table = read_state(path).get("token_embedding_table.weight")
    return 0 if table is None else table.shape[0]
