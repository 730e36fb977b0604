"""What a model would learn from some data, found out before anything is trained."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lora.config import DataConfig
from lora.data.chat.choose_template import choose_template
from lora.data.inspection_view import print_report
from lora.data.prepare import PreparedData
from lora.data.reading.formats import Example
from lora.data.reading.readers import Source, read_examples
from lora.data.sequences.encode import encode_examples
from lora.data.sequences.encoded import EncodedExamples, EncodingCounts, check_has_targets
from lora.data.sequences.packing import pack, padded_length
from lora.data.tokenizers.subword import TextTokenizer
from lora.errors import DataError

__all__ = ["DataReport", "Preview", "inspect_data", "inspect_prepared", "print_report"]

_PREVIEW_TOKENS = 400
_COMPACT_PREVIEW_TOKENS = 4000  # the compact view takes their middle out and shows the end
_MUCH = 0.1  # of the examples: from here on a cut is worth a warning


@dataclass(frozen=True)
class Preview:
    """The beginning of one example as the model meets it."""

    source: str
    spans: list[tuple[str, bool]]
    """Text, and whether its tokens are learned."""
    n_more_tokens: int
    """Tokens behind what is shown."""


@dataclass
class DataReport:
    """What was understood, and what would be learned."""

    source: str
    max_length: int
    learn_on: str
    errors: list[str] = field(default_factory=list)
    """What has to be mended before training is possible."""
    warnings: list[str] = field(default_factory=list)
    """What is likely not meant."""
    notes: list[str] = field(default_factory=list)
    n_examples: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    """Examples by format."""
    template_origin: str | None = None
    """Where the chat template comes from; None without conversations."""
    quantiles_tokens: dict[str, int] = field(default_factory=dict)
    """Tokens of the shortest, median, 95th of a hundred and longest example, before any cut."""
    histogram: list[tuple[int, int, int]] = field(default_factory=list)
    """Fewest tokens, most tokens, number of examples."""
    n_learned_tokens: int = 0
    n_ignored_tokens: int = 0
    """Tokens in rows that are read and not learned."""
    n_rows: int = 0
    fill_fraction: float = 0.0
    """Share of the rows' places that hold tokens and no padding."""
    counts: EncodingCounts = field(default_factory=EncodingCounts)
    """What became of examples that are too long or teach nothing."""
    n_without_end: int = 0
    """Uncut examples in which no end of a turn or of the text is learned."""
    n_duplicates: int = 0
    """Examples that say exactly what an earlier one says."""
    n_empty_answers: int = 0
    special_tokens: dict[str, int] = field(default_factory=dict)
    """How often each token that was added stands in the rows."""
    previews: list[Preview] = field(default_factory=list)

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)


