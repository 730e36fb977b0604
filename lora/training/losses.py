"""Loss functions of decoders and of transformers' models: (model, batch) -> (sum, tokens), (1,).

The loss is in nats, summed over the batch's target tokens.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.data.sequences.batches import IGNORE, Batch
from lora.decoder.decoder import Decoder
from lora.errors import DataError, ModelError
from lora.kernels.cross_entropy import linear_cross_entropy
from lora.kernels.trained_rows_cross_entropy import trained_rows_cross_entropy
from lora.layers.trainable_tokens import TrainableTokensLinear
from lora.lora_module import LoRALayer
from lora.training.step_runner import LossFn


def decoder_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the loss of one of our decoders with a plain head; logits exist chunk by chunk."""
    decoder = cast(Decoder, model)
    hidden = _hidden(decoder, batch)
    weight = decoder.output_head().weight
    loss, n_tokens = linear_cross_entropy(hidden, weight, batch.labels.flatten())
    return loss[None], n_tokens[None]


def trainable_tokens_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the loss of one of our decoders whose head has trainable rows; logits in chunks."""
    decoder = cast(Decoder, model)
    head = cast(TrainableTokensLinear, decoder.output_head())
    loss, n_tokens = trained_rows_cross_entropy(
        _hidden(decoder, batch), head.weight, head.token_rows, head.columns, batch.labels.flatten()
    )
    return loss[None], n_tokens[None]


def adapted_head_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the loss of one of our decoders with any head; logits of learned tokens only."""
    decoder, labels = cast(Decoder, model), batch.labels.flatten()
    learned = labels != IGNORE
    logits = decoder.logits_of(_hidden(decoder, batch)[learned])  # (N, V)
    return _sum_of(logits, labels[learned])


def transformers_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the loss of one of transformers' causal models: padded on either side, not packed.

    Raises DataError for packed sequences, whose documents would attend to each other.
    """
    if bool((batch.document_ids > 0).any()):  # the host waits for the device
        raise DataError(
            "Cannot train one of transformers' models on packed sequences: their documents would "
            "attend to each other. Set packing to false, or load the model as lora's Decoder."
        )
    is_token = batch.document_ids >= 0  # (B, T)
    # Attention over nothing may be NaN: a sequence of padding, which is not learned, has itself.
    mask = (is_token | ~is_token.any(1, keepdim=True)).long()  # (B, T)
    output: Any = model(
        input_ids=batch.input_ids,
        attention_mask=mask,
        position_ids=batch.position_ids,
        use_cache=False,
    )
    labels = batch.labels.flatten()
    learned = labels != IGNORE
    return _sum_of(output.logits.flatten(0, 1)[learned], labels[learned])


def loss_for(model: nn.Module) -> LossFn:
    """Return the loss function that fits `model`.

    Raises ModelError for a model that is neither a Decoder nor one of transformers' causal models.
    """
    if isinstance(model, Decoder):
        if model.config.logit_scale != 1 or model.config.logit_softcap is not None:
            return adapted_head_loss
        if isinstance(model.output_head(), TrainableTokensLinear):
            return trainable_tokens_loss
        adapted = isinstance(model.output_head(), LoRALayer)
        return adapted_head_loss if adapted else decoder_loss
    if is_transformers(model):
        return transformers_loss
    raise ModelError(
        f"Cannot choose a loss for {type(model).__name__}. Allowed: lora's Decoder, transformers' "
        "causal models. Pass a loss_fn of your own: (model, batch) -> (loss sum, target tokens)."
    )


def is_transformers(model: nn.Module) -> bool:
    """Whether `model` is one of transformers'; never imports transformers."""
    return any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__)


def _sum_of(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed loss and the number of `labels` (N,), from logits (N, V)."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    n_tokens = torch.tensor([len(labels)], device=labels.device)
    return F.cross_entropy(wide, labels, reduction="sum")[None], n_tokens


def _hidden(decoder: Decoder, batch: Batch) -> Tensor:
    hidden = decoder.hidden_states(
        batch.input_ids,
        position_ids=batch.position_ids,
        document_ids=None if batch.is_causal else batch.document_ids,
    )
    return hidden.flatten(0, 1)  # (B·T, C)
