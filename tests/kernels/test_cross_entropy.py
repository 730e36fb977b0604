"""The chunked loss agrees with its plain twin, and never holds all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora.errors import ModelError
from lora.kernels import cross_entropy
from lora.kernels.cross_entropy import (
    IGNORE,
    LogitTransform,
    linear_cross_entropy,
    plain_linear_cross_entropy,
)

N, C, V = 37, 12, 53
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


def make_inputs(dtype: torch.dtype, learned: str = "some") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, C, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, V, (N,), generator=generator)
    if learned == "some":
        labels[torch.rand(N, generator=generator) < 0.6] = IGNORE
    if learned == "none":
        labels[:] = IGNORE
    return hidden.requires_grad_(True), weight.requires_grad_(True), labels


def relative(seen: Tensor, wanted: Tensor) -> float:
    return ((seen - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("learned", ["some", "all"])
@pytest.mark.parametrize("chunk_tokens", [1, 5, N, 1000])
def test_agrees_with_the_plain_twin(dtype: torch.dtype, learned: str, chunk_tokens: int) -> None:
    hidden, weight, labels = make_inputs(dtype, learned)
    loss, count = linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens)
    wanted, wanted_count = plain_linear_cross_entropy(hidden, weight, labels)
    assert loss.shape == count.shape == ()
    assert (loss.dtype, count.dtype) == (dtype, torch.int64)
    assert count.item() == wanted_count.item() == (labels != IGNORE).sum().item()
    assert relative(loss, wanted) < TOLERANCES[dtype]
    gradients = torch.autograd.grad(loss * 0.3, (hidden, weight))
    wanted_gradients = torch.autograd.grad(wanted * 0.3, (hidden, weight))
    for seen, reference in zip(gradients, wanted_gradients, strict=True):
        assert relative(seen, reference) < TOLERANCES[dtype]


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "all"])
def test_factor_cap_and_bias_have_exact_gradients(
    trained: str, softcap: float | None, scale: float
) -> None:
    hidden, weight, labels = make_inputs(torch.float64)
    bias = torch.randn(V, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    named = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, tensor in named.items():
        tensor.requires_grad_(trained in (name, "all"))
    asked = [tensor for tensor in named.values() if tensor.requires_grad]
    settings = {"bias": bias, "transform": LogitTransform(scale, softcap)}
    loss, count = linear_cross_entropy(hidden, weight, labels, chunk_tokens=5, **settings)
    wanted, wanted_count = plain_linear_cross_entropy(hidden, weight, labels, **settings)
    assert count == wanted_count
    assert relative(loss, wanted) < 1e-12
    seen = torch.autograd.grad(0.7 * loss, asked)
    for one, other in zip(seen, torch.autograd.grad(0.7 * wanted, asked), strict=True):
        assert relative(one, other) < 1e-10
    with torch.no_grad():
        assert relative(linear_cross_entropy(hidden, weight, labels, **settings)[0], wanted) < 1e-12


def test_many_columns_of_a_capped_head_go_through_in_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lora.kernels.cross_entropy.CHUNK_COLUMNS", 10)
    hidden, weight, labels = make_inputs(torch.float64)
    settings = {"bias": torch.linspace(-1, 1, V).double(), "transform": LogitTransform(0.5, 3.0)}
    loss, _ = linear_cross_entropy(hidden, weight.detach(), labels, **settings)
    wanted, _ = plain_linear_cross_entropy(hidden, weight, labels, **settings)
    assert relative(loss, wanted) < 1e-12
    assert relative(*(torch.autograd.grad(each, hidden)[0] for each in (loss, wanted))) < 1e-10


def test_bf16_inputs_give_an_fp32_loss_near_the_exact_one() -> None:
    hidden, weight, labels = make_inputs(torch.bfloat16)
    loss, _ = linear_cross_entropy(hidden, weight, labels, chunk_tokens=4)
    exact_hidden = hidden.detach().double().requires_grad_(True)
    exact_weight = weight.detach().double().requires_grad_(True)
    wanted, _ = plain_linear_cross_entropy(exact_hidden, exact_weight, labels)
    assert loss.dtype == torch.float32
    assert relative(loss.double(), wanted) < 1e-2
    gradients = torch.autograd.grad(loss, (hidden, weight))
    wanted_gradients = torch.autograd.grad(wanted, (exact_hidden, exact_weight))
    for seen, reference in zip(gradients, wanted_gradients, strict=True):
        assert seen.dtype == torch.bfloat16
        assert relative(seen.double(), reference) < 2e-2


def test_without_targets_loss_and_gradients_are_zero() -> None:
    hidden, weight, labels = make_inputs(torch.float32, "none")
    loss, count = linear_cross_entropy(hidden, weight, labels)
    assert (loss.item(), count.item()) == (0.0, 0)
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_huge_logits_stay_finite() -> None:
    hidden, weight, labels = make_inputs(torch.float32)
    loss, _ = linear_cross_entropy(hidden * 1e4, weight, labels)
    wanted, _ = plain_linear_cross_entropy(hidden * 1e4, weight, labels)
    assert loss.isfinite()
    assert relative(loss, wanted) < 1e-5
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_only_what_is_required_gets_a_gradient(trained: str) -> None:
    hidden, weight, labels = make_inputs(torch.float64)
    hidden.requires_grad_(trained == "hidden")
    weight.requires_grad_(trained == "weight")
    linear_cross_entropy(hidden, weight, labels, chunk_tokens=4)[0].backward()
    wanted, _ = plain_linear_cross_entropy(hidden, weight, labels)
    (reference,) = torch.autograd.grad(wanted, hidden if trained == "hidden" else weight)
    seen, other = (hidden, weight) if trained == "hidden" else (weight, hidden)
    assert other.grad is None
    assert seen.grad is not None
    assert relative(seen.grad, reference) < 1e-10


class Recorder(TorchDispatchMode):
    """Records the sizes of all new tensors, and the matmuls."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.n_matmuls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.sizes.append(out.numel())
        self.n_matmuls += func is torch.ops.aten.mm.default
        return out


