"""The fast stacked step on a GPU: it agrees with the plain one, resumes, and trains a sweep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora.adapters.apply import apply_lora, lora_layers
from lora.config import BaseDtype, DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.data.reading.orders import make_orders
from lora.data.sequences.batches import Batch
from lora.decoder.config import AttentionConfig, FeedForwardConfig, LayerConfig
from lora.decoder.decoder import Decoder, build_decoder
from lora.device import choose_device
from lora.fast.stacked_runner import FastStackedRunner, choose_stacked_runner
from lora.fast.stacked_step import StackedFastStep
from lora.fast.step import FastStep
from lora.fast.weights.stacked_flat import StackedFlat
from lora.kernels.step.jit import HAS_TRITON
from lora.kernels.step.ops import TRITON
from lora.stacked.apply import StackedAdapters, apply_stacked
from lora.stacked.losses import StackedDecoderLoss, stack_batches
from lora.stacked.plain_step import PlainStackedRunner
from lora.sweep import SweepJob, SweepResult, sweep
from lora.sweep.grid import Grid
from lora.training.optim import schedule_factor
from tests.tiny_llama import ROPE, changed, llama_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and HAS_TRITON), reason="needs a CUDA device and Triton"
    ),
]
VOCABULARY = 1000
ADAPTERS = [
    LoRAConfig(rank=8, alpha=16.0, init_seed=0),
    LoRAConfig(rank=16, alpha=8.0, init_seed=1),
    LoRAConfig(rank=1, alpha=2.0, init_seed=2),
]
TRAIN = [
    TrainConfig(steps=8, weight_decay=0.1),
    TrainConfig(steps=8, max_grad_norm=0.05),
    TrainConfig(steps=8, max_grad_norm=0.0),
]
RATES = (1e-3, 3e-3, 5e-4)


def scheduled(step: int) -> list[float]:
    """Return each adapter's learning rate after `step` steps."""
    return [rate * schedule_factor(step, config) for rate, config in zip(RATES, TRAIN, strict=True)]


FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen 3": {"qk_norm": "head"},
    "Gemma 2": {
        "block": "sandwich",
        "embedding_scale": 16.0,
        "feed_forward": FeedForwardConfig(512, "gelu_pytorch_tanh"),
        "attention": AttentionConfig(8, 2, 32, logit_softcap=20.0),
        "logit_softcap": 15.0,
        "layers": (LayerConfig(ROPE, 64, 32**-0.5), LayerConfig(ROPE, None, 32**-0.5)) * 2,
    },
    "Granite": {"residual_multiplier": 0.4, "logit_scale": 0.5, "embedding_scale": 4.0},
    "OLMo 2": {
        "block": "post_norm",
        "qk_norm": "width",
        "attention": AttentionConfig(8, 8, 32),
    },
    "Phi-3": {
        "attention": AttentionConfig(8, 2, 32, is_fused=True),
        "feed_forward": FeedForwardConfig(512, "silu", is_fused=True),
        "layers": (LayerConfig(replace(ROPE, rotary_dim=24), None, 32**-0.5),) * 4,
    },
}
"""Deltas of a Llama."""


def build(hidden: int = 256, **changes: Any) -> Decoder:
    config = llama_config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        heads=(8, 2, hidden // 8),
        feed_forward=2 * hidden,
        n_layers=4,
        max_position_embeddings=512,
        bias=True,
    )
    model = build_decoder(changed(config, **changes), 0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.05 if parameter.ndim > 1 else 0.2
            parameter.add_(spread * torch.randn(parameter.shape, generator=draw))
    return model.to("cuda", torch.bfloat16)


def stack(model: Decoder, adapters: Sequence[LoRAConfig] = ADAPTERS) -> StackedAdapters:
    """Apply the adapters to `model` with random values."""
    stacked = apply_stacked(model, adapters, range(len(adapters)))
    for k in range(len(adapters)):
        draw = torch.Generator().manual_seed(30 + k)
        values = {
            name: 0.05 * torch.randn(t.shape, generator=draw) if name.endswith("lora_B") else t
            for name, t in stacked.values(k).items()
        }
        stacked.fill(k, values)
    return stacked


def batch(seed: int, *, packed: bool, tokens: int = 192) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (2, tokens), generator=draw)
    labels, documents = ids.roll(-1, 1), torch.zeros_like(ids)
    positions = torch.arange(tokens).expand(2, -1).clone()
    labels[:, ::7] = -100
    if packed:
        for start in (10, 11, 40):
            documents[0, start:] += 1
            positions[0, start:] = torch.arange(tokens - start)
        documents[1, 50:], labels[1, 50:] = -1, -100
        positions[1, 50:] = 0
    return Batch(ids, labels, positions, documents)


