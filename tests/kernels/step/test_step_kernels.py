"""The hand-written step's Triton kernels against their plain twins: on a GPU, or interpreted.

Without a GPU: TRITON_INTERPRET=1 pytest tests/kernels/step/test_step_kernels.py (triton installed).
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from lora.kernels.step import (
    adamw,
    attention,
    attention_triton,
    dropout,
    fp8,
    head_norm,
    low_rank,
    norm,
    rotary,
    swiglu,
    token_loss,
)
from lora.kernels.step.jit import HAS_TRITON

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    # torch's own, where autograd's thread is the first to multiply
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
    pytest.mark.skipif(
        not (HAS_TRITON and (torch.cuda.is_available() or INTERPRETED)),
        reason="needs Triton with a CUDA device or its interpreter",
    ),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
# One rounding of bf16 may fall to either side; fp32 differs by the order of sums.
TOLERANCE = 4e-3 if TYPE is torch.bfloat16 else 1e-6
ROWS, WIDTH = 37, 72
# The interpreter's own cast loses a carry into the exponent: there codes stay as they are.
CODES = fp8.FP8 if torch.cuda.is_available() else torch.float32


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def random(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw).to(TYPE).to(DEVICE)


def assert_close(fast: Tensor, plain: Tensor, tolerance: float = TOLERANCE) -> None:
    difference = (fast.double() - plain.double()).norm() / plain.double().norm()
    assert difference <= tolerance


def fp8_like(x: Tensor, factors: Tensor | None) -> fp8.Fp8Rows:
    codes = torch.zeros(x.shape, dtype=CODES, device=DEVICE)
    return fp8.Fp8Rows(codes, torch.zeros(len(x), 1, device=DEVICE), factors)


def assert_fp8(fast: fp8.Fp8Rows, plain: fp8.Fp8Rows) -> None:
    """Inputs may differ by one rounding of bf16, so a code may be the neighbouring one."""
    values = [rows.codes.double() * rows.scales.double() for rows in (fast, plain)]
    assert_close(*values, 8e-3 if TYPE is torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("with_factors", [True, False])
def test_fp8_rows(draw: torch.Generator, with_factors: bool) -> None:
    x = random(draw, ROWS, WIDTH + 16)[:, :WIDTH]
    x[0], x[1] = 0, 1e-38
    x[2, 3] = float("inf") if CODES is fp8.FP8 else 1e9
    factors = torch.rand(WIDTH, generator=draw).to(DEVICE) if with_factors else None
    plain, fast = fp8_like(x, factors), fp8_like(x, factors)
    fp8.quantise_rows(x, plain)
    fp8.quantise_rows_triton(x, fast)
    assert_fp8(
        *(fp8.Fp8Rows(rows.codes[3:], rows.scales[3:]) for rows in (fast, plain)),
    )
    if CODES is fp8.FP8:
        assert torch.equal(fast.codes[2].float().isnan(), plain.codes[2].float().isnan())
        assert torch.equal(fast.scales[:2], plain.scales[:2])
        same = fast.codes.float() == plain.codes.float()
        assert same[3:].float().mean() > 0.99


@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("with_factors", [True, False])
def test_norms_and_swiglu_write_codes_beside_their_results(
    draw: torch.Generator, with_factors: bool, gelu: bool
) -> None:
    x, delta, dy = (random(draw, ROWS, WIDTH) for _ in range(3))
    weight, gate_up = random(draw, WIDTH), random(draw, ROWS, 2 * WIDTH)
    narrow = torch.rand(WIDTH, generator=draw).to(DEVICE) if with_factors else None
    wide = torch.rand(2 * WIDTH, generator=draw).to(DEVICE) if with_factors else None
    found: list[list[fp8.Fp8Rows]] = []
    for add, back, activate, activate_back in (
        (norm.add_norm, norm.norm_backward, swiglu.swiglu, swiglu.swiglu_backward),
        (
            norm.add_norm_triton,
            norm.norm_backward_triton,
            swiglu.swiglu_triton,
            swiglu.swiglu_backward_triton,
        ),
    ):
        rows = [fp8_like(like, f) for like, f in ((x, narrow),) * 3 + ((gate_up, wide),)]
        total, normed, rstd = torch.empty_like(x), torch.empty_like(x), x.new_empty(ROWS).float()
        add(x, delta, weight, 1e-5, total, normed, rstd, rows[0])
        out, gradient = torch.empty_like(x), gate_up.clone()
        back(dy, total, rstd, weight, delta, out, rows[1])
        activated, again = torch.empty_like(x), torch.empty_like(x)
        activate(gate_up, activated, rows[2], gelu=gelu)
        activate_back(gradient, dy, again, rows[3], gelu=gelu)
        assert_close(again, activated)
        for made, row in zip((normed, out, activated, gradient), rows, strict=True):
            expected = fp8_like(made, row.factors)
            expected.write(made)
            assert_fp8(row, expected)
        found.append(rows)
    for fast, plain in zip(found[1], found[0], strict=True):
        assert_fp8(fast, plain)


@pytest.mark.parametrize("recomputes", [True, False])
@pytest.mark.parametrize("with_factors", [True, False])
def test_gradients_of_wide_rows_in_chunks(
    draw: torch.Generator, recomputes: bool, with_factors: bool
) -> None:
    width = 16400  # beyond what stays in registers, and no multiple of a chunk
    gate_up, dy = random(draw, 3, 2 * width + 16)[:, : 2 * width], random(draw, 3, width)
    factors = torch.rand(2 * width, generator=draw).to(DEVICE) if with_factors else None
    grads, rows, outs = [], [], []
    for function in (swiglu.swiglu_backward, swiglu.swiglu_backward_triton):
        grads.append(gate_up.clone())
        rows.append(fp8_like(gate_up, factors))
        outs.append(torch.zeros_like(dy))
        function(grads[-1], dy, outs[-1] if recomputes else None, rows[-1])
    assert_close(grads[1], grads[0])
    if recomputes:
        assert_close(outs[1], outs[0])
    expected = fp8_like(grads[1], factors)
    expected.write(grads[1])
    assert_fp8(rows[1], expected)


def test_transposing_codes(draw: torch.Generator) -> None:
    weight = random(draw, 136, 80).to(fp8.FP8)
    out = torch.zeros(80, 136, dtype=fp8.FP8, device=DEVICE)
    fp8.transpose_codes_triton(weight, out)
    assert torch.equal(out.float(), weight.float().T)


@pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)),
    reason="fp8 matmuls with a scale for each row need a GPU of capability 9.0",
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_scaled_matmul_of_codes(draw: torch.Generator, with_bias: bool) -> None:
    x, weight = random(draw, ROWS, 512), random(draw, 272, 512)
    rows, columns = fp8_like(x, None), fp8_like(weight, None)
    rows.write(x)
    columns.write(weight)
    bias = random(draw, 272) if with_bias else None
    out = torch.full((ROWS, 288), 7.0, device=DEVICE, dtype=TYPE)
    plain = torch.empty(ROWS, 272, device=DEVICE, dtype=torch.float64)
    scales = columns.scales.T
    fp8.scaled_matmul(rows, columns.codes, scales, bias, plain)
    fp8.scaled_matmul_device(rows, columns.codes, scales, bias, out[:, :272])
    assert_close(out[:, :272], plain, 6e-3)
    assert (out[:, 272:] == 7).all()
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert_close(plain, exact, 0.05)


@pytest.mark.parametrize("with_delta", [True, False])
def test_norm_and_its_gradients(draw: torch.Generator, with_delta: bool) -> None:
    x, delta, dy = (random(draw, ROWS, WIDTH) for _ in range(3))
    weight = random(draw, WIDTH)
    results = []
    for function in (norm.add_norm, norm.add_norm_triton):
        total, rstd = torch.empty_like(x), torch.empty(ROWS, device=DEVICE)
        normed = torch.full((ROWS, WIDTH + 16), 7.0, device=DEVICE, dtype=TYPE)
        function(x, delta if with_delta else None, weight, 1e-5, total, normed[:, :WIDTH], rstd)
        assert (normed[:, WIDTH:] == 7).all()
        results.append((total, normed, rstd))
    for fast, plain in zip(results[1], results[0], strict=True):
        assert_close(fast, plain)
    total, _, rstd = results[0]
    plain, fast = torch.empty_like(x), total.clone()
    beside = delta if with_delta else None
    norm.norm_backward(dy, total, rstd, weight, beside, plain)
    norm.norm_backward_triton(dy, fast, rstd, weight, beside, fast)  # over its own input
    assert_close(fast, plain)
    plain = norm.norm_weight_gradient(dy, total, rstd)
    assert_close(norm.norm_weight_gradient_triton(dy, total, rstd), plain, 1e-5)


BRANCHES = {"norm": (True, 1.0), "factor": (False, 0.22), "norm and factor": (True, 0.7)}


@pytest.mark.parametrize("kind", BRANCHES)
@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("offset", [True, False])
def test_norms_with_a_branch_before_the_sum(
    draw: torch.Generator, kind: str, has_norm: bool, offset: bool
) -> None:
    """Forward and backward of both norms and the sum: total, normed, codes, and their gradients."""
    x, delta, dy, beside = (random(draw, ROWS, WIDTH) for _ in range(4))
    weight, own_weight = random(draw, WIDTH), random(draw, WIDTH)
    is_normed, factor = BRANCHES[kind]
    results = []
    for add, back in (
        (norm.add_norm, norm.norm_backward),
        (norm.add_norm_triton, norm.norm_backward_triton),
    ):
        total, normed = torch.empty_like(x), torch.empty_like(x)
        rstd, own_rstd = torch.zeros(2, ROWS, device=DEVICE).unbind()
        own = (own_weight, own_rstd) if is_normed else (None, None)
        branch = norm.Branch(*own, factor)
        codes = [fp8_like(x, None) for _ in range(2)]
        before = (
            (weight, 1e-5, total, normed, rstd) if has_norm else (None, 1e-5, total, normed, None)
        )
        add(x, delta, *before, codes[0], branch=branch, offset=offset)
        out, d_branch = torch.empty_like(x), torch.full((ROWS, WIDTH + 16), 7.0).to(x)
        d_branch[:, :WIDTH] = delta
        source = (total, rstd, weight) if has_norm else (total, None, None)
        ways = {"branch": branch, "d_branch": d_branch[:, :WIDTH], "offset": offset}
        back(dy, *source, beside, out, codes[1], **ways)
        alone = delta.clone()  # the branch's gradient by itself, from the sum's
        back(out, out, None, None, None, None, **{**ways, "d_branch": alone})
        assert torch.equal(alone, d_branch[:, :WIDTH])
        for rows, made in zip(codes, (normed, alone), strict=True):
            expected = fp8_like(made, None)
            expected.write(made)
            assert_fp8(rows, expected)
        results.append((total, normed, rstd + 1, own_rstd + 1, out, d_branch))
    for fast, plain in zip(results[1], results[0], strict=True):
        assert_close(fast, plain)


@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("recomputes", [True, False])
def test_swiglu_and_its_gradient(draw: torch.Generator, recomputes: bool, gelu: bool) -> None:
    width = 1300
    gate_up = random(draw, ROWS, 2 * width + 16)[:, : 2 * width]
    dy = random(draw, ROWS, width)
    plain, fast = torch.zeros_like(dy), torch.zeros_like(dy)
    swiglu.swiglu(gate_up, plain, gelu=gelu)
    swiglu.swiglu_triton(gate_up, fast, gelu=gelu)
    assert_close(fast, plain)
    grads, outs = [], []
    for function in (swiglu.swiglu_backward, swiglu.swiglu_backward_triton):
        grads.append(gate_up.clone())
        outs.append(torch.zeros_like(dy))
        function(grads[-1], dy, outs[-1] if recomputes else None, gelu=gelu)
    assert_close(grads[1], grads[0])
    if recomputes:
        assert_close(outs[1], plain)


@pytest.mark.parametrize("rotates", [True, False])
def test_rotation_and_its_gradient(draw: torch.Generator, rotates: bool) -> None:
    heads, shared, width = 9, 3, 16
    columns = (heads + 2 * shared) * width
    cos, sin = (torch.randn(ROWS, width // 2, generator=draw).to(DEVICE) for _ in range(2))
    plain = random(draw, ROWS, columns + 8)
    fast = plain.clone()
    rotary.rotate_heads(plain, cos, sin, heads + shared)
    rotary.rotate_heads_triton(fast, cos, sin, heads + shared)
    assert_close(fast, plain)
    dq, dv = random(draw, ROWS, heads, width), random(draw, ROWS, shared, width)
    dk = random(draw, shared, ROWS, width).transpose(0, 1)
    tables = (cos, sin) if rotates else (None, None)
    rotary.gather_gradients(dq, dk, dv, *tables, plain[:, :columns])
    rotary.gather_gradients_triton(dq, dk, dv, *tables, fast[:, :columns])
    assert_close(fast, plain)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.125, None), (0.5, 4.0)])
def test_token_loss_and_its_gradient(
    draw: torch.Generator, scale: float, softcap: float | None
) -> None:
    width = 20001
    plain = 3 * random(draw, ROWS, width)
    fast = plain.clone()
    scaled = plain.float() * scale
    capped = scaled if softcap is None else softcap * (scaled / softcap).tanh()
    ways = {"scale": scale, "softcap": softcap}
    labels = torch.randint(0, width, (ROWS,), generator=draw).to(DEVICE)
    labels[::5] = token_loss.IGNORE
    expected = torch.nn.functional.cross_entropy(capped, labels, reduction="none")
    losses = torch.full((2, ROWS), 7.0, device=DEVICE)
    token_loss.token_loss(plain, labels, losses[0], **ways)
    token_loss.token_loss_triton(fast, labels, losses[1], **ways)
    assert_close(losses[0], expected, 1e-5)
    assert_close(losses[1], expected, 1e-5)
    assert_close(fast, plain)
    assert (fast[::5] == 0).all()


@pytest.mark.parametrize("taken", [True, False])
def test_adamw(draw: torch.Generator, taken: bool) -> None:
    values, gradients, mean, square = torch.randn(4, 5000, generator=draw).to(DEVICE)
    square.abs_()
    results = []
    control = torch.tensor([1e-2, 3.0, 0.5, float(taken)], device=DEVICE)
    for function in (adamw.adamw, adamw.adamw_triton):
        own = values.clone(), mean.clone(), square.clone()
        function(own[0], gradients, own[1], own[2], control, 0.1, adamw.AdamWSettings())
        results.append(own)
    for fast, plain in zip(results[1], results[0], strict=True):
        assert_close(fast, plain, 1e-6)
    assert torch.equal(results[1][0], values) is not taken


def test_dropout_masks_are_the_same_in_both_twins(draw: torch.Generator) -> None:
    x = random(draw, ROWS, 1300)
    seed = torch.tensor(123456789, device=DEVICE)
    plain, fast = torch.zeros_like(x), torch.zeros_like(x)
    dropout.drop(x, plain, seed, 7, 0.1)
    dropout.drop_triton(x, fast, seed, 7, 0.1)
    assert torch.equal(plain == 0, fast == 0)
    assert_close(fast, plain)
    dropout.add_dropped(x, plain, seed, 8, 0.1)
    dropout.add_dropped_triton(x, fast, seed, 8, 0.1)
    assert_close(fast, plain, 2 * TOLERANCE)


def test_dropout_masks_of_a_part_are_rows_of_the_whole(draw: torch.Generator) -> None:
    x = random(draw, ROWS, 1300)
    seed = torch.tensor(123456789, device=DEVICE)
    for drop in (dropout.drop, dropout.drop_triton):
        whole, part = torch.zeros_like(x), torch.zeros_like(x[5:])
        drop(x, whole, seed, 7, 0.1)
        drop(x[5:], part, seed, 7, 0.1, 5)
        assert torch.equal(part, whole[5:])


@pytest.mark.parametrize("adapters", [1, 3])
def test_adding_low_rank_to_all_blocks(draw: torch.Generator, adapters: int) -> None:
    many = 2 * adapters
    b, base, a = random(draw, many, 70, 16), random(draw, 2, 70, 136), random(draw, many, 16, 136)
    plain, fast = (base.new_zeros(many, 70, 136) for _ in range(2))
    low_rank.add_low_rank(base, b, a, plain)
    low_rank.add_low_rank_triton(base, b, a, fast)
    assert_close(fast, plain)


def test_stacked_adamw(draw: torch.Generator) -> None:
    n, count = 3, 2500
    values = [torch.randn(n, count, generator=draw).to(DEVICE) for _ in range(2)]
    moments = [torch.rand(n, count, generator=draw).to(DEVICE) for _ in range(2)]
    values[1][1] = float("nan")  # of the adapter whose step is not taken
    control = torch.tensor([[1e-2, 1, 0.5, 1, 0.1], [1e-2, 4, 1, 0, 0], [3e-3, 7, 2, 1, 0.0]])
    results = []
    for function in (adamw.stacked_adamw, adamw.stacked_adamw_triton):
        own = [t.clone() for t in (*values, *moments)]
        function(*own, control.to(DEVICE), adamw.AdamWSettings())
        for tensor, before in zip(own, (*values, *moments), strict=True):
            assert torch.equal(tensor[1].nan_to_num(5.0), before[1].nan_to_num(5.0))
        results.append([own[0], own[2], own[3]])
    for fast, plain in zip(results[1], results[0], strict=True):
        assert_close(fast, plain, 1e-5)
        assert not torch.equal(plain[0], plain[1])


@pytest.mark.parametrize(("width", "rotated"), [(24, 24), (16, 8), (40, 24)])
def test_rotation_of_any_width_and_of_a_part(
    draw: torch.Generator, width: int, rotated: int
) -> None:
    heads, shared = 3, 1
    columns = (heads + 2 * shared) * width
    cos, sin = (torch.randn(ROWS, rotated // 2, generator=draw).to(DEVICE) for _ in range(2))
    plain = random(draw, ROWS, columns + 8)
    fast, before = plain.clone(), plain.clone()
    rotary.rotate_heads(plain, cos, sin, heads + shared, width)
    rotary.rotate_heads_triton(fast, cos, sin, heads + shared, width)
    assert_close(fast, plain)
    assert torch.equal(fast[:, rotated:width], before[:, rotated:width])
    dq, dv = random(draw, ROWS, heads, width), random(draw, ROWS, shared, width)
    dk = random(draw, shared, ROWS, width).transpose(0, 1)
    rotary.gather_gradients(dq, dk, dv, cos, sin, plain[:, :columns])
    rotary.gather_gradients_triton(dq, dk, dv, cos, sin, fast[:, :columns])
    assert_close(fast, plain)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize(
    ("heads", "rotated", "offset", "is_whole"),
    [
        ((9, 3, 32), 32, 0.0, False),
        ((4, 1, 24), 24, 1.0, False),
        ((5, 5, 16), 0, 0.0, False),
        ((3, 1, 40), 40, 0.0, True),
        ((4, 2, 16), 8, 1.0, False),
    ],
)
def test_norms_of_heads_and_their_gradients(
    draw: torch.Generator,
    heads: tuple[int, int, int],
    rotated: int,
    offset: float,
    is_whole: bool,
    trains: bool,
) -> None:
    n_heads, shared, width = heads
    group, columns = n_heads // shared, (n_heads + 2 * shared) * width
    sizes = (n_heads * width, shared * width) if is_whole else (width, width)
    norms = head_norm.HeadNorms(heads, *(random(draw, n) for n in sizes), 1e-5, offset)
    tables = None
    if rotated:
        cos, sin = (torch.randn(ROWS, rotated // 2, generator=draw).to(DEVICE) for _ in range(2))
        tables = (cos, sin)
    whole = random(draw, ROWS, columns + 8)
    qkv, split = whole[:, :columns], (n_heads + shared) * width
    plain, fast = (torch.full((ROWS, split + 8), 7.0, device=DEVICE, dtype=TYPE) for _ in range(2))
    head_norm.norm_heads(qkv, norms, tables, plain[:, :split])
    head_norm.norm_heads_triton(qkv, norms, tables, fast[:, :split])
    assert_close(fast, plain)
    dq = random(draw, ROWS, n_heads, 1, width + 8)[..., :width]
    partial = torch.randn(ROWS, n_heads, 2, width, generator=draw).to(DEVICE)
    parts = partial.unflatten(1, (shared, group))
    gradients = dq, parts[..., 0, :], parts[..., 1, :]
    expected = whole.clone()
    found = head_norm.norm_heads_backward(
        *gradients, norms, tables, expected[:, :columns], trains=trains
    )
    own = head_norm.norm_heads_backward_triton(*gradients, norms, tables, qkv, trains=trains)
    assert_close(whole, expected)
    assert (own is None) is (found is None) is (not trains)
    for one, other in zip(own or (), found or (), strict=True):
        assert_close(one, other, 1e-5)


@pytest.mark.parametrize(
    ("heads", "count", "window", "rotated", "softcap"),
    [
        ((6, 2, 16), 150, 0, 16, 0.0),
        ((4, 4, 32), 130, 40, 32, 0.0),
        ((3, 1, 64), 64, 0, 0, 0.0),
        ((9, 3, 64), 300, 0, 64, 0.0),
        ((4, 2, 12), 150, 30, 12, 0.0),
        ((2, 2, 96), 130, 0, 32, 0.0),
        ((2, 1, 256), 130, 40, 256, 0.0),
        ((4, 2, 32), 150, 40, 32, 3.0),
        ((2, 1, 256), 100, 0, 256, 3.0),
    ],
)
def test_attention_and_its_gradient(
    draw: torch.Generator,
    heads: tuple[int, int, int],
    count: int,
    window: int,
    rotated: int,
    softcap: float,
) -> None:
    n_heads, shared, width = heads
    columns, inner = (n_heads + 2 * shared) * width, n_heads * width
    positions = torch.arange(count)
    for start in (17, 18, count // 2):
        positions[start:] = torch.arange(count - start)
    positions[-5:] = 0  # padding
    begins = attention.find_begins(positions.to(DEVICE))
    ends = attention.find_ends(begins)
    whole = random(draw, count, columns + 16)
    qkv, dy = whole[:, :columns], random(draw, count, inner)
    tables = None
    if rotated:
        cos, sin = (torch.randn(count, rotated // 2, generator=draw).to(DEVICE) for _ in range(2))
        tables = (cos, sin)
    expected = qkv.double()
    y = torch.empty(count, inner, device=DEVICE, dtype=torch.float64)
    lse = torch.empty(n_heads, count, device=DEVICE)
    settings = attention.AttentionSettings(heads, width**-0.5, window, softcap)
    split = settings.split
    attention.attend(expected[:, :split], expected[:, split:], begins, settings, y, lse)
    out = torch.full((count, inner + 16), 7.0, device=DEVICE, dtype=TYPE)
    qk, v = qkv[:, :split], qkv[:, split:]
    attention_triton.attend_triton(qk, v, begins, settings, out[:, :inner], lse)
    assert_close(out[:, :inner], y, 5e-3 if TYPE is torch.bfloat16 else 1e-6)
    assert (out[:, inner:] == 7).all()
    wide = None if tables is None else (tables[0].double(), tables[1].double())
    partial = torch.full((count, n_heads, 2, width), 7.0, device=DEVICE)
    apart, wide_partial = qk.contiguous(), partial.double()
    attention.attend_gradients(
        expected[:, :split].contiguous(), expected[:, split:], begins, ends, settings, y, lse,
        dy.double(), wide_partial,
    )  # fmt: skip
    attention_triton.attend_gradients_triton(
        apart, v.contiguous(), begins, ends, settings, out[:, :inner], lse, dy, partial
    )
    grouped = [x.unflatten(1, (shared, -1)).sum(2) for x in (partial, wide_partial)]
    assert_close(*grouped, 1e-2 if TYPE is torch.bfloat16 else 1e-6)
    attention.attend_backward(expected, begins, ends, settings, y, lse, dy.double(), partial, wide)
    attention_triton.attend_backward_triton(
        qkv, begins, ends, settings, out[:, :inner], lse, dy, partial, tables
    )
    parts = (n_heads * width, shared * width, shared * width)
    for fast, plain in zip(qkv.split(parts, 1), expected.split(parts, 1), strict=True):
        assert_close(fast, plain, 1e-2 if TYPE is torch.bfloat16 else 1e-6)
