"""The plain twins of the hand-written step's kernels against autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora.decoder.rope import rotate_plain
from lora.kernels.step import dropout, norm, rotary, swiglu, token_loss
from lora.kernels.step.attention_triton import NARROW, WIDE, fitting_stages
from lora.kernels.step.head_norm import HeadNorms, norm_heads, norm_heads_backward

ROWS, WIDTH = 6, 8


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def random(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def test_norm_is_autograds(draw: torch.Generator) -> None:
    x, delta, dy, beside = (random(draw, ROWS, WIDTH) for _ in range(4))
    weight = random(draw, WIDTH).requires_grad_()
    total, normed, rstd = torch.empty_like(x), torch.empty_like(x), x.new_empty(ROWS)
    norm.add_norm(x, delta, weight.detach(), 1e-5, total, normed, rstd)
    inputs = (x + delta).requires_grad_()
    expected = F.rms_norm(inputs, (WIDTH,), weight, 1e-5)
    torch.testing.assert_close(normed, expected.detach())
    expected.backward(dy)
    assert inputs.grad is not None
    out = torch.empty_like(x)
    norm.norm_backward(dy, total, rstd, weight.detach(), beside, out)
    torch.testing.assert_close(out, inputs.grad + beside)
    torch.testing.assert_close(norm.norm_weight_gradient(dy, total, rstd), weight.grad)


def test_swiglu_is_autograds(draw: torch.Generator) -> None:
    gate_up, dy = random(draw, ROWS, 2 * WIDTH).requires_grad_(), random(draw, ROWS, WIDTH)
    gate, up = gate_up.chunk(2, -1)
    expected = F.silu(gate) * up
    expected.backward(dy)
    out, again = torch.empty_like(dy), torch.empty_like(dy)
    swiglu.swiglu(gate_up.detach(), out)
    torch.testing.assert_close(out, expected.detach())
    changed = gate_up.detach().clone()
    swiglu.swiglu_backward(changed, dy, again)
    torch.testing.assert_close(changed, gate_up.grad)
    torch.testing.assert_close(again, out)


def test_rotation_is_the_decoders_and_can_be_undone(draw: torch.Generator) -> None:
    heads, shared, half = 4, 2, 3
    angles = random(draw, ROWS, half)
    cos, sin = angles.cos(), angles.sin()
    qkv = random(draw, ROWS, (heads + 2 * shared) * 2 * half)
    changed = qkv.clone()
    rotary.rotate_heads(changed, cos, sin, heads + shared)
    whole = (torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None])
    parts = qkv.unflatten(1, (-1, 2 * half))  # (N, heads, D)
    expected = rotate_plain(parts[:, : heads + shared], *whole)
    torch.testing.assert_close(changed.unflatten(1, (-1, 2 * half))[:, : heads + shared], expected)
    back = torch.empty_like(qkv)
    split = changed.unflatten(1, (-1, 2 * half)).split((heads, shared, shared), 1)
    rotary.gather_gradients(*split, cos, sin, back)
    torch.testing.assert_close(back, qkv)


@pytest.mark.parametrize("is_whole", [True, False])
def test_norms_of_heads_are_autograds(draw: torch.Generator, is_whole: bool) -> None:
    heads, shared, width, rotated = 4, 2, 8, 4
    angles = random(draw, ROWS, rotated // 2)
    cos, sin = angles.cos(), angles.sin()
    sizes = (heads * width, shared * width) if is_whole else (width, width)
    weights = [random(draw, size).requires_grad_() for size in sizes]
    qkv = random(draw, ROWS, (heads + 2 * shared) * width)
    norms = HeadNorms((heads, shared, width), *(w.detach() for w in weights), 1e-5, 1.0)
    out = qkv.new_empty(ROWS, (heads + shared) * width)
    norm_heads(qkv, norms, (cos, sin), out)
    inputs = qkv.clone().requires_grad_()
    *parts, v = inputs.unflatten(1, (-1, width)).split((heads, shared, shared), 1)
    normed = []
    for x, weight in zip(parts, weights, strict=True):
        whole = x.flatten(1) if is_whole else x
        y = F.rms_norm(whole, weight.shape, 1 + weight, 1e-5).view(x.shape)
        tables = (torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None])
        turned = rotate_plain(y[..., :rotated], *tables)
        normed.append(torch.cat((turned, y[..., rotated:]), -1))
    torch.testing.assert_close(out, torch.cat(normed, 1).flatten(1).detach())
    # Keys and values in two parts each, as query heads that share them leave their gradients.
    dq = random(draw, ROWS, heads, 1, width)
    dk, dv = (random(draw, ROWS, shared, 2, width) for _ in range(2))
    torch.autograd.backward([*normed, v], [dq.sum(2), dk.sum(2), dv.sum(2)])
    found = norm_heads_backward(dq, dk, dv, norms, (cos, sin), qkv, trains=True)
    assert found is not None
    torch.testing.assert_close(qkv, inputs.grad)
    for one, weight in zip(found, weights, strict=True):
        torch.testing.assert_close(one, weight.grad)


def test_token_loss_is_autograds(draw: torch.Generator) -> None:
    logits = random(draw, ROWS, 11).requires_grad_()
    labels = torch.tensor([3, -100, 0, 10, 10, -100])
    losses = torch.empty(ROWS, dtype=torch.float64)
    expected = F.cross_entropy(logits, labels, reduction="sum")
    expected.backward()
    changed = logits.detach().clone()
    token_loss.token_loss(changed, labels, losses)
    torch.testing.assert_close(losses.sum(), expected.detach())
    torch.testing.assert_close(changed, logits.grad)


@pytest.mark.parametrize(
    ("kib", "fewer"),
    [(228, {}), (100, {("forward", 128): 2, ("keys", 256): 1, ("queries", 256): 1})],
    ids=["H100", "RTX 4090"],
)
def test_attention_fits_the_shared_memory_of_a_gpu(
    kib: int, fewer: dict[tuple[str, int], int]
) -> None:
    for lanes, table in ((64, NARROW), (128, NARROW), (256, WIDE)):
        for name, tiles in table.items():
            stages = fewer.get((name, lanes), tiles.stages)
            assert fitting_stages(name, tiles, lanes, kib * 1024) == stages


def test_dropout_masks_differ_by_seed_and_layer_and_keep_the_probability() -> None:
    seed = torch.tensor(5)
    masks = [
        dropout.keep_mask(seed + change, layer, 400, 500, 0.25).double()
        for change, layer in ((0, 0), (0, 1), (1, 0))
    ]
    for mask in masks:
        assert abs(float(mask.mean()) - 0.75) < 0.005
        columns = mask.mean(0)
        assert float(columns.std()) < 0.03  # binomial: 0.0217
        neighbours = ((mask[:, 1:] - 0.75) * (mask[:, :-1] - 0.75)).mean() / (0.75 * 0.25)
        assert abs(float(neighbours)) < 0.02
    for other in masks[1:]:
        together = ((masks[0] - 0.75) * (other - 0.75)).mean() / (0.75 * 0.25)
        assert abs(float(together)) < 0.02
    assert torch.equal(masks[0], dropout.keep_mask(seed, 0, 400, 500, 0.25).double())
