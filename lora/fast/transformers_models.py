"""transformers' causal models inside a captured step, through their public interfaces alone.

While a graph is captured the host cannot ask whether a mask is needed, so transformers makes one
that nobody needs: (B, 1, T, T), and attention takes a slower kernel. Rows here are one document
padded at the end, where causal order is mask enough; an attention function of our name, registered
with transformers, is theirs without a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from lora.data.sequences.batches import Batch
from lora.errors import DataError

UNMASKED = "lora_unmasked_sdpa"


def transformers_logits(model: nn.Module, batch: Batch, packed: bool) -> Tensor:
    """Of transformers' causal models: one document a row, padded at its end -> (B, T, V).

    Raises DataError for rows of several documents, which would see each other.
    """
    if packed:
        raise DataError(
            "Rows of several documents, or padded at their beginning, were given to one of "
            "transformers' models: there they would see each other. Set packing to false, pad at "
            "the end, or load the model as lora's Decoder."
        )
    output: Any = model(input_ids=batch.input_ids, use_cache=False)
    logits: Tensor = output.logits
    return logits


def why_masked(model: nn.Module) -> str | None:
    """Return why `model` needs masks of its own, or None where causal order is all it wants."""
    config = cast(Any, model).config.get_text_config()
    attention = config._attn_implementation
    if attention not in ("sdpa", UNMASKED):
        return f"its attention is {attention}, not sdpa"
    told: dict[str, Any] = config.to_dict()
    kinds = set(told.get("layer_types") or ())
    if kinds - {"full_attention"}:
        return f"it has blocks of other attention ({', '.join(sorted(kinds))})"
    if not kinds and told.get("sliding_window"):
        return "its attention has a window"
    return None


@contextmanager
def unmasked_attention(model: nn.Module) -> Iterator[None]:
    """Within the block `model`, one of transformers', attends in causal order without a mask."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    theirs: Any = model
    before = theirs.config._attn_implementation
    AttentionInterface.register(UNMASKED, sdpa_attention_forward)
    theirs.set_attn_implementation(UNMASKED)
    try:
        yield
    finally:
        theirs.set_attn_implementation(before)
