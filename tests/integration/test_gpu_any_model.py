"""Models that transformers runs, on a GPU: trained in bf16, resumed, answered, merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lora
from lora.data.reading.orders import make_orders
from lora.runs.disk import read_json
from tests.integration.test_any_model import save_model

pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SETTINGS: dict[str, Any] = {
    **{"steps": 12, "batch_size": 4, "learning_rate": 2e-2, "max_length": 128},
    **{"eval_every_steps": 6, "save_every_steps": 6, "samples": 1, "sample_tokens": 4},
}


@pytest.mark.parametrize(("name", "is_packed"), [("gpt_neox", True), ("mamba", False)])
def test_it_learns_answers_and_is_merged(name: str, is_packed: bool, tmp_path: Path) -> None:
    folder, rows = save_model(tmp_path / name, name), make_orders("train", 24)
    given = {**SETTINGS, "rank": 4, "device": "cuda", "model": str(folder), "out": tmp_path}
    done = lora.finetune(rows, name="run", **given)
    record = read_json(done.folder / "run.json")
    assert (record["implementation"], record["data_config"]["packing"]) == (
        "transformers",
        is_packed,
    )
    assert done.result.best_eval_loss < done.result.start_eval_loss - 0.05
    assert done.memory.measured_bytes < 2e9
    model, tokenizer = lora.load_model(folder, adapter=done.saved, device="cuda")
    answers = lora.generate(model, tokenizer, ["3 lamps", "a chair to Rome"], max_new_tokens=4)
    assert len(answers) == 2
    merged = lora.merge(done.saved, tmp_path / "merged", model=folder, device="cuda")
    assert merged.relative_error <= merged.tolerance
    more = lora.finetune(rows, name="run", **{**given, "resume": True, "steps": 14})
    assert more.result.steps == 14


def test_all_weights_train_and_answer(tmp_path: Path) -> None:
    folder, rows = save_model(tmp_path / "falcon", "falcon"), make_orders("train", 24)
    given = {**SETTINGS, "device": "cuda", "model": str(folder), "out": tmp_path}
    full = lora.finetune(rows, full=True, name="full", **{**given, "learning_rate": 1e-3})
    assert full.result.best_eval_loss < full.result.start_eval_loss
    model, tokenizer = lora.load_model(full.saved, device="cuda")
    assert isinstance(lora.generate(model, tokenizer, "3 lamps", max_new_tokens=2), str)
