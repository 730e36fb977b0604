"""Loss curves of the fast and the plain step on a real model and real text, on a GPU.

    python benchmarks/gpu_curves.py --out benchmarks/results/gpu_curves_h200.jsonl

200 steps of LoRA on Python's own documentation (pydoc's topics): the fast step, the plain one, the
plain one with another random A (the distance to it is the noise level), and the fast step over an
FP8 base. Validation losses are measured on the base that was trained on, and for each adapter also
on the unquantised base. Prints a JSON line per run, then one with the distances; --picture plots
the curves.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lora.adapters.save_load import load_adapter
from lora.config import BaseDtype, DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.data.reading.readers import read_examples
from lora.data.tokenizers.subword import load_tokenizer
from lora.device import choose_device
from lora.finetune import FinetuneJob, finetune
from lora.inference.evaluation import measure_loss
from lora.pretrained.hf_weights import load_decoder
from lora.pretrained.sources import find_model
from lora.runs.disk import read_rows

RUNS: dict[str, dict[str, Any]] = {
    "plain step": {"fast": False},
    "fast step": {},
    "plain step, another draw of A": {"fast": False, "draw": 1},
    "fast step, fp8 base": {"base_dtype": "fp8"},
}


def run_once(
    model: str | None,
    out: Path,
    name: str,
    steps: int,
    *,
    fast: bool = True,
    draw: int = 0,
    seed: int = 0,
    base_dtype: BaseDtype = "auto",
) -> dict:
    """Return training losses, validation losses and times of one run."""
    texts = [{"text": text} for _, text in sorted(pydoc_data.topics.topics.items())]
    held_out = texts[::20]
    job = FinetuneJob(
        data=[text for index, text in enumerate(texts) if index % 20],
        eval_data=held_out,
        model=model,
        base_dtype=base_dtype,
        lora=LoRAConfig(rank=16, alpha=32.0, init_seed=draw),
        train=TrainConfig(steps=steps, batch_size=4, seed=seed),
        data_config=DataConfig(max_length=512, long_examples="split"),
        run=RunConfig(out=out, name=name, fast=fast, eval_every_steps=steps),
    )
    began_s = time.perf_counter()
    done = finetune(job)
    wall_s = time.perf_counter() - began_s
    rows = read_rows(done.folder / "metrics.jsonl")
    seconds = sorted(row["step_s"] for row in read_rows(done.folder / "timings.jsonl"))
    return {
        "run": name,
        "steps": steps,
        "eval_loss": done.result.eval_loss,
        "eval_loss_on_the_base_as_it_was": on_plain_base(model, done.saved, held_out),
        "peak_gb": round(done.result.peak_memory_bytes / 1e9, 3),
        "step_ms": round(1000 * seconds[len(seconds) // 2], 2),
        "wall_s": round(wall_s, 1),
        "losses": [round(row["loss"], 4) for row in rows if "loss" in row],
    }


def on_plain_base(model: str | None, adapter: Path, held_out: list[dict]) -> float:
    """Return the validation loss of the adapter in `adapter` on the unquantised base."""
    source, choice = find_model(model), choose_device()
    decoder = load_decoder(source.folder, dtype=choice.compute_dtype, device=choice.device)
    load_adapter(decoder, adapter)
    config = DataConfig(max_length=512, long_examples="split")
    examples = read_examples(held_out)
    return measure_loss(decoder, examples, load_tokenizer(source.folder), config, choice)


def distance(one: list[float], other: list[float]) -> float:
    """Return the mean absolute difference of two curves, in nats."""
    return statistics.fmean(abs(a - b) for a, b in zip(one, other, strict=True))


def mean_of_last(losses: list[float]) -> float:
    """Return the mean of a run's last 20 losses."""
    return statistics.fmean(losses[-20:])


def draw_curves(runs: list[dict], path: Path) -> None:
    """Plot the runs' losses into `path`."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6))
    thin = {"linewidth": 1.0}
    styles = ({"linewidth": 2.6, "alpha": 0.45}, thin, {**thin, "ls": ":"}, {**thin, "ls": "--"})
    for run, style in zip(runs, styles, strict=True):
        axes.plot(range(1, len(run["losses"]) + 1), run["losses"], label=run["run"], **style)
    axes.set(xlabel="step", ylabel="loss of the step (nats)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> int:
    """Run the jobs and compare their curves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="as in lora finetune; by default SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, help="also write the lines to this file")
    parser.add_argument("--picture", type=Path, help="draw the curves into this file")
    parser.add_argument("--from-file", type=Path, help="draw what --out wrote, run nothing")
    arguments = parser.parse_args()
    if arguments.from_file:
        lines = [json.loads(line) for line in arguments.from_file.read_text().splitlines()]
        draw_curves([line for line in lines if "losses" in line], arguments.picture)
        return 0
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in RUNS.items():
            runs.append(run_once(arguments.model, Path(folder), name, arguments.steps, **settings))
    plain, fast, other, fp8 = (run["losses"] for run in runs)
    found = {
        "fast_to_plain_nats": round(distance(plain, fast), 5),
        "plain_to_other_draw_nats": round(distance(plain, other), 5),
        "fp8_to_fast_nats": round(distance(fp8, fast), 5),
        "fp8_mean_of_last_20_against_fast": round(mean_of_last(fp8) / mean_of_last(fast) - 1, 5),
        "fp8_held_out_against_fast": round(runs[3]["eval_loss"] / runs[1]["eval_loss"] - 1, 5),
        "gained_nats": round(statistics.fmean(plain[:5]) - statistics.fmean(plain[-5:]), 4),
    }
    lines = [json.dumps(line) for line in (*runs, found)]
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if arguments.picture:
        draw_curves(runs, arguments.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
