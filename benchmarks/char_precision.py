"""bf16 compute against fp32 on the character model: time, memory and loss.

    python benchmarks/char_precision.py              # meant for a GPU with bf16 tensor cores
    python benchmarks/char_precision.py --steps 20

Both precisions train the same model (width 384, 6 blocks, batch size 64, 256 characters) on the
same batches from the same weights, with full fine-tuning and with LoRA. Prints JSON lines.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"N_EMBD": "384", "N_HEAD": "6", "N_LAYER": "6", "BLOCK_SIZE": "256", "BATCH_SIZE": "64"}


def main() -> None:
    """Train the base in each precision, then LoRA on the fp32 base in each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    steps = str(parser.parse_args().steps)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for method in ("base", "lora"):
            for precision in ("fp32", "bf16"):
                name = f"{method}-{precision}"
                environment = (
                    os.environ
                    | SIZES
                    | {
                        "OUTPUT_DIR": str(out),
                        "RUN_NAME": name,
                        "PRECISION": precision,
                        "BASE_STEPS": steps,
                        "MAX_STEPS": steps,
                        "EVAL_INTERVAL": steps,
                        "LEARNING_RATE": "1e-3" if method == "base" else "5e-3",
                    }
                )
                if method == "lora":
                    environment |= {"USE_LORA": "True", "BASE_CHECKPOINT": str(out / "base-fp32")}
                command = [sys.executable, str(ROOT / "training.py")]
                subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
                result = json.loads((out / name / "result.json").read_text())
                run = json.loads((out / name / "run.json").read_text())
                timings = (out / name / "timings.jsonl").read_text().splitlines()
                seconds = sorted(json.loads(line)["step_s"] for line in timings)
                row = {
                    "method": method,
                    "precision": precision,
                    "device": run["device"].split(",")[0],
                    "median_step_ms": 1000 * seconds[len(seconds) // 2],
                    "peak_mb": result["peak_memory_bytes"] / 1e6,
                    "held_out_loss": result["eval_loss"],
                }
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
