"""The loss functions by which real models meet the trainer: (model, batch) -> (sum, tokens), (1,).

The loss is in nats, summed over the batch's target tokens.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from lora.data.batches import IGNORE, Batch
from lora.decoder.decoder import Decoder
from lora.errors import ModelError
from lora.kernels.cross_entropy import linear_cross_entropy
from lora.lora_module import LoRALayer


def decoder_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of our decoders with a plain head: the logits are never held all at once."""
    decoder = cast(Decoder, model)
    hidden = _hidden(decoder, batch)
    weight = decoder.output_head().weight
    loss, n_tokens = linear_cross_entropy(hidden, weight, batch.labels.flatten())
    return loss[None], n_tokens[None]


def adapted_head_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of our decoders whose head has LoRA: logits of the learned tokens only."""
    decoder, labels = cast(Decoder, model), batch.labels.flatten()
    learned = labels != IGNORE
    logits = decoder.output_head()(_hidden(decoder, batch)[learned]).float()  # (N, V)
    return F.cross_entropy(logits, labels[learned], reduction="sum")[None], learned.sum()[None]


def transformers_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of transformers' causal models: one document a row, padded on the right."""
    mask = (batch.document_ids >= 0).long()  # (B, T)
    output: Any = model(
        input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids
    )
    labels = batch.labels.flatten()
    logits = output.logits.flatten(0, 1).float()  # (B·T, V)
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return total[None], (labels != IGNORE).sum()[None]


def loss_for(model: nn.Module) -> Any:
    """Return the loss function that fits `model`, chosen once.

    Raises ModelError for a model that is neither a Decoder nor one of transformers' causal models.
    """
    if isinstance(model, Decoder):
        adapted = isinstance(model.output_head(), LoRALayer)
        return adapted_head_loss if adapted else decoder_loss
    if any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__):
        return transformers_loss
    raise ModelError(
        f"A loss was asked for {type(model).__name__}: known are lora's Decoder and transformers' "
        "causal models. Pass a function (model, batch) -> (loss sum, target tokens) of your own."
    )


def _hidden(decoder: Decoder, batch: Batch) -> Tensor:
    hidden = decoder.hidden_states(
        batch.input_ids, position_ids=batch.position_ids, document_ids=batch.document_ids
    )
    return hidden.flatten(0, 1)  # (B·T, C)
