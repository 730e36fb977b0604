"""Tokens whose ids lie beyond the model's embedding: compared before anything is computed.

Released models have such tokens: a pad token that was added without a row, an image token of a
model for text. They do no harm until a text has one.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora.config import DataConfig
from lora.data.reading.formats import Example
from lora.data.sequences.documents import Documents
from lora.data.tokenizers.subword import TextTokenizer
from lora.errors import DataError


def choose_pad_id(tokenizer: TextTokenizer, n_rows: int | None) -> tuple[int, str | None]:
    """Return an id below `n_rows` that pads sequences, and a note if it is not the pad token's.

    Padding is masked: which token pads changes nothing that is learned.
    """
    rows = n_rows if n_rows is not None else 2**32
    ids = (tokenizer.pad_id, tokenizer.eos_id, 0)
    chosen = next(number for number in ids if number is not None and number < rows)
    if tokenizer.pad_id is None or tokenizer.pad_id < rows:
        return chosen, None
    return chosen, (
        f"note: the pad token {tokenizer.pad_token!r} has the id {tokenizer.pad_id:,}, and the "
        f"model's embedding {rows:,} rows: the token {chosen:,} pads, which changes nothing that "
        "is learned"
    )


def tokenizer_for(
    tokenizer: TextTokenizer, config: DataConfig, n_rows: int | None
) -> tuple[TextTokenizer, int | None]:
    """Return the tokenizer with what `config` adds, and the embedding's rows, which grow with it.

    None rows stay None.
    """
    added = config.special_tokens
    if added:
        tokenizer = tokenizer.with_tokens(added)
        n_rows = None if n_rows is None else max(n_rows, 1 + max(tokenizer.ids_of(added)))
    if config.keep_control_tokens:
        tokenizer = tokenizer.with_control_tokens_in_messages()
    return tokenizer, n_rows


def check_ids(
    documents: Documents, examples: Sequence[Example], tokenizer: TextTokenizer, n_rows: int | None
) -> None:
    """Raise DataError if a token in `documents` has no embedding row; None: all have one."""
    if n_rows is None or not len(documents.ids) or int(documents.ids.max()) < n_rows:
        return
    first = int((documents.ids >= n_rows).argmax())
    number = int(documents.ids[first])
    document = int(documents.starts.searchsorted(first, "right")) - 1
    source = examples[int(documents.example_indices[document])].source
    token = tokenizer.backend.id_to_token(number)
    raise DataError(
        f"Cannot use the tokenizer: its token {token!r}, in {source}, has the id "
        f"{number:,}, and the model's embedding has rows for 0 to {n_rows - 1:,}. Use the model's "
        f"own tokenizer and chat template, or give the token a row: --special-tokens {token!r}."
    )
