"""A sweep of eight candidates, as `lora sweep` runs it: on one device all at once."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from one_gpu.cases import RANK
from plan_memory import WORDS, make_folder

from devices.cases import Case
from lora.config import DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.distributed.world import World
from lora.sweep import SweepJob, sweep
from lora.sweep.grid import Grid

RATES = (1e-5, 3e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3)
SEQUENCES, TOKENS, STEPS = 4, 512, 300
"""Of a candidate's step, and how many steps."""
SMOKE_TOKENS, SMOKE_STEPS = 32, 4


def time_sweep(case: Case, world: World, smoke: bool) -> dict[str, Any]:
    """Return the time of a step of all candidates, those of other ranks included."""
    tokens, steps = (SMOKE_TOKENS, SMOKE_STEPS) if smoke else (TOKENS, STEPS)
    with tempfile.TemporaryDirectory() as own:
        folder = Path(world.on_main(lambda: own, "the sweep's directory"))
        shape = "tiny" if smoke else "135M"
        model = world.on_main(lambda: make_folder(shape, folder / "model"), "the model")
        job = SweepJob(
            data=[{"text": text} for text in texts(tokens)],
            model=model,
            grid=Grid(rank=(RANK,), learning_rate=RATES),
            lora=LoRAConfig(rank=RANK, alpha=2.0 * RANK),
            train=TrainConfig(steps=steps, batch_size=SEQUENCES),
            data_config=DataConfig(max_length=tokens),
            run=RunConfig(
                out=folder, name="sweep", device="cpu" if smoke else "cuda",
                eval_every_steps=steps, save_every_steps=steps,
            ),
        )  # fmt: skip
        begun_s = time.perf_counter()
        done = sweep(job)
        found = {
            "step_ms": 1000 * done.train_s / steps,
            "tokens": len(RATES) * SEQUENCES * tokens,
            "peak_gb": done.peak_memory_bytes / 1e9,
            "sweep_s": time.perf_counter() - begun_s,
            "best": done.candidates[0].name,
        }
        world.gather(None, "the others, before rank 0 removes the files")
    return found


def texts(tokens: int) -> list[str]:
    """Return texts of about a sequence each; they say the same words in another order."""
    count = len(WORDS)
    return [
        " ".join(WORDS[(start + step * i) % count] for i in range(tokens - 8))
        for start in range(count)
        for step in range(1, 12)
    ]
