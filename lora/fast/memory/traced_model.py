"""What a tracer asks of a model: its blocks, which of them are alike, its forward and its loss."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.decoder.attention import NO_CACHE, TokenPositions
from lora.decoder.decoder import Decoder
from lora.decoder.language_model import LanguageModel
from lora.decoder.quantised.nf4 import Nf4Weight
from lora.decoder.quantised.tables import rows_of
from lora.fast.captured import loss_of_head
from lora.fast.memory.sections import block_kinds, retain_blocks
from lora.fast.transformers_models import TransformersForward
from lora.kernels.cross_entropy import CHUNK_TOKENS, learned_cross_entropy
from lora.kernels.step.ops import PLAIN
from lora.layers.trainable_tokens import TrainableTokensLinear
from lora.lora_module import LoRALayer
from lora.pretrained.transformers_models.bounded import unmasked_attention
from lora.pretrained.transformers_models.config import settings_by_block
from lora.pretrained.transformers_models.model import TransformersModel
from lora.training.losses import transform_of


class TracedModel(Protocol):
    """A model on fake tensors, of whichever implementation."""

    @property
    def model(self) -> LanguageModel:
        """The model."""

    def kinds(self) -> list[Hashable]:
        """Return a kind for each block: those of one kind hold the same memory in a step."""

    def retain(self, indices: Sequence[int]) -> None:
        """Changes the model in place: only the blocks at `indices` stay."""

    def hidden(self, ids: Tensor, *, packed: bool) -> Tensor:
        """Return the head's input (B·T, C); `packed`: sequences of several documents."""


def traced_model(
    model: LanguageModel, compute_dtype: torch.dtype, *, captured: bool
) -> TracedModel:
    """Return what traces `model`, whose step is the captured one or the plain one."""
    if isinstance(model, TransformersModel):
        return _TransformersTraced(model, compute_dtype, captured=captured)
    assert isinstance(model, Decoder)
    return _DecoderTraced(model)


class _DecoderTraced:
    def __init__(self, model: Decoder) -> None:
        self.model: Decoder = model

    def kinds(self) -> list[Hashable]:
        return block_kinds(self.model.blocks(), self.model, self.model.config.layers)

    def retain(self, indices: Sequence[int]) -> None:
        retain_blocks(self.model.blocks(), indices)

    def hidden(self, ids: Tensor, *, packed: bool) -> Tensor:
        positions = TokenPositions(torch.zeros_like(ids), ids if packed else None, NO_CACHE)
        x = self.model.get_input_embeddings()(ids)  # (B, T, C)
        return self.model.trunk.through_blocks(x, positions).flatten(0, 1)  # (B·T, C)


class _TransformersTraced:
    """transformers' model; no value of a mask or a position is read, so it takes fake ones."""

    def __init__(
        self, model: TransformersModel, compute_dtype: torch.dtype, *, captured: bool
    ) -> None:
        self.model: TransformersModel = model
        self._forward, self._captured = TransformersForward(model, compute_dtype), captured

    def kinds(self) -> list[Hashable]:
        blocks = self.model.blocks()
        lists = settings_by_block(self.model.config.text, len(blocks))
        settings = list(zip(*lists.values(), strict=True)) or [()] * len(blocks)
        own = [(_attributes(block), repr(one)) for block, one in zip(blocks, settings, strict=True)]
        return block_kinds(blocks, self.model, own)

    def retain(self, indices: Sequence[int]) -> None:
        blocks, text = self.model.blocks(), self.model.config.text
        lists = settings_by_block(text, len(blocks))
        retain_blocks(blocks, indices)
        setattr(text, "num_hidden_layers", len(blocks))  # noqa: B010 - its own name may be another
        for name, values in lists.items():
            setattr(text, name, [values[index] for index in indices])

    def hidden(self, ids: Tensor, *, packed: bool) -> Tensor:
        with self._context(packed=packed):
            if self._is_masked(packed=packed):
                run = self.model.run_masked(ids, torch.zeros_like(ids), ids)
            else:
                run = self.model.run(ids, None)
        return run.flatten(0, 1)  # (B·T, C)

    def _is_masked(self, *, packed: bool) -> bool:
        if self.model.traits.why_not_packed is not None:
            return False
        if self._captured and self._forward.takes_bounds(packed):
            return False
        return packed or (self._captured and self._forward.why_masked is not None)

    def _context(self, *, packed: bool) -> AbstractContextManager[None]:
        # Attention by bounds holds what causal attention without a mask does.
        is_plain = self._forward.why_masked is None or self._forward.by_bounds
        is_plain &= self.model.traits.why_not_packed is None
        if self._is_masked(packed=packed) or not is_plain:
            return nullcontext()
        return unmasked_attention(self.model.theirs)


def _attributes(block: nn.Module) -> tuple[Any, ...]:
    """Return the plain settings of all modules of a block, without those that number it."""
    kinds = (bool, float, str, type(None))
    return tuple(
        (name, key, value)
        for name, module in block.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, kinds)
    )


def plain_loss(model: LanguageModel, hidden: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of tokens (n, C) that are learned, as `lora.training.losses` computes it.

    `labels` may be fewer than tokens: one chunk of the loss holds as much as the next.
    """
    head = model.output_head()
    is_plain = isinstance(head, nn.Linear | Nf4Weight) and not isinstance(head, LoRALayer)
    if model.needs_all_logits or not (is_plain or isinstance(head, TrainableTokensLinear)):
        wide = model.logits_of(hidden).float()
        return F.cross_entropy(wide, labels.new_zeros(len(hidden)), reduction="sum")
    bias = head.bias if is_plain else None
    return learned_cross_entropy(
        hidden, rows_of(head, hidden), labels, CHUNK_TOKENS, bias, transform_of(model.config)
    )


def captured_loss(model: LanguageModel, hidden: Tensor, labels: Tensor) -> Tensor:
    """Return the captured step's loss of tokens (N, C): its own kernel allocates nothing."""
    ops = replace(PLAIN, token_loss=lambda *inputs, **settings: None)
    loss: Tensor = loss_of_head(model, ops)(hidden[None], labels[None])
    return loss
