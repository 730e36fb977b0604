"""The fast step on a GPU: the plain path's figures, why not, dropout, resume, bad weights."""

from __future__ import annotations

import copy
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora.adapters.apply import apply_lora, lora_layers
from lora.config import DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.data.reading.orders import make_orders
from lora.data.sequences.batches import Batch
from lora.decoder.config import (
    AttentionConfig,
    DecoderConfig,
    FeedForwardConfig,
    LayerConfig,
    RopeConfig,
)
from lora.decoder.decoder import Decoder, build_decoder
from lora.device import choose_device
from lora.errors import TrainingError
from lora.fast.choose import choose_steps
from lora.fast.graphs import Graphs
from lora.fast.llama.checkpointing import MODES
from lora.fast.runner import CapturedStepRunner
from lora.fast.step import FastStep
from lora.fast.why_not import why_not_fast
from lora.finetune import FinetuneJob, finetune
from lora.kernels.step.jit import HAS_TRITON
from lora.kernels.step.ops import TRITON
from lora.pretrained.transformers_models.load import as_language_model
from lora.runs.disk import read_rows
from lora.training.losses import loss_for
from lora.training.optim import build_optimizer
from lora.training.plain_step import train_step

pytestmark = [
    pytest.mark.gpu,
    # torch's own, where autocast hands a norm bf16 and its weight is fp32
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),
    pytest.mark.skipif(
        not (torch.cuda.is_available() and HAS_TRITON), reason="needs a CUDA device and Triton"
    ),
]
VOCABULARY = 1000
TOLERANCE = 0.035
"""Relative, a tensor: bf16 products through four blocks; autocast's own differ by 0.016 here. Where
these differ more, so may the step's, by a third more than the tensor that is the furthest off."""


def build(**changes: object) -> Decoder:
    sizes: dict[str, object] = {
        "family": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "max_position_embeddings": 512,
        "norm_eps": 1e-5,
        "block": "pre_norm",
        "embedding_scale": 1.0,
        "tie_word_embeddings": True,
        "attention": AttentionConfig(8, 2, 32, qkv_bias=True),
        "feed_forward": FeedForwardConfig(512, "silu"),
        "layers": (LayerConfig(RopeConfig(1e4), None, 32**-0.5),) * 4,
    }
    model = build_decoder(DecoderConfig(**{**sizes, **changes}), 0)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.05 if parameter.ndim > 1 else 0.2
            parameter.add_(spread * torch.randn(parameter.shape, generator=draw))
            parameter.copy_(parameter.bfloat16())  # so that a bf16 base holds the same values
    return model


def adapt(model: Any, **settings: object) -> Any:
    apply_lora(model, LoRAConfig(rank=8, init_seed=0, **settings))  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.copy_(0.05 * torch.randn(layer.lora_B.shape, generator=draw))
    return model


def batch(*, packed: bool, rows: int = 2, tokens: int = 192) -> Batch:
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (rows, tokens), generator=draw)
    labels, documents = ids.roll(-1, 1), torch.zeros_like(ids)
    positions = torch.arange(tokens).expand(rows, -1).clone()
    labels[:, ::7] = -100
    if packed:
        for start in (50, 51, 130):
            documents[0, start:] += 1
            positions[0, start:] = torch.arange(tokens - start)
        documents[1, 150:], labels[1, 150:] = -1, -100
    return Batch(ids, labels, positions, documents)


