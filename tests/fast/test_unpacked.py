"""The hand-written step over an nf4 base: against the plain step, and over the unpacked values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lora.adapters.apply import train_token_rows
from lora.adapters.bases.unpack import unpack_base
from lora.config import BaseWeights
from lora.data.sequences.batches import Batch
from lora.decoder.decoder import Decoder
from lora.decoder.quantised.base import quantised_modules
from lora.fast.llama import buffers
from lora.fast.llama.checkpointing import MODES
from lora.fast.memory.fast_step import fast_memory
from lora.fast.step import FastStep
from lora.fast.weights import packed_tables
from lora.fast.weights.unpacked import UnpackedProjection
from lora.fast.why_not import why_not_hand_written
from lora.kernels.step.ops import PLAIN
from lora.layers.quantised_model import use_quantised_linears
from lora.training.losses import loss_for
from lora.training.optim import build_optimizer
from tests.fast.conftest import (
    GEMMA,
    GRANITE,
    OLMO,
    PHI,
    RATES,
    apply_random_lora,
    check_steps,
    relative,
)

DROPOUT: tuple[dict[str, Any], dict[str, Any]] = ({}, {"dropout": 0.3})
NF4 = BaseWeights(base_dtype="nf4")
TABLES = BaseWeights("nf4", nf4_embeddings=True)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tied": ({}, {"rank_pattern": {"k_proj": 2}}),
    "untied, biases": ({"tied": False, "bias": True}, {"rank": 16}),
    "two targets": ({"window": 4}, {"targets": ("q_proj", "down_proj")}),
    "one block": ({}, {"layers": (1,)}),
    "Gemma": (GEMMA, {"layers": (1, 2)}),
    "Granite": (GRANITE, {"layers": (1, 2)}),
    "OLMo": (OLMO, {}),
    "fused": (PHI, {}),
}


def packed(model: Decoder, *, base: BaseWeights = NF4, keep: tuple[str, ...] = ()) -> Decoder:
    """Changes `model` in place and returns it: its linears are nf4, those in `keep` are not."""
    kinds = nn.Linear | nn.Embedding
    plain = {n: m for n, m in model.named_modules() if isinstance(m, kinds)}
    use_quantised_linears(model, base)
    for name, module in quantised_modules(model).items():
        if name.endswith(keep or (" ",)):
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent).add_module(leaf, plain[name])
        else:
            module.load(plain[name].weight.detach(), name)
    model.tie_head()
    return model


def unpacked(model: Decoder) -> Decoder:
    """Return a copy of `model`, without LoRA, whose linears have the unpacked values."""
    twin = copy.deepcopy(model)
    for name, module in quantised_modules(twin).items():
        parent, _, leaf = name.rpartition(".")
        plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(module.unpacked(), requires_grad=False)
        plain.bias = module.bias
        twin.get_submodule(parent).add_module(leaf, plain)
    return twin


def adapted(model: Decoder, **settings: Any) -> Decoder:
    return apply_random_lora(model, torch.float64, **settings)


def steps_of(make_batch: Callable[..., Batch], *, packed: bool) -> list[list[Batch]]:
    """Return two micro-batches for each rate."""
    return [
        [make_batch(10 * number + index, packed=packed) for index in range(2)]
        for number in range(len(RATES))
    ]


def check(
    step: FastStep, plain: Decoder, make_batch: Callable[..., Batch], *, packed: bool = True
) -> None:
    """Train `step`'s model and `plain`, which is equal to it, and compare all that comes of it."""
    batches = steps_of(make_batch, packed=packed)
    check_steps(step, plain, build_optimizer(plain, 1.0, 0.0), batches)


def train(step: FastStep, make_batch: Callable[..., Batch]) -> None:
    for number, batches in enumerate(steps_of(make_batch, packed=True), 1):
        step.launch(batches, 1e-2, number)


