"""Tokens per second of generation: ours against transformers' generate with its KV cache.

    python benchmarks/cpu_generate.py
    python benchmarks/cpu_generate.py --out benchmarks/results/cpu_generate.jsonl

SmolLM2-135M-Instruct in fp32, greedy decoding, always the same number of new tokens, batch sizes 1
and 8; the two alternate. Prints JSON lines: batch size (`rows`), variant, median tokens per second,
ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lora.config import SamplingConfig
from lora.decoder.decoder import Decoder
from lora.inference.generate import generate
from lora.inference.loading import load_model

NEW_TOKENS, PROMPT_TOKENS = 64, 32


def main() -> None:
    """Time both, alternating, and print the medians."""
    import transformers

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the lines to this file")
    arguments = parser.parse_args()
    loaded = load_model(None, None, "cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        loaded.source.folder, dtype=torch.float32
    ).eval()
    lines = []
    for rows in (1, 8):
        draw = torch.Generator().manual_seed(rows)
        prompts = torch.randint(1000, 40000, (rows, PROMPT_TOKENS), generator=draw)
        variants = {
            "ours": lambda p=prompts: generate_ours(loaded.model, p),
            "transformers": lambda p=prompts: generate_theirs(theirs, p),
        }
        lines += compare(rows, variants, arguments.rounds)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    print(text, end="")
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


def generate_ours(model: Decoder, prompts: torch.Tensor) -> list[list[int]]:
    """Return our new tokens for each prompt."""
    sampling = SamplingConfig(max_new_tokens=NEW_TOKENS)
    return generate(model, prompts.tolist(), sampling, stop_ids=())


@torch.no_grad()
def generate_theirs(model: Any, prompts: torch.Tensor) -> list[list[int]]:
    """Return transformers' new tokens for each prompt."""
    found = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    new: list[list[int]] = found[:, PROMPT_TOKENS:].tolist()
    return new


def compare(
    rows: int, variants: dict[str, Callable[[], list[list[int]]]], rounds: int
) -> list[dict[str, Any]]:
    """Return each variant's speed; both must generate the same number of tokens."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, run in variants.items():
            began_s = time.perf_counter()
            answers = run()
            seconds[name].append(time.perf_counter() - began_s)
            assert [len(answer) for answer in answers] == [NEW_TOKENS] * rows, name
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    return [
        {
            "rows": rows,
            "variant": name,
            "tokens_per_s": round(rows * NEW_TOKENS / median, 1),
            "against_ours": round(medians["ours"] / median, 2),
            "threads": torch.get_num_threads(),
        }
        for name, median in medians.items()
    ]


if __name__ == "__main__":
    main()