def test_never_more_logits_than_of_a_chunk() -> None:
    hidden, weight, labels = make_inputs(torch.float32, "all")
    weight.requires_grad_(False)
    with Recorder() as recorder:
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=15)[0].backward()
    assert max(recorder.sizes) == 15 * V
    assert recorder.n_matmuls == 3 * 2  # three chunks: logits, and the hidden gradient


def test_tokens_without_a_target_are_left_out_of_the_matmuls() -> None:
    hidden, weight, labels = make_inputs(torch.float32)
    n_learned = int((labels != IGNORE).sum())
    assert n_learned * V > V * C  # so that the logits are the largest tensor
    with Recorder() as recorder:
        linear_cross_entropy(hidden, weight.detach(), labels)[0].backward()
    assert max(recorder.sizes) == n_learned * V


def test_without_gradients_only_the_logits_are_computed() -> None:
    hidden, weight, labels = make_inputs(torch.float32)
    with torch.no_grad(), Recorder() as recorder:
        loss, _ = linear_cross_entropy(hidden, weight, labels)
    assert recorder.n_matmuls == 1
    assert not loss.requires_grad
    assert relative(loss, plain_linear_cross_entropy(hidden, weight, labels)[0]) < 1e-5


def test_one_token() -> None:
    hidden, weight, labels = make_inputs(torch.float64, "all")
    loss, count = linear_cross_entropy(hidden[:1], weight, labels[:1])
    wanted, _ = plain_linear_cross_entropy(hidden[:1], weight, labels[:1])
    assert count.item() == 1
    assert relative(loss, wanted) < 1e-10


@pytest.mark.parametrize("rows", [31, 127, 508])
def test_padded_tokens_leave_no_trace(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 24, generator=generator).requires_grad_()
    weight = torch.randn(90, 24, generator=generator)
    labels = torch.randint(0, 90, (rows,), generator=generator)
    loss, count = linear_cross_entropy(hidden, weight, labels)
    (grad,) = torch.autograd.grad(loss, hidden)
    exact = hidden.detach().double().requires_grad_()
    wanted, _ = plain_linear_cross_entropy(exact, weight.double(), labels)
    (wanted_grad,) = torch.autograd.grad(wanted, exact)
    assert count == rows
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert grad.shape == hidden.shape
    assert (grad - wanted_grad).norm() <= 1e-6 * wanted_grad.norm()


class PackedRows:
    """A head's rows that are counted when they are asked for."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.dtype, self.most = weight, weight.dtype, 0

    def __len__(self) -> int:
        return len(self.weight)

    def rows(self, start: int, stop: int) -> Tensor:
        self.most = max(self.most, stop - start)
        return self.weight[start:stop]

    def select(self, ids: Tensor) -> Tensor:
        return self.weight[ids]


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_of_a_packed_weight_slices_are_read(
    softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_COLUMNS", 20)
    hidden, weight, labels = make_inputs(torch.float64)
    own = {"bias": weight[:, 0].detach(), "transform": LogitTransform(0.5, softcap)}
    packed = PackedRows(weight.detach())
    loss, _ = linear_cross_entropy(hidden, packed, labels, chunk_tokens=5, **own)
    wanted, _ = plain_linear_cross_entropy(hidden, weight, labels, **own)
    assert relative(loss, wanted) < 1e-10
    (seen,), (gradient,) = (torch.autograd.grad(each * 0.3, hidden) for each in (loss, wanted))
    assert relative(seen, gradient) < 1e-10
    with torch.no_grad():
        alone, _ = linear_cross_entropy(hidden, packed, labels, chunk_tokens=5, **own)
    assert relative(alone, wanted) < 1e-10
    assert packed.most == 20


def test_a_packed_weight_with_a_bias_that_trains_is_refused() -> None:
    hidden, weight, labels = make_inputs(torch.float64)
    bias = weight[:, 0].detach().requires_grad_()
    packed = PackedRows(weight.detach())
    with pytest.raises(ModelError, match="bias of a packed output head"):
        linear_cross_entropy(hidden, packed, labels, bias=bias)
    wanted, _ = plain_linear_cross_entropy(hidden, weight, labels, bias=bias)
    with torch.no_grad():
        loss, _ = linear_cross_entropy(hidden, packed, labels, bias=bias)
    assert relative(loss, wanted) < 1e-10
