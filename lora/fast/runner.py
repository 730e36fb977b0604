"""Step runners of a GPU: the hand-written step and the captured one, read one step late."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora.config import TrainConfig
from lora.data.sequences.batches import Batch
from lora.decoder.decoder import Decoder
from lora.decoder.language_model import LanguageModel
from lora.device import DeviceChoice
from lora.distributed.dropout import SharedDropouts
from lora.distributed.world import ALONE, StopFlags, World
from lora.fast.captured import CapturedStep, Forward, decoder_forward, loss_of_head
from lora.fast.llama.checkpointing import ActivationCheckpointing
from lora.fast.sharded.base import ShardedBase
from lora.fast.step import FastStep
from lora.fast.transformers_models import TransformersForward
from lora.kernels.step.jit import HAS_TRITON
from lora.kernels.step.ops import PLAIN, TRITON
from lora.pretrained.transformers_models.model import TransformersModel
from lora.training.checkpoint import OptimizerState, restore_training_tensors, training_tensors
from lora.training.diagnosis import find_in_all
from lora.training.losses import loss_for
from lora.training.out_of_memory import is_out_of_memory
from lora.training.plain_step import evaluate, skipped_step
from lora.training.step_runner import LossFn, StepOutcome, TrainingState

READ_LATE_STEPS = 1
"""The host reads a step's report after it has launched so many more, so that it never waits for
the step that it has just launched."""


@dataclass(frozen=True)
class _Launched:
    step: int
    learning_rate: float
    micro_batches: Sequence[Any]
    """Kept until the step is read: a step that is not finite is traced back to its sequences."""
    report: Tensor
    """On the host, valid when `event` has passed."""
    event: torch.cuda.Event | None


class DeviceStep(Protocol):
    """A step that is launched on the device and leaves its report there."""

    report: Tensor
    """Loss, tokens, gradient norm, whether the update was made, (4,)."""

    def launch(self, batches: Sequence[Any], learning_rate: float, number: int = 1) -> None:
        """Begin step `number`."""

    def optimizer_state(self) -> OptimizerState:
        """Return AdamW's state, views of the step's tensors."""

    def load_optimizer_state(self, saved: OptimizerState) -> None:
        """Changes AdamW's state in place, after the model's parameters were restored."""


class DeviceStepRunner:
    """Runs a step that leaves its report on the device: launched ahead, read one step late.

    A `lora.training.step_runner.StepRunner`.

    Args:
        model: what `step` trains.
        step: how.
        choice: where it runs, and the compute dtype.
        about: one line for the user.
        loss_fn: for evaluations, and to find where a NaN came from; None: what fits `model`.
        world: processes that have parts of micro-batches of `micro_batch_size` sequences.
        micro_batch_size: of all processes together; of no use alone.
    """

    batch_device = torch.device("cpu")
    """The step copies micro-batches to its device by itself, into the buffers that it reads."""

    def __init__(
        self,
        model: nn.Module,
        step: DeviceStep,
        choice: DeviceChoice,
        about: str,
        loss_fn: LossFn | None = None,
        world: World = ALONE,
        micro_batch_size: int = 0,
    ) -> None:
        self.loss_fn = loss_fn or loss_for(model)
        self.world, self._micro_batch_size = world, micro_batch_size
        self.model, self.choice, self.about = model, choice, about
        self.is_cuda = choice.device.type == "cuda"
        self._step = step
        self._launched: deque[_Launched] = deque()

    def describe(self) -> str:
        """Return one line on what the step does with this model."""
        return self.about

    def launch(
        self, step: int, micro_batches: Sequence[Any], learning_rates: Sequence[float]
    ) -> None:
        """Begin step number `step`; on a GPU this returns at once."""
        # The protocol has one for each of K stacked adapters; here all parameters share one.
        (learning_rate,) = learning_rates
        self._step.launch(micro_batches, learning_rate, step)
        # A copy: the next step writes its own report over this one before the host reads it.
        report, event = self._step.report.clone(), None
        if self.is_cuda:
            report = report.to("cpu", non_blocking=True)
            # An event rather than a synchronisation: the host may launch the next step meanwhile.
            event = torch.cuda.Event()
            event.record()
        self._launched.append(_Launched(step, learning_rate, micro_batches, report, event))

    def finished(self, *, wait: bool) -> list[StepOutcome]:
        """Return the steps that are done, all but the newest unless `wait`."""
        outcomes = []
        # On a CPU a step is done when it is launched, and nothing is gained by reading it late.
        while len(self._launched) > (0 if wait or not self.is_cuda else READ_LATE_STEPS):
            outcomes.append(self._read(self._launched.popleft()))
        return outcomes

    def evaluate(self, batches: Iterable[Any]) -> list[float]:
        """Return the mean loss in nats over all target tokens of `batches`, dropout off."""
        autocast = self.choice.autocast
        return [evaluate(self.model, batches, self.loss_fn, autocast, self.world)]

    def state(self, adapter: int = 0) -> TrainingState:
        """Return what trains, AdamW's moments and the states of random generators; views."""
        return training_tensors(self.model, self._step.optimizer_state())

    def restore(self, state: TrainingState, *, step: int, adapter: int = 0) -> None:
        """Changes model, optimizer and generators in place; AdamW's own step number is in `state`.

        Raises CheckpointError if `state` is of another model.
        """
        self._step.load_optimizer_state(restore_training_tensors(self.model, state))

    def _read(self, launched: _Launched) -> StepOutcome:
        if launched.event is not None:
            with self.world.waits(f"the gradients of step {launched.step}"):
                launched.event.synchronize()  # the host waits here, for a step that is one behind
        loss, n_tokens, norm, is_taken, *flags = launched.report.tolist()
        stops = StopFlags.from_sums(flags) if flags else StopFlags()
        if not is_taken:
            return self._explain(launched, loss, norm, stops)
        return StepOutcome(
            launched.step,
            losses=[loss],
            n_tokens=int(n_tokens),
            gradient_norms=[norm],
            learning_rates=[launched.learning_rate],
            stops=stops,
        )

    def _explain(
        self, launched: _Launched, loss: float, norm: float, stops: StopFlags
    ) -> StepOutcome:
        """Return the outcome of a step that was not taken: its batches are run again, watched."""
        # The graphs keep no module's output, so autograd's forward is run, with hooks. Batches of
        # other kinds (the character model's pairs) are on the device already.
        # The step after this one is launched already and may have moved the parameters: the layer
        # named may be another then, but a damaged example or weight is found all the same.
        device = self.choice.device
        batches = [b.to(device) if isinstance(b, Batch) else b for b in launched.micro_batches]
        autocast, size = self.choice.autocast, self._micro_batch_size
        found = find_in_all(self.model, batches, self.loss_fn, autocast, size, self.world)
        why = (
            f"The loss is {loss} and the gradient norm {norm}: not finite, so the step was not "
            f"taken. Lower the learning rate, or look for damaged examples. {found.sentence}"
        )
        return skipped_step(launched.step, launched.learning_rate, why, found, stops)