QUICK = [("untied, biases", mode) for mode in ("none", "full+offload")]
QUICK += [(name, "full") for name in ("tied", "Gemma", "fused")]
WAYS = [
    pytest.param(name, mode, marks=[] if (name, mode) in QUICK else pytest.mark.slow)
    for name in CASES
    for mode in (*MODES, "none, swiglu recomputed")
]


@pytest.mark.parametrize(("name", "mode"), WAYS)
def test_steps_equal_the_plain_ones(
    tiny_decoder: Callable[..., Decoder],
    make_batch: Callable[..., Batch],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    mode: str,
) -> None:
    sizes, settings = CASES[name]
    recomputes = mode.endswith("recomputed")
    monkeypatch.setattr(buffers, "MAX_STORED_SWIGLU_BYTES", 0 if recomputes else 1e9)
    monkeypatch.setattr(buffers, "FEED_FORWARD_CHUNK_TOKENS", 20)
    plain = adapted(packed(tiny_decoder(**sizes)), **settings)
    assert why_not_hand_written(plain) is None
    step = FastStep(
        copy.deepcopy(plain),
        PLAIN,
        torch.float64,
        checkpointing=MODES.get(mode),
        own_attention=recomputes,
    )
    check(step, plain, make_batch, packed=not recomputes)


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("name", ["untied, biases", "dropout", "Gemma"])
def test_steps_equal_those_over_the_unpacked_values_to_the_bit(
    tiny_decoder: Callable[..., Decoder],
    make_batch: Callable[..., Batch],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    mode: str,
) -> None:
    monkeypatch.setattr(buffers, "FEED_FORWARD_CHUNK_TOKENS", 20)
    sizes, settings = DROPOUT if name == "dropout" else CASES[name]
    model = packed(tiny_decoder(dtype=torch.float32, **sizes))
    found = []
    for one in (model, unpacked(model)):
        apply_random_lora(one, **settings)
        step = FastStep(one, PLAIN, torch.float32, checkpointing=MODES[mode], merges=False, seed=5)
        train(step, make_batch)
        found.append((step.report, step.flat.values, step.flat.mean))
    for own, expected in zip(*found, strict=True):
        assert torch.equal(own, expected)


@pytest.mark.parametrize(
    "base",
    [BaseWeights("nf4", nf4_block=256, nf4_double_quant=False), BaseWeights("int8")],
)
def test_other_ways_to_pack_step_as_the_plain_step_does(
    tiny_decoder: Callable[..., Decoder], make_batch: Callable[..., Batch], base: BaseWeights
) -> None:
    plain = adapted(packed(tiny_decoder(), base=base))
    assert why_not_hand_written(plain) is None
    step = FastStep(copy.deepcopy(plain), PLAIN, torch.float64, checkpointing=MODES["full"])
    assert f"{base.base_dtype} weights unpacked" in step.describe()
    # The scales of int8 rows multiply its outputs there, the weight here.
    check(step, plain, make_batch)


def test_linears_that_are_not_packed_take_part(
    tiny_decoder: Callable[..., Decoder], make_batch: Callable[..., Batch]
) -> None:
    """As in folders in 4 bits: one member of a projection in one block, and a whole projection."""
    plain = adapted(
        packed(tiny_decoder(bias=True), keep=("0.self_attn.k_proj", "2.mlp.up_proj", "o_proj"))
    )
    step = FastStep(copy.deepcopy(plain), PLAIN, torch.float64)
    kinds = [isinstance(p, UnpackedProjection) for p in step.network.projections]
    assert kinds == [True, False, True, True]
    check(step, plain, make_batch)


@pytest.mark.parametrize(
    ("rows", "saved"), [((5, 40), ("norm",)), ((), ("embed_tokens", "lm_head", "input_layernorm"))]
)
def test_what_trains_beside_lora(
    tiny_decoder: Callable[..., Decoder],
    make_batch: Callable[..., Batch],
    rows: tuple[int, ...],
    saved: tuple[str, ...],
) -> None:
    plain = adapted(packed(tiny_decoder(tied=False)), modules_to_save=saved)
    if rows:
        train_token_rows(plain, rows)
    assert why_not_hand_written(plain) is None
    step = FastStep(copy.deepcopy(plain), PLAIN, torch.float64)
    check(step, plain, make_batch)


