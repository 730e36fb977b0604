"""Run folders written by hand, as lora finetune, sweep and compare leave them."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lora.config import DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.runs.directory import Run
from lora.runs.sweep_record import (
    CandidateState,
    SweepOutcome,
    SweepRecord,
    WaveTiming,
    append_wave_timing,
    write_outcome,
    write_sweep_record,
)

STEPS = 20
Make = Callable[..., Path]


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, default=str), encoding="utf-8")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_adapter(folder: Path, n_values: int = 640) -> None:
    """Write a safetensors file with one tensor of fp32 zeros."""
    entry = {"dtype": "F32", "shape": [8, n_values // 8], "data_offsets": [0, 4 * n_values]}
    header = json.dumps({"x.lora_A.weight": entry, "__metadata__": {"format": "pt"}}).encode()
    folder.mkdir(parents=True)
    data = struct.pack("<Q", len(header)) + header + bytes(4 * n_values)
    (folder / "adapter_model.safetensors").write_bytes(data)


def described(
    lora: LoRAConfig | None, train: TrainConfig, name: str, rate: float
) -> dict[str, Any]:
    return {
        "model": "tiny",
        "model_source": "models/tiny",
        "device": "cpu, fp32",
        "learning_rate": rate,
        "base_fingerprint": "base-1",
        "base_parameters": 10_000,
        "from_adapter": None,
        "data": {
            "source": "orders.jsonl",
            "eval_source": "held out.jsonl",
            "examples": 40,
            "held_out_examples": 8,
            "now": "2026-01-02T03:04:05",
            "fingerprint": "rows-1",
            "held_out_fingerprint": "held-1",
            "warnings": ["2 examples are there twice"],
        },
        "lora": None if lora is None else asdict(lora),
        "train": asdict(train),
        "data_config": asdict(DataConfig(max_length=128)),
        "run": asdict(RunConfig(name=name)),
        "environment": {"python": "3.12", "versions": {"torch": "2.11"}},
    }


@pytest.fixture
def make_run(tmp_path: Path) -> Make:
    """Return a function that writes a finished run's folder."""

    def make(
        name: str = "orders",
        *,
        full: bool = False,
        lora: LoRAConfig | None = None,
        train: TrainConfig | None = None,
        out: Path = tmp_path,
        end: float = 0.5,
        step_s: float = 0.25,
    ) -> Path:
        folder = out / name
        lora = None if full else lora or LoRAConfig()
        train = replace(train or TrainConfig(), steps=STEPS)
        rate = train.learning_rate or (1e-4 if full else 1e-3)
        write_json(folder / "run.json", described(lora, train, name, rate))
        losses = [2.0 * (end / 2.0) ** (step / STEPS) for step in range(STEPS + 1)]
        rows: list[dict[str, Any]] = [{"step": 0, "eval_loss": losses[0]}]
        for step in range(1, STEPS + 1):
            row = {"step": step, "loss": losses[step] + 0.05, "tokens": 100 * step}
            rows.append(row | {"learning_rate": rate / step, "gradient_norm": 1.0 + step % 3})
            if step % 5 == 0:
                rows.append({"step": step, "eval_loss": losses[step]})
        write_lines(folder / "metrics.jsonl", rows)
        peak = 3_000_000_000 if full else 1_000_000_000
        write_lines(
            folder / "timings.jsonl",
            [
                {"step": step, "step_s": step_s, "peak_memory_bytes": peak}
                for step in range(1, STEPS + 1)
            ],
        )
        samples = [
            {"step": step, "prompt": "Two red coats", "answer": answer, "reference": '{"n": 2}',
             "tokens": 4, "ended": True}
            for step, answer in ((0, "I cannot"), (STEPS, '{"n": 2}'))
        ]  # fmt: skip
        write_lines(folder / "samples.jsonl", samples)
        parts = {"weights": 500, "gradients": 10, "optimizer": 20, "activations": 300, "loss": 20}
        planned = {**{k: v * 1_000_000 for k, v in parts.items()}, "other": 0}
        total = sum(planned.values())
        trained = 10_000 if full else 640
        counts = {"trained_parameters": trained, "parameters": 10_000 + (0 if full else 640)}
        memory = {"planned": {**planned, **counts, "total": total}, "measured_bytes": peak}
        result = {"steps": STEPS, "eval_loss": losses[-1], "train_s": STEPS * step_s}
        result |= {"n_tokens": 100 * STEPS, "peak_memory_bytes": peak, "memory": memory}
        write_json(folder / "result.json", result)
        write_adapter(folder / ("model" if full else "adapter"), 10_000 if full else 640)
        return folder

    return make