class FastStepRunner(DeviceStepRunner):
    """Runs the hand-written step of a decoder that `why_not_fast` has nothing against.

    Args:
        model: its parameters become views of the step's tensors.
        choice: where it runs, and the compute dtype.
        config: of AdamW, clipping and dropout's seed.
        checkpointing: which activations are recomputed; None: hardly any.
        leaner: called if the first step runs out of memory; returns what to store instead, or None
            to give up.
        world: processes that have parts of each micro-batch; all of them go leaner together.
        base: where frozen weights come from that are sharded, and on the meta device in `model`.
    """

    def __init__(
        self,
        model: Decoder,
        choice: DeviceChoice,
        config: TrainConfig,
        *,
        checkpointing: ActivationCheckpointing | None = None,
        leaner: Callable[[], ActivationCheckpointing | None] = lambda: None,
        world: World = ALONE,
        base: ShardedBase | None = None,
    ) -> None:
        self._leaner, self._has_launched = leaner, False
        self.step = FastStep(
            model,
            # On a CPU the plain twins of the kernels: for tests, since no run chooses this there.
            TRITON if choice.device.type == "cuda" else PLAIN,
            choice.compute_dtype,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
            checkpointing=checkpointing,
            world=world,
            first_sequence=world.share.part(config.micro_batch_size).start,
            base=base,
            whole_rate_fraction=config.whole_rate_fraction,
        )
        about, size = self.step.describe(), config.micro_batch_size
        super().__init__(model, self.step, choice, about, world=world, micro_batch_size=size)

    def launch(
        self, step: int, micro_batches: Sequence[Any], learning_rates: Sequence[float]
    ) -> None:
        """Begin step number `step`; the first one is tried again with less memory if it must."""
        if self._has_launched:
            super().launch(step, micro_batches, learning_rates)
            return
        while not self._launch_first(step, micro_batches, learning_rates):
            # What a failed step held is free when its frames are gone, which the handled error
            # kept alive.
            gc.collect()
            if self.is_cuda:
                torch.cuda.empty_cache()
        self._has_launched = True

    def _launch_first(
        self, step: int, micro_batches: Sequence[Any], learning_rates: Sequence[float]
    ) -> bool:
        """Return whether the step was launched; else the next try stores less."""
        taken = self.step.taken_steps.clone()
        try:
            super().launch(step, micro_batches, learning_rates)
        except (RuntimeError, MemoryError) as error:
            # Another mode rounds differently, so it is taken before anything was trained, or never.
            was_updated = not torch.equal(self.step.taken_steps, taken)
            was_updated |= self.step.has_agreed  # the other processes have gone on
            if was_updated or not is_out_of_memory(error):
                raise
            checkpointing = self._leaner()
            if checkpointing is None:
                raise
            self.step.restart(checkpointing)
            return False
        return True