@pytest.mark.parametrize(
    ("mode", "n_unpacked"),
    # 4 projections of 3 blocks forward; backward the last block's gate/up and down are there yet.
    # Recomputing: q/k/v and output again, gate/up once for the recomputation and its gradient.
    [("none", 24 - 2), ("cheap", 24 - 2), ("full", 24 + 2 * 2 - 2)],
)
def test_weights_are_unpacked_once_for_all_chunks(
    tiny_decoder: Callable[..., Decoder],
    make_batch: Callable[..., Batch],
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    n_unpacked: int,
) -> None:
    monkeypatch.setattr(buffers, "FEED_FORWARD_CHUNK_TOKENS", 7)
    monkeypatch.setattr(buffers, "MAX_STORED_SWIGLU_BYTES", 0)
    seen: list[int] = []
    unpack_base = UnpackedProjection.unpack_base

    def counting(projection: UnpackedProjection, layer: int, out: torch.Tensor) -> None:
        seen.append(layer)
        unpack_base(projection, layer, out)

    monkeypatch.setattr(UnpackedProjection, "unpack_base", counting)
    model = apply_random_lora(packed(tiny_decoder(dtype=torch.float32)))
    step = FastStep(model, PLAIN, torch.float32, checkpointing=MODES[mode])
    for number in (1, 2):
        seen.clear()
        step.launch([make_batch(number, packed=True)], 1e-2, number)
        assert len(seen) == n_unpacked


def test_an_evaluation_between_steps_changes_nothing(
    tiny_decoder: Callable[..., Decoder], make_batch: Callable[..., Batch]
) -> None:
    found = []
    for evaluates in (True, False):
        model = adapted(packed(tiny_decoder()))
        step = FastStep(model, PLAIN, torch.float64)
        for number in (1, 2, 3):
            if evaluates:
                loss, _ = loss_for(model)(model, make_batch(9, packed=True))
                assert loss.isfinite()
            step.launch([make_batch(number, packed=True)], 1e-2, number)
        found.append(step.flat.values)
    assert torch.equal(*found)


@pytest.mark.parametrize("mode", ["none", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        ({"tied": False}, {"targets": ("q_proj", "down_proj")}),
        ({"tied": False, "embedding_scale": 3.0}, {"targets": ("q_proj", "lm_head")}),
        ({}, {"dropout": 0.2, "targets": ("up_proj", "o_proj")}),
    ],
)
def test_packed_tables_compute_what_their_values_do(
    tiny_decoder: Callable[..., Decoder],
    make_batch: Callable[..., Batch],
    monkeypatch: pytest.MonkeyPatch,
    sizes: dict[str, Any],
    settings: dict[str, Any],
    mode: str,
) -> None:
    monkeypatch.setattr(packed_tables, "MIN_UNPACKED_VALUES", 0)
    monkeypatch.setattr(buffers, "MAX_LOGITS_ELEMENTS", 400 * 20)  # tokens in two parts
    model = packed(tiny_decoder(vocab_size=401, **sizes), base=TABLES)
    plain = copy.deepcopy(model)
    unpack_base(plain, torch.float64)
    found = []
    for one in (model, plain):
        adapted(one, **settings)
        step = FastStep(one, PLAIN, torch.float64, checkpointing=MODES[mode], seed=5, merges=False)
        train(step, make_batch)
        found.append(step)
    own, other = found
    assert isinstance(own.network.head, packed_tables.PackedTable)
    assert len(list(own.network.head._slices())) > 3
    assert own.report.tolist() == pytest.approx(other.report.tolist(), rel=1e-6)
    assert relative(own.flat.values, other.flat.values) < 1e-12
    assert relative(own.flat.mean, other.flat.mean) < 1e-12


