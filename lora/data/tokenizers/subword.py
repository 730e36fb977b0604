"""Subword tokenizers, read from a Hugging Face folder.

The `tokenizers` library does the work; this adds the stop and padding tokens and the chat template.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer

from lora.data.tokenizers.model_files import CONTENT_TOKENS, SPECIAL_TOKENS, read_tokenizer_files
from lora.data.tokenizers.tokenizer_file import load_backend, switch_sampling_off
from lora.data.tokenizers.tokenizer_trial import is_panic
from lora.errors import DataError
from lora.runs.disk import atomic_write

TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "</s>")
"""Special tokens that end an assistant's turn in the chat templates in use."""


@dataclass(frozen=True)
class TextTokenizer:
    """Text to token ids and back, with the special tokens of a model.

    No special tokens are added by default. Special tokens that occur in a text are encoded as such.
    """

    backend: Tokenizer
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    chat_template: str | None = None
    stop_ids: tuple[int, ...] = ()
    """Tokens that end an answer: end-of-text and end-of-turn."""
    n_known: int | None = None
    """Number of ids before `with_tokens` added some; None: it added none."""
    notes: tuple[str, ...] = ()
    """What of the model's files is not used, for messages."""
    content_tokens: tuple[str, ...] = ()
    """Special tokens that messages may spell out; all others are split there."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def bos_id(self) -> int | None:
        return self._id(self.bos_token)

    @property
    def eos_id(self) -> int | None:
        return self._id(self.eos_token)

    @property
    def pad_id(self) -> int | None:
        return self._id(self.pad_token)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Return the ids of `text`; `add_special_tokens` adds those of the model's tokenizer."""
        with _library_errors([text]):
            return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_fast(self, texts: Sequence[str]) -> list[Encoding]:
        """Return the tokens of many texts, without offsets, tokenised in parallel."""
        with _library_errors(texts):
            return list(self.backend.encode_batch_fast(list(texts), add_special_tokens=False))

    def encode_with_offsets(self, texts: Sequence[str]) -> list[Encoding]:
        """Return the tokens of many texts with their offsets, tokenised in parallel."""
        with _library_errors(texts):
            return list(self.backend.encode_batch(list(texts), add_special_tokens=False))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`."""
        with _library_errors(()):
            return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def with_tokens(self, tokens: Sequence[str]) -> TextTokenizer:
        """Return a tokenizer that never splits `tokens`; this one is not changed.

        Unknown tokens get the next ids, known ones keep theirs. `decode` shows them, as it does
        the tool and thinking tokens of released models; one with which the chat template ends
        turns also ends answers.

        Raises DataError for a token that is not encoded as one id: the tokenizer's normalizer
        changes it first.
        """
        unknown = [token for token in tokens if self.backend.token_to_id(token) is None]
        known = {t.content for t in self.backend.get_added_tokens_decoder().values()}
        backend = Tokenizer.from_str(self.backend.to_str())
        backend.add_tokens(
            [AddedToken(token, normalized=False) for token in tokens if token not in known]
        )
        numbers = dict(zip(tokens, _ids_of(backend, tokens), strict=True))
        for token, number in numbers.items():
            text = f"a{token}b"
            found = backend.encode(text, add_special_tokens=False)
            if number not in found.ids:
                raise DataError(
                    f"Cannot add the special token {token!r}: the tokenizer turns {text!r} into "
                    f"{found.tokens}, without that token. Choose another spelling, such as "
                    "<|word|>."
                )
        n_known = min((numbers[token] for token in unknown), default=None)
        stops = find_stop_ids(backend, self.eos_token, self.chat_template, self.stop_ids)
        special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
        meant = tuple(token for token in tokens if token in special)
        return replace(
            self,
            backend=backend,
            stop_ids=stops,
            n_known=n_known,
            content_tokens=tuple(dict.fromkeys((*self.content_tokens, *meant))),
        )

    def with_control_tokens_in_messages(self) -> TextTokenizer:
        """Return a tokenizer with which messages may spell out every special token."""
        added = self.backend.get_added_tokens_decoder().values()
        return replace(self, content_tokens=tuple(t.content for t in added if t.special))

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` into `folder`.

        `generation_config.json`, from which other programs read the stop tokens, is written if
        `folder` has none.
        """
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / "tokenizer.json", self.backend.to_str().encode())
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
            "chat_template": self.chat_template,
            "clean_up_tokenization_spaces": False,
            CONTENT_TOKENS: list(self.content_tokens) or None,
        }
        _write_object(folder / "tokenizer_config.json", config)
        if self.stop_ids and not (folder / "generation_config.json").exists():
            ids = {"bos_token_id": self.bos_id, "eos_token_id": list(self.stop_ids)}
            _write_object(folder / "generation_config.json", {**ids, "pad_token_id": self.pad_id})

    def ids_of(self, tokens: Sequence[str]) -> list[int]:
        """Return the ids of `tokens`, all of which must be in the vocabulary."""
        return _ids_of(self.backend, tokens)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)


def _ids_of(backend: Tokenizer, tokens: Sequence[str]) -> list[int]:
    vocabulary = backend.get_vocab(with_added_tokens=True)
    return [vocabulary[token] for token in tokens]


def load_tokenizer(folder: Path) -> TextTokenizer:
    """Return the tokenizer in a model's folder.

    Raises DataError if `tokenizer.json` is missing or damaged, with how to create one, or another
    file says something about the tokenizer that cannot be used.
    """
    path = folder / "tokenizer.json"
    backend = load_backend(path)
    # The file's own truncation and padding would change the training data.
    backend.no_truncation()
    backend.no_padding()
    files = read_tokenizer_files(folder)
    named = dict(files.special_tokens)
    for word, token in named.items():
        if token is None or backend.token_to_id(token) is not None:
            continue
        if word != "pad_token":  # padding is masked, so any token will do
            raise DataError(
                f"Cannot load the tokenizer in {folder}: tokenizer_config.json says that {word} is "
                f"{token!r}, but {path.name} has no such token. Correct one of the two."
            )
        named[word] = None
    stops = find_stop_ids(backend, named["eos_token"], files.chat_template, files.eos_ids)
    bos, eos, pad = (named[word] for word in SPECIAL_TOKENS)
    notes = (*switch_sampling_off(backend), *files.notes)
    return TextTokenizer(
        backend,
        bos,
        eos,
        pad,
        chat_template=files.chat_template,
        stop_ids=stops,
        notes=notes,
        content_tokens=files.content_tokens,
    )


def find_stop_ids(
    backend: Tokenizer, eos: str | None, template: str | None, more: Sequence[int] = ()
) -> tuple[int, ...]:
    """Return the ids of the tokens that end an answer, sorted.

    They are end-of-text, `more` (the ids in generation_config.json), and those tokens of TURN_ENDS
    that the chat template uses and that are added tokens: an ordinary token of that spelling would
    end answers that contain the word.
    """
    added = {token.content: number for number, token in backend.get_added_tokens_decoder().items()}
    ids = {added[word] for word in TURN_ENDS if template and word in template and word in added}
    ids |= {number for number in more if backend.id_to_token(number) is not None}
    end = None if eos is None else backend.token_to_id(eos)
    return tuple(sorted(ids if end is None else {*ids, end}))


def _write_object(path: Path, values: dict[str, Any]) -> None:
    known = {key: value for key, value in values.items() if value is not None}
    atomic_write(path, (json.dumps(known, indent=2, ensure_ascii=False) + "\n").encode())


@contextlib.contextmanager
def _library_errors(texts: Sequence[str]) -> Iterator[None]:
    """Name the text that cannot be encoded: not a str, or with a lone surrogate (damaged JSON).

    A panic of the library, which is no Exception, becomes a DataError.
    """
    try:
        yield
    except (TypeError, UnicodeEncodeError):
        for text in texts:
            if not isinstance(text, str):
                kind = type(text).__name__
                raise DataError(
                    f"Cannot tokenise a value of type {kind}: a str is needed."
                ) from None
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"Cannot tokenise the text {text[:40]!r}…: character {error.start} is a lone "
                    "surrogate. Remove it, or save the data again as UTF-8."
                ) from None
        raise
    except BaseException as error:
        if not is_panic(error):
            raise
        raise DataError(
            f"Cannot use the tokenizer: the tokenizers library panics: {str(error)[:200]}. Its "
            "tokenizer.json is damaged: copy it again, or use another."
        ) from None
