"""The loss of K stacked adapters on a decoder: (model, batch) -> (sums, target tokens), both (K,).

No sum runs over two adapters: the output head and the loss are computed for one adapter at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.data.sequences.batches import IGNORE, Batch
from lora.decoder.decoder import Decoder
from lora.decoder.quantised.tables import rows_of
from lora.device import DeviceChoice
from lora.kernels.cross_entropy import linear_cross_entropy
from lora.stacked.apply import StackedAdapters
from lora.stacked.layers import StackedLoRALinear
from lora.training.losses import transform_of


class StackedDecoderLoss:
    """The loss of a native decoder with `stacked` on it; a batch is (K·B, T), adapter 0's first."""

    def __init__(self, stacked: StackedAdapters) -> None:
        self._n_adapters = stacked.stack.n_adapters

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return each adapter's summed loss in nats and its target tokens, (K,), (K,)."""
        decoder, n = cast(Decoder, model), self._n_adapters
        hidden = decoder.hidden_states(
            batch.input_ids, position_ids=batch.position_ids, document_ids=batch.document_ids
        )
        labels = batch.labels.view(n, -1)  # (K, N)
        head = decoder.output_head()
        if isinstance(head, StackedLoRALinear):
            return _from_logits(decoder.logits_of(hidden), labels)
        transform, weight = transform_of(decoder.config), rows_of(head, hidden)
        # Unbound, not sliced: the backward of each of K slices would be a gradient of full size.
        by_adapter = hidden.flatten(0, 1).unflatten(0, (n, -1)).unbind(0)  # K times (N, C)
        found = [
            linear_cross_entropy(own, weight, own_labels, transform=transform)
            for own, own_labels in zip(by_adapter, labels.unbind(0), strict=True)
        ]
        sums, counts = zip(*found, strict=True)
        return torch.stack(sums), torch.stack(counts)


def _from_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.flatten(0, 1)  # (K·N, V)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(wide, labels.flatten(), ignore_index=IGNORE, reduction="none")
    return losses.view_as(labels).sum(1), (labels != IGNORE).sum(1)


def stack_batches(batches: Sequence[Batch]) -> Batch:
    """Return one batch (K·B, T) of the adapters' batches (B, T), adapter 0's first."""
    return Batch(
        input_ids=torch.cat([batch.input_ids for batch in batches]),  # (K·B, T)
        labels=torch.cat([batch.labels for batch in batches]),
        position_ids=torch.cat([batch.position_ids for batch in batches]),
        document_ids=torch.cat([batch.document_ids for batch in batches]),
    )


@torch.no_grad()
def evaluate_stacked(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]],
    n_adapters: int,
    choice: DeviceChoice,
) -> list[float]:
    """Return each adapter's mean loss in nats over all target tokens of `batches`, dropout off.

    Every adapter sees each batch (B, T). The host waits for the device once per batch. NaN where
    there is no target token.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros(n_adapters, dtype=torch.float64, device=choice.device)
    count = 0
    for batch in batches:
        with choice.autocast():
            sums, counts = loss_fn(model, stack_batches([batch] * n_adapters))  # (K,), (K,)
        total += sums.double()
        count += int(counts[0])
    model.train(was_training)
    return [float(value) / count if count else math.nan for value in total]
