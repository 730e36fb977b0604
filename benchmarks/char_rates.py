"""Which learning rate is best for each way of adapting the character model?

    python benchmarks/char_rates.py               # about 15 minutes on two cores
    python benchmarks/char_rates.py --steps 60    # a short look

One base learns prose; then full fine-tuning and LoRA of two ranks learn code from it, each at
several rates, every run a process of its own (training.py). Prints one JSON object a line.
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
FULL_RATES = (5e-4, 1e-3, 2e-3)
LORA_RATES = {8: (3.5e-3, 5e-3, 7e-3), 32: (1.2e-3, 2.5e-3, 5e-3)}
EMBEDDING_FRACTIONS = (0.1, 1.0)  # beside the default of 0.3, at rank 8
SIZES = {"BATCH_SIZE": "8"}


def run(out: Path, name: str, variables: dict[str, str]) -> dict[str, Any]:
    """Run training.py and return what it left in result.json."""
    environment = os.environ | SIZES | variables | {"OUTPUT_DIR": str(out), "RUN_NAME": name}
    command = [sys.executable, str(ROOT / "training.py")]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads((out / name / "result.json").read_text())
    return result


def main() -> None:
    """Train the base, then every candidate from it."""
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
        candidates: list[tuple[str, int, float, dict[str, str]]] = [
            ("full", 0, rate, {}) for rate in FULL_RATES
        ]
        for rank, rates in LORA_RATES.items():
            lora = {"USE_LORA": "True", "LORA_RANK": str(rank), "LORA_ALPHA": str(2 * rank)}
            candidates += [("lora", rank, rate, lora) for rate in rates]
        for fraction in EMBEDDING_FRACTIONS:
            lora = {"USE_LORA": "True", "EMBEDDING_RATE_FRACTION": str(fraction)}
            candidates.append(("lora", 8, LORA_RATES[8][1], lora))
        for number, (method, rank, rate, variables) in enumerate(candidates):
            name = f"{number}-{method}"
            result = run(out, name, {**common, **variables, "LEARNING_RATE": str(rate)})
            row = {"method": method, "rank": rank, "learning_rate": rate, "seed": arguments.seed}
            fraction = float(variables.get("EMBEDDING_RATE_FRACTION", 0.3))
            row |= {"embedding_rate_fraction": fraction} if method == "lora" else {}
            row |= {"steps": result["steps"], "held_out_loss": result["eval_loss"]}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
