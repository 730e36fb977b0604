"""Loss functions of causal language models: (model, batch) -> (sum, tokens), (1,).

The loss is in nats, summed over the batch's target tokens.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.data.sequences.batches import IGNORE, Batch
from lora.decoder.language_model import LanguageModel, ModelConfig
from lora.decoder.quantised.base import QuantisedWeight
from lora.decoder.quantised.tables import rows_of
from lora.errors import ModelError
from lora.kernels.cross_entropy import LogitTransform, linear_cross_entropy
from lora.kernels.trained_rows_cross_entropy import trained_rows_cross_entropy
from lora.layers.trainable_tokens import TrainableTokensLinear
from lora.lora_module import LoRALayer
from lora.training.step_runner import LossFn


def linear_head_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the loss of a model whose head is a linear without LoRA; logits exist in chunks."""
    own = cast(LanguageModel, model)
    head, hidden = own.output_head(), _hidden(own, batch)
    loss, n_tokens = linear_cross_entropy(
        hidden,
        rows_of(head, hidden),
        batch.labels.flatten(),
        bias=head.bias,
        transform=transform_of(own.config),
    )
    return loss[None], n_tokens[None]


def trainable_tokens_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the loss of a model whose head has trainable rows; logits in chunks."""
    own = cast(LanguageModel, model)
    head = cast(TrainableTokensLinear, own.output_head())
    loss, n_tokens = trained_rows_cross_entropy(
        _hidden(own, batch),
        head.weight,
        head.token_rows,
        head.columns,
        batch.labels.flatten(),
        transform=transform_of(own.config),
    )
    return loss[None], n_tokens[None]


def any_head_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the loss of a model with any head, LoRA's too; logits of learned tokens only.

    A model that needs all logits has them where others have hidden states.
    """
    own, labels = cast(LanguageModel, model), batch.labels.flatten()
    learned = labels != IGNORE
    logits = own.logits_of(_hidden(own, batch)[learned])  # (N, V)
    return _sum_of(logits, labels[learned])


def loss_for(model: nn.Module) -> LossFn:
    """Return the loss function that fits `model`.

    Raises ModelError unless it is a LanguageModel.
    """
    if not isinstance(model, LanguageModel):
        raise ModelError(
            f"Cannot choose a loss for {type(model).__name__}. Allowed: lora's Decoder, "
            "transformers' causal models through lora.train. Pass a loss_fn of your own: (model, "
            "batch) -> (loss sum, target tokens)."
        )
    head = model.output_head()
    if model.needs_all_logits:
        return any_head_loss
    if isinstance(head, TrainableTokensLinear):
        return trainable_tokens_loss
    is_plain = isinstance(head, nn.Linear | QuantisedWeight) and not isinstance(head, LoRALayer)
    return linear_head_loss if is_plain else any_head_loss


def transform_of(config: ModelConfig) -> LogitTransform:
    """Return what `config` does with the head's logits."""
    return LogitTransform(config.logit_scale, config.logit_softcap)


def _sum_of(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed loss and the number of `labels` (N,), from logits (N, V)."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    n_tokens = torch.tensor([len(labels)], device=labels.device)
    return F.cross_entropy(wide, labels, reduction="sum")[None], n_tokens


def _hidden(model: LanguageModel, batch: Batch) -> Tensor:
    hidden = model.hidden_states(
        batch.input_ids,
        position_ids=batch.position_ids,
        document_ids=None if batch.is_causal else batch.document_ids,
    )
    return hidden.flatten(0, 1)  # (B·T, C)