class CapturedStepRunner(DeviceStepRunner):
    """Runs autograd's step in one graph, of any model that `why_not_captured` accepts.

    Args:
        model: what trains becomes views of one flat buffer.
        choice: where it runs, and the compute dtype.
        config: of AdamW and clipping.
        compiles: send blocks and loss through torch.compile: faster steps, a later first one.
        world: processes that have parts of each micro-batch.
    """

    def __init__(
        self,
        model: LanguageModel,
        choice: DeviceChoice,
        config: TrainConfig,
        *,
        compiles: bool,
        world: World = ALONE,
    ) -> None:
        is_cuda = choice.device.type == "cuda"
        # AdamW and the loss are kernels of ours, and their plain twins can be captured too.
        ops = TRITON if is_cuda and HAS_TRITON else PLAIN
        forward: Forward = decoder_forward(model)
        if isinstance(model, TransformersModel):
            forward = TransformersForward(model, choice.compute_dtype)
        size = config.micro_batch_size
        self.step = CapturedStep(
            model,
            forward,
            ops,
            choice,
            loss=loss_of_head(model, ops, compiles=compiles),
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            compiled=model.blocks() if compiles else None,
            world=world,
            dropouts=SharedDropouts(model, world.share, size, config.seed),
            whole_rate_fraction=config.whole_rate_fraction,
        )
        kind = str(choice.compute_dtype).removeprefix("torch.")
        blocks = "compiled blocks" if compiles else "blocks as they are"
        graph = "one CUDA graph" if is_cuda else "no graph"
        about = f"captured step: {graph}, autograd, {blocks}, {kind} matmuls"
        if isinstance(forward, TransformersForward):
            about += forward.describe()
        super().__init__(model, self.step, choice, about, world=world, micro_batch_size=size)
