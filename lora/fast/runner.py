"""The fast step as the loop takes it: launched ahead, read one step late."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora.data.batches import Batch
from lora.decoder.decoder import Decoder
from lora.device import DeviceChoice
from lora.diagnosis import find_nonfinite
from lora.fast.ops import PLAIN, TRITON
from lora.fast.step import MERGE_BELOW_WIDTH, FastStep, trains_whole
from lora.losses import loss_for
from lora.steps import StepDone

READ_LATE_STEPS = 1


@dataclass(frozen=True)
class _Launched:
    number: int
    rate: float
    batches: Sequence[Batch]
    report: Tensor
    """On the host, valid when `event` has passed."""
    event: torch.cuda.Event | None


class FastSteps:
    """`lora.steps.Steps` of a decoder that `why_not_fast` has nothing against.

    Args:
        model: becomes views of the fast step's tensors.
        choice: where it runs, and the type of its products.
        weight_decay: of matrices.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them alone.
        seed: of dropout.
    """

    def __init__(
        self,
        model: Decoder,
        choice: DeviceChoice,
        *,
        weight_decay: float,
        max_grad_norm: float,
        seed: int,
    ) -> None:
        self.model, self.choice = model, choice
        self.is_cuda = choice.device.type == "cuda"
        self.step = FastStep(
            model,
            TRITON if self.is_cuda else PLAIN,
            choice.compute_dtype,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            seed=seed,
        )
        self._launched: deque[_Launched] = deque()

    def describe(self) -> str:
        """Return one line on what the step does with this model."""
        width = self.model.config.hidden_size
        how = "LoRA inside the weights' products"
        if trains_whole(self.model):
            how = "all weights train"
        elif self.step.masks is not None:
            how = "LoRA beside the weights, with dropout"
        elif self.step.merges:
            how = f"LoRA merged once a step (width {width} < {MERGE_BELOW_WIDTH})"
        graph = "one CUDA graph" if self.is_cuda else "no graph"
        kind = str(self.choice.compute_dtype).removeprefix("torch.")
        return f"fast step: {graph}, {self.step.ops.name} kernels, {kind} products; {how}"

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Use `optimizer`'s moments; its state becomes views of the fast step's."""
        self.step.adopt_moments(optimizer)

    def launch(self, number: int, batches: Sequence[Any], rate: float) -> None:
        """Begin step `number`; on a GPU this returns at once."""
        self.step.launch(batches, rate, number)
        report, event = self.step.report.clone(), None
        if self.is_cuda:
            report = report.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._launched.append(_Launched(number, rate, batches, report, event))

    def finished(self, *, wait: bool) -> list[StepDone]:
        """Return the steps that are done, all but the newest unless `wait`."""
        done = []
        while len(self._launched) > (0 if wait or not self.is_cuda else READ_LATE_STEPS):
            done.append(self._read(self._launched.popleft()))
        return done

    def _read(self, launched: _Launched) -> StepDone:
        if launched.event is not None:
            launched.event.synchronize()
        loss, n_tokens, norm, taken = launched.report.tolist()
        why = "" if taken else self._explain(launched, loss, norm)
        return StepDone(launched.number, [loss], int(n_tokens), norm, launched.rate, why)

    def _explain(self, launched: _Launched, loss: float, norm: float) -> str:
        device = self.choice.device
        batches = [batch.to(device) for batch in launched.batches]
        where = find_nonfinite(self.model, batches, loss_for(self.model), self.choice.autocast)
        return (
            f"Step {launched.number}: The loss is {loss} and the gradient's norm {norm}: not "
            "finite, so the step was not taken. Lower the learning rate, or look for damaged "
            f"examples. {where}"
        )
