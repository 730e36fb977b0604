"""Examples to tokens: which tokens are targets, and what happens to examples that are too long.

Each text is tokenised once, as a whole. Targets are found through character offsets, so the tokens
are exactly those that the model sees in use. Conversations get no special tokens beyond the
template's. Plain texts and completions begin the way the tokenizer begins a text, and end with the
end-of-text token, which is always a target.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial

import numpy as np
from tokenizers import Encoding

from lora.config import DataConfig
from lora.data.chat.choose_template import begin_ids, compile_template, find_shipped_template
from lora.data.chat.control_tokens import ControlTokens, special_ids, unmark, unmark_offset
from lora.data.chat.conversations import ConversationRenderer
from lora.data.chat.dropped_fields import refuse_dropped
from lora.data.chat.template import Span
from lora.data.chat.template_renderer import TemplateLimitError
from lora.data.chat.turns import SpannedText
from lora.data.reading.faults import Faults
from lora.data.reading.formats import Example
from lora.data.sequences.boundaries import ApartEncoder, PromptEnds, show_border
from lora.data.sequences.documents import DocumentsBuilder
from lora.data.sequences.encoded import EncodedExamples, EncodingCounts
from lora.data.sequences.long_texts import PIECE_CHARACTERS, Ids, Mask, SequenceCutter, cut_text
from lora.data.sequences.masks import find_targets
from lora.data.sequences.prefetch import Prefetcher
from lora.data.tokenizers.offsets import OffsetFinder
from lora.data.tokenizers.subword import TextTokenizer
from lora.errors import DataError

OnProgress = Callable[[float], None]
"""Called with the fraction of the work that is done, 0 to 1."""

_CHUNK_EXAMPLES, _CHUNK_CHARACTERS = 512, 1 << 21
_QUIET_S, _PROGRESS_EVERY_S = 2.0, 0.5
_PIECES_AT_ONCE = 64


def encode_examples(
    examples: Sequence[Example],
    tokenizer: TextTokenizer,
    config: DataConfig,
    on_progress: OnProgress = lambda fraction: None,
    *,
    now: datetime | None = None,
) -> EncodedExamples:
    """Return the tokens of all examples, at most `config.max_length` each.

    Args:
        examples: of any formats.
        tokenizer: with a chat template if there are conversations; see `choose_template`.
        config: which tokens are targets, and how long examples are cut. The text of a whole file
            is always split.
        on_progress: called a few times a second once two seconds have passed.
        now: the date for chat templates that print one; None uses the clock.

    Raises:
        DataError: the template rejects conversations; one message names all of them.
    """
    if config.keep_control_tokens:
        tokenizer = tokenizer.with_control_tokens_in_messages()
    has_chats = any(example.messages is not None for example in examples)
    template = compile_template(tokenizer, now) if has_chats else None
    throttle = _ProgressThrottle(on_progress, len(examples))
    with ConversationRenderer(template, whole=config.learn_on == "all") as conversations:
        encoder = _Encoder(len(examples), tokenizer, config, conversations, throttle)
        encoder.add_all(examples)
    return encoder.finish()


@dataclass(frozen=True)
class _Text:
    """A text to tokenise, and how its tokens are used."""

    example: int
    """Index of its example."""
    text: str
    spans: list[Span] | None
    """Target characters; None: all of them."""
    is_plain: bool
    """Begins and ends with the tokenizer's special tokens."""
    cuts: Sequence[int] = ()
    """Characters before which it is cut into parts that are tokenised apart."""


def _unmarked(example: int, marked: SpannedText) -> _Text:
    """Return a text without the marks in its control tokens, cut there."""
    text, cuts = unmark(marked.text)
    spans = [
        (unmark_offset(marked.text, first), unmark_offset(marked.text, last))
        for first, last in marked.spans
    ]
    return _Text(example, text, spans, False, cuts)


