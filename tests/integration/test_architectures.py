"""Runs of transformers' architectures through the loop: resumed to the byte, opened by PEFT."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import lora
from lora.training.checkpoint import list_checkpoints
from tests.integration.conftest import make_tokenizer
from tests.pretrained.tiny_models import ARCHITECTURES, tiny_transformers

pytest.importorskip("transformers")

QUICK = ("falcon", "mixtral", "mamba")
"""Changes a linear's output in place; has experts; has no attention."""
SETTINGS: dict[str, Any] = {
    "steps": 6,
    "batch_size": 2,
    "max_length": 128,
    "save_every_steps": 3,
    "eval_every_steps": 3,
}


def adapted(name: str) -> Any:
    own = [key for key in ("n_positions", "max_seq_len") if key in ARCHITECTURES[name]]
    positions = dict.fromkeys(own or ["max_position_embeddings"], 128)
    model = tiny_transformers(name, vocab_size=400, **positions)
    return lora.apply_lora(model, lora.LoRAConfig(rank=2, dropout=0.1, init_seed=0))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in ARCHITECTURES],
)
def test_a_run_resumes_to_the_byte(name: str, orders_file: Path, tmp_path: Path) -> None:
    tokenizer, kept = make_tokenizer(), {}
    for resume in (False, True):
        run = lora.train(
            adapted(name), tokenizer, orders_file, out=tmp_path, name="x", resume=resume, **SETTINGS
        )
        files = [run.saved / "adapter_model.safetensors", run.folder / "metrics.jsonl"]
        kept[resume] = [path.read_bytes() for path in files]
        assert run.result.best_eval_loss < run.result.start_eval_loss
        shutil.rmtree(list_checkpoints(run.folder / "checkpoints")[-1])
    assert kept[True] == kept[False]
