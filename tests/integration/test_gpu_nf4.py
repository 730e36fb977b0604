"""An nf4 base on a GPU: bitsandbytes' bits, the hand-written step in all modes, a whole run."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora.adapters.apply import apply_lora, lora_layers
from lora.adapters.bases.unpack import unpack_base
from lora.config import BaseWeights, LoRAConfig
from lora.data.sequences.batches import Batch
from lora.decoder.decoder import Decoder, build_decoder
from lora.decoder.quantised.base import quantised_modules
from lora.device import choose_device
from lora.fast.llama import buffers
from lora.fast.llama.checkpointing import MODES
from lora.fast.memory.fast_step import FastPlan
from lora.fast.step import FastStep
from lora.fast.weights import packed_tables
from lora.fast.why_not import why_not_fast
from lora.finetune import finetune
from lora.kernels.nf4 import Nf4Tensor, nf4_scales, quantise_nf4
from lora.kernels.step.jit import HAS_TRITON
from lora.kernels.step.ops import TRITON
from lora.kernels.unpack.nf4 import unpack_nf4_triton
from lora.layers.quantised_model import use_quantised_linears
from lora.runs.disk import read_rows
from tests.fast.test_unpacked import unpacked
from tests.heard import Heard
from tests.integration.gpu_runs import folder_of, learn_alike
from tests.tiny_llama import changed, llama_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and HAS_TRITON), reason="needs a CUDA device and Triton"
    ),
]
VOCABULARY, WIDTH = 1000, 512
NF4 = BaseWeights(base_dtype="nf4")
TABLES = BaseWeights("nf4", nf4_embeddings=True)


def weight(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    draw = torch.Generator("cuda").manual_seed(seed)
    drawn = torch.randn(rows, columns, generator=draw, device="cuda")
    return (drawn * torch.logspace(-3, 0, rows, device="cuda")[:, None]).to(dtype)


@pytest.mark.parametrize("double_quant", [True, False])
def test_codes_scales_and_values_are_those_of_bitsandbytes(double_quant: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    given = weight(512, 2048)
    codes, state = functional.quantize_4bit(
        given, blocksize=64, quant_type="nf4", compress_statistics=double_quant
    )
    own = quantise_nf4(given, 64, double_quant=double_quant)
    same_codes = (codes.view(-1) == own.codes.view(-1)).float().mean().item()
    scales = state.absmax
    if double_quant:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
    apart = (scales - nf4_scales(own)).abs().max().item()
    print(f"bitsandbytes on CUDA: codes {same_codes}, scales at most {apart} apart")
    assert same_codes == 1.0
    # Theirs, by our kernel: the mean of the scales is summed in another order on a GPU.
    offset = state.offset if double_quant else own.offset
    groups = state.state2.absmax if double_quant else own.group_scales
    theirs = Nf4Tensor(codes.view(512, 1024), state.absmax, groups, offset, 64)
    out = torch.empty_like(given)
    unpack_nf4_triton(theirs, out)
    assert torch.equal(out, functional.dequantize_4bit(codes, state))


def build(width: int = WIDTH, base: BaseWeights = NF4, **changes: Any) -> Decoder:
    """Return a packed model without LoRA."""
    config = llama_config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        heads=(width // 64, width // 128, 64),
        feed_forward=2 * width,
        n_layers=4,
        max_position_embeddings=4096,
        bias=True,
    )
    model = build_decoder(changed(config, **changes), 0, dtype=torch.bfloat16, device="cuda")
    kinds = nn.Linear | nn.Embedding
    weights = {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, kinds)}
    use_quantised_linears(model, base)
    for name, module in quantised_modules(model).items():
        module.load(weights[name], name)
    return model


def adapted(model: Decoder, **settings: Any) -> Decoder:
    apply_lora(model, LoRAConfig(**{"rank": 8, "init_seed": 0, **settings}))
    draw = torch.Generator("cuda").manual_seed(2)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_(0, 0.05, generator=draw)
    return model


def batch(seed: int = 3, rows: int = 2, tokens: int = 192, *, packed: bool = True) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, tokens), generator=draw)
    labels, documents = ids.roll(-1, 1), torch.zeros_like(ids)
    positions = torch.arange(tokens).expand(rows, -1).clone()
    labels[:, ::7] = -100
    if packed:
        for start in (50, 51, 130):
            documents[0, start:] += 1
            positions[0, start:] = torch.arange(tokens - start)
    return Batch(ids, labels, positions, documents)


def train(step: FastStep, numbers: range, n_micro: int = 1) -> list[list[float]]:
    reports = []
    for number in numbers:
        step.launch([batch(10 * number + n) for n in range(n_micro)], 3e-3, number)
        reports.append(step.report.tolist())
    return reports


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.2}, {"targets": ("q_proj", "up_proj")}])
@pytest.mark.parametrize("mode", MODES)
def test_steps_have_the_bits_of_those_over_the_unpacked_values(
    mode: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers, "FEED_FORWARD_CHUNK_TOKENS", 256)
    model = build()
    found = []
    for one in (model, unpacked(model)):
        adapted(one, **settings)
        step = FastStep(
            one, TRITON, torch.bfloat16, checkpointing=MODES[mode], merges=False, seed=5
        )
        reports = train(step, range(1, 5), n_micro=2)
        assert step.graphs.why_not is None
        found.append((reports, step.flat.values.clone()))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][0][0][0] != found[0][0][-1][0]


def test_steps_over_int8_have_the_bits_of_those_over_the_unpacked_values() -> None:
    model = build(base=BaseWeights(base_dtype="int8"))
    found = []
    for one in (model, unpacked(model)):
        step = FastStep(adapted(one), TRITON, torch.bfloat16, merges=False)
        found.append((train(step, range(1, 4)), step.flat.values.clone()))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(("vocabulary", "is_whole"), [(VOCABULARY, True), (8200, False)])
def test_tables_in_nf4_are_read_by_rows_and_slices(
    vocabulary: int, is_whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_tables, "MIN_UNPACKED_VALUES", 0)
    model = build(base=TABLES, vocab_size=vocabulary, tie_word_embeddings=False)
    plain = copy.deepcopy(model)
    unpack_base(plain, torch.bfloat16)
    found = []
    for one in (model, plain):
        step = FastStep(adapted(one), TRITON, torch.bfloat16, merges=False)
        reports = train(step, range(1, 4))
        assert step.graphs.why_not is None
        found.append((step, reports))
    (own, reports), (other, expected) = found
    head = own.network.head
    assert isinstance(head, packed_tables.PackedTable)
    assert (len(list(head._slices())) == 1) == is_whole
    if is_whole:
        assert reports == expected
        assert torch.equal(own.flat.values, other.flat.values)
    assert reports[-1] == pytest.approx(expected[-1], rel=1e-2)


def test_steps_learn_continue_to_the_bit_and_leave_the_codes_alone() -> None:
    model = adapted(build())
    other = copy.deepcopy(model)
    before = {n: b.clone() for n, b in model.state_dict().items() if "lora_" not in n}
    assert why_not_fast(model, choose_device("cuda")) is None
    whole = FastStep(model, TRITON, torch.bfloat16)
    first = train(whole, range(1, 9))
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    moments = copy.deepcopy(whole.optimizer_state())
    with torch.no_grad():  # between steps: the modules unpack for themselves
        assert model(batch(1).input_ids.cuda()).isfinite().all()
    rest = train(whole, range(9, 17))
    assert rest[-1][0] < first[0][0]

    again = FastStep(other, TRITON, torch.bfloat16)
    for name, parameter in other.named_parameters():
        if name in trained:
            parameter.data.copy_(trained[name])
    again.load_optimizer_state(moments)
    assert train(again, range(9, 17)) == rest
    assert torch.equal(again.flat.values, whole.flat.values)
    for name, value in model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_holds_what_is_planned(mode: str) -> None:
    rows, tokens = 4, 2048
    plan = FastPlan(adapted(build(1024)), rows, tokens).memory(MODES[mode])
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = adapted(build(1024))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step = FastStep(model, TRITON, torch.bfloat16, checkpointing=MODES[mode])
    for number in (1, 2, 3):
        step.launch([batch(rows=rows, tokens=tokens)], 0.0, number)
    held = torch.cuda.max_memory_allocated() - before
    print(f"{mode}: {plan.total / 1e6:.1f} MB planned, {held / 1e6:.1f} held")
    assert plan.total == pytest.approx(held, rel=0.1)


def test_a_whole_run_says_what_it_does_learns_and_is_repeated(
    tiny_folder: Path, tmp_path: Path
) -> None:
    heard = Heard()
    fast, _ = learn_alike("nf4", tiny_folder, tmp_path, heard)
    assert any("nf4" in line and line.startswith("fast step") for line in heard.said), heard.said
    written = read_rows(folder_of(fast) / "metrics.jsonl")
    finetune(replace(fast, resume=True))
    assert read_rows(folder_of(fast) / "metrics.jsonl") == written
