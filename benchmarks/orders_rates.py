"""Learning rate, steps, batch size and rank for the order notes of demo.py, by validation scores.

    python benchmarks/orders_rates.py --rates 1e-3 --steps 2 --seeds 0 --notes 4     # a short look
    python benchmarks/orders_rates.py --rates 1e-3 2e-3 3e-3     # two hours on two cores
    python benchmarks/orders_rates.py --device cuda              # a few minutes on a GPU

SmolLM2-135M-Instruct is trained for one epoch per candidate, in fp32, and then answers notes of the
validation part. The test part is never used here. Prints JSON lines.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora.config import DataConfig, LoRAConfig, RunConfig, SamplingConfig, TrainConfig
from lora.data.reading.formats import example_from_row
from lora.data.reading.orders import make_orders
from lora.finetune import FinetuneJob, finetune
from lora.inference.answers import answer_examples
from lora.inference.evaluation import measure_loss, score, wrong_fields
from lora.inference.loading import LoadedModel, load_model

DATA = DataConfig(max_length=192, packing=False)
SAMPLING = SamplingConfig(max_new_tokens=60)


@dataclass(frozen=True)
class Candidate:
    """The settings of one training run."""

    learning_rate: float
    steps: int
    batch_rows: int
    rank: int
    seed: int

    @property
    def train_config(self) -> TrainConfig:
        return TrainConfig(
            steps=self.steps,
            batch_size=self.batch_rows,
            learning_rate=self.learning_rate,
            seed=self.seed,
            precision="fp32",
        )


def main() -> None:
    """Train and measure every combination of the given values."""
    arguments = read_arguments()
    lists = arguments.rates, arguments.steps, arguments.rows, arguments.ranks, arguments.seeds
    for values in itertools.product(*lists):
        row = run_candidate(Candidate(*values), arguments.notes, arguments.device)
        print(json.dumps(row), flush=True)


def read_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 3e-3, 5e-3])
    parser.add_argument("--steps", type=int, nargs="+", default=[40, 60, 80])
    parser.add_argument("--rows", type=int, nargs="+", default=[4], help="batch size")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--notes", type=int, default=60, help="number of validation notes to answer"
    )
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


def run_candidate(candidate: Candidate, n_notes: int, device: str) -> dict[str, Any]:
    """Return the candidate's settings and its results on `n_notes` validation notes."""
    with tempfile.TemporaryDirectory() as folder:
        # No evaluation during training: the validation notes are measured below.
        run = RunConfig(Path(folder), "run", eval_every_steps=candidate.steps, device=device)
        job = FinetuneJob(
            data=make_orders("train", candidate.steps * candidate.batch_rows, candidate.seed),
            eval_data=make_orders("validation", 1),
            lora=LoRAConfig(rank=candidate.rank, alpha=2.0 * candidate.rank),
            train=candidate.train_config,
            data_config=DATA,
            run=run,
        )
        done = finetune(job)
        loaded = load_model(None, done.saved, device)
        row = {**vars(candidate), "device": loaded.choice.device.type}
        row |= measure(loaded, n_notes)
        return {**row, "train_s": round(done.result.train_s, 1)}


def measure(loaded: LoadedModel, n_notes: int) -> dict[str, Any]:
    """Return loss and scores on validation notes, and how often each field was wrong."""
    rows = make_orders("validation", n_notes)
    examples = [example_from_row(row, f"note {n}") for n, row in enumerate(rows, 1)]
    loss = measure_loss(loaded.model, examples, loaded.tokenizer, DATA, loaded.choice)
    answers = answer_examples(loaded.model, examples, loaded.tokenizer, SAMPLING, batch_size=30)
    found = score(loss, answers)
    wrong = Counter(name for answer in answers for name in wrong_fields(answer))
    return {
        "n_notes": n_notes,
        "loss": round(loss, 5),
        "valid_json": found.valid_json,
        "fields_right": found.fields_right,
        "n_fields": found.n_fields,
        "exact_match": found.exact_match,
        "wrong": dict(wrong),
    }


if __name__ == "__main__":
    main()