def check_gradients(model: Decoder, kind: str, batches: Batch, **settings: Any) -> None:
    """Check the step's gradients, in bf16, against the plain ones in fp32; LoRA is put on."""
    if kind == "full":
        model.requires_grad_(True)
    elif not lora_layers(model):
        adapt(model)
    plain = model
    fast, plain = copy.deepcopy(plain).cuda(), plain.cuda()
    step = FastStep(fast, TRITON, torch.bfloat16, merges=kind == "merged", **settings)
    step.launch([batches], 0.0)
    loss, expected = plain_gradients(plain, batches, autocast=False)
    _, rounded = plain_gradients(plain, batches, autocast=True)
    assert step.report[0].item() == pytest.approx(loss, rel=2e-3)
    tolerance = max(TOLERANCE, 1.3 * max(apart(rounded, expected).values()))
    start, found = step.flat.values.data_ptr(), {}
    for name, parameter in fast.named_parameters():
        if parameter.requires_grad:
            place = (parameter.data_ptr() - start) // 4
            own = step.flat.gradients.as_strided(parameter.shape, parameter.stride(), place)
            found[name] = own
    errors = apart(found, expected)
    assert errors == pytest.approx(dict.fromkeys(errors, 0.0), abs=tolerance)


def plain_gradients(
    model: Decoder, batches: Batch, *, autocast: bool
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the mean loss, and the gradients of its sum by name."""
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss_sum, n_tokens = loss_for(model)(model, batches.to("cuda"))
    loss_sum.sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return (loss_sum / n_tokens).item(), gradients


def apart(own: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return relative differences by name."""
    # A key's bias moves all logits of a query alike: its gradient is rounding alone.
    names = [name for name in expected if not name.endswith("k_proj.bias")]
    return {n: ((own[n] - expected[n]).norm() / expected[n].norm()).item() for n in names}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["merged", "split", "full"])
def test_gradients_are_the_plain_ones(kind: str, packed: bool) -> None:
    check_gradients(build(), kind, batch(packed=packed))


GATED = FeedForwardConfig(512, "gelu_pytorch_tanh")
FAMILIES: dict[str, dict[str, object]] = {
    "qwen3": {"attention": AttentionConfig(8, 2, 64, qk_norm="head")},
    "qwen3, windows": {
        "attention": AttentionConfig(4, 2, 128, qk_norm="head"),
        "layers": (LayerConfig(RopeConfig(1e4), 40, 128**-0.5), LayerConfig(None, None, 0.1)) * 2,
    },
    "gemma3": {
        "block": "sandwich",
        "embedding_scale": 16.0,
        "feed_forward": GATED,
        "attention": AttentionConfig(2, 1, 256, qk_norm="head"),
        "layers": (
            LayerConfig(RopeConfig(1e4), 40, 0.0625),
            LayerConfig(RopeConfig(1e6), None, 0.0625),
        )
        * 2,
    },
    "gemma2": {
        "block": "sandwich",
        "embedding_scale": 16.0,
        "feed_forward": GATED,
        "logit_softcap": 5.0,
        "attention": AttentionConfig(2, 1, 256, logit_softcap=2.0),
        "layers": (LayerConfig(RopeConfig(1e4), 40, 0.1), LayerConfig(RopeConfig(1e4), None, 0.1))
        * 2,
    },
    "granite": {"residual_multiplier": 0.22, "logit_scale": 0.125, "embedding_scale": 12.0},
    "olmo2": {"block": "post_norm", "attention": AttentionConfig(8, 8, 32, qk_norm="width")},
    "phi3": {
        "attention": AttentionConfig(4, 2, 96, is_fused=True),
        "feed_forward": FeedForwardConfig(512, "silu", is_fused=True),
        "layers": (LayerConfig(RopeConfig(1e4, rotary_dim=72), None, 96**-0.5),) * 4,
    },
    "odd heads": {"attention": AttentionConfig(4, 2, 20, logit_softcap=2.0)},
}
WAYS = {  # packed through our kernels or torch's, or unpacked
    "own kernels": ("split", "merged"),
    "torch's kernels": ("full",),
    "unpacked": ("split", "full"),
}


@pytest.mark.parametrize(("way", "kind"), [(way, kind) for way in WAYS for kind in WAYS[way]])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_other_families(name: str, kind: str, way: str) -> None:
    own = {"own kernels": True, "torch's kernels": False, "unpacked": None}[way]
    batches = batch(packed=way != "unpacked")
    check_gradients(build(**FAMILIES[name]), kind, batches, own_attention=own)


