"""How long `lora plan` takes, and what it answers: SmolLM2, shapes of 2.7B to 70B, CPU and GPU.

    python benchmarks/plan_speed.py --out benchmarks/results/plan_speed_cpu.jsonl

Each row is one process, from its start to its end; no GPU is needed, and no weights are read.
`cpu_s` is the processor time of the process, which other programs on the machine hardly change.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5,
    "rope_theta": 5e5, "max_position_embeddings": 8192, "hidden_act": "silu",
    "vocab_size": 128256, "tie_word_embeddings": False, "num_key_value_heads": 8,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64},
    "Phi-2": {"model_type": "phi", "architectures": ["PhiForCausalLM"], "hidden_size": 2560,
              "intermediate_size": 10240, "num_hidden_layers": 32, "num_attention_heads": 32,
              "num_key_value_heads": 32, "partial_rotary_factor": 0.4, "hidden_act": "gelu_new",
              "vocab_size": 51200, "max_position_embeddings": 2048},
}  # fmt: skip
LONG = ["--max-length", "4096", "--batch-size", "1", "--rank", "16"]
CASES: dict[str, tuple[str | None, list[str]]] = {
    "SmolLM2 on a CPU": (None, ["--device", "cpu"]),
    "SmolLM2 on a GPU": (None, ["--device", "cuda", "--memory-gb", "80"]),
    "8B on a CPU": ("8B", ["--device", "cpu", *LONG]),
    "8B on a GPU": ("8B", ["--device", "cuda", "--memory-gb", "142", *LONG]),
    "Phi-2, by transformers, on a GPU": (
        "Phi-2",
        ["--device", "cuda", "--memory-gb", "80", "--max-length", "2048", "--batch-size", "1"],
    ),
    "70B on a GPU": ("70B", ["--device", "cuda", "--memory-gb", "142", *LONG]),
    "70B on a GPU, fp8 base": (
        "70B",
        ["--device", "cuda", "--memory-gb", "142", "--base-dtype", "fp8", *LONG],
    ),
}


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Return the row of one case."""
    shape, flags = CASES[name]
    if shape is not None:
        flags = ["--model", str(folder / shape), *flags]
        (folder / shape).mkdir(exist_ok=True)
        (folder / shape / "config.json").write_text(json.dumps({**COMMON, **SHAPES[shape]}))
    before, start = os.times(), time.perf_counter()
    command = [sys.executable, "-m", "lora", "plan", "--json", *flags]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    wall_s, after = time.perf_counter() - start, os.times()
    planned = json.loads(done.stdout)
    cpu_s = sum(after[2:4]) - sum(before[2:4])  # user and system time of subprocesses
    return {
        "case": name,
        "hardware": f"{os.cpu_count()} CPU cores",
        "wall_s": round(wall_s, 2),
        "cpu_s": round(cpu_s, 2),
        "lora_gb": round(planned["lora"]["total"] / 1e9, 2),
        "full_gb": round(planned["full"]["total"] / 1e9, 2),
        "largest": planned["largest_rows"],
    }


def main() -> None:
    """Measure all cases or some."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*CASES])
    parser.add_argument("--out", type=Path, help="also write the lines to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for name in arguments.only or CASES:
            rows.append(json.dumps(measure(name, Path(folder))))
            print(rows[-1], flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
