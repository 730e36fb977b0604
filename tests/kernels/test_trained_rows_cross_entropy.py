"""The head with trained rows and its loss, against the full weight and all logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora.kernels.cross_entropy import AS_THEY_ARE, LogitTransform
from lora.kernels.trained_rows_cross_entropy import (
    plain_trained_rows_cross_entropy,
    trained_rows_cross_entropy,
)

N, V, C, IDS = 23, 31, 6, (4, 30, 29)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, generator=draw, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, C, generator=draw, dtype=torch.float64).to(dtype)
    rows = torch.randn(len(IDS), C, generator=draw, dtype=torch.float64)
    rows = rows.to(torch.promote_types(dtype, torch.float32))
    labels = torch.randint(0, V, (N,), generator=draw)
    labels[[2, 11]] = -100
    labels[[3, 4, 5]] = torch.tensor(IDS)
    return hidden.requires_grad_(), weight, rows.requires_grad_(), torch.tensor(IDS), labels


TRANSFORMS = AS_THEY_ARE, LogitTransform(0.4), LogitTransform(0.4, 1.5)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "scaled", "capped"])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 512])
def test_it_agrees_with_its_plain_twin(chunk_tokens: int, transform: LogitTransform) -> None:
    hidden, _, rows, _, _ = given = inputs()
    fused = trained_rows_cross_entropy(*given, chunk_tokens=chunk_tokens, transform=transform)
    plain = plain_trained_rows_cross_entropy(*given, transform=transform)
    assert fused[1] == plain[1] == N - 2
    torch.testing.assert_close(fused[0], plain[0], rtol=1e-12, atol=0)
    seen = torch.autograd.grad(3 * fused[0], (hidden, rows))
    wanted = torch.autograd.grad(3 * plain[0], (hidden, rows))
    for one, other in zip(seen, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_in_bf16_the_rows_keep_fp32_gradients() -> None:
    hidden, weight, rows, ids, labels = inputs(torch.bfloat16)
    loss, _ = trained_rows_cross_entropy(hidden, weight, rows, ids, labels)
    exact = inputs()
    wanted = plain_trained_rows_cross_entropy(*exact)[0]
    assert loss.dtype == torch.float32
    assert abs(loss.item() / wanted.item() - 1) < 1e-2
    seen = torch.autograd.grad(loss, rows)[0]
    reference = torch.autograd.grad(wanted, exact[2])[0].float()
    assert seen.dtype == torch.float32
    assert (seen - reference).norm() / reference.norm() < 2e-2


def test_autocast_changes_nothing_for_a_weight_in_bf16() -> None:
    hidden, weight, rows, ids, labels = inputs(torch.bfloat16)
    wanted = trained_rows_cross_entropy(hidden, weight, rows, ids, labels)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = trained_rows_cross_entropy(hidden.float(), weight, rows, ids, labels)[0]
    assert torch.equal(loss, wanted)
    seen, other = (torch.autograd.grad(each, rows)[0] for each in (loss, wanted))
    assert torch.equal(seen, other)


def test_without_targets_loss_and_gradients_are_zero() -> None:
    hidden, weight, rows, ids, labels = inputs()
    loss, count = trained_rows_cross_entropy(
        hidden, weight, rows, ids, torch.full_like(labels, -100)
    )
    loss.backward()
    assert loss == 0
    assert count == 0
    assert not rows.grad.any()
    assert not hidden.grad.any()


def test_without_gradients_the_loss_is_the_same() -> None:
    hidden, weight, rows, ids, labels = inputs()
    with_grad = trained_rows_cross_entropy(hidden, weight, rows, ids, labels)[0]
    with torch.no_grad():
        assert trained_rows_cross_entropy(hidden, weight, rows, ids, labels)[0] == with_grad
