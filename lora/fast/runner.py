"""Steps of a GPU as the loop takes them: launched ahead, read one step late."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora.data.sequences.batches import Batch
from lora.decoder.decoder import Decoder
from lora.device import DeviceChoice
from lora.fast.captured import CapturedStep, decoder_logits
from lora.fast.llama.checkpointing import ActivationCheckpointing
from lora.fast.step import MERGE_BELOW_WIDTH, FastStep, trains_all_weights
from lora.fast.transformers_models import transformers_logits, why_masked
from lora.kernels.step.jit import HAS_TRITON
from lora.kernels.step.ops import PLAIN, TRITON
from lora.training.diagnosis import find_nonfinite
from lora.training.losses import loss_for
from lora.training.plain_step import LossFn
from lora.training.step_runner import StepOutcome

READ_LATE_STEPS = 1


@dataclass(frozen=True)
class _Launched:
    number: int
    rate: float
    batches: Sequence[Any]
    report: Tensor
    """On the host, valid when `event` has passed."""
    event: torch.cuda.Event | None


class DeviceStep(Protocol):
    """A step that is launched on the device and leaves its report there."""

    report: Tensor
    """Loss, tokens, gradient's norm, whether it was taken, (4,)."""

    def launch(self, batches: Sequence[Any], rate: float, number: int = 1) -> None:
        """Begin step `number`."""

    def adopt_moments(self, optimizer: torch.optim.Optimizer) -> None:
        """Changes `optimizer` in place: its state becomes views of the step's."""


class DeviceStepRunner:
    """`lora.training.step_runner.StepRunner` of a step on the device.

    Args:
        model: what `step` trains.
        step: how.
        choice: where it runs, and the type of its products.
        about: one line for the user.
        loss_fn: finds where a NaN came from; None: what fits `model`.
    """

    def __init__(
        self,
        model: nn.Module,
        step: DeviceStep,
        choice: DeviceChoice,
        about: str,
        loss_fn: LossFn | None = None,
    ) -> None:
        self.loss_fn = loss_fn
        self.model, self.choice, self.about = model, choice, about
        self.is_cuda = choice.device.type == "cuda"
        self._step = step
        self._launched: deque[_Launched] = deque()

    def describe(self) -> str:
        """Return one line on what the step does with this model."""
        return self.about

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Use `optimizer`'s moments; its state becomes views of the fast step's."""
        self._step.adopt_moments(optimizer)

    def launch(self, number: int, batches: Sequence[Any], rate: float) -> None:
        """Begin step `number`; on a GPU this returns at once."""
        self._step.launch(batches, rate, number)
        report, event = self._step.report.clone(), None
        if self.is_cuda:
            report = report.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._launched.append(_Launched(number, rate, batches, report, event))

    def finished(self, *, wait: bool) -> list[StepOutcome]:
        """Return the steps that are done, all but the newest unless `wait`."""
        done = []
        while len(self._launched) > (0 if wait or not self.is_cuda else READ_LATE_STEPS):
            done.append(self._read(self._launched.popleft()))
        return done

    def _read(self, launched: _Launched) -> StepOutcome:
        if launched.event is not None:
            launched.event.synchronize()
        loss, n_tokens, norm, taken = launched.report.tolist()
        number, rate = launched.number, launched.rate
        if taken:
            return StepOutcome(number, [loss], int(n_tokens), norm, rate)
        device = self.choice.device
        batches = [b.to(device) if isinstance(b, Batch) else b for b in launched.batches]
        loss_fn = self.loss_fn or loss_for(self.model)
        where = find_nonfinite(self.model, batches, loss_fn, self.choice.autocast)
        why = (
            f"The loss is {loss} and the gradient's norm {norm}: not finite, so the step was not "
            f"taken. Lower the learning rate, or look for damaged examples. {where.sentence}"
        )
        places = where.places if where.is_of_data else None
        return StepOutcome(number, [loss], int(n_tokens), norm, rate, why, places)


class FastStepRunner(DeviceStepRunner):
    """The step written by hand, of a decoder that `why_not_fast` has nothing against.

    Args:
        model: becomes views of the fast step's tensors.
        choice: where it runs, and the type of its products.
        weight_decay: of matrices.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them alone.
        seed: of dropout.
        keep: what stays of the blocks between forward and backward; None: nearly all.
    """

    def __init__(
        self,
        model: Decoder,
        choice: DeviceChoice,
        *,
        weight_decay: float,
        max_grad_norm: float,
        seed: int,
        checkpointing: ActivationCheckpointing | None = None,
    ) -> None:
        self.step = FastStep(
            model,
            TRITON if choice.device.type == "cuda" else PLAIN,
            choice.compute_dtype,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            seed=seed,
            checkpointing=checkpointing,
        )
        super().__init__(model, self.step, choice, _about_fast(self.step, choice))


class CapturedStepRunner(DeviceStepRunner):
    """Autograd's step in one graph, of any model that `why_not_captured` has nothing against.

    Args:
        model: what trains becomes views of one flat buffer.
        choice: where it runs, and the type of its products.
        weight_decay: of matrices.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them alone.
        compiles: send blocks and loss through torch.compile: faster steps, a later first one.
    """

    def __init__(
        self,
        model: nn.Module,
        choice: DeviceChoice,
        *,
        weight_decay: float,
        max_grad_norm: float,
        compiles: bool,
    ) -> None:
        is_cuda = choice.device.type == "cuda"
        is_ours = isinstance(model, Decoder)
        masked = None if is_ours else why_masked(model)
        compiles = compiles and masked is None  # a mask that only a capture has compiles anew there
        self.step = CapturedStep(
            model,
            decoder_logits if is_ours else transformers_logits,
            TRITON if is_cuda and HAS_TRITON else PLAIN,
            choice,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            compiles=compiles,
            unmasked=not is_ours and masked is None,
        )
        kind = str(choice.compute_dtype).removeprefix("torch.")
        blocks = "compiled blocks" if compiles else "blocks as they are"
        graph = "one CUDA graph" if is_cuda else "no graph"
        about = f"captured step: {graph}, autograd, {blocks}, {kind} products"
        if masked is not None:
            about += f"; attention takes masks, for {masked}"
        super().__init__(model, self.step, choice, about)


def _about_fast(step: FastStep, choice: DeviceChoice) -> str:
    width = step.model.config.hidden_size
    how = "LoRA inside the weights' products"
    if trains_all_weights(step.model):
        how = "all weights train"
    elif step.network.codes is not None:
        how = "frozen products in fp8, LoRA beside them"
    elif step.masks is not None:
        how = "LoRA beside the weights, with dropout"
    elif step.merges:
        how = f"LoRA merged once a step (width {width} < {MERGE_BELOW_WIDTH})"
    graph = "one CUDA graph" if choice.device.type == "cuda" else "no graph"
    kind = str(choice.compute_dtype).removeprefix("torch.")
    return f"fast step: {graph}, {step.ops.name} kernels, {kind} products; {how}"