@pytest.mark.parametrize("name", ["gemma3", "granite", "olmo2"])
@pytest.mark.parametrize("mode", ["cheap", "full", "full+offload"])
def test_other_families_are_recomputed(mode: str, name: str) -> None:
    for own in (True, False):
        checkpointing = replace(MODES[mode], n_stored_attention=2 * (mode == "full"))
        check_gradients(
            build(**FAMILIES[name]), "split", batch(packed=True), own_attention=own,
            checkpointing=checkpointing,
        )  # fmt: skip


def test_dropout_stays_and_repeats() -> None:
    reports = []
    for _ in range(2):
        model = adapt(build(), dropout=0.2).cuda()
        assert why_not_fast(model, choose_device("cuda")) is None
        step = FastStep(model, TRITON, torch.bfloat16, seed=1)
        for number in (1, 2, 3):
            step.launch([batch(packed=True)], 0.0, number)
            reports.append(step.report[0].item())
    assert reports[:3] == reports[3:]
    assert len(set(reports)) == 3


def test_reasons_against_it_are_told() -> None:
    choice = choose_device("cuda")
    gelu = FeedForwardConfig(512, "gelu")
    assert "gelu" in (why_not_fast(build(feed_forward=gelu), choice) or "")
    wide = AttentionConfig(2, 1, 320)
    assert "width is 320" in (why_not_fast(build(attention=wide), choice) or "")
    beside = adapt(build(), targets=("q_proj",), modules_to_save=("down_proj",))
    assert "trains beside LoRA" in (why_not_fast(beside, choice) or "")
    fp32 = choose_device("cuda", "fp32")
    assert "bf16" in (why_not_fast(adapt(build()), fp32) or "")


@pytest.fixture
def job(tiny_folder: Path, tmp_path: Path) -> FinetuneJob:
    return FinetuneJob(
        data=make_orders("train", 48),
        model=str(tiny_folder),
        lora=LoRAConfig(rank=4),
        train=TrainConfig(steps=40, batch_size=8, gradient_accumulation=2, learning_rate=2e-2),
        data_config=DataConfig(max_length=128),
        run=RunConfig(out=tmp_path, name="fast", device="cuda", eval_every_steps=10),
    )


class Lines:
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)

    def start(self, total: int, done: int) -> None:
        pass

    def step(self, step: int, loss: float, rate: float, memory: int) -> None:
        pass

    def stop(self) -> None:
        pass


def test_finetune_takes_it_and_learns_like_the_plain_step(job: FinetuneJob) -> None:
    # At a low rate: at a high one rounding alone drives two runs apart.
    job, said = replace(job, train=replace(job.train, learning_rate=5e-3)), Lines()
    fast = finetune(job, said)  # type: ignore[arg-type]
    plain_run = replace(job.run, name="plain", fast=False)
    plain = finetune(replace(job, run=plain_run), said)  # type: ignore[arg-type]
    assert any(line.startswith("fast step: one CUDA graph, Triton") for line in said.lines)
    assert "plain step: as asked" in said.lines
    curves = [
        [row["loss"] for row in read_rows(done.folder / "metrics.jsonl") if "loss" in row]
        for done in (fast, plain)
    ]
    gained = curves[1][0] - plain.result.eval_loss
    assert gained > 0.05
    apart = [abs(one - other) for one, other in zip(*curves, strict=True)]
    assert sum(apart) / len(apart) < 0.1 * gained
    assert abs(fast.result.eval_loss - plain.result.eval_loss) < 0.1 * gained


def test_full_fine_tuning_takes_it_too(job: FinetuneJob) -> None:
    said = Lines()
    rate = replace(job.train, learning_rate=2e-3)
    job = replace(job, lora=None, train=rate)
    fast = finetune(job, said)  # type: ignore[arg-type]
    plain = finetune(replace(job, run=replace(job.run, name="plain", fast=False)))
    assert any("all weights train" in line for line in said.lines)
    assert abs(fast.result.eval_loss - plain.result.eval_loss) < 0.03 * plain.result.eval_loss