def inspect_data(
    source: Source,
    tokenizer: TextTokenizer,
    config: DataConfig,
    *,
    n_previews: int = 3,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> DataReport:
    """Return what training would make of `source`; faults of the data stand in `errors`.

    Nothing is held out here: the figures are of all examples. Raises DependencyError if a file's
    format needs a package that is not installed.
    """
    report = DataReport(_name_of(source), config.max_length, config.learn_on)
    try:
        if config.special_tokens:
            tokenizer = tokenizer.with_tokens(config.special_tokens)
        examples = read_examples(source, report.notes.append)
        _describe_examples(report, examples)
        if any(example.messages is not None for example in examples):
            tokenizer, report.template_origin = choose_template(tokenizer, config.chat_template)
        encoded = encode_examples(examples, tokenizer, config, on_progress)
        _describe_tokens(report, encoded, tokenizer)
        _count_special_tokens(report, encoded, tokenizer, config)
        _count_rows(report, encoded, config)
        report.previews = _preview(examples, encoded, tokenizer, n_previews, _PREVIEW_TOKENS)
        _warn(report)
        check_has_targets(encoded, config.learn_on)
    except DataError as error:
        report.errors.append(str(error))
    return report


def inspect_prepared(
    data: PreparedData, source: Source, config: DataConfig, *, n_previews: int = 1
) -> DataReport:
    """Return the same report of `data`, made from `source` and about to be learned.

    Nothing is read or tokenised again. The figures are of the examples that are learned from;
    those that are held out do not count.
    """
    report = DataReport(_name_of(source), config.max_length, config.learn_on)
    report.template_origin = data.template_origin
    _describe_examples(report, data.train_examples)
    _describe_tokens(report, data.train_encoded, data.tokenizer)
    _count_special_tokens(report, data.train_encoded, data.tokenizer, config)
    report.n_rows, report.fill_fraction = len(data.train), data.train.fill_fraction
    report.previews = _preview(
        data.train_examples, data.train_encoded, data.tokenizer, n_previews, _COMPACT_PREVIEW_TOKENS
    )
    _warn(report)
    return report


def _name_of(source: Source) -> str:
    return str(source) if isinstance(source, str | Path) else "rows in memory"


def _describe_examples(report: DataReport, examples: Sequence[Example]) -> None:
    report.n_examples = len(examples)
    report.formats = dict(
        Counter(e.format + (" (whole files)" if e.is_file else "") for e in examples)
    )
    report.n_duplicates = len(examples) - len({e.content_key() for e in examples})
    report.n_empty_answers = sum(e.has_empty_answer for e in examples)


def _describe_tokens(
    report: DataReport, encoded: EncodedExamples, tokenizer: TextTokenizer
) -> None:
    documents, lengths = encoded.documents, encoded.lengths
    report.counts = encoded.counts
    report.n_learned_tokens = documents.n_target_tokens
    report.n_ignored_tokens = len(documents.ids) - report.n_learned_tokens
    values = np.quantile(lengths, [0, 0.5, 0.95, 1], method="nearest").tolist()
    names = ("shortest", "median", "95 %", "longest")
    report.quantiles_tokens = dict(zip(names, values, strict=True))
    report.histogram = _count_by_size(lengths)
    if len(documents):
        is_end = np.isin(documents.labels, tokenizer.stop_ids).astype(np.int64)
        has_end = np.add.reduceat(is_end, documents.starts[:-1]) > 0
        is_whole = lengths[documents.example_indices] <= report.max_length
        report.n_without_end = int((is_whole & ~has_end).sum())


def _count_special_tokens(
    report: DataReport, encoded: EncodedExamples, tokenizer: TextTokenizer, config: DataConfig
) -> None:
    numbers = tokenizer.ids_of(config.special_tokens)
    for token, number in zip(config.special_tokens, numbers, strict=True):
        report.special_tokens[token] = int((encoded.documents.ids == number).sum())


def _count_rows(report: DataReport, encoded: EncodedExamples, config: DataConfig) -> None:
    sizes = np.diff(encoded.documents.starts)
    width = config.max_length if config.packing else padded_length(sizes, config.max_length)
    packed = config.packing and len(sizes)
    report.n_rows = pack(sizes, width, seed=0).n_sequences if packed else len(sizes)
    report.fill_fraction = len(encoded.documents.ids) / max(1, report.n_rows * width)


def _count_by_size(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Return numbers of examples by powers of two of their tokens."""
    powers = [int(length).bit_length() for length in lengths]
    counts = Counter(powers)
    numbers = range(min(powers), max(powers) + 1)
    return [(1 << p >> 1, max(0, (1 << p) - 1), counts[p]) for p in numbers]


def _preview(
    examples: Sequence[Example],
    encoded: EncodedExamples,
    tokenizer: TextTokenizer,
    most: int,
    most_tokens: int,
) -> list[Preview]:
    documents = encoded.documents
    _, firsts = np.unique(documents.example_indices, return_index=True)
    previews = []
    for number in firsts[:most].tolist():
        ids, learned = documents.tokens(number)
        shown = ids[:most_tokens].tolist()
        changes = np.flatnonzero(np.diff(learned[: len(shown)])) + 1
        spans, told = [], 0
        for begin, end in itertools.pairwise([0, *changes.tolist(), len(shown)]):
            # Some decoders drop a space at the beginning, so each part is cut out of the whole.
            text = tokenizer.decode(shown[:end], skip_special_tokens=False)
            spans.append((text[told:], bool(learned[begin])))
            told = len(text)
        source = examples[documents.example_indices[number]].source
        previews.append(Preview(source, spans, len(ids) - len(shown)))
    return previews


def _warn(report: DataReport) -> None:
    n, counts = report.n_examples, report.counts
    cut = counts.n_truncated + counts.n_dropped
    long = (
        f"{cut} of {n} examples are longer than max_length={report.max_length} and lose "
        f"{counts.n_cut_tokens:,} tokens"
    )
    told = {
        f"{report.n_duplicates} of {n} examples are copies of earlier ones": report.n_duplicates,
        f"{report.n_empty_answers} of {n} examples have an empty answer: the model learns to say "
        "nothing": report.n_empty_answers,
        f"{counts.n_nothing_to_learn} of {n} examples have no token to learn and are left out": (
            counts.n_nothing_to_learn
        ),
        long: cut > _MUCH * n,
        f"{counts.n_lost_turns} answers cannot be told from the rest of what the chat template "
        "makes of them, and are not learned; set learn_on to 'all' to learn all": (
            counts.n_lost_turns
        ),
        f"{report.n_without_end} of {n} examples learn no token that ends an answer: the model may "
        "never stop": report.n_without_end,
    }
    told |= {
        f"the special token {token!r} never appears in the examples: its row learns only that it "
        "is not said": not count
        for token, count in report.special_tokens.items()
    }
    report.warnings += [warning for warning, is_so in told.items() if is_so]
    if 0 < cut <= _MUCH * n:
        report.notes.append(long)