def test_the_step_says_what_it_does(tiny_decoder: Callable[..., Decoder]) -> None:
    about = FastStep(adapted(packed(tiny_decoder())), PLAIN, torch.float64).describe()
    assert about.endswith("LoRA inside the weights' matmuls; nf4 weights unpacked for each of them")


def test_a_restart_and_another_shape_take_new_scratch(
    tiny_decoder: Callable[..., Decoder], make_batch: Callable[..., Batch]
) -> None:
    model = adapted(packed(tiny_decoder()))
    step = FastStep(model, PLAIN, torch.float64)
    step.launch([make_batch(0, packed=True)], 0.0)
    expected = step.report.clone()
    first = step.network.qkv
    assert isinstance(first, UnpackedProjection)
    step.restart(MODES["full"])
    assert not first.weights  # or the old scratch would stay beside the new one
    step.launch([make_batch(0, packed=True)], 0.0)
    assert step.report.tolist() == pytest.approx(expected.tolist(), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "n_scratch", "n_beside"),
    # Beside W (2·56, 48) of gate/up and (48, 56) of down: 16 rows and columns for LoRA's ranks,
    # or A and B of all blocks in matmuls of their own.
    [
        ({}, (128 * 64, 64 * 72), 0),
        ({"dropout": 0.3}, (112 * 48, 48 * 56), 3 * 16 * (80 + 48 + 112 + 48 + 3 * 48 + 56)),
        ({"targets": ("q_proj",)}, (96 * 64, 48 * 56), 0),
        # Rows of the head are a multiple of 64.
        ({"targets": ("q_proj",), "base": TABLES}, (128 * 48, 48 * 56), 0),
    ],
)
def test_memory_counts_packed_weights_and_scratch(
    tiny_decoder: Callable[..., Decoder],
    make_batch: Callable[..., Batch],
    settings: dict[str, Any],
    n_scratch: tuple[int, int],
    n_beside: int,
) -> None:
    own = {name: value for name, value in settings.items() if name != "base"}
    model = tiny_decoder(dtype=torch.bfloat16, bias=True, tied="base" not in settings)
    apply_random_lora(packed(model, base=settings.get("base", NF4)), **own)
    held = fast_memory(copy.deepcopy(model), 2, 16)
    step = FastStep(model, PLAIN, torch.bfloat16)
    step.launch([make_batch(0, packed=True)], 0.0)
    assert step.buffers is not None
    assert (step.buffers.unpacked.numel(), step.buffers.unpacked_down.numel()) == n_scratch
    tensors = [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    storages[step.flat.values.untyped_storage().data_ptr()] = 4 * step.flat.values.numel()
    assert held.weights == sum(storages.values()) + 2 * n_beside


@pytest.mark.parametrize("mode", MODES)
def test_phases_that_follow_one_another_share_scratch(
    tiny_decoder: Callable[..., Decoder], mode: str
) -> None:
    model = apply_random_lora(packed(tiny_decoder(dtype=torch.bfloat16)))
    network = FastStep(model, PLAIN, torch.bfloat16, own_attention=True).network
    shared = network.buffers(2, 16, MODES[mode])
    network.release()
    network.scratch, scratch = None, network.scratch
    apart = network.buffers(2, 16, MODES[mode])
    network.scratch = scratch
    assert shared.logits.data_ptr() == shared.dkv_partial.data_ptr()
    assert (shared.logits.data_ptr() == shared.gate_up.scratch.data_ptr()) == ("full" in mode)
    for name in ("logits", "dkv_partial"):
        one, other = getattr(shared, name), getattr(apart, name)
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
    for one, other in ((shared.gate_up, apart.gate_up), (shared.swiglu_out, apart.swiglu_out)):
        assert one.scratch.shape == other.scratch.shape
    # 2 · 16 tokens: gate, up and act(gate) · up with 16 columns for LoRA; dkv; logits of 97 (104).
    feed = 32 * (128 + 72) if "full" in mode else 0
    partial, logits = 2 * 32 * 6 * 2 * 8, 32 * 104
    assert shared.phases is not None
    assert shared.phases.tensor.numel() == max(feed, partial, logits)
