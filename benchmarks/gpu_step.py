"""One training step on a GPU: ours against the peers, each in its own process.

    python benchmarks/gpu_step.py                              # all cases and variants, minutes
    python benchmarks/gpu_step.py --cases 135M-4x512 --variants ours_lora peft
    python benchmarks/gpu_step.py --cases 8B-4x2048 --variants ours_lora_cheap --limit-s 60
    python benchmarks/gpu_step.py --cells 8B-4x2048:ours_lora_nf4 8B-4x2048:peft_bnb_liger
    python benchmarks/gpu_step.py --out benchmarks/results/gpu_step_h200.jsonl
    python benchmarks/gpu_step.py --dry-run                    # tiny shapes on a CPU: does it run?

Random Llama-shaped weights in bf16, rank 16 on all linears, AdamW. "Ours" goes through the trainer
and the real loader; `packed` variants read packed sequences, all others the same batch in every
step. Prints JSON lines. step_ms is the median of steps after the warm-up, peak_gb (10⁹ bytes) the
allocator's peak, build_peak_gb the same while the model was built, start_s the time from building
the step to the end of the first one, its compilation included (for sequences of 32,768 tokens and
more, which have no graph, nearly to the end of the second), planned_gb what
`lora.fast.memory.fast_step` planned. model_tflops counts the matmuls with weights: forward,
backward and, where weights train, their gradients; neither attention nor recomputation. `doubts`
says what is wrong with a row: a loss that is not finite or did not fall, a base that is not packed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gpu_peers import LEARNING_RATE, PEERS, PeerMissing, build_theirs, peak_bytes, restart_peak
from gpu_qlora import QLORA_PEERS

from lora.adapters.apply import apply_lora
from lora.config import BaseWeights, LoRAConfig, RunConfig, TrainConfig
from lora.data.sequences.batches import BatchStream, build_sequences
from lora.data.sequences.documents import Documents
from lora.decoder.config import (
    AttentionConfig,
    DecoderConfig,
    FeedForwardConfig,
    LayerConfig,
    RopeConfig,
)
from lora.decoder.decoder import Decoder, assign_parameters, build_empty_decoder
from lora.decoder.families import decoder_config
from lora.decoder.quantised.base import QuantisedWeight
from lora.device import WHOLE, DeviceChoice, Share, choose_device
from lora.fast.memory.fast_step import USABLE_MEMORY_FRACTION, FastPlan, MemoryFit, fit_memory
from lora.fast.runner import CapturedStepRunner, FastStepRunner
from lora.fast.why_not import why_not_fast
from lora.layers.quantised_model import use_quantised_linears
from lora.pretrained.transformers_models.load import as_language_model
from lora.runs.directory import create_run
from lora.runs.disk import read_rows
from lora.training.job import TrainingJob
from lora.training.losses import loss_for
from lora.training.plain_step import PlainStepRunner
from lora.training.step_runner import StepRunner
from lora.training.trainer import train

RANK = 16


@dataclass(frozen=True)
class Shape:
    """The sizes of a model and of a training step."""

    hidden: int
    layers: int
    heads: int
    shared: int
    feed_forward: int
    vocabulary: int
    rows: int
    tokens: int
    tied: bool = True
    warm_up_steps: int = 5
    timed_steps: int = 30
    config: dict[str, Any] | None = None
    """config.json of a model that is no Llama of these sizes."""
    device: str = "cuda"

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def parameters(self) -> int:
        """Number of parameters in matmuls, the head included once."""
        kv = self.shared * self.head_dim
        block = self.hidden * (2 * self.hidden + 2 * kv + 3 * self.feed_forward)
        return self.layers * block + self.vocabulary * self.hidden


CASES = {
    "135M-4x512": Shape(576, 30, 9, 3, 1536, 49152, 4, 512),
    "1B-1x512": Shape(2048, 16, 32, 8, 8192, 128256, 1, 512),
    "1B-4x2048": Shape(2048, 16, 32, 8, 8192, 128256, 4, 2048),
    "8B-1x2048": Shape(4096, 32, 32, 8, 14336, 128256, 1, 2048, False, 3, 12),
    "8B-4x2048": Shape(4096, 32, 32, 8, 14336, 128256, 4, 2048, False, 3, 8),
    "8B-1x4096": Shape(4096, 32, 32, 8, 14336, 128256, 1, 4096, False, 3, 10),
    "8B-2x4096": Shape(4096, 32, 32, 8, 14336, 128256, 2, 4096, False, 3, 8),
    "70B-1x2048": Shape(8192, 80, 64, 8, 28672, 128256, 1, 2048, False, 2, 4),
    "70B-1x4096": Shape(8192, 80, 64, 8, 28672, 128256, 1, 4096, False, 2, 4),
    "8B-1x32768": Shape(4096, 32, 32, 8, 14336, 128256, 1, 32768, False, 2, 4),
    "8B-1x131072": Shape(4096, 32, 32, 8, 14336, 128256, 1, 131072, False, 1, 2),
}
TINY = {"hidden": 128, "layers": 2, "heads": 4, "shared": 2, "feed_forward": 256,
        "vocabulary": 512, "tokens": 512, "warm_up_steps": 2, "timed_steps": 6}  # fmt: skip
"""Sizes of a dry run."""
MEMORY_GB = {"ours_lora_cheap": 32.0}
"""The memory budget of a mode; the default is the free memory."""
BASES = {
    "fp8": BaseWeights("fp8"),
    "int8": BaseWeights("int8"),
    "nf4": BaseWeights("nf4"),
    "nf4_embeddings": BaseWeights("nf4", nf4_embeddings=True),
}
MODES = ("", "_auto", "_cheap", "_full", "_offload", "_packed")
OURS = (
    *(f"ours_lora{mode}" for mode in MODES),
    *(f"ours_lora_{base}{mode}" for base in BASES for mode in MODES),
    "ours_lora_captured",
    "ours_lora_plain",
    "ours_lora_nf4_plain",
    "ours_full",
    "theirs_lora_plain",
    "theirs_lora_captured",
    "theirs_lora_compiled",
    "theirs_lora_captured_packed",
    "theirs_lora_compiled_packed",
)
"""`theirs` is transformers' model with `apply_lora` and our trainer. auto, cheap, full and offload
are modes of `lora finetune --memory`; without one it is none. fp8, int8 and nf4 are `--base-dtype`,
nf4_embeddings is nf4 with `--nf4-embeddings`."""

PACKED_DTYPES = (torch.uint8, torch.int8, torch.float8_e4m3fn)


def base_and_mode(variant: str) -> tuple[BaseWeights, str]:
    """Return what stores the base of one of our variants, and its mode or other suffix."""
    kind = variant.removeprefix("ours_lora")
    for name in sorted(BASES, key=len, reverse=True):
        if kind.startswith(f"_{name}"):
            return BASES[name], kind.removeprefix(f"_{name}")
    return BaseWeights(), kind


def build_empty(shape: Shape) -> Decoder:
    """Return a decoder of this shape on the meta device."""
    if shape.config is not None:
        return build_empty_decoder(decoder_config(shape.config))
    layer = LayerConfig(RopeConfig(10000.0), None, shape.head_dim**-0.5)
    config = DecoderConfig(
        family="llama",
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        max_position_embeddings=max(4096, shape.tokens),
        norm_eps=1e-5,
        block="pre_norm",
        embedding_scale=1.0,
        tie_word_embeddings=shape.tied,
        attention=AttentionConfig(shape.heads, shape.shared, shape.head_dim),
        feed_forward=FeedForwardConfig(shape.feed_forward, "silu"),
        layers=(layer,) * shape.layers,
    )
    return build_empty_decoder(config)


def build_model(
    shape: Shape,
    dtype: torch.dtype,
    *,
    base: BaseWeights = BaseWeights(),  # noqa: B008
    device: str = "cuda",
) -> Decoder:
    """Return a decoder of this shape with random values, its frozen weights stored as `base` says.

    Each weight is drawn, quantised and dropped before the next.
    """
    model = build_empty(shape)
    draw = torch.Generator(device).manual_seed(0)

    def value(size: torch.Size) -> torch.Tensor:
        if len(size) == 1:
            return torch.ones(size, dtype=dtype, device=device)
        return torch.randn(size, dtype=dtype, device=device, generator=draw).mul_(0.02)

    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    use_quantised_linears(model, base)

    def values() -> Iterator[tuple[str, torch.Tensor]]:
        for name in [name for name, _ in model.named_parameters()]:
            owner = model.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, QuantisedWeight) and name.endswith("weight"):
                owner.load(value(sizes[name]), name)
            else:
                yield name, value(sizes[name])

    assign_parameters(model, values())
    return model


def build_stream(
    shape: Shape,
    device: torch.device | str,
    *,
    packed: bool,
    share: Share = WHOLE,
    n_batches: int = 64,
) -> BatchStream:
    """Return the real loader over random tokens: one document per sequence, or packed ones.

    The shape's sequences are those of each process. With one batch it is that of every step.
    """
    import numpy as np

    draw = np.random.default_rng(0)
    n_rows = n_batches * shape.rows * share.size
    if packed:
        lengths = draw.integers(40, 400, n_rows * shape.tokens // 200)
    else:
        lengths = np.full(n_rows, shape.tokens)
    starts = np.concatenate(([0], lengths.cumsum()))
    ids = draw.integers(0, shape.vocabulary, starts[-1]).astype(np.int32)
    labels = np.roll(ids, -1)
    documents = Documents(ids, labels, starts, np.arange(len(lengths)))
    rows = build_sequences(documents, shape.tokens, packing=packed, pad_id=0, seed=0)
    return BatchStream(rows, shape.rows * share.size, 0, device, share)


def time_ours(shape: Shape, variant: str) -> dict[str, Any]:
    """Return the time and memory of a run through the trainer."""
    full, plain = variant == "ours_full", variant.endswith("plain")
    choice = choose_device(shape.device)
    fit = None if full else fit_mode(shape, variant)
    base, _ = base_and_mode(variant)
    restart_peak(shape.device)
    began_s = time.perf_counter()
    model: Any
    if variant.startswith("theirs"):
        model = as_language_model(build_theirs(shape, dtype=choice.compute_dtype))
    else:
        dtype = torch.float32 if full else choice.compute_dtype
        model = build_model(shape, dtype, base=base, device=shape.device)
    if full:
        model.requires_grad_(True)
    else:
        apply_lora(model, LoRAConfig(rank=RANK, alpha=2.0 * RANK, init_seed=0))
    n_steps = shape.warm_up_steps + shape.timed_steps
    config = TrainConfig(
        steps=n_steps,
        batch_size=shape.rows,
        warmup_fraction=0.0,
        learning_rate=LEARNING_RATE,
        seed=0,
    )
    device = choice.device if plain else "cpu"  # where `batch_device` of its steps will be
    packed = variant.endswith("packed")
    stream = build_stream(shape, device, packed=packed, n_batches=64 if packed else 1)
    built_bytes = peak_bytes(shape.device)
    restart_peak(shape.device)
    built_s = time.perf_counter()
    steps = build_steps(model, choice, variant, fit, config)
    with tempfile.TemporaryDirectory() as folder, create_run(Path(folder), "run") as run:
        job = TrainingJob(
            model=model,
            steps=steps,
            stream=stream,
            eval_batches=list,
            train_config=config,
            run_config=RunConfig(eval_every_steps=10**6, save_every_steps=10**6),
            run=run,
            choice=choice,
        )
        result = train(job)
        rows = read_rows(run.folder / "timings.jsonl")
        losses = [row["loss"] for row in read_rows(run.folder / "metrics.jsonl")]
    seconds = [row["step_s"] for row in rows]
    # A step's result is read while the next one runs, so the last row's time is too short.
    timed = sorted(seconds[shape.warm_up_steps : -1])
    packed_weights = [p for p in model.parameters() if p.dtype in PACKED_DTYPES]
    return {
        "step_ms": 1000 * timed[len(timed) // 2],
        "peak_gb": (result.peak_memory_bytes or peak_bytes(shape.device)) / 1e9,
        "start_s": seconds[0],
        "build_s": built_s - began_s,
        "build_peak_gb": built_bytes / 1e9,
        "first_and_last_loss": [round(losses[0], 4), round(losses[-1], 4)],
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "packed_linears": len(packed_weights),
        **({} if fit is None else {"planned_gb": fit.memory.total / 1e9, "mode": fit.reason}),
    }


def fit_mode(shape: Shape, variant: str) -> MemoryFit | None:
    """Return which activations a variant of the fast step stores, recomputes or offloads."""
    base, kind = base_and_mode(variant)
    if not variant.startswith("ours_lora") or kind in ("_captured", "_plain"):
        return None
    model = build_empty(shape).to(torch.bfloat16 if shape.device == "cuda" else torch.float32)
    use_quantised_linears(model, base)
    apply_lora(model, LoRAConfig(rank=RANK, alpha=2.0 * RANK, init_seed=0))
    is_packed = kind == "_packed"
    plan = FastPlan(model, shape.rows, shape.tokens, packed=is_packed)
    if kind in ("", "_packed"):
        return fit_memory(plan, "none", None)
    free = torch.cuda.mem_get_info()[0] if shape.device == "cuda" else 10**12
    budget = free * USABLE_MEMORY_FRACTION
    if variant in MEMORY_GB:
        budget = MEMORY_GB[variant] * 1e9
    return fit_memory(plan, "full+offload" if kind == "_offload" else kind[1:], int(budget))


def build_steps(
    model: Any, choice: DeviceChoice, variant: str, fit: MemoryFit | None, config: TrainConfig
) -> StepRunner:
    """Return the step runner of one of our variants."""
    if variant.endswith("plain"):
        return PlainStepRunner(model, loss_for(model), choice, config)
    if "captured" in variant or "compiled" in variant:
        compiles = "compiled" in variant
        return CapturedStepRunner(model, choice, config, compiles=compiles)
    # The kernels' plain twins run on a CPU, which no run chooses.
    why_not = why_not_fast(model, choice) if choice.device.type == "cuda" else None
    assert why_not is None, why_not
    checkpointing = None if fit is None else fit.checkpointing
    return FastStepRunner(model, choice, config, checkpointing=checkpointing)


def measure_ceiling() -> float:
    """Return the TFLOP/s of a large bf16 GEMM on random data."""
    size = 8192
    x, y = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16).unbind()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(5):
        x @ y
    begin.record()
    for _ in range(30):
        x @ y
    end.record()
    torch.cuda.synchronize()
    return 30 * 2 * size**3 / (begin.elapsed_time(end) * 1e-3) / 1e12


def doubts_about(row: dict[str, Any], variant: str) -> list[str]:
    """Return what is wrong with a row of measurements."""
    found = []
    first, last = row["first_and_last_loss"]
    if not math.isfinite(first + last):
        found.append("the loss is not finite")
    elif last >= first and not variant.endswith("packed"):
        found.append("the loss of the same batch did not fall")
    is_packed = any(name in variant for name in (*BASES, "bnb"))
    if is_packed != bool(row.get("packed_linears")):
        found.append(f"packed linears: {row.get('packed_linears')}")
    return found


def run_child(case: str, variant: str, *, dry: bool = False) -> dict[str, Any]:
    """Return the row of one case and variant, measured in this process.

    A dry run is one of the same code on a CPU, of tiny sizes.
    """
    shape = CASES[case]
    if dry:
        shape = replace(shape, **TINY, rows=min(shape.rows, 2), device="cpu")
    if variant in OURS:
        found = time_ours(shape, variant)
    else:
        found = (PEERS | QLORA_PEERS)[variant](shape, RANK)
    found = {key: round(v, 2) if isinstance(v, float) else v for key, v in found.items()}
    found["doubts"] = doubts_about(found, variant)
    if dry:
        return {"case": case, "variant": variant, "hardware": "a dry run on a CPU", **found}
    ceiling = measure_ceiling()
    tokens = shape.rows * shape.tokens
    trains_all = variant == "ours_full" or variant.startswith("full_")
    flops = (6 if trains_all else 4) * shape.parameters * tokens
    tflops = flops / (found["step_ms"] * 1e-3) / 1e12
    packages = ["torch", "triton", "transformers"]
    packages += [] if variant in OURS else ["peft", "bitsandbytes", "liger-kernel"]
    return {
        "case": case,
        "variant": variant,
        "hardware": f"one {torch.cuda.get_device_name()}",
        "versions": {name: version(name) for name in packages if find_spec(_module(name))},
        **found,
        "tokens_per_s": round(tokens / (found["step_ms"] * 1e-3)),
        "model_tflops": round(tflops, 1),
        "share_of_ceiling": round(tflops / ceiling, 3),
    }


def _module(package: str) -> str:
    return package.replace("-", "_")


def main() -> int:
    """Measure each case and variant in its own process; print JSON lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    variants = [*OURS, *PEERS, *QLORA_PEERS]
    parser.add_argument("--variants", nargs="+", choices=variants, default=variants)
    parser.add_argument("--cells", nargs="+", metavar="CASE:VARIANT", help="these, in this order")
    parser.add_argument("--out", type=Path, help="also append the lines to this file")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--limit-s", type=float, help="seconds after which a case counts as failed")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    known = {f"{case}:{variant}" for case in CASES for variant in variants}
    if unknown := [cell for cell in arguments.cells or () if cell not in known]:
        parser.error(f"unknown cells: {', '.join(unknown)}")
    if arguments.child:
        case, variant = arguments.cases[0], arguments.variants[0]
        get_ready(variant)
        if not sys.stdin.readline():  # comes when the cell before this one has been measured
            return 1
        try:
            row = run_child(case, variant, dry=arguments.dry_run)
        except PeerMissing as missing:
            row = {"case": case, "variant": variant, "skipped": str(missing)}
        print(json.dumps(row), flush=True)
        return 0
    cells = arguments.cells or [
        f"{case}:{variant}" for case in arguments.cases for variant in arguments.variants
    ]
    for line in measure_cells(cells, arguments.limit_s, dry=arguments.dry_run):
        print(line, flush=True)
        if arguments.out:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
    return 0


