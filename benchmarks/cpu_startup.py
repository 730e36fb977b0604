"""Start-up time of the command, and what `import lora` adds to torch's own import.

    python benchmarks/cpu_startup.py
    python benchmarks/cpu_startup.py --out benchmarks/results/cpu_startup.jsonl

Each figure is the median over fresh processes, the commands alternating. Prints JSON lines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

PYTHON = (sys.executable, "-c")
COMMANDS = {
    "python": (*PYTHON, "pass"),
    "import lora": (*PYTHON, "import lora"),
    "lora --help": (sys.executable, "-m", "lora", "--help"),
    "lora finetune --help": (sys.executable, "-m", "lora", "finetune", "--help"),
    "import torch": (*PYTHON, "import torch"),
    "import torch and lora": (*PYTHON, "import torch, lora"),
    "import torch and all names of lora": (
        *PYTHON,
        "import torch, lora; [getattr(lora, name) for name in lora.__all__]",
    ),
}


def main() -> None:
    """Time every command `--rounds` times, alternating, and print the medians in seconds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="also write the lines to this file")
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(arguments.rounds + 1):
        for name, command in COMMANDS.items():
            began_s = time.perf_counter()
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            seconds[name].append(time.perf_counter() - began_s)
    rows = [  # the first round warms the file cache
        {"what": name, "median_s": round(statistics.median(times[1:]), 3)}
        for name, times in seconds.items()
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    print(lines, end="")
    if arguments.out:
        arguments.out.write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