class _Encoder:
    """Turns chunks of examples into documents and counts what is cut."""

    def __init__(
        self,
        n_examples: int,
        tokenizer: TextTokenizer,
        config: DataConfig,
        conversations: ConversationRenderer,
        throttle: _ProgressThrottle,
    ) -> None:
        self._tokenizer, self._config = tokenizer, config
        self._conversations, self._throttle = conversations, throttle
        self._all_are_targets = config.learn_on == "all"
        self._offsets = OffsetFinder(tokenizer)
        self._begin, self._stops = begin_ids(tokenizer), frozenset(tokenizer.stop_ids)
        self._builder, self._faults = DocumentsBuilder(), Faults()
        self._lengths = np.zeros(n_examples, np.int64)
        self._outcomes = {
            name: np.zeros(n_examples, np.bool_)
            for name in ("kept", "truncated", "split", "dropped")
        }
        self._n_cut_tokens = self._n_lost_turns = 0
        self._dropped_fields = Counter[str]()
        self._control_tokens: dict[int, int] = {}
        self._plain_control_tokens = Counter[int]()
        self._is_special = special_ids(tokenizer)
        self._prompt_ends = PromptEnds(tokenizer, self._offsets)
        self._apart = ApartEncoder(self._offsets)
        self._parted_prompts: dict[int, tuple[str, str]] = {}

    def add_all(self, examples: Sequence[Example]) -> None:
        examples = self._mark_control_tokens(examples)
        has_spans = not self._all_are_targets and any(example.text is None for example in examples)
        work = self._offsets.encode if has_spans else self._tokenizer.encode_fast
        with Prefetcher(work) as prefetcher:
            chunks = list(_chunks(examples))
            self._conversations.prepare(examples[chunks[0].start : chunks[0].stop])
            for chunk, following in zip(chunks, [*chunks[1:], range(0)], strict=True):
                texts: list[_Text] = []
                for number in chunk:
                    if examples[number].is_file:
                        # First what came before: documents keep the order of the examples.
                        self._tokenise(prefetcher, texts)
                        texts = []
                        self._add_file(prefetcher, number, examples[number].text or "")
                    else:
                        texts += self._find_texts(number, examples[number])
                # Rendered while the tokens of this chunk are computed.
                self._conversations.prepare(examples[following.start : following.stop])
                self._tokenise(prefetcher, texts)
                self._throttle.update(chunk.stop)

    def _mark_control_tokens(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Return the examples with marks in the special tokens that their messages spell out."""
        control, marked = ControlTokens(self._tokenizer), list(examples)
        for number, example in enumerate(examples):
            if example.messages is None:
                continue
            try:
                marked[number], n_found = control.mark(example)
            except DataError as error:
                self._faults.add(example.source, error)
                continue
            if n_found:
                self._control_tokens[number] = n_found
        return marked

    def finish(self) -> EncodedExamples:
        self._faults.raise_if_any(
            "Cannot tokenise the conversations: the chat template rejects some:",
            "Correct or remove these examples, or give another template with chat_template.",
        )
        outcomes = self._outcomes
        dropped = outcomes["dropped"] & ~outcomes["kept"]
        counts = EncodingCounts(
            n_examples=len(self._lengths),
            n_truncated=int(outcomes["truncated"].sum()),
            n_split=int(outcomes["split"].sum()),
            n_dropped=int(dropped.sum()),
            n_cut_tokens=self._n_cut_tokens,
            n_nothing_to_learn=int((~outcomes["kept"] & ~dropped).sum()),
            n_lost_turns=self._n_lost_turns,
        )
        return EncodedExamples(
            self._builder.build(),
            counts,
            self._lengths,
            dropped_fields=dict(self._dropped_fields),
            control_tokens=self._control_tokens,
            plain_control_tokens=dict(self._plain_control_tokens),
            parted_prompts=self._parted_prompts,
        )

    def _find_texts(self, number: int, example: Example) -> list[_Text]:
        if example.is_context:
            return []
        if example.text is not None:
            return [_Text(number, example.text, None, True)] if example.text.strip() else []
        if example.prompt is not None and example.completion is not None:
            whole = example.prompt + example.completion
            return [_Text(number, whole, [(len(example.prompt), len(whole))], True)]
        try:
            texts = self._render(example)
        except TemplateLimitError as error:  # the next one would take as long
            raise TemplateLimitError(f"{example.source}: {error}") from None
        except DataError as error:
            self._faults.add(example.source, error)
            return []
        if number in self._control_tokens:
            return [_unmarked(number, text) for text in texts]
        return [_Text(number, text.text, text.spans, False) for text in texts]

    def _render(self, example: Example) -> list[SpannedText]:
        found = self._conversations.render(example)
        if self._all_are_targets and example.off_flags:
            flags = ", ".join(sorted(set(example.off_flags.values())))
            raise DataError(
                f"{flags} turns off a part of it, but learn_on='all' trains on every token: "
                "set learn_on to 'assistant'"
            )
        if found.dropped and not self._config.allow_dropped_fields:
            raise refuse_dropped(found.dropped, find_shipped_template(self._tokenizer))
        self._dropped_fields.update(found.dropped)
        self._n_lost_turns += found.n_lost_turns
        return found.texts

    def _tokenise(self, prefetcher: Prefetcher[list[Encoding]], texts: list[_Text]) -> None:
        if texts:
            prefetcher.put([t.text for t in texts], partial(self._add_texts, texts))

    def _add_texts(self, texts: list[_Text], encodings: list[Encoding]) -> None:
        for text, encoding in zip(texts, encodings, strict=True):
            ids = encoding.ids
            tokens = np.asarray(ids, np.int32)
            if text.cuts:
                ids, tokens, offsets = self._apart.encode(text.text, text.cuts)
            if text.spans is None or self._all_are_targets:
                is_target = np.ones(len(ids), np.bool_)
            else:
                if not text.cuts:
                    offsets = self._offsets.find(text.text, encoding, ids, tokens)
                cuts = self._prompt_ends.find_cuts(text.text, text.spans, ids, offsets)
                if cuts:
                    self._parted_prompts[text.example] = show_border(text.text, cuts[0])
                    ids, tokens, offsets = self._apart.encode(text.text, [*cuts, *text.cuts])
                is_target = find_targets(text.text, text.spans, ids, offsets, self._stops)
            self._add(text, tokens, is_target)

    def _add_file(self, prefetcher: Prefetcher[list[Encoding]], example: int, text: str) -> None:
        pieces, n_done = cut_text(text, PIECE_CHARACTERS), 0
        cutter = SequenceCutter(self._config.max_length)
        while batch := list(itertools.islice(pieces, _PIECES_AT_ONCE)):
            n_done += sum(map(len, batch))
            prefetcher.put(batch, partial(self._add_pieces, example, cutter, n_done == len(text)))
            self._throttle.update(example + n_done / max(1, len(text)))

    def _add_pieces(
        self, example: int, cutter: SequenceCutter, are_last: bool, encodings: list[Encoding]
    ) -> None:
        for number, encoding in enumerate(encodings, 1):
            tokens = np.asarray(encoding.ids, np.int32)
            self._count_special(example, tokens)
            is_target = np.ones(len(tokens), np.bool_)
            if cutter.n_tokens == 0:
                tokens, is_target = self._with_begin(tokens, is_target)
            if are_last and number == len(encodings):
                tokens, is_target = self._with_end(tokens, is_target)
            for part in cutter.cut(tokens, is_target):
                self._keep(example, *part)
        if are_last:
            self._keep(example, *cutter.rest())
            self._lengths[example] = cutter.n_tokens
            self._outcomes["split"][example] = cutter.n_tokens > self._config.max_length

    def _add(self, text: _Text, tokens: Ids, is_target: Mask) -> None:
        if text.is_plain:
            self._count_special(text.example, tokens)
            tokens, is_target = self._with_end(*self._with_begin(tokens, is_target))
        self._lengths[text.example] += len(tokens)
        for part in self._fit(len(tokens), text.example):
            self._keep(text.example, tokens[part], is_target[part])

    def _count_special(self, example: int, tokens: Ids) -> None:
        found = int(self._is_special[tokens].sum())
        if found:
            self._plain_control_tokens[example] += found

    def _keep(self, example: int, tokens: Ids, is_target: Mask) -> None:
        if is_target[1:].any():  # a document's first token is never a target
            self._builder.add(tokens, is_target, example)
            self._outcomes["kept"][example] = True

    def _with_begin(self, tokens: Ids, is_target: Mask) -> tuple[Ids, Mask]:
        begin = self._begin
        if not begin or tokens[: len(begin)].tolist() == begin:
            return tokens, is_target
        tokens = np.concatenate([np.asarray(begin, np.int32), tokens])
        return tokens, np.concatenate([np.full(len(begin), self._all_are_targets), is_target])

    def _with_end(self, tokens: Ids, is_target: Mask) -> tuple[Ids, Mask]:
        eos = self._tokenizer.eos_id
        if eos is None:
            return tokens, is_target
        if len(tokens) == 0 or tokens[-1] != eos:
            tokens = np.append(tokens, np.int32(eos))
            is_target = np.append(is_target, True)
        is_target[-1] = True
        return tokens, is_target

    def _fit(self, n_tokens: int, example: int) -> list[slice]:
        """Return the parts of a text that fit in sequences, and count its example as cut or not."""
        max_length, long_examples = self._config.max_length, self._config.long_examples
        if n_tokens <= max_length:
            return [slice(0, n_tokens)]
        if long_examples == "split":
            self._outcomes["split"][example] = True
            # A part begins with the last token of the one before: each token is a target once.
            firsts = range(0, n_tokens - 1, max_length - 1)
            return [slice(first, first + max_length) for first in firsts]
        self._outcomes["truncated" if long_examples == "truncate" else "dropped"][example] = True
        kept = max_length if long_examples == "truncate" else 0
        self._n_cut_tokens += n_tokens - kept
        return [slice(0, kept)] if kept else []


def _chunks(examples: Sequence[Example]) -> Iterator[range]:
    """Yield ranges of example indices, small enough that their tokens take little memory."""
    first = n_characters = 0
    for number, example in enumerate(examples):
        if number - first == _CHUNK_EXAMPLES or n_characters > _CHUNK_CHARACTERS:
            yield range(first, number)
            first, n_characters = number, 0
        n_characters += 0 if example.is_file else example.n_characters
    yield range(first, len(examples))


class _ProgressThrottle:
    """Passes progress on after a quiet start, and not too often."""

    def __init__(self, on_progress: OnProgress, total: int) -> None:
        self._on_progress, self._total = on_progress, total
        self._next_s = time.monotonic() + _QUIET_S

    def update(self, n_examples: float) -> None:
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _PROGRESS_EVERY_S
            self._on_progress(n_examples / self._total)
