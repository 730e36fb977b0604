"""The character model's hand-written step against autograd in fp64, and against the plain step."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lora.config import TrainConfig
from lora.device import DeviceChoice, choose_device
from lora.training.optim import build_optimizer
from lora.training.plain_step import PlainStepRunner, train_step
from models.bigram_lm_v2 import BigramLanguageModel, bigram_loss
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from models.char_step import CharStep, CharStepRunner, char_steps, why_not_hand_written

VOCAB, RATE, DECAY, SHARE = 40, 1e-2, 0.1, 0.3
WIDE = torch.float64


def build(
    sizes: tuple[int, int, int, int],
    rank: int | None,
    *,
    train_embeddings: bool = True,
    dtype: torch.dtype = torch.float64,
) -> BigramLanguageModel:
    """A model with every tensor random; `rank` None: all of it trains."""
    torch.manual_seed(sum(sizes))
    model = BigramLanguageModel(VOCAB, *sizes)
    if rank is not None:
        model = BigramLanguageModelLoRA.from_base(
            model, lora_rank=rank, train_embeddings=train_embeddings
        )
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.2)
    return model.to(dtype)


def draw_batches(rows: int, tokens: int, count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(rows + tokens)
    ids = torch.randint(0, VOCAB, (count, 2, rows, tokens), generator=generator)
    return [(inputs, targets) for inputs, targets in ids]


def relative(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).norm() / reference.norm().clamp(min=1e-30)).item()


def exact_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`bigram_loss` without its rounding to fp32."""
    logits, _ = model(batch[0])
    loss = F.cross_entropy(logits.flatten(0, 1), batch[1].flatten(), reduction="sum")
    return loss[None], torch.tensor([batch[1].numel()])