def together(seed: int, **settings: object) -> Batch:
    return stack_batches([batch(10 * seed + k, **settings) for k in range(3)])  # type: ignore[arg-type]


def fast_step(
    model: Decoder,
    stacked: StackedAdapters,
    train: Sequence[TrainConfig],
    *,
    merges: bool | None = None,
) -> StackedFastStep:
    return StackedFastStep(
        model,
        stacked,
        TRITON,
        torch.bfloat16,
        weight_decays=[config.weight_decay for config in train],
        max_grad_norms=[config.max_grad_norm for config in train],
        merges=merges,
    )


def gradient_of(step: StackedFastStep, parameter: torch.Tensor) -> torch.Tensor:
    place = (parameter.data_ptr() - step.flat.values.data_ptr()) // 4
    return step.flat.gradients.as_strided(parameter.shape, parameter.stride(), place)


def errors_of(
    exact: StackedAdapters, gradient: Callable[[str, str], torch.Tensor]
) -> dict[tuple[str, str, int], float]:
    """Return the relative error of each adapter's gradient of each tensor."""
    found = {}
    for name, layer in exact.layers.items():
        for part in ("lora_A", "lora_B"):
            expected, own = getattr(layer, part).grad, gradient(name, part)
            for k in range(len(expected)):
                difference = (own[k] - expected[k]).norm() / expected[k].norm()
                found[name, part, k] = float(difference)
    return found


