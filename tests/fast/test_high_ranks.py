"""A rank above a layer's smaller side is planned, and trained by each step as by the plain one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lora.adapters.apply import apply_lora
from lora.config import LoRAConfig, TrainConfig
from lora.data.sequences.batches import Batch
from lora.decoder.decoder import Decoder
from lora.device import choose_device
from lora.fast.memory.fast_step import stacked_memory
from lora.fast.memory.plan import PlanInputs
from lora.fast.memory.planner import plan_memory
from lora.fast.runner import CapturedStepRunner, FastStepRunner
from lora.fast.stacked_runner import FastStackedRunner
from lora.fast.why_not import why_not_hand_written, why_not_stacked_hand_written
from lora.kernels.step import low_rank
from lora.stacked.apply import apply_stacked
from lora.stacked.losses import StackedDecoderLoss, stack_batches
from lora.stacked.plain_step import PlainStackedRunner, StackedStepRunner
from lora.training.losses import loss_for
from lora.training.plain_step import PlainStepRunner
from lora.training.step_runner import StepRunner

CPU = choose_device("cpu", "fp32")
CONFIG = TrainConfig(weight_decay=0.1)
HIGH = LoRAConfig(rank=70, init_seed=1)
"""Above every side of the tiny decoder's layers: they are 16, 48 and 56 wide."""
RUNNERS: dict[str, Callable[[Decoder], StepRunner]] = {
    "fast": lambda model: FastStepRunner(model, CPU, CONFIG),
    "captured": lambda model: CapturedStepRunner(model, CPU, CONFIG, compiles=False),
}
Make = Callable[..., Decoder]
MakeBatch = Callable[..., Batch]


def adapted(make: Make) -> Decoder:
    model = make(dtype=torch.float32)
    apply_lora(model, HIGH)
    return model


def train(steps: StepRunner, make: MakeBatch) -> list[float]:
    losses = []
    for number in range(3):
        steps.launch(number + 1, [make(number, packed=True).to(steps.batch_device)], [1e-3])
        losses += [outcome.losses[0] for outcome in steps.finished(wait=True)]
    return losses


@pytest.mark.parametrize("kind", RUNNERS)
def test_each_step_trains_as_the_plain_one(
    tiny_decoder: Make, make_batch: MakeBatch, kind: str
) -> None:
    plain_model, model = adapted(tiny_decoder), adapted(tiny_decoder)
    assert why_not_hand_written(model) is None
    plain = PlainStepRunner(plain_model, loss_for(plain_model), CPU, CONFIG)
    assert train(RUNNERS[kind](model), make_batch) == pytest.approx(
        train(plain, make_batch), rel=1e-4
    )


def test_a_stack_of_high_and_low_ranks_trains_as_the_plain_one(
    tiny_decoder: Make, make_batch: MakeBatch
) -> None:
    losses = []
    for is_fast in (False, True):
        model = tiny_decoder(dtype=torch.float32)
        stacked = apply_stacked(model, [LoRAConfig(rank=3, init_seed=0), HIGH], (0, 1))
        assert why_not_stacked_hand_written(model, stacked) is None
        configs = [CONFIG, CONFIG]
        steps: StackedStepRunner = PlainStackedRunner(
            model, stacked, StackedDecoderLoss(stacked), configs, CPU
        )
        if is_fast:
            steps = FastStackedRunner(model, stacked, configs, CPU)
        for number in range(3):
            batch = stack_batches([make_batch(10 * number + k, packed=True) for k in range(2)])
            steps.launch(number + 1, [batch], [1e-3, 1e-3])
        losses.append([outcome.losses for outcome in steps.finished(wait=True)])
    assert torch.tensor(losses[1]).allclose(torch.tensor(losses[0]), rtol=1e-4)


def test_ranks_beyond_shared_memory_are_merged_by_the_plain_twin() -> None:
    draw = torch.Generator().manual_seed(0)
    rank = 2 * low_rank.MAX_RANK
    base, b, a = (
        torch.randn(2, *sizes, generator=draw) for sizes in ((8, 6), (8, rank), (rank, 6))
    )
    plain, fast = torch.empty_like(base), torch.empty_like(base)
    low_rank.add_low_rank(base, b, a, plain)
    low_rank.add_low_rank_triton(base, b, a, fast)
    assert torch.equal(fast, plain)


def test_high_ranks_are_planned_and_named_once(
    tiny_decoder: Make, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_decoder().config
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        low, high = (
            plan_memory(PlanInputs(config, LoRAConfig(rank=rank), 2, 16, device, dtype), 0)
            for rank in (4, 70)
        )
        assert high.trained_parameters * 4 == low.trained_parameters * 70
        assert high.total > low.total
        assert caplog.text.count("the rank is above the smaller side of 21 layers") == 1
        caplog.clear()
    loras = [LoRAConfig(rank=4, init_seed=0), HIGH]
    assert stacked_memory(config, loras, 2, 16, packed=True).total > 0
