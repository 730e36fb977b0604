"""Data inspection: what a model would be trained on, computed before any training."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lora.config import DataConfig
from lora.data.chat.choose_template import choose_template
from lora.data.findings import describe_columns, describe_encoding, describe_placeholders
from lora.data.inspection_report import DataReport, Preview
from lora.data.prepare import PreparedData
from lora.data.prompting.rules import rules_for
from lora.data.reading.formats import COMPLETION, Example
from lora.data.reading.readers import Source, read_examples
from lora.data.reading.splitting import settings_of_split
from lora.data.sequences.embedding_rows import check_ids, tokenizer_for
from lora.data.sequences.encode import encode_examples
from lora.data.sequences.encoded import EncodedExamples, check_has_targets
from lora.data.sequences.packing import pack, packed_length, padded_length
from lora.data.tokenizers.subword import TextTokenizer
from lora.errors import DataError

_PREVIEW_TOKENS = 400
_COMPACT_PREVIEW_TOKENS = 4000  # the compact view leaves out their middle and shows the end
_LABEL_WORDS = frozenset(
    ("label", "labels", "category", "class", "sentiment", "intent", "topic", "target", "tag")
)
"""Names of columns beside a text that are likely its label."""
_MANY = 0.1  # fraction of the examples from which on cut ones are worth a warning


def inspect_data(
    source: Source,
    tokenizer: TextTokenizer,
    config: DataConfig,
    *,
    n_rows: int | None = None,
    n_previews: int = 3,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> DataReport:
    """Return a report on `source` as training data; faults of the data are in its `errors`.

    `n_rows` is of the model's embedding, with which the ids are compared; None: with nothing. No
    validation split is made: the figures cover all examples. Raises DependencyError if a file's
    format needs a package that is not installed.
    """
    report = DataReport(_name_of(source), config.max_length, config.learn_on)
    has_template = tokenizer.chat_template is not None
    try:
        report.notes += tokenizer.notes
        for setting in settings_of_split(config):
            report.notes.append(f"{setting} is not used here: the figures cover all examples")
        tokenizer, n_rows = tokenizer_for(tokenizer, config, n_rows)
        rules = rules_for(config, has_template=has_template)
        examples = read_examples(source, report.notes.append, rules=rules)
        _describe_examples(report, examples, config)
        if any(example.messages is not None for example in examples):
            tokenizer, report.template_origin = choose_template(tokenizer, config.chat_template)
        encoded = encode_examples(examples, tokenizer, config, on_progress)
        _count_tokens(report, examples, encoded, tokenizer)
        _count_special_tokens(report, encoded, tokenizer, config)
        _count_sequences(report, encoded, config)
        report.previews = _preview(examples, encoded, tokenizer, n_previews, _PREVIEW_TOKENS)
        _warn(report)
        check_ids(encoded.documents, examples, tokenizer, n_rows)
        check_has_targets(encoded, config.learn_on)
    except DataError as error:
        report.errors.append(str(error))
    return report


def inspect_prepared(
    data: PreparedData, source: Source, config: DataConfig, *, n_previews: int = 1
) -> DataReport:
    """Return the same report on `data`, which was prepared from `source` for training.

    Nothing is read or tokenised again. The figures cover the training examples, not the
    validation examples.
    """
    report = DataReport(_name_of(source), config.max_length, config.learn_on)
    report.template_origin = data.template_origin
    _describe_examples(report, data.train_examples, config)
    _count_tokens(report, data.train_examples, data.train_encoded, data.tokenizer)
    _count_special_tokens(report, data.train_encoded, data.tokenizer, config)
    report.n_rows, report.fill_fraction = len(data.train), data.train.fill_fraction
    report.previews = _preview(
        data.train_examples, data.train_encoded, data.tokenizer, n_previews, _COMPACT_PREVIEW_TOKENS
    )
    _warn(report)
    return report


def _name_of(source: Source) -> str:
    return str(source) if isinstance(source, str | Path) else "rows in memory"


def _describe_examples(report: DataReport, examples: Sequence[Example], config: DataConfig) -> None:
    report.n_examples = len(examples)
    report.formats = dict(
        Counter(e.format + (" (whole files)" if e.is_file else "") for e in examples)
    )
    report.n_duplicates = len(examples) - len({e.content_key() for e in examples})
    report.n_empty_answers = sum(e.has_empty_answer for e in examples)
    report.columns = dict(Counter(name for e in examples for name in e.columns))
    report.unused_columns, notes = describe_columns(examples)
    report.notes += notes
    words = _LABEL_WORDS.difference(config.columns)  # those are left out on purpose
    labels = [name for name in report.unused_columns if name.strip().lower() in words]
    if labels and "text" in report.formats:
        report.warnings.append(
            f"the texts are learned without the column {labels[0]}: if it is their label, set "
            f"columns label={labels[0]}"
        )
    report.n_media_placeholders, warning = describe_placeholders(examples)
    report.warnings += [warning] if warning else []
    if any(e.format == COMPLETION and e.messages and not e.n_prompt_messages for e in examples):
        report.notes.append(
            "prompt and completion are a user and an assistant turn, without the white space "
            "between them; set raw to train them as plain text"
        )
    report.n_flagged = sum(bool(e.off_flags) for e in examples)
    if report.n_flagged:
        report.notes.append(
            f"loss flags make answers of {report.n_flagged} of {len(examples)} examples context"
        )


def _count_tokens(
    report: DataReport,
    examples: Sequence[Example],
    encoded: EncodedExamples,
    tokenizer: TextTokenizer,
) -> None:
    documents, lengths = encoded.documents, encoded.lengths
    report.counts = encoded.counts
    report.dropped_fields = encoded.dropped_fields
    report.n_control_tokens = sum(encoded.control_tokens.values())
    report.n_plain_control_tokens = sum(encoded.plain_control_tokens.values())
    report.n_parted_prompts = len(encoded.parted_prompts)
    warnings, notes = describe_encoding(examples, encoded)
    report.warnings += warnings
    report.notes += notes
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
    ids = tokenizer.ids_of(config.special_tokens)
    for token, token_id in zip(config.special_tokens, ids, strict=True):
        report.special_tokens[token] = int((encoded.documents.ids == token_id).sum())


def _count_sequences(report: DataReport, encoded: EncodedExamples, config: DataConfig) -> None:
    sizes = np.diff(encoded.documents.starts)
    if config.is_packed and len(sizes):
        layout = pack(sizes, config.max_length, seed=0)
        width = packed_length(layout, sizes, config.max_length)
        report.n_rows = layout.n_sequences
    else:
        width, report.n_rows = padded_length(sizes, config.max_length), len(sizes)
    report.fill_fraction = len(encoded.documents.ids) / max(1, report.n_rows * width)


def _count_by_size(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Return the number of examples by powers of two of their tokens."""
    powers = [int(length).bit_length() for length in lengths]
    counts = Counter(powers)
    numbers = range(min(powers), max(powers) + 1)
    return [(1 << p >> 1, max(0, (1 << p) - 1), counts[p]) for p in numbers]


