"""The captured step's loss by chunks of all tokens, against the loss from all logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora.decoder.quantised.nf4 import Nf4Linear
from lora.fast.chunked_loss import ChunkedLoss
from lora.kernels.cross_entropy import IGNORE, LogitTransform, plain_linear_cross_entropy
from lora.kernels.step.token_loss import token_loss
from lora.kernels.trained_rows_cross_entropy import plain_trained_rows_cross_entropy
from lora.layers.trainable_tokens import TrainableTokensLinear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_loss_and_gradient_are_those_of_all_logits(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None, bias: bool
) -> None:
    monkeypatch.setattr("lora.fast.chunked_loss.CHUNK_LOGITS", 8 * 31)
    monkeypatch.setattr("lora.fast.chunked_loss.ROUND_TOKENS", 4)
    torch.manual_seed(0)
    head = nn.Linear(6, 31, bias=bias, dtype=torch.float64).requires_grad_(False)
    hidden = torch.randn(2, 11, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 31, (2, 11))
    labels[0, :3] = IGNORE
    transform = LogitTransform(0.7, softcap)
    loss = ChunkedLoss(head, token_loss, transform)(hidden, labels)
    wanted, _ = plain_linear_cross_entropy(
        hidden.flatten(0, 1), head.weight, labels.flatten(), bias=head.bias, transform=transform
    )
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    seen, other = (torch.autograd.grad(0.3 * each, hidden)[0] for each in (loss, wanted))
    torch.testing.assert_close(seen, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_trained_rows_of_the_head(monkeypatch: pytest.MonkeyPatch, softcap: float | None) -> None:
    monkeypatch.setattr("lora.fast.chunked_loss.CHUNK_LOGITS", 8 * 31)
    monkeypatch.setattr("lora.fast.chunked_loss.ROUND_TOKENS", 4)
    torch.manual_seed(0)
    base, ids = nn.Linear(6, 31, bias=False, dtype=torch.float64), (30, 4)
    rows = nn.Parameter(torch.randn(2, 6, dtype=torch.float64))
    head = TrainableTokensLinear(base, ids, rows, 29)
    hidden = torch.randn(1, 11, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[4, 30, IGNORE, 5, 30, 30, 1, 2, 3, 4, 0]])
    transform = LogitTransform(0.7, softcap)
    loss = ChunkedLoss(head, token_loss, transform)(hidden, labels)
    wanted, _ = plain_trained_rows_cross_entropy(
        hidden[0], head.weight, rows, torch.tensor(ids), labels[0], transform=transform
    )
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    found = torch.autograd.grad(0.3 * loss, (hidden, rows))
    for one, other in zip(found, torch.autograd.grad(0.3 * wanted, (hidden, rows)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_autocast_gives_a_wide_loss() -> None:
    head = nn.Linear(8, 16, bias=False).requires_grad_(False)
    hidden = torch.randn(1, 5, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ChunkedLoss(head, token_loss)(hidden, torch.arange(5)[None])
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert (loss.dtype, gradient.dtype) == (torch.float32, torch.float32)
    wanted, _ = plain_linear_cross_entropy(hidden[0], head.weight, torch.arange(5))
    assert abs(loss - wanted) < 1e-2 * wanted


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_head_in_nf4_is_unpacked_by_slices(
    softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora.fast.chunked_loss.UNPACKED_VALUES", 64 * 6)
    torch.manual_seed(0)
    linear = nn.Linear(6, 150, dtype=torch.float64).requires_grad_(False)
    head = Nf4Linear(linear)
    head.load(linear.weight, "head")
    sizes: list[int] = []
    unpack = head.unpack_into

    def counted(out: torch.Tensor, first_row: int = 0) -> None:
        sizes.append(len(out))
        unpack(out, first_row)

    monkeypatch.setattr(head, "unpack_into", counted)
    hidden = torch.randn(1, 9, 6, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 150, (1, 9))
    how = LogitTransform(0.5, softcap)
    loss = ChunkedLoss(head, token_loss, how)(hidden, labels)
    assert sizes == [64, 64, 22, 64, 64, 22]  # for the logits, and for the gradient
    wanted, _ = plain_linear_cross_entropy(
        hidden[0], head.unpacked(torch.float64), labels[0], bias=head.bias, transform=how
    )
    torch.testing.assert_close(loss, wanted)
    (seen,), (gradient,) = (torch.autograd.grad(each, hidden) for each in (loss, wanted))
    torch.testing.assert_close(seen, gradient)
