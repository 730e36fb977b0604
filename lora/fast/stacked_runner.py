"""Step runner of K stacked adapters on a GPU, and the choice between it and the plain one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lora.config import TrainConfig
from lora.data.sequences.batches import Batch
from lora.decoder.decoder import Decoder
from lora.device import DeviceChoice
from lora.fast.runner import READ_LATE_STEPS
from lora.fast.stacked_step import StackedFastStep
from lora.fast.why_not import why_not_stacked
from lora.kernels.step.ops import PLAIN, TRITON
from lora.stacked.apply import StackedAdapters
from lora.stacked.losses import StackedDecoderLoss, evaluate_stacked
from lora.stacked.plain_step import PlainStackedRunner, StackedStepRunner, why_stopped
from lora.training.step_runner import StepOutcome, TrainingState


@dataclass(frozen=True)
class _Launched:
    step: int
    learning_rates: list[float]
    report: Tensor
    """(K, 4), on the host, valid when `event` has passed."""
    event: torch.cuda.Event | None


class FastStackedRunner:
    """Runs the hand-written step of K adapters on one decoder, read one step late.

    A `lora.stacked.plain_step.StackedStepRunner`, whose adapters train as they would alone.

    Args:
        model: with `stacked` on it; its weights become views of the step's tensors.
        configs: of AdamW and clipping, one for each adapter.
        choice: where it runs, and the compute dtype.
    """

    batch_device = torch.device("cpu")
    """The step copies micro-batches to its device by itself, into the buffers that it reads."""

    def __init__(
        self,
        model: Decoder,
        stacked: StackedAdapters,
        configs: Sequence[TrainConfig],
        choice: DeviceChoice,
    ) -> None:
        self.model, self.stacked, self.choice = model, stacked, choice
        self.loss_fn = StackedDecoderLoss(stacked)
        self.is_cuda = choice.device.type == "cuda"
        # An attribute of its own, so that tests on a CPU can read as late as a GPU's runner.
        self.late_steps = READ_LATE_STEPS if self.is_cuda else 0
        self.step = StackedFastStep(
            model,
            stacked,
            TRITON if self.is_cuda else PLAIN,
            choice.compute_dtype,
            weight_decays=[config.weight_decay for config in configs],
            max_grad_norms=[config.max_grad_norm for config in configs],
        )
        self.failures: dict[int, str] = {}
        """By adapter: why it no longer trains."""
        self._launched: deque[_Launched] = deque()

    def describe(self) -> str:
        """Return one line on the step."""
        graph = "one CUDA graph" if self.is_cuda else "no graph"
        return f"fast stacked step: {graph}, {self.step.describe()}"

    def launch(
        self, step: int, micro_batches: Sequence[Batch], learning_rates: Sequence[float]
    ) -> None:
        """Begin step number `step` of all adapters; on a GPU this returns at once."""
        self.step.launch(micro_batches, learning_rates, step)
        # A copy: the next step writes its own report over this one before the host reads it.
        report, event = self.step.report.clone(), None
        if self.is_cuda:
            report = report.to("cpu", non_blocking=True)
            # An event rather than a synchronisation: the host may launch the next step meanwhile.
            event = torch.cuda.Event()
            event.record()
        self._launched.append(_Launched(step, list(learning_rates), report, event))

    def finished(self, *, wait: bool) -> list[StepOutcome]:
        """Return the steps that are done, all but the newest unless `wait`.

        An adapter whose step was not finite is in `failures` from then on.
        """
        outcomes = []
        while len(self._launched) > (0 if wait else self.late_steps):
            outcomes.append(self._read(self._launched.popleft()))
        return outcomes

    def drop(self, adapter: int, reason: str) -> None:
        """Stop `adapter` for `reason`: its values stay what they are from now on."""
        self.failures[adapter] = reason
        # A mask on the device: no graph is captured again, and the others keep their bits.
        self.step.update.is_alive[adapter] = False

    def evaluate(self, batches: Iterable[Batch]) -> list[float]:
        """Return each adapter's mean loss in nats over all target tokens of `batches` (B, T)."""
        n = self.stacked.stack.n_adapters
        return evaluate_stacked(self.model, batches, self.loss_fn, n, self.choice)

    def state(self, adapter: int = 0) -> TrainingState:
        """Return copies on the host of all that `adapter` needs to go on.

        Names are those of `lora.stacked.plain_step.PlainStackedRunner.state`: either runner goes on
        from what the other has saved.
        """
        # Copies, because the device writes the next step over what these are views of.
        own = self.stacked.values(adapter).items()
        state = {f"value.{name}": tensor.cpu() for name, tensor in own}
        for name, (mean, square) in self._moments(adapter).items():
            state[f"mean.{name}"] = mean.to("cpu", copy=True)
            state[f"square.{name}"] = square.to("cpu", copy=True)
        return {**state, "dropout": self.stacked.stack.generators[adapter].get_state()}

    @torch.no_grad()
    def restore(self, state: TrainingState, *, step: int, adapter: int = 0) -> None:
        """Changes `adapter` in place: it goes on from `state` after `step` steps."""
        self.stacked.fill(adapter, {n.removeprefix("value."): t for n, t in state.items()})
        for name, (mean, square) in self._moments(adapter).items():
            mean.copy_(state[f"mean.{name}"])
            square.copy_(state[f"square.{name}"])
        self.stacked.stack.generators[adapter].set_state(state["dropout"].cpu())
        self.step.update.taken_steps[adapter] = step  # AdamW's bias correction counts from there
        self.step.refresh()  # merged weights are of the values before

    def _moments(self, adapter: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Return `adapter`'s moments by tensor, views without padding."""
        found, flat = {}, self.step.flat
        for name, layer in self.stacked.layers.items():
            # Adapters are padded to the largest rank of the stack: a checkpoint has none of that.
            rank = layer.ranks[adapter]
            mean, square = flat.moments(layer.lora_A, adapter)
            found[f"{name}.lora_A"] = (mean[:rank], square[:rank])  # (R_k, I)
            mean, square = flat.moments(layer.lora_B, adapter)
            found[f"{name}.lora_B"] = (mean[:, :rank], square[:, :rank])  # (O, R_k)
        return found

    def _read(self, launched: _Launched) -> StepOutcome:
        if launched.event is not None:
            launched.event.synchronize()  # the host waits here, for a step that is one behind
        # A stopped adapter reports "not taken" at each later step too: only the first one counts.
        losses, counts, norms, taken = zip(*launched.report.tolist(), strict=True)
        not_finite = {
            k: why_stopped(launched.step, losses[k], norms[k])
            for k, is_taken in enumerate(taken)
            if not is_taken and k not in self.failures
        }
        self.failures |= not_finite
        return StepOutcome(
            launched.step,
            losses=list(losses),
            n_tokens=int(sum(counts)),
            gradient_norms=list(norms),
            learning_rates=launched.learning_rates,
            not_finite=not_finite,
        )


def choose_stacked_runner(
    model: nn.Module,
    stacked: StackedAdapters,
    configs: Sequence[TrainConfig],
    choice: DeviceChoice,
    *,
    fast: bool = True,
    on_message: Callable[[str], None] = lambda text: None,
) -> StackedStepRunner:
    """Return the runner of the fastest step for these adapters on a decoder; report on a GPU which.

    What `model` holds may become views of the step's own tensors. `fast`: False takes the plain
    step.
    """
    why_not = why_not_stacked(model, stacked, choice) if fast else "as asked"
    if why_not is None:
        runner = FastStackedRunner(cast(Decoder, model), stacked, configs, choice)
        on_message(runner.describe())
        return runner
    if choice.device.type == "cuda":
        on_message(f"plain stacked step: {why_not}")
    return PlainStackedRunner(model, stacked, StackedDecoderLoss(stacked), configs, choice)