@pytest.fixture
def make_sweep(tmp_path: Path) -> Make:
    """Return a function that writes a sweep: ranks 4, 8, 16 at two rates, one failed, one stopped.

    At rate 1e-3 the losses at the end are 0.400, 0.352 and 0.350: rank 8 is enough.
    """

    def make(name: str = "ranks", *, is_finished: bool = True) -> Path:
        folder = tmp_path / name
        candidates = []
        ends = {(4, 1e-3): 0.4, (8, 1e-3): 0.352, (16, 1e-3): 0.35, (4, 3e-4): 0.9, (8, 3e-4): 0.8}
        ends[(16, 1e-1)] = math.inf
        for number, ((rank, rate), end) in enumerate(ends.items(), start=1):
            own = f"{number:03d}-rank{rank}-rate{rate:g}"
            lora = LoRAConfig(rank=rank, alpha=2.0 * rank)
            train = TrainConfig(steps=STEPS, learning_rate=rate)
            place = folder / "candidates" / own
            write_json(place / "run.json", described(lora, train, name, rate) | {"sweep": None})
            settings = {"rank": rank, "learning_rate": rate}
            state = CandidateState(own, settings, "done", STEPS, eval_loss=end)
            if math.isinf(end):
                state = CandidateState(own, settings, step=3)
                state.fail("the loss of step 3 is nan")
            elif (rank, rate) == (4, 3e-4):
                state = CandidateState(own, settings, step=10, eval_loss=end)
                state.stop(10, "halving at step 10: place 5 of 5")
            rows: list[dict[str, Any]] = [{"step": 0, "eval_loss": 2.0}]
            rows += [{"step": s, "loss": 2.0 - s / 20} for s in range(1, state.step + 1)]
            if state.status != "failed":
                rows.append({"step": state.step, "eval_loss": end})
            write_lines(place / "metrics.jsonl", rows)
            if state.status == "done":
                write_adapter(place / "adapter", 80 * rank)
            candidates.append(state)
        asked = described(LoRAConfig(), TrainConfig(steps=STEPS), name, 1e-3)
        grid: dict[str, list[Any]] = {"rank": [4, 8, 16], "learning_rate": [3e-4, 1e-3, 1e-1]}
        grid |= {"alpha": ["2r"], "dropout": [0.0], "seed": [1337], "schedule": ["cosine"]}
        asked["sweep"] = {"grid": grid, "halving": True, "steps": STEPS}
        write_json(folder / "run.json", asked)
        record = SweepRecord(
            candidates, (5, 10, STEPS), at_once=6, base_eval_loss=2.0, steps_taken=20
        )
        write_sweep_record(Run(folder), record)
        append_wave_timing(Run(folder), WaveTiming(20, 12.5, 20, 2_000_000_000))
        if is_finished:
            best = next(c.name for c in candidates if c.eval_loss == 0.35)
            write_outcome(Run(folder), SweepOutcome(best, 0.35, 12.5))
        return folder

    return make


@pytest.fixture
def make_comparison(tmp_path: Path, make_run: Make) -> Make:
    """Return a function that writes a comparison of LoRA and full fine-tuning."""

    def make(name: str = "fair", *, is_finished: bool = True) -> Path:
        folder = tmp_path / name
        asked = {
            "model": None, "lora": asdict(LoRAConfig(rank=4)), "data": "orders.jsonl",
            "eval_data": None, "data_config": asdict(DataConfig()), "methods": ["lora", "full"],
            "same": "steps", "train": asdict(TrainConfig(steps=STEPS)),
            "rates": {"rates": [3e-4, 1e-3], "full_rates": [], "full_learning_rate": None,
                      "rate_steps": 20},
            "measures": {"forgetting_data": None, "metric": "json-fields", "test_data": None,
                         "answers": 40, "answer_tokens": 64},
        }  # fmt: skip
        write_json(folder / "run.json", {"kind": "compare", "compare": asked, "model": "tiny"})
        members = []
        for method in ("lora", "full"):
            is_full = method == "full"
            make_run(method, full=is_full, out=folder / "members", end=0.6 if is_full else 0.5,
                     step_s=0.5 if is_full else 0.25)  # fmt: skip
            rates = [3e-5, 1e-4] if is_full else [3e-4, 1e-3]
            members.append(
                {
                    "name": method, "method": method, "folder": f"members/{method}",
                    "learning_rate": rates[1], "rate_chosen": "sweep",
                    "rates_tried": [
                        {"learning_rate": r, "eval_loss": 0.9 - 100 * r} for r in rates
                    ],
                    "steps": STEPS, "train_s": 10.0 if is_full else 5.0,
                    "step_s_median": 0.5 if is_full else 0.25,
                    "peak_memory_bytes": 3_000_000_000 if is_full else 1_200_000_000,
                    "planned_memory_bytes": None,
                    "trainable_parameters": 10_000 if is_full else 640,
                    "total_parameters": 10_000 if is_full else 10_640,
                    "stored_bytes": 40_000 if is_full else 2_560,
                    "final_eval_loss": 0.6 if is_full else 0.5,
                    "best_eval_loss": 0.6 if is_full else 0.5,
                    "forgetting": {"text": "the prose", "before": 3.0, "after": 3.5},
                    "task_metric": {"name": "JSON fields", "before": 0.0, "after": 0.75},
                    "samples": [{"prompt": "Two red coats", "expected": '{"n": 2}',
                                 "answer": f"<b>{method}</b>"}],
                }
            )  # fmt: skip
        if is_finished:
            found = {"kind": "compare", "base": "tiny", "members": members, "same": "steps"}
            found |= {"seed": 1337, "base_eval_loss": 2.0, "device": "cpu", "rate_steps": 20}
            sample = {"prompt": "Two red coats", "expected": '{"n": 2}', "answer": "I cannot"}
            found |= {"base_samples": [sample], "notes": ["the best rate is the highest tried"]}
            write_json(folder / "compare.json", found)
        return folder

    return make
