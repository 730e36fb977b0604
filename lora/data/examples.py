"""Examples to tokens: which are learned, and what becomes of those that are too long.

Each text is tokenised whole, once. What is learned is found by the characters' places, so that the
tokens are those that the model meets when it is used. Conversations get no special tokens beside
the template's. Plain texts and completions begin as the tokenizer itself begins a text, and end in
the end-of-text token, which is always learned.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import cast

import numpy as np
from numpy.typing import NDArray

from lora.config import DataConfig
from lora.data.chat import ChatTemplate, Span
from lora.data.documents import Documents, DocumentsBuilder
from lora.data.formats import Example
from lora.data.masks import find_learned
from lora.data.tables import Faults
from lora.data.templates import begin_ids, compile_template
from lora.data.tokenizers import TextTokenizer
from lora.data.turns import SpannedText, render_conversation
from lora.errors import DataError

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]
OnProgress = Callable[[float], None]
"""Hears which fraction of the work is done."""

_CHUNK_EXAMPLES = 512
_QUIET_S, _PROGRESS_EVERY_S = 2.0, 0.5
_PIECE_CHARACTERS = 1 << 16  # a file is tokenised in such pieces, many at a time
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
    for first in range(0, len(examples), _CHUNK_EXAMPLES):
        encoder.add_chunk(first, examples[first : first + _CHUNK_EXAMPLES])
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
        self._begin, self._stops = begin_ids(tokenizer), frozenset(tokenizer.stop_ids)
        self._builder, self._faults = DocumentsBuilder(), Faults()
        self._lengths = np.zeros(n_examples, np.int64)
        self._fates = {
            name: np.zeros(n_examples, np.bool_)
            for name in ("kept", "truncated", "split", "dropped")
        }
        self._n_cut_tokens = self._n_lost_turns = 0

    def add_chunk(self, first: int, examples: Sequence[Example]) -> None:
        texts: list[_Text] = []
        for number, example in enumerate(examples, first):
            if example.is_file:
                self._tokenise(texts)  # documents keep the order of the examples
                texts = []
                self._add_file(number, example.text or "")
            else:
                texts += self._find_texts(number, example)
        self._tokenise(texts)
        self._clock.tick(first + len(examples))

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

    def _tokenise(self, texts: list[_Text]) -> None:
        if self._learns_all or all(text.spans is None for text in texts):
            for text, ids in zip(
                texts, self._tokenizer.encode_batch([t.text for t in texts]), strict=True
            ):
                self._add(text, ids, np.ones(len(ids), np.bool_))
            return
        backend = self._tokenizer.backend
        encodings = backend.encode_batch([t.text for t in texts], add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            ids = encoding.ids
            learned = np.ones(len(ids), np.bool_)
            if text.spans is not None:
                learned = find_learned(text.text, text.spans, ids, encoding.offsets, self._stops)
            self._add(text, ids, learned)

    def _add_file(self, owner: int, text: str) -> None:
        parts: list[Ids] = []
        pieces = list(_cut(text))
        for first in range(0, len(pieces), _PIECES_AT_ONCE):
            for ids in self._tokenizer.encode_batch(pieces[first : first + _PIECES_AT_ONCE]):
                parts.append(np.asarray(ids, np.int32))
            self._clock.tick(owner + first / len(pieces))
        tokens = np.concatenate(parts)
        learned = np.ones(len(tokens), np.bool_)
        self._add(_Text(owner, text, None, True), tokens, learned, is_file=True)

    def _add(
        self, text: _Text, ids: Sequence[int] | Ids, learned: Mask, is_file: bool = False
    ) -> None:
        tokens = np.asarray(ids, np.int32)
        if text.is_plain:
            tokens, learned = self._with_ends(tokens, learned)
        self._lengths[text.owner] += len(tokens)
        long_examples = "split" if is_file else self._config.long_examples
        for part in self._fit(len(tokens), long_examples, text.owner):
            if learned[part][1:].any():  # a document's first token is never a target
                self._builder.add(tokens[part], learned[part], text.owner)
                self._fates["kept"][text.owner] = True

    def _with_ends(self, tokens: Ids, learned: Mask) -> tuple[Ids, Mask]:
        begin, eos = self._begin, self._tokenizer.eos_id
        if begin and tokens[: len(begin)].tolist() != begin:
            tokens = np.concatenate([np.asarray(begin, np.int32), tokens])
            learned = np.concatenate([np.full(len(begin), self._learns_all), learned])
        if eos is None:
            return tokens, learned
        if len(tokens) == 0 or tokens[-1] != eos:
            tokens = np.append(tokens, np.int32(eos))
            learned = np.append(learned, True)
        learned[-1] = True
        return tokens, learned

    def _fit(self, n_tokens: int, long_examples: str, owner: int) -> list[slice]:
        """Return the parts of a text that rows hold, and note what that means for its example."""
        most = self._config.max_length
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


def _cut(text: str) -> Iterator[str]:
    """Yield the text in pieces that end in a newline before a word, where no token crosses."""
    first = 0
    while len(text) - first > _PIECE_CHARACTERS:
        border = _BORDER.search(text, first + _PIECE_CHARACTERS)
        if border is None:
            break
        yield text[first : border.end()]
        first = border.end()
    yield text[first:]


_BORDER = re.compile(r"\n(?=\S)")


class _Clock:
    """Passes progress on, once it has taken some time, and not too often."""

    def __init__(self, on_progress: OnProgress, total: int) -> None:
        self._on_progress, self._total = on_progress, total
        self._next_s = time.monotonic() + _QUIET_S

    def tick(self, n_examples: float) -> None:
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _PROGRESS_EVERY_S
            self._on_progress(n_examples / self._total)