def test_other_families_are_captured_and_learn_like_the_plain_step(job: FinetuneJob) -> None:
    """What the fast step refuses: another activation, with packed rows."""
    said = Lines()
    model = adapt(build(feed_forward=FeedForwardConfig(512, "relu")).bfloat16())
    plain = copy.deepcopy(model).cuda()
    choice = choose_device("cuda")
    config = TrainConfig(steps=6, weight_decay=0.0)
    steps = choose_steps(model.cuda(), choice, config, on_message=said.message)
    assert isinstance(steps, CapturedStepRunner)
    assert said.lines[0].startswith("captured step: one CUDA graph")
    optimizer = build_optimizer(plain, 1e-4, 0.0)
    for number in range(1, 7):
        batches = [batch(packed=number % 2 > 0), batch(packed=False)]
        steps.launch(number, batches, [1e-4])
        expected = train_step(
            plain,
            [x.to("cuda") for x in batches],
            loss_for(plain),
            optimizer,
            autocast=choice.autocast,
        )
        done = steps.finished(wait=True)[-1]
        assert done.losses[0] == pytest.approx(expected.loss.item(), rel=4e-3)
        assert done.gradient_norms[0] == pytest.approx(expected.gradient_norm.item(), rel=0.05)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # both torch's own,
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # while it compiles
@pytest.mark.parametrize(
    ("compiles", "dtype"),
    [(False, torch.bfloat16), (True, torch.bfloat16), (False, torch.float32)],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_transformers_model_is_captured(
    tiny_folder: Path, packed: bool, compiles: bool, dtype: torch.dtype
) -> None:
    transformers = pytest.importorskip("transformers")
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = adapt(load(tiny_folder, dtype=dtype)).cuda()
    plain = as_language_model(copy.deepcopy(theirs))
    choice = choose_device("cuda")
    steps = CapturedStepRunner(as_language_model(theirs), choice, TrainConfig(), compiles=compiles)
    optimizer = build_optimizer(plain, 1e-3, 0.0)
    ids = batch(packed=packed).input_ids % 300
    rows = replace(batch(packed=packed), input_ids=ids, labels=ids.roll(-1, 1))
    losses = []
    for number in range(1, 6):
        steps.launch(number, [rows], [1e-3])
        expected = train_step(
            plain, [rows.to("cuda")], loss_for(plain), optimizer, autocast=choice.autocast
        )
        losses.append(steps.finished(wait=True)[-1].losses[0])
        assert losses[-1] == pytest.approx(expected.loss.item(), rel=4e-3)
    assert losses[-1] < losses[0]


class Sums(nn.Module):
    """A causal model that asks the host in its forward: no graph can hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.head = nn.Linear(16, 50)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(x * 2 if x.sum().item() > 0 else x)


def test_what_cannot_be_captured_runs_without_a_graph() -> None:
    model = Sums().cuda()
    graphs = Graphs(torch.device("cuda"), torch.ones((), dtype=torch.bool, device="cuda"))
    ids, total = torch.arange(50, device="cuda"), torch.zeros((), device="cuda")
    for _ in range(3):
        graphs.run(("step",), lambda: total.add_(model(ids).detach().sum()))
    assert graphs.why_not is not None
    assert torch.isfinite(total)
    assert bool(graphs.is_live)


def test_a_resumed_run_repeats(job: FinetuneJob) -> None:
    whole = finetune(job)
    written = read_rows(whole.folder / "metrics.jsonl")
    finetune(replace(job, resume=True))
    assert read_rows(whole.folder / "metrics.jsonl") == written


def test_what_is_not_finite_is_named(job: FinetuneJob, tiny_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_folder, damaged)
    path = damaged / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3] = math.nan
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(TrainingError, match=f"Step 1.*{name}"):
        finetune(replace(job, model=str(damaged)))
