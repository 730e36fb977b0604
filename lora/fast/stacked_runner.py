"""Training K stacked adapters through the fast step: launched on the device, read one step late.

It stands in for `lora.stacked.plain_step.PlainStackedRunner`, which says the same of every adapter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lora.config import TrainConfig
from lora.data.sequences.batches import Batch
from lora.decoder.decoder import Decoder
from lora.device import DeviceChoice
from lora.fast.choose import why_not_stacked
from lora.fast.runner import READ_LATE_STEPS
from lora.fast.stacked_step import StackedFastStep
from lora.kernels.step.ops import PLAIN, TRITON
from lora.stacked.apply import StackedAdapters
from lora.stacked.losses import StackedDecoderLoss
from lora.stacked.plain_step import (
    PlainStackedRunner,
    StackedStepRunner,
    scheduled_rates,
    why_stopped,
)

State = dict[str, Tensor]


@dataclass(frozen=True)
class _Launched:
    steps: list[int]
    """The number of the step, from 1, for each adapter."""
    report: Tensor
    """(K, 4), on the host, valid when `event` has passed."""
    event: torch.cuda.Event | None


class FastStackedRunner:
    """Steps of K adapters on one decoder, each as `lora.fast.step` takes them alone.

    Args:
        model: with `stacked` on it; its weights become views of the step's tensors.
        configs: one for each adapter.
        rates: the peak rate of each.
        choice: where it runs, and the type of its products.
    """

    batch_device = torch.device("cpu")
    """Where batches are wanted: the step copies them to its device by itself."""

    def __init__(
        self,
        model: Decoder,
        stacked: StackedAdapters,
        configs: Sequence[TrainConfig],
        rates: Sequence[float],
        choice: DeviceChoice,
    ) -> None:
        self.stacked, self._configs, self._rates = stacked, tuple(configs), tuple(rates)
        self.is_cuda = choice.device.type == "cuda"
        self.late_steps = READ_LATE_STEPS if self.is_cuda else 0
        self.step = StackedFastStep(
            model,
            stacked,
            TRITON if self.is_cuda else PLAIN,
            choice.compute_dtype,
            weight_decays=[config.weight_decay for config in configs],
            max_grad_norms=[config.max_grad_norm for config in configs],
        )
        self.steps = [0] * stacked.stack.n_adapters
        """Launched so far, by adapter."""
        self.failures: dict[int, str] = {}
        """Why adapter k was stopped, by k."""
        self._launched: deque[_Launched] = deque()

    def describe(self) -> str:
        """Return one line on the step."""
        graph = "one CUDA graph" if self.is_cuda else "no graph"
        return f"fast stacked step: {graph}, {self.step.describe()}"

    def launch(self, micro_batches: Sequence[Batch]) -> None:
        """Begin a step; on a GPU this returns at once."""
        rates = scheduled_rates(self._rates, self._configs, self.steps)
        self.steps = [step + 1 for step in self.steps]
        self.step.launch(micro_batches, rates)
        report, event = self.step.report.clone(), None
        if self.is_cuda:
            report = report.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._launched.append(_Launched(self.steps, report, event))

    def finished(self, *, wait: bool) -> list[list[float]]:
        """Return each adapter's mean loss, (K,), of the steps that are done and were not returned.

        All but the newest unless `wait`. An adapter that failed in one is in `failures` then.
        """
        done = []
        while len(self._launched) > (0 if wait else self.late_steps):
            done.append(self._read(self._launched.popleft()))
        return done

    def drop(self, k: int, reason: str) -> None:
        """Stop adapter `k` for `reason`."""
        self.failures[k] = reason
        self.step.update.is_alive[k] = False

    def state(self, k: int) -> State:
        """Return copies on the host of all that adapter `k` needs to go on: see the plain one."""
        values = {f"value.{name}": tensor for name, tensor in self.stacked.values(k).items()}
        state = {name: tensor.cpu() for name, tensor in values.items()}
        for name, (mean, square) in self._moments(k).items():
            state[f"mean.{name}"] = mean.to("cpu", copy=True)
            state[f"square.{name}"] = square.to("cpu", copy=True)
        return {**state, "dropout": self.stacked.stack.generators[k].get_state()}

    @torch.no_grad()
    def restore(self, k: int, state: State, step: int) -> None:
        """Changes adapter `k` in place: it goes on from `state` after `step` steps."""
        self.stacked.fill(k, {name.removeprefix("value."): t for name, t in state.items()})
        for name, (mean, square) in self._moments(k).items():
            mean.copy_(state[f"mean.{name}"])
            square.copy_(state[f"square.{name}"])
        self.stacked.stack.generators[k].set_state(state["dropout"].cpu())
        self.steps[k] = step
        self.step.update.taken_steps[k] = step
        self.step.refresh()

    def _moments(self, k: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Return adapter `k`'s moments by tensor, without padding."""
        found, flat = {}, self.step.flat
        for name, layer in self.stacked.layers.items():
            rank = layer.ranks[k]
            mean, square = flat.moments(layer.lora_A, k)
            found[f"{name}.lora_A"] = (mean[:rank], square[:rank])  # (R_k, I)
            mean, square = flat.moments(layer.lora_B, k)
            found[f"{name}.lora_B"] = (mean[:, :rank], square[:, :rank])  # (O, R_k)
        return found

    def _read(self, launched: _Launched) -> list[float]:
        if launched.event is not None:
            launched.event.synchronize()
        rows = launched.report.tolist()
        for k, (loss, _, norm, taken) in enumerate(rows):
            if not taken and k not in self.failures:
                self.failures[k] = why_stopped(launched.steps[k], loss, norm)
        return [row[0] for row in rows]


def choose_stacked_runner(
    model: nn.Module,
    stacked: StackedAdapters,
    configs: Sequence[TrainConfig],
    rates: Sequence[float],
    choice: DeviceChoice,
    *,
    fast: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> StackedStepRunner:
    """Return the fastest training of these adapters on a decoder, and say on a GPU which and why.

    What `model` holds may become views of the step's own tensors.
    """
    why_not = why_not_stacked(model, stacked, choice) if fast else "as asked"
    if why_not is None:
        training = FastStackedRunner(cast(Decoder, model), stacked, configs, rates, choice)
        say(training.describe())
        return training
    if choice.device.type == "cuda":
        say(f"plain stacked step: {why_not}")
    return PlainStackedRunner(
        model,
        stacked,
        StackedDecoderLoss(stacked),
        configs,
        rates,
        autocast=choice.autocast,
        device=choice.device,
    )