def _preview(
    examples: Sequence[Example],
    encoded: EncodedExamples,
    tokenizer: TextTokenizer,
    max_previews: int,
    max_tokens: int,
) -> list[Preview]:
    documents = encoded.documents
    _, firsts = np.unique(documents.example_indices, return_index=True)
    previews = []
    for number in firsts[:max_previews].tolist():
        ids, is_target = documents.tokens(number)
        shown = ids[:max_tokens].tolist()
        changes = np.flatnonzero(np.diff(is_target[: len(shown)])) + 1
        spans, n_decoded = [], 0
        for begin, end in itertools.pairwise([0, *changes.tolist(), len(shown)]):
            # Some decoders drop a leading space, so each part is cut out of the whole text.
            text = tokenizer.decode(shown[:end], skip_special_tokens=False)
            spans.append((text[n_decoded:], bool(is_target[begin])))
            n_decoded = len(text)
        source = examples[documents.example_indices[number]].source
        previews.append(Preview(source, spans, len(ids) - len(shown)))
    return previews


def _warn(report: DataReport) -> None:
    n, counts = report.n_examples, report.counts
    n_cut = counts.n_truncated + counts.n_dropped
    long = (
        f"{n_cut} of {n} examples are longer than max_length={report.max_length} and lose "
        f"{counts.n_cut_tokens:,} tokens"
    )
    found = {
        f"{report.n_duplicates} of {n} examples are copies of earlier ones": report.n_duplicates,
        f"{report.n_empty_answers} of {n} examples have an empty answer: the model learns to "
        "answer nothing": report.n_empty_answers,
        f"{counts.n_nothing_to_learn} of {n} examples have no target token and are left out": (
            counts.n_nothing_to_learn
        ),
        long: n_cut > _MANY * n,
        f"{counts.n_lost_turns} answers cannot be located in the chat template's output and are "
        "not trained on; set learn_on to 'all' to train on all tokens": counts.n_lost_turns,
        f"{report.n_without_end} of {n} examples have no target token that ends an answer: the "
        "model may never stop": report.n_without_end,
    }
    found |= {
        f"the special token {token!r} occurs in no example: its embedding row only learns that it "
        "never comes next": not count
        for token, count in report.special_tokens.items()
    }
    report.warnings += [warning for warning, is_so in found.items() if is_so]
    if 0 < n_cut <= _MANY * n:
        report.notes.append(long)