def autograd_gradients(
    model: BigramLanguageModel, batches: list[tuple[Tensor, Tensor]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The mean gradients of a plain step, computed in `dtype`; `model` stays as it is."""
    model = copy.deepcopy(model).to(dtype)
    optimizer = build_optimizer(model, RATE, DECAY, SHARE)
    train_step(model, batches, exact_loss, optimizer, max_grad_norm=0.0)
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def gradients_by_hand(
    model: BigramLanguageModel, batches: list[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    model = copy.deepcopy(model)
    step = CharStep(model, weight_decay=DECAY, max_grad_norm=0.0, embedding_lr_fraction=SHARE)
    step.launch(batches, RATE)
    flat, found = step.update.flat, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            offset = (parameter.data_ptr() - flat.values.data_ptr()) // parameter.element_size()
            found[name] = flat.gradients.as_strided(parameter.shape, parameter.stride(), offset)
    return found


@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 3),
    head_width=st.integers(3, 5),
    layers=st.integers(1, 3),
    tokens=st.integers(1, 9),
    rows=st.integers(1, 4),
    rank=st.none() | st.integers(1, 6),
    train_embeddings=st.booleans(),
    micro_batches=st.integers(1, 2),
)
def test_gradients_agree_with_autograd(
    heads: int,
    head_width: int,
    layers: int,
    tokens: int,
    rows: int,
    rank: int | None,
    train_embeddings: bool,
    micro_batches: int,
) -> None:
    width = heads * head_width
    rank = None if rank is None else min(rank, width)
    model = build((width, heads, layers, 9), rank, train_embeddings=train_embeddings)
    batches = draw_batches(rows, tokens, micro_batches)
    seen, wanted = gradients_by_hand(model, batches), autograd_gradients(model, batches, WIDE)
    assert seen.keys() == wanted.keys()
    largest = max(gradient.norm() for gradient in wanted.values())
    for name, gradient in wanted.items():
        # train_step divides by a number in fp32; a lone token's queries have no gradient at all.
        distance = (seen[name] - gradient).norm()
        assert distance <= 2e-7 * gradient.norm() + 1e-14 * largest, name


@pytest.mark.parametrize("rank", [None, 1, 8, 32])
@pytest.mark.parametrize("width", [64, 256])
def test_gradients_agree_in_fp32_at_the_usual_sizes(rank: int | None, width: int) -> None:
    model = build((width, 4, 2, 32), rank, dtype=torch.float32)
    # Activations near one, and s·B·A half as large as W: the reference itself must have digits.
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            scaling = 16.0 / parameter.shape[1] if name.endswith("lora_B") else 0.5
            nn.init.normal_(parameter, 0, 1 / (math.sqrt(parameter.shape[1]) * 2 * scaling))
    batches = draw_batches(8, 32, 1)
    exact = autograd_gradients(model, batches, WIDE)
    plain, seen = (
        autograd_gradients(model, batches, torch.float32), gradients_by_hand(model, batches)
    )  # fmt: skip
    for name, gradient in exact.items():
        # Gradients of queries and keys are differences of near numbers: autograd's own have no more
        # than five digits there.
        allowed = max(1e-5, 2 * relative(plain[name].to(WIDE), gradient))
        assert relative(seen[name].to(WIDE), gradient) <= allowed, name


@pytest.mark.parametrize("rank", [None, 3])
def test_many_steps_agree_with_autograd(rank: int | None) -> None:
    model = build((12, 3, 2, 8), rank)
    by_hand = copy.deepcopy(model)
    optimizer = build_optimizer(model, RATE, DECAY, SHARE)
    step = CharStep(by_hand, weight_decay=DECAY, embedding_lr_fraction=SHARE)
    before = [p.clone() for p in by_hand.parameters() if not p.requires_grad]
    for batch in draw_batches(4, 8, 20):
        wanted = train_step(model, [batch], bigram_loss, optimizer)
        step.launch([batch], RATE)
        assert step.report[0].item() == pytest.approx(wanted.loss.item(), rel=1e-6)
        assert step.report[2].item() == pytest.approx(wanted.gradient_norm.item(), rel=1e-5)
    for name, parameter in by_hand.named_parameters():
        assert relative(parameter, model.get_parameter(name)) <= 1e-6, name
    after = [p for p in by_hand.parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_model_evaluates_with_what_was_trained() -> None:
    model = build((12, 3, 2, 8), 2)
    (batch,) = draw_batches(4, 8, 1)
    step = CharStep(model)
    for _ in range(30):
        step.launch([batch], RATE)
    reported = step.report[0].item()
    seen = bigram_loss(model, batch)[0].item() / batch[1].numel()
    assert seen == pytest.approx(reported, abs=0.1)
    assert seen < 2.5


def test_a_new_step_resumes_from_saved_moments_to_the_bit() -> None:
    model = build((12, 3, 1, 8), 2, dtype=torch.float32)
    first, *others = draw_batches(4, 8, 4)
    config, cpu = TrainConfig(whole_rate_fraction=SHARE), choose_device("cpu", "fp32")
    steps = CharStepRunner(model, cpu, config)
    steps.launch(1, [first], [RATE])
    resumed = build((12, 3, 1, 8), 2, dtype=torch.float32)
    other = CharStepRunner(resumed, cpu, config)
    other.restore(copy.deepcopy(steps.state()), step=1)
    for number, batch in enumerate(others, start=2):
        for each in (steps, other):
            each.launch(number, [batch], [RATE])
    assert [d.losses for d in steps.finished(wait=True)][1:] == [
        d.losses for d in other.finished(wait=True)
    ]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name


@pytest.mark.parametrize("rank", [None, 2])
def test_a_run_of_the_plain_step_resumes_with_the_hand_written_one(rank: int | None) -> None:
    plain = build((12, 3, 2, 8), rank)
    first, *others = draw_batches(4, 8, 5)
    optimizer = build_optimizer(plain, RATE, DECAY, SHARE)
    train_step(plain, [first], bigram_loss, optimizer)
    by_hand = copy.deepcopy(plain)
    step = CharStep(by_hand, weight_decay=DECAY, embedding_lr_fraction=SHARE)
    begun = {name: optimizer.state[p] for name, p in plain.named_parameters() if p.requires_grad}
    step.load_optimizer_state(copy.deepcopy(begun))
    for batch in others:
        train_step(plain, [batch], bigram_loss, optimizer)
        step.launch([batch], RATE)
    for name, parameter in by_hand.named_parameters():
        assert relative(parameter, plain.get_parameter(name)) <= 1e-6, name


def test_a_step_that_is_not_finite_is_not_taken_and_says_where_it_came_from() -> None:
    model = build((12, 3, 1, 8), 2, dtype=torch.float32)
    with torch.no_grad():
        model.blocks[0].ln1.weight[0] = torch.inf  # type: ignore[union-attr]
    steps = CharStepRunner(model, choose_device("cpu", "fp32"), TrainConfig())
    before = copy.deepcopy(model.state_dict())
    steps.launch(1, draw_batches(4, 8, 1), [RATE])
    (done,) = steps.finished(wait=True)
    assert "not taken" in done.not_finite[0]
    assert "blocks.0" in done.not_finite[0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_what_it_cannot_train_takes_the_plain_step() -> None:
    cpu = choose_device("cpu", "fp32")
    model = build((12, 3, 1, 8), 2, dtype=torch.float32)
    assert why_not_hand_written(model, cpu) is None
    gpu = DeviceChoice(torch.device("cuda"), torch.float32, "a test")
    assert "CPUs" in str(why_not_hand_written(model, gpu))
    dropped = BigramLanguageModel(VOCAB, 12, 3, 1, 8, dropout=0.1)
    assert why_not_hand_written(dropped, cpu) == "the hand-written step has no dropout"
    dropped_lora = BigramLanguageModelLoRA(VOCAB, 12, 3, 1, 8, lora_rank=2, lora_dropout=0.1)
    assert why_not_hand_written(dropped_lora, cpu) == "the hand-written step has no dropout"
    long = BigramLanguageModel(VOCAB, 12, 3, 1, 300)
    assert "sequences of 300 tokens" in str(why_not_hand_written(long, cpu))
    model.ln_f.weight.requires_grad_(True)
    assert "beside LoRA" in str(why_not_hand_written(model, cpu))
    assert isinstance(char_steps(model, cpu, TrainConfig()), PlainStepRunner)