def get_ready(variant: str) -> None:
    """Import what a variant needs and open the GPU, which takes as long as many a measurement."""
    if variant not in OURS:
        for name in ("transformers.models.llama.modeling_llama", "peft", "bitsandbytes"):
            with suppress(ImportError):
                importlib.import_module(name)
    if torch.cuda.is_available():
        torch.cuda.init()


def measure_cells(cells: Sequence[str], limit_s: float | None, *, dry: bool) -> Iterator[str]:
    """Yield the row of each CASE:VARIANT; the process of the next one gets ready meanwhile."""
    waiting = deque(cells)
    following = _start(waiting.popleft(), dry=dry) if waiting else None
    while following is not None:
        process, cell = following
        following = _start(waiting.popleft(), dry=dry) if waiting else None
        yield _finish(process, cell, limit_s)


def _start(cell: str, *, dry: bool) -> tuple[subprocess.Popen[str], str]:
    case, variant = cell.split(":")
    command = [sys.executable, __file__, "--child", "--cases", case, "--variants", variant]
    command += ["--dry-run"] if dry else []
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True), cell


def _finish(process: subprocess.Popen[str], cell: str, limit_s: float | None) -> str:
    case, variant = cell.split(":")
    try:
        out, errors = process.communicate("go\n", timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return json.dumps({"case": case, "variant": variant, "failed": f"not in {limit_s:.0f} s"})
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        said = errors.strip().splitlines() or ["no output"]
        # The last line may be of a library's cleaning up.
        failed = next((line for line in reversed(said) if "Error" in line), said[-1])
        return json.dumps({"case": case, "variant": variant, "failed": failed[:300]})
    return lines[-1]


if __name__ == "__main__":
    sys.exit(main())
