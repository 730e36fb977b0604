"""transformers' causal models inside a captured step, through their public interfaces alone.

During a capture transformers cannot read on the host whether a mask is needed, so it builds one
that is not, (B, 1, T, T), and attention takes a slower kernel. Where a sequence is one document
padded at the end, causal attention is enough; where it is several, FlashAttention takes where each
begins. Other architectures get masks.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lora.data.sequences.batches import Batch
from lora.errors import DataError
from lora.pretrained.transformers_models.bounded import (
    FLASH_DTYPES,
    UNMASKED,
    attention_within,
    unmasked_attention,
)
from lora.pretrained.transformers_models.config import setting
from lora.pretrained.transformers_models.model import TransformersModel


class TransformersForward:
    """Hidden states of a captured step's batches, without reading a value on the host.

    Args:
        model: one of transformers'.
        compute_dtype: of the matmuls.
    """

    def __init__(self, model: TransformersModel, compute_dtype: torch.dtype) -> None:
        self.model = model
        traits, device = model.traits, next(model.parameters()).device
        is_flash = device.type != "cuda" or compute_dtype in FLASH_DTYPES
        drops = setting(model.config.text, "attention_dropout", "attn_pdrop")
        self.by_bounds = traits.attends_by_bounds and is_flash and not drops
        """Whether packed sequences need no mask."""
        self.why_masked = None if model.why_not_packed else why_masked(model.theirs)
        """Why a sequence of one document needs a mask, or its bounds."""

    def takes_bounds(self, packed: bool) -> bool:
        """Whether a batch is computed by where its documents begin."""
        return self.by_bounds and (packed or self.why_masked is not None)

    def context(
        self, packed: bool, bounds: Tensor, max_tokens: int
    ) -> AbstractContextManager[None]:
        """Return what a forward of such a batch runs in; it changes the model's attention."""
        theirs = self.model.theirs
        if max_tokens > self.model.rotary_limit:
            return nullcontext()
        if self.takes_bounds(packed):
            return attention_within(theirs, bounds, max_tokens)
        is_plain = not packed and self.why_masked is None and not self.model.why_not_packed
        return unmasked_attention(theirs) if is_plain else nullcontext()

    def __call__(self, batch: Batch, packed: bool) -> Tensor:
        """Return the hidden states (B, T, C), or the logits of a model that needs them all."""
        if batch.input_ids.shape[1] > self.model.rotary_limit:
            # Its documents go through one by one, which no graph can hold: the step is called.
            return self.model.hidden_states(batch.input_ids, document_ids=batch.document_ids)
        if self.takes_bounds(packed):
            return self.model.run(batch.input_ids, batch.position_ids)
        if packed and self.model.why_not_packed is not None:
            raise DataError(
                f"Cannot train a {self.model.config.family} on packed sequences, or on padding in "
                f"front: {self.model.why_not_packed}. Set packing to false, and pad at the end."
            )
        if packed or self.why_masked is not None:
            return self.model.run_masked(batch.input_ids, batch.position_ids, batch.document_ids)
        return self.model.run(batch.input_ids, None)

    def describe(self) -> str:
        """Return what is said of attention in the step's line; empty where all is as usual."""
        if self.why_masked is None:
            return ""
        means = "goes by documents" if self.by_bounds else "takes masks"
        return f"; attention {means}, because {self.why_masked}"


def why_masked(theirs: Any) -> str | None:
    """Return why `theirs` needs masks of its own, or None if causal attention is enough."""
    # Models with a vision part have a config in the config, for the text alone.
    config = theirs.config.get_text_config()
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
