"""The best learning rate for LoRA and for full fine-tuning of the character model.

    python benchmarks/char_rates.py               # about 20 minutes on two cores
    python benchmarks/char_rates.py --steps 60    # a short look
    OMP_NUM_THREADS=1 python benchmarks/char_rates.py    # the same digits every time

A base is trained on prose; full fine-tuning and LoRA of two ranks then train it on code, each at
several learning rates, every run in its own process (training.py). Prints JSON lines.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FULL_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
LORA = [  # rank, alpha, learning rate, factor of it for the fully trained embeddings
    *((8, 16, rate, 0.3) for rate in (3.5e-3, 5e-3, 7e-3, 1e-2)),
    *((8, 16, 7e-3, fraction) for fraction in (0.1, 1.0)),
    *((32, 16, rate, 0.3) for rate in (2.5e-3, 3.5e-3, 5e-3, 7e-3, 1e-2)),
    (32, 32, 3.5e-3, 0.3),
    (32, 64, 2.5e-3, 0.3),
]
SIZES = {"BATCH_SIZE": "8"}


def run(out: Path, name: str, variables: dict[str, str]) -> dict[str, Any]:
    """Run training.py and return the content of its result.json."""
    environment = os.environ | SIZES | variables | {"OUTPUT_DIR": str(out), "RUN_NAME": name}
    command = [sys.executable, str(ROOT / "training.py")]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads((out / name / "result.json").read_text())
    return result


def main() -> None:
    """Train the base, then every candidate from its weights."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="steps of each adaptation")
    parser.add_argument("--base-steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=1337)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        common = {"MAX_STEPS": str(arguments.steps), "SEED": str(arguments.seed)}
        common["EVAL_INTERVAL"] = str(arguments.steps)
        run(out, "base", {"BASE_STEPS": str(arguments.base_steps), "SEED": common["SEED"]})
        common["BASE_CHECKPOINT"] = str(out / "base")
        for number, (settings, variables) in enumerate(candidates()):
            result = run(out, f"{number}", {**common, **variables})
            row = {**settings, "seed": arguments.seed, "steps": result["steps"]}
            print(json.dumps({**row, "held_out_loss": result["eval_loss"]}), flush=True)


def candidates() -> list[tuple[dict[str, Any], dict[str, str]]]:
    """Return the candidates, each as a row of the results and as variables of training.py."""
    found: list[tuple[dict[str, Any], dict[str, str]]] = []
    for rate in FULL_RATES:
        found.append(({"method": "full", "learning_rate": rate}, {"LEARNING_RATE": str(rate)}))
    for rank, alpha, rate, fraction in LORA:
        row = {"method": "lora", "rank": rank, "alpha": alpha, "learning_rate": rate}
        variables = {"USE_LORA": "True", "LORA_RANK": str(rank), "LORA_ALPHA": str(alpha)}
        variables |= {"LEARNING_RATE": str(rate), "EMBEDDING_RATE_FRACTION": str(fraction)}
        found.append(({**row, "embedding_rate_fraction": fraction}, variables))
    return found


if __name__ == "__main__":
    main()
