"""Data preparation of 100 MB of text against tokenization alone.

    LORA_BENCH_DATA=folder python benchmarks/cpu_data.py
    LORA_BENCH_DATA=folder python benchmarks/cpu_data.py --megabytes 20 --out result.jsonl

The texts of that folder, repeated with numbers in them up to that size, as JSONL of about 2,000
characters an example. `ours` reads, checks, tokenizes, masks and packs them into sequences;
`tokenizers` only tokenizes them with that library's `encode_batch`, 1,000 texts at a time. Each
runs in its own process, twice, alternating. Prints JSON lines.
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

from lora.config import DataConfig
from lora.data.prepare import prepare_data
from lora.data.tokenizers.subword import load_tokenizer
from lora.device import peak_memory_bytes
from lora.pretrained.sources import find_model

PIECE_CHARACTERS, PART_TEXTS = 2000, 1000
VARIANTS = ("tokenizers", "ours")


def main() -> int:
    """Write the texts, measure both variants and print JSON lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="also write the lines to this file")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(*arguments.child)))
        return 0
    folder = os.environ.get("LORA_BENCH_DATA")
    if not folder:
        print("cpu_data.py is skipped: set LORA_BENCH_DATA to a folder of texts")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "texts.jsonl"
        n_bytes = write_texts(Path(folder), file, arguments.megabytes * 10**6)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
        for _ in range(arguments.rounds):
            for name in VARIANTS:
                found[name].append(in_subprocess(name, file))
    best = {name: min(rows, key=lambda row: row["seconds"]) for name, rows in found.items()}
    lines = ""
    for name, row in best.items():
        ratio = row["seconds"] / best["tokenizers"]["seconds"]
        speed = n_bytes / 1e6 / row["seconds"]
        line = {"megabytes": n_bytes // 10**6, "variant": name, **row}
        line |= {"mb_per_s": round(speed, 2), "against_tokenizers": round(ratio, 3)}
        lines += json.dumps(line) + "\n"
    print(lines, end="")
    if arguments.out:
        arguments.out.write_text(lines, encoding="utf-8")
    return 0


def write_texts(folder: Path, file: Path, max_bytes: int) -> int:
    """Write examples of the folder's texts until they have `max_bytes`; return their bytes."""
    whole = "\n".join(p.read_text(encoding="utf-8") for p in sorted(folder.glob("*.txt")))
    starts = range(0, len(whole), PIECE_CHARACTERS)
    written = number = 0
    with file.open("w", encoding="utf-8") as out:
        while written < max_bytes:
            number += 1
            for start in starts:
                text = f"{number} {whole[start : start + PIECE_CHARACTERS]}"
                out.write(json.dumps({"text": text}) + "\n")
                written += len(text.encode())
                if written >= max_bytes:
                    break
    return written


def in_subprocess(name: str, file: Path) -> dict[str, Any]:
    """Return what `measure` finds in a subprocess."""
    command = [sys.executable, __file__, "--child", name, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def measure(name: str, path: str) -> dict[str, Any]:
    """Return seconds, tokens and the process's peak memory."""
    import torch

    tokenizer = load_tokenizer(find_model(None).folder)
    began_s = time.perf_counter()
    if name == "ours":
        config = DataConfig(max_length=512, eval_fraction=0.0, long_examples="split")
        n_tokens = len(prepare_data(path, tokenizer, config, 0).train.documents.ids)
        seconds = time.perf_counter() - began_s
    else:
        texts = [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]
        began_s = time.perf_counter()
        n_tokens = 0
        for start in range(0, len(texts), PART_TEXTS):
            part = tokenizer.backend.encode_batch(texts[start : start + PART_TEXTS])
            n_tokens += sum(len(each.ids) for each in part)
        seconds = time.perf_counter() - began_s
    peak = peak_memory_bytes(torch.device("cpu"))
    return {"seconds": round(seconds, 2), "tokens": n_tokens, "peak_mb": peak // 10**6}


if __name__ == "__main__":
    sys.exit(main())
