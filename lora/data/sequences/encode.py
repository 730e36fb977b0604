"""Examples to tokens: which are learned, and what becomes of those that are too long.

Each text is tokenised whole, once. What is learned is found by the characters' places, so that the
tokens are those that the model meets when it is used. Conversations get no special tokens beside
the template's. Plain texts and completions begin as the tokenizer itself begins a text, and end in
the end-of-text token, which is always learned.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from lora.config import DataConfig
from lora.data.chat.choose_template import begin_ids, compile_template
from lora.data.chat.template import ChatTemplate, Span
from lora.data.chat.turns import SpannedText, render_conversation
from lora.data.reading.formats import Example
from lora.data.reading.tables import Faults
from lora.data.sequences.ahead import Ahead
from lora.data.sequences.documents import Documents, DocumentsBuilder
from lora.data.sequences.long_texts import PIECE_CHARACTERS, Ids, Mask, RowCutter, cut_text
from lora.data.sequences.masks import find_learned
from lora.data.tokenizers.offsets import PlaceFinder
from lora.data.tokenizers.subword import TextTokenizer
from lora.errors import DataError

OnProgress = Callable[[float], None]
"""Hears which fraction of the work is done."""

_CHUNK_EXAMPLES, _CHUNK_CHARACTERS = 512, 1 << 21
_QUIET_S, _PROGRESS_EVERY_S = 2.0, 0.5
_PIECES_AT_ONCE = 64


@dataclass(frozen=True)
class EncodingCounts:
    """What became of the examples."""

    n_examples: int = 0
    n_truncated: int = 0
    """Examples that lost their end because they were too long."""
    n_split: int = 0
    """Examples that were split over several rows because they were too long."""
    n_dropped: int = 0
    """Examples that were left out because they were too long."""
    n_cut_tokens: int = 0
    """Tokens of truncated and dropped examples that no row holds."""
    n_nothing_to_learn: int = 0
    """Examples of which no token is left to learn; no row holds them."""
    n_lost_turns: int = 0
    """Answers that the template shows in a way in which they cannot be found."""


@dataclass(frozen=True)
class EncodedExamples:
    """Examples as documents of at most `max_length` tokens, each with something to learn."""

    documents: Documents
    counts: EncodingCounts
    lengths: NDArray[np.int64]
    """Tokens of each example, before anything was cut, (n_examples,)."""


def encode_examples(
    examples: Sequence[Example],
    tokenizer: TextTokenizer,
    config: DataConfig,
    on_progress: OnProgress = lambda fraction: None,
    *,
    now: datetime | None = None,
) -> EncodedExamples:
    """Return the tokens of all examples, of at most `config.max_length` each.

    Args:
        examples: of any formats.
        tokenizer: with a chat template if there are conversations; see `choose_template`.
        config: what is learned, and what becomes of long examples. The text of a whole file is
            always split.
        on_progress: called a few times a second once it has taken two seconds.
        now: the date for chat templates that tell one; None asks the clock.

    Raises:
        DataError: the template refuses conversations; all are named in one message.
    """
    has_chats = any(example.messages is not None for example in examples)
    template = compile_template(tokenizer, now) if has_chats else None
    clock = _Clock(on_progress, len(examples))
    encoder = _Encoder(len(examples), tokenizer, config, template, clock)
    encoder.add_all(examples)
    return encoder.finish()


def check_learnable(encoded: EncodedExamples, learn_on: str) -> None:
    """Raise DataError if there is nothing to learn from at all, saying why."""
    if encoded.documents.n_target_tokens:
        return
    counts = encoded.counts
    reasons = {
        f"{counts.n_dropped} were dropped as too long": counts.n_dropped,
        f"{counts.n_truncated} were cut before their answers ended": counts.n_truncated,
        f"{counts.n_lost_turns} answers cannot be told from the rest of what the chat template "
        "makes of them": counts.n_lost_turns,
    }
    told = "; ".join(reason for reason, count in reasons.items() if count)
    told = told or "they have no answers"
    raise DataError(
        f"Training on {learn_on!r} tokens was asked for, and none of {counts.n_examples} examples "
        f"has a token to learn: {told}. Raise max_length, set learn_on to 'all', or give a chat "
        "template with generation blocks."
    )


@dataclass(frozen=True)
class _Text:
    """A text to tokenise, and how its tokens are used."""

    owner: int
    text: str
    spans: list[Span] | None
    """None: everything is learned."""
    is_plain: bool
    """Begins and ends in the tokenizer's special tokens."""


