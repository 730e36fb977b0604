"""transformers' causal models inside a captured step, through their public interfaces alone.

During a capture transformers cannot read on the host whether a mask is needed, so it builds one
that is not, (B, 1, T, T), and attention takes a slower kernel. Sequences here are one document
padded at the end, for which causal attention is enough: an attention function registered under a
name of ours is transformers' own without a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lora.data.sequences.batches import Batch
from lora.decoder.language_model import transformers_network

UNMASKED = "lora_unmasked_sdpa"


def transformers_logits(model: nn.Module, batch: Batch, packed: bool) -> Tensor:
    """Return the logits (B, T, V) of one of transformers' causal models.

    Unless it is `packed`, each sequence is one document, padded at its end.
    """
    # `packed` is known on the host: it is part of the key of the graph that is captured here.
    logits: Tensor = (
        model(batch.input_ids, position_ids=batch.position_ids, document_ids=batch.document_ids)
        if packed
        else model(batch.input_ids)
    )
    return logits


def why_masked(model: nn.Module) -> str | None:
    """Return why `model` needs masks of its own, or None if causal attention is enough."""
    # Models with a vision part have a config in the config, for the text alone.
    config = transformers_network(model).config.get_text_config()
    attention = config._attn_implementation
    if attention not in ("sdpa", UNMASKED):
        return f"its attention is {attention}, not sdpa"
    settings: dict[str, Any] = config.to_dict()
    kinds = set(settings.get("layer_types") or ())
    if kinds - {"full_attention"}:
        return f"some of its blocks do not attend in full ({', '.join(sorted(kinds))})"
    if not kinds and settings.get("sliding_window"):
        return "its attention has a window"
    return None


@contextmanager
def unmasked_attention(model: nn.Module) -> Iterator[None]:
    """Inside the context `model`, one of transformers', attends causally without a mask tensor."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    theirs = transformers_network(model)
    # Through the model's own method, which also sets it in the configs of sub-models.
    # Masks are built by the name of the attention: under an unknown name transformers builds none.
    before = theirs.config._attn_implementation
    AttentionInterface.register(UNMASKED, sdpa_attention_forward)
    theirs.set_attn_implementation(UNMASKED)
    try:
        yield
    finally:
        theirs.set_attn_implementation(before)