@pytest.mark.parametrize("merges", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_gradients_are_as_near_to_those_of_fp32_as_autocast_in_bf16_is(
    packed: bool, merges: bool
) -> None:
    check_gradients(packed=packed, merges=merges)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_other_families_are_as_near(name: str) -> None:
    check_gradients(packed=True, merges=False, **FAMILIES[name])


def check_gradients(*, packed: bool, merges: bool, **changes: Any) -> None:
    """Check the stacked step's gradients against fp32's, by autocast's distance from them."""
    models = wide, half, fast = build(**changes), build(**changes), build(**changes)
    exact, plain, stacked = (stack(model) for model in models)
    wide.float()  # what fp32 makes of the same values
    step = fast_step(fast, stacked, TRAIN, merges=merges)
    batches = together(1, packed=packed)
    on_device = batches.to("cuda")
    step.launch([batches], [0.0] * 3)
    sums, counts = StackedDecoderLoss(exact)(wide, on_device)
    sums.sum().backward()
    with torch.autocast("cuda", torch.bfloat16):
        half_sums, _ = StackedDecoderLoss(plain)(half, on_device)
    half_sums.sum().backward()
    assert step.report[:, 0].tolist() == pytest.approx((sums / counts).tolist(), rel=4e-3)
    known = errors_of(exact, lambda name, part: getattr(plain.layers[name], part).grad)
    own = errors_of(
        exact, lambda name, part: gradient_of(step, getattr(stacked.layers[name], part))
    )
    assert sum(own.values()) <= 1.2 * sum(known.values())
    for k in range(3):
        worst, allowed = (
            max(error for (_, _, number), error in errors.items() if number == k)
            for errors in (own, known)
        )
        assert worst <= 1.5 * allowed, k


def test_losses_follow_the_plain_stacked_step() -> None:
    plain, fast = build(), build()
    reference, stacked = stack(plain), stack(fast)
    choice = choose_device("cuda")
    training = PlainStackedRunner(plain, reference, StackedDecoderLoss(reference), TRAIN, choice)
    said: list[str] = []
    own = choose_stacked_runner(fast, stacked, TRAIN, choice, on_message=said.append)
    assert isinstance(own, FastStackedRunner)
    assert said[0].startswith("fast stacked step: one CUDA graph, Triton kernels")
    for number in range(8):
        micro = [together(2 * number + place, packed=True) for place in range(2)]
        rates = scheduled(number)
        training.launch(number + 1, [part.to(training.batch_device) for part in micro], rates)
        own.launch(number + 1, micro, rates)
        (expected,), (found,) = (one.finished(wait=True) for one in (training, own))
        assert found.losses == pytest.approx(expected.losses, rel=5e-3)
    assert not own.failures


def test_one_adapter_is_trained_as_by_the_fast_step_of_one() -> None:
    model, other = build(), apply_lora(build(), ADAPTERS[1])
    stacked = stack(model, [ADAPTERS[1]])
    values = stacked.values(0)
    with torch.no_grad():
        for name, layer in lora_layers(other).items():
            layer.lora_A.copy_(values[f"{name}.lora_A"])
            layer.lora_B.copy_(values[f"{name}.lora_B"])
    step = fast_step(model, stacked, [TRAIN[0]])
    one = FastStep(other, TRITON, torch.bfloat16, weight_decay=0.1, merges=False)  # type: ignore[arg-type]
    for number in range(8):
        batches = [batch(number, packed=True)]
        step.launch(batches, [1e-3], number + 1)
        one.launch(batches, 1e-3, number + 1)
        assert step.report[0, :3].tolist() == pytest.approx(one.report[:3].tolist(), rel=2e-2)
    assert step.report[0, 3] == one.report[3] == 1


@pytest.mark.parametrize("merges", [True, False])
@pytest.mark.parametrize(
    ("packed", "tokens", "family"),
    [
        (False, 192, {}),
        (True, 192, {}),
        (True, 200, {}),
        (False, 200, {}),
        (True, 200, FAMILIES["Gemma 2"]),
    ],
)
def test_an_adapter_that_is_not_finite_leaves_the_bits_of_the_others(
    packed: bool, tokens: int, family: dict[str, Any], merges: bool
) -> None:
    def train(breaks: bool) -> StackedFastStep:
        model = build(**family)
        stacked = stack(model)
        step = fast_step(model, stacked, TRAIN, merges=merges)
        for number in range(4):
            if breaks and number == 2:
                next(iter(stacked.layers.values())).lora_A.data[1, 0, 0] = math.nan
                step.refresh()
            step.launch([together(number, packed=packed, tokens=tokens)], RATES, number + 1)
        return step

    whole, again, broken = train(False), train(False), train(True)
    assert broken.update.taken_steps.tolist() == [4.0, 2.0, 4.0]
    assert broken.update.is_alive.tolist() == [True, False, True]
    for k in (0, 2):
        for name in ("values", "mean", "square"):
            kept = getattr(whole.flat, name)[k]
            assert torch.equal(kept, getattr(again.flat, name)[k]), "two runs differ"
            assert torch.equal(kept, getattr(broken.flat, name)[k]), (k, name)


def resumed_halfway(begin: Callable[[], FastStackedRunner]) -> tuple[StackedFlat, StackedFlat]:
    """Return the state after six steps in one go, and after three, a restore and three more."""

    def go(training: FastStackedRunner, numbers: range) -> None:
        for number in numbers:
            training.launch(number + 1, [together(number, packed=True)], scheduled(number))
        training.finished(wait=True)

    whole, half, rest = begin(), begin(), begin()
    go(whole, range(6))
    go(half, range(3))
    for k in range(3):
        rest.restore(half.state(k), step=3, adapter=k)
    go(rest, range(3, 6))
    return whole.step.flat, rest.step.flat


def test_restored_training_continues_with_the_same_bits() -> None:
    choice = choose_device("cuda")

    def begin() -> FastStackedRunner:
        model = build()
        return FastStackedRunner(model, stack(model), TRAIN, choice)

    whole, resumed = resumed_halfway(begin)
    assert torch.equal(resumed.values, whole.values)
    assert torch.equal(resumed.square, whole.square)


def sweep_alike(
    model: Path, out: Path, *, steps: int, base_dtype: BaseDtype = "auto", device: str = "cuda"
) -> SweepResult:
    """Sweep in waves on the fast step, and again on the plain one: their losses are near.

    Returns the first of the two.
    """
    job = SweepJob(
        data=make_orders("train", 32),
        grid=Grid(rank=(2, 4), learning_rate=(1e-3, 3e-3)),
        model=str(model),
        train=TrainConfig(steps=steps, batch_size=4),
        data_config=DataConfig(max_length=128),
        run=RunConfig(out=out, name="fast", eval_every_steps=4, device=device),
        at_once=2,
        base_dtype=base_dtype,
    )
    fast = sweep(job)
    plain = sweep(replace(job, run=replace(job.run, name="plain", fast=False)))
    kept = {state.name: state.eval_loss for state in plain.candidates}
    for candidate in fast.candidates:
        assert candidate.status == "done"
        assert candidate.eval_loss == pytest.approx(kept[candidate.name], rel=1e-2)
    return fast


def test_a_sweep_in_waves_ends_as_with_the_plain_step(tiny_folder: Path, tmp_path: Path) -> None:
    fast = sweep_alike(tiny_folder, tmp_path, steps=12)
    for candidate in fast.candidates:
        folder = fast.folder / "candidates" / candidate.name / "adapter"
        tensors = load_file(folder / "adapter_model.safetensors")
        assert all(bool(t.isfinite().all()) for t in tensors.values())
    assert fast.best is not None
    assert fast.best.is_dir()
