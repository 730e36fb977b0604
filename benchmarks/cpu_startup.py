"""How long the command and the library take to start.

    python benchmarks/cpu_startup.py
    python benchmarks/cpu_startup.py --out benchmarks/results/cpu_startup.jsonl

Each figure is the median over processes of their own, which take turns. Targets: `lora --help`
under 0.3 s; `import lora` with LoRALinear less than 0.1 s longer than `import torch`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "python": ("-c", "pass"),
    "lora --help": ("-m", "lora", "--help"),
    "import lora": ("-c", "import lora"),
    "import torch": ("-c", "import torch"),
    "import torch, then LoRALinear": ("-c", "import torch; from lora import LoRALinear"),
}
TARGETS_S = {"lora --help": 0.3, "LoRALinear beyond torch": 0.1}


def measure(rounds: int) -> dict[str, float]:
    """Return the median seconds of each command; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(rounds + 1):
        for name, arguments in COMMANDS.items():
            began_s = time.perf_counter()
            subprocess.run(
                [sys.executable, *arguments],
                check=True,
                stdout=subprocess.DEVNULL,
                cwd=Path(__file__).parents[1],
            )
            if number:
                seconds[name].append(time.perf_counter() - began_s)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    added_s = medians["import torch, then LoRALinear"] - medians["import torch"]
    return {**medians, "LoRALinear beyond torch": added_s}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="also append JSON lines to this file")
    arguments = parser.parse_args()
    rows = []
    for name, median_s in measure(arguments.rounds).items():
        target_s = TARGETS_S.get(name)
        verdict = None if target_s is None else "met" if median_s < target_s else "missed"
        wanted = "" if target_s is None else f"  wanted < {target_s} s: {verdict}"
        print(f"{name:<32}{median_s:7.3f} s{wanted}", flush=True)
        rows.append(
            {"what": name, "seconds": round(median_s, 3), "target_s": target_s, "target": verdict}
        )
    if arguments.out:
        with arguments.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
