"""One training step on a GPU: ours against the peers, each in its own process.

    python benchmarks/gpu_step.py                              # all cases and variants, minutes
    python benchmarks/gpu_step.py --cases 135M-4x512 --variants ours_lora peft
    python benchmarks/gpu_step.py --cases 8B-4x2048 --variants ours_lora_cheap --limit-s 60
    python benchmarks/gpu_step.py --out benchmarks/results/gpu_step_h200.jsonl

Random Llama-shaped weights in bf16, rank 16 on all linears, AdamW. "Ours" goes through the trainer
and the real loader; `packed` variants read packed sequences. Prints JSON lines. step_ms is the
median of steps after the warm-up, peak_gb (10⁹ bytes) the allocator's peak, start_s the time from
building the step to the end of the first one, its compilation included (for sequences of 32,768
tokens and more, which have no graph, nearly to the end of the second), planned_gb what
`lora.fast.memory.fast_step` planned. model_tflops counts the matmuls with weights: forward,
backward and, where weights train, their gradients; neither attention nor recomputation.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_peers import PEERS, PeerMissing, build_theirs

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
from lora.decoder.quantised.fp8 import Fp8Linear
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
    "8B-4x2048": Shape(4096, 32, 32, 8, 14336, 128256, 4, 2048, False, 3, 8),
    "8B-1x4096": Shape(4096, 32, 32, 8, 14336, 128256, 1, 4096, False, 3, 10),
    "8B-2x4096": Shape(4096, 32, 32, 8, 14336, 128256, 2, 4096, False, 3, 8),
    "70B-1x2048": Shape(8192, 80, 64, 8, 28672, 128256, 1, 2048, False, 2, 4),
    "70B-1x4096": Shape(8192, 80, 64, 8, 28672, 128256, 1, 4096, False, 2, 4),
    "8B-1x32768": Shape(4096, 32, 32, 8, 14336, 128256, 1, 32768, False, 2, 4),
    "8B-1x131072": Shape(4096, 32, 32, 8, 14336, 128256, 1, 131072, False, 1, 2),
}
MEMORY_GB = {"ours_lora_cheap": 32.0}
"""The memory budget of a mode; the default is the free memory."""
OURS = (
    "ours_lora",
    "ours_lora_auto",
    "ours_lora_cheap",
    "ours_lora_full",
    "ours_lora_offload",
    "ours_lora_packed",
    "ours_lora_fp8",
    "ours_lora_fp8_auto",
    "ours_lora_fp8_full",
    "ours_lora_fp8_offload",
    "ours_lora_fp8_packed",
    "ours_lora_captured",
    "ours_lora_plain",
    "ours_full",
    "theirs_lora_plain",
    "theirs_lora_captured",
    "theirs_lora_compiled",
    "theirs_lora_captured_packed",
    "theirs_lora_compiled_packed",
)
"""`theirs` is transformers' model with `apply_lora` and our trainer. auto, cheap, full and offload
are modes of `lora finetune --memory`; without one it is none. fp8 is `--base-dtype fp8`."""
MODE_OF = {"ours_lora_offload": "full+offload", "ours_lora_fp8_offload": "full+offload"}


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
    shape: Shape, dtype: torch.dtype, *, fp8: bool = False, device: str = "cuda"
) -> Decoder:
    """Return a decoder of this shape with random values, on the GPU; `fp8` as the base dtype."""
    model = build_empty(shape)
    draw = torch.Generator(device).manual_seed(0)

    def value(parameter: torch.Tensor) -> torch.Tensor:
        if parameter.ndim == 1:
            return torch.ones(parameter.shape, dtype=dtype, device=device)
        drawn = torch.randn(tuple(parameter.shape), dtype=dtype, device=device, generator=draw)
        return drawn.mul_(0.02)

    if fp8:
        use_quantised_linears(model, BaseWeights("fp8"))

    def values() -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in list(model.named_parameters()):
            owner = model.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, Fp8Linear) and name.endswith("weight"):
                owner.load(value(parameter), name)
            else:
                yield name, value(parameter)

    assign_parameters(model, values())
    return model


def build_stream(
    shape: Shape, device: torch.device | str, *, packed: bool, share: Share = WHOLE
) -> BatchStream:
    """Return the real loader over random tokens: one document per sequence, or packed ones.

    The shape's sequences are those of each process.
    """
    import numpy as np

    draw = np.random.default_rng(0)
    n_rows = 64 * shape.rows * share.size
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
    choice = choose_device("cuda")
    fit = None if full else fit_mode(shape, variant)
    began_s = time.perf_counter()
    model: Any
    if variant.startswith("theirs"):
        model = as_language_model(build_theirs(shape))
    else:
        dtype = torch.float32 if full else torch.bfloat16
        model = build_model(shape, dtype, fp8="fp8" in variant)
    if full:
        model.requires_grad_(True)
    else:
        apply_lora(model, LoRAConfig(rank=RANK, alpha=2.0 * RANK, init_seed=0))
    n_steps = shape.warm_up_steps + shape.timed_steps
    config = TrainConfig(
        steps=n_steps, batch_size=shape.rows, warmup_fraction=0.0, learning_rate=1e-4, seed=0
    )
    device = choice.device if plain else "cpu"  # where `batch_device` of its steps will be
    stream = build_stream(shape, device, packed=variant.endswith("packed"))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
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
    return {
        "step_ms": 1000 * timed[len(timed) // 2],
        "peak_gb": result.peak_memory_bytes / 1e9,
        "start_s": seconds[0],
        "build_s": built_s - began_s,
        "first_and_last_loss": [round(losses[0], 4), round(losses[-1], 4)],
        **({} if fit is None else {"planned_gb": fit.memory.total / 1e9, "mode": fit.reason}),
    }


def fit_mode(shape: Shape, variant: str) -> MemoryFit | None:
    """Return which activations a variant of the fast step stores, recomputes or offloads."""
    kind = variant.removeprefix("ours_lora").replace("_fp8", "")
    if not variant.startswith("ours_lora") or kind in ("_captured", "_plain"):
        return None
    model = build_empty(shape).bfloat16()
    if "fp8" in variant:
        use_quantised_linears(model, BaseWeights("fp8"))
    apply_lora(model, LoRAConfig(rank=RANK, alpha=2.0 * RANK, init_seed=0))
    is_packed = kind == "_packed"
    plan = FastPlan(model, shape.rows, shape.tokens, packed=is_packed)
    if kind in ("", "_packed"):
        return fit_memory(plan, "none", None)
    budget = torch.cuda.mem_get_info()[0] * USABLE_MEMORY_FRACTION
    if variant in MEMORY_GB:
        budget = MEMORY_GB[variant] * 1e9
    return fit_memory(plan, MODE_OF.get(variant, kind[1:]), int(budget))


def build_steps(
    model: Any, choice: DeviceChoice, variant: str, fit: MemoryFit | None, config: TrainConfig
) -> StepRunner:
    """Return the step runner of one of our variants."""
    if variant.endswith("plain"):
        return PlainStepRunner(model, loss_for(model), choice, config)
    if "captured" in variant or "compiled" in variant:
        compiles = "compiled" in variant
        return CapturedStepRunner(model, choice, config, compiles=compiles)
    assert why_not_fast(model, choice) is None
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


def run_child(case: str, variant: str) -> dict[str, Any]:
    """Return the row of one case and variant, measured in this process."""
    shape = CASES[case]
    if variant in OURS:
        found = time_ours(shape, variant)
    else:
        found = PEERS[variant](shape, RANK)
    ceiling = measure_ceiling()
    tokens = shape.rows * shape.tokens
    trains_all = variant == "ours_full" or variant.startswith("full_")
    flops = (6 if trains_all else 4) * shape.parameters * tokens
    tflops = flops / (found["step_ms"] * 1e-3) / 1e12
    import transformers
    import triton

    return {
        "case": case,
        "variant": variant,
        "hardware": f"one {torch.cuda.get_device_name()}",
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "transformers": transformers.__version__,
        },
        **{key: round(v, 2) if isinstance(v, float) else v for key, v in found.items()},
        "tokens_per_s": round(tokens / (found["step_ms"] * 1e-3)),
        "model_tflops": round(tflops, 1),
        "share_of_ceiling": round(tflops / ceiling, 3),
    }


def main() -> int:
    """Measure each case and variant in its own process; print JSON lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    variants = [*OURS, *PEERS]
    parser.add_argument("--variants", nargs="+", choices=variants, default=variants)
    parser.add_argument("--out", type=Path, help="also append the lines to this file")
    parser.add_argument("--limit-s", type=float, help="seconds after which a case counts as failed")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        try:
            row = run_child(arguments.cases[0], arguments.variants[0])
        except PeerMissing as missing:
            row = {"case": arguments.cases[0], "variant": arguments.variants[0]}
            row["skipped"] = str(missing)
        print(json.dumps(row), flush=True)
        return 0
    for case in arguments.cases:
        for variant in arguments.variants:
            line = _in_subprocess(case, variant, arguments.limit_s)
            print(line, flush=True)
            if arguments.out:
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
    return 0


def _in_subprocess(case: str, variant: str, limit_s: float | None) -> str:
    command = [sys.executable, __file__, "--child", "--cases", case, "--variants", variant]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return json.dumps({"case": case, "variant": variant, "failed": f"not in {limit_s:.0f} s"})
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        failed = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return json.dumps({"case": case, "variant": variant, "failed": failed[:300]})
    return lines[-1]


if __name__ == "__main__":
    sys.exit(main())
