"""Attention within documents, by the mask functions of transformers itself.

All of transformers' masks (causal, windows, chunks) come from functions that it looks up by the
name of the attention. Within the context the function of the model's attention gets one more
condition: the same document. So each layer keeps the mask that it has, windows included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

MASKED_ATTENTIONS = ("sdpa", "eager")
"""Attentions of transformers that read the mask as a tensor."""


@contextmanager
def documents_apart(config: Any, document_ids: Tensor) -> Iterator[None]:
    """Inside the context models with `config` attend within the same of `document_ids` (B, T).

    Padding, document −1, attends to padding. Raises KeyError for an attention of another name.
    """
    from transformers import masking_utils

    functions = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    name = config._attn_implementation
    plain: Callable[..., Any] = functions[name]

    def same_document(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return document_ids[batch, query] == document_ids[batch, key]

    def masked(*, mask_function: Any = masking_utils.causal_mask_function, **settings: Any) -> Any:
        within = masking_utils.and_masks(mask_function, same_document)
        return plain(mask_function=within, **{**settings, "allow_is_causal_skip": False})

    functions[name] = masked  # a local override, which such a table offers
    try:
        yield
    finally:
        del functions[name]