class _Encoder:
    """Turns chunks of examples into documents and keeps the accounts."""

    def __init__(
        self,
        n_examples: int,
        tokenizer: TextTokenizer,
        config: DataConfig,
        template: ChatTemplate | None,
        clock: _Clock,
    ) -> None:
        self._tokenizer, self._config = tokenizer, config
        self._template, self._clock = template, clock
        self._learns_all = config.learn_on == "all"
        self._places = PlaceFinder(tokenizer)
        self._begin, self._stops = begin_ids(tokenizer), frozenset(tokenizer.stop_ids)
        self._builder, self._faults = DocumentsBuilder(), Faults()
        self._lengths = np.zeros(n_examples, np.int64)
        self._fates = {
            name: np.zeros(n_examples, np.bool_)
            for name in ("kept", "truncated", "split", "dropped")
        }
        self._n_cut_tokens = self._n_lost_turns = 0

    def add_all(self, examples: Sequence[Example]) -> None:
        has_spans = not self._learns_all and any(example.text is None for example in examples)
        work = self._places.encode if has_spans else self._tokenizer.encode_fast
        with Ahead(work) as ahead:
            for chunk in _chunks(examples):
                texts: list[_Text] = []
                for number in chunk:
                    if examples[number].is_file:
                        self._tokenise(ahead, texts)  # documents keep the order of the examples
                        texts = []
                        self._add_file(ahead, number, examples[number].text or "")
                    else:
                        texts += self._find_texts(number, examples[number])
                self._tokenise(ahead, texts)
                self._clock.tick(chunk.stop)

    def finish(self) -> EncodedExamples:
        self._faults.raise_if_any(
            "The chat template refuses conversations:",
            "Mend or remove these examples, or give another template with chat_template.",
        )
        fates = self._fates
        dropped = fates["dropped"] & ~fates["kept"]
        counts = EncodingCounts(
            n_examples=len(self._lengths),
            n_truncated=int(fates["truncated"].sum()),
            n_split=int(fates["split"].sum()),
            n_dropped=int(dropped.sum()),
            n_cut_tokens=self._n_cut_tokens,
            n_nothing_to_learn=int((~fates["kept"] & ~dropped).sum()),
            n_lost_turns=self._n_lost_turns,
        )
        return EncodedExamples(self._builder.build(), counts, self._lengths)

    def _find_texts(self, number: int, example: Example) -> list[_Text]:
        if example.text is not None:
            return [_Text(number, example.text, None, True)] if example.text.strip() else []
        if example.prompt is not None and example.completion is not None:
            whole = example.prompt + example.completion
            return [_Text(number, whole, [(len(example.prompt), len(whole))], True)]
        try:
            texts = self._render(example)
        except DataError as error:
            self._faults.add(example.source, error)
            return []
        return [_Text(number, text.text, text.spans, False) for text in texts]

    def _render(self, example: Example) -> list[SpannedText]:
        template = cast(ChatTemplate, self._template)
        if self._learns_all:
            tools, documents = example.tools, example.documents
            text = template.render(example.messages or (), tools=tools, documents=documents)
            return [SpannedText(text, [])]
        found = render_conversation(template, example)
        self._n_lost_turns += found.n_lost_turns
        return found.texts

    def _tokenise(self, ahead: Ahead[list[Encoding]], texts: list[_Text]) -> None:
        if texts:
            ahead.put([t.text for t in texts], partial(self._add_texts, texts))

    def _add_texts(self, texts: list[_Text], encodings: list[Encoding]) -> None:
        for text, encoding in zip(texts, encodings, strict=True):
            ids = encoding.ids
            tokens = np.asarray(ids, np.int32)
            if text.spans is None or self._learns_all:
                learned = np.ones(len(ids), np.bool_)
            else:
                places = self._places.find(text.text, encoding, ids, tokens)
                learned = find_learned(text.text, text.spans, ids, places, self._stops)
            self._add(text, tokens, learned)

    def _add_file(self, ahead: Ahead[list[Encoding]], owner: int, text: str) -> None:
        pieces, n_done = cut_text(text, PIECE_CHARACTERS), 0
        rows = RowCutter(self._config.max_length)
        while batch := list(itertools.islice(pieces, _PIECES_AT_ONCE)):
            n_done += sum(map(len, batch))
            ahead.put(batch, partial(self._add_pieces, owner, rows, n_done == len(text)))
            self._clock.tick(owner + n_done / max(1, len(text)))

    def _add_pieces(
        self, owner: int, rows: RowCutter, are_last: bool, encodings: list[Encoding]
    ) -> None:
        for number, encoding in enumerate(encodings, 1):
            tokens = np.asarray(encoding.ids, np.int32)
            learned = np.ones(len(tokens), np.bool_)
            if rows.n_tokens == 0:
                tokens, learned = self._with_begin(tokens, learned)
            if are_last and number == len(encodings):
                tokens, learned = self._with_end(tokens, learned)
            for row in rows.cut(tokens, learned):
                self._keep(owner, *row)
        if are_last:
            self._keep(owner, *rows.rest())
            self._lengths[owner] = rows.n_tokens
            self._fates["split"][owner] = rows.n_tokens > self._config.max_length

    def _add(self, text: _Text, tokens: Ids, learned: Mask) -> None:
        if text.is_plain:
            tokens, learned = self._with_end(*self._with_begin(tokens, learned))
        self._lengths[text.owner] += len(tokens)
        for part in self._fit(len(tokens), text.owner):
            self._keep(text.owner, tokens[part], learned[part])

    def _keep(self, owner: int, tokens: Ids, learned: Mask) -> None:
        if learned[1:].any():  # a document's first token is never a target
            self._builder.add(tokens, learned, owner)
            self._fates["kept"][owner] = True

    def _with_begin(self, tokens: Ids, learned: Mask) -> tuple[Ids, Mask]:
        begin = self._begin
        if not begin or tokens[: len(begin)].tolist() == begin:
            return tokens, learned
        tokens = np.concatenate([np.asarray(begin, np.int32), tokens])
        return tokens, np.concatenate([np.full(len(begin), self._learns_all), learned])

    def _with_end(self, tokens: Ids, learned: Mask) -> tuple[Ids, Mask]:
        eos = self._tokenizer.eos_id
        if eos is None:
            return tokens, learned
        if len(tokens) == 0 or tokens[-1] != eos:
            tokens = np.append(tokens, np.int32(eos))
            learned = np.append(learned, True)
        learned[-1] = True
        return tokens, learned

    def _fit(self, n_tokens: int, owner: int) -> list[slice]:
        """Return the parts of a text that rows hold, and note what that means for its example."""
        most, long_examples = self._config.max_length, self._config.long_examples
        if n_tokens <= most:
            return [slice(0, n_tokens)]
        if long_examples == "split":
            self._fates["split"][owner] = True
            # A part begins with the last token of the one before, so that all are targets once.
            return [slice(first, first + most) for first in range(0, n_tokens - 1, most - 1)]
        self._fates["truncated" if long_examples == "truncate" else "dropped"][owner] = True
        kept = most if long_examples == "truncate" else 0
        self._n_cut_tokens += n_tokens - kept
        return [slice(0, kept)] if kept else []


def _chunks(examples: Sequence[Example]) -> Iterator[range]:
    """Yield the numbers of the examples, so many at a time that their tokens take little memory."""
    first = n_characters = 0
    for number, example in enumerate(examples):
        if number - first == _CHUNK_EXAMPLES or n_characters > _CHUNK_CHARACTERS:
            yield range(first, number)
            first, n_characters = number, 0
        n_characters += 0 if example.is_file else example.n_characters
    yield range(first, len(examples))


class _Clock:
    """Passes progress on, once it has taken some time, and not too often."""

    def __init__(self, on_progress: OnProgress, total: int) -> None:
        self._on_progress, self._total = on_progress, total
        self._next_s = time.monotonic() + _QUIET_S

    def tick(self, n_examples: float) -> None:
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _PROGRESS_EVERY_S
            self._on_progress(n_examples / self._total)
