"""Models that transformers runs, on a GPU: trained in bf16, resumed, answered, merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import lora
from lora.config import BaseWeights, TrainConfig
from lora.data.reading.orders import make_orders
from lora.device import choose_device
from lora.fast.choose import MIN_COMPILED_STEPS, choose_steps
from lora.pretrained.load.models import load_language_model
from lora.runs.disk import read_json
from lora.training.losses import loss_for
from lora.training.optim import build_optimizer
from lora.training.plain_step import train_step
from tests.integration.test_any_model import save_model
from tests.integration.test_gpu_architectures import batch
from tests.integration.test_gpu_fast import Lines, adapt
from tests.pretrained.tiny_models import save_tiny_transformers

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


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("gpt_neox", "auto"),
        ("gpt2", "transformers"),
        ("gpt2", "native"),
        ("mixtral", "transformers"),
    ],
)
def test_compiled_blocks_over_a_quantised_base_learn_as_the_plain_step(
    name: str, implementation: Any, kind: Any, tmp_path: Path
) -> None:
    off = {key: 0.0 for key in ("attn_pdrop", "embd_pdrop", "resid_pdrop") if name == "gpt2"}
    folder = save_tiny_transformers(name, tmp_path, **off)
    own = {"implementation": implementation, "dtype": torch.bfloat16, "device": "cuda"}
    model = adapt(load_language_model(folder, base=BaseWeights(base_dtype=kind), **own)).cuda()
    plain: Any = copy.deepcopy(model)
    choice, said = choose_device("cuda"), Lines()
    config = TrainConfig(steps=MIN_COMPILED_STEPS, weight_decay=0.0)
    steps = choose_steps(model, choice, config, on_message=said.message)
    assert "compiled blocks" in said.lines[0]
    optimizer, losses = build_optimizer(plain, 1e-3, 0.0), []
    for number in range(1, 5):
        rows = batch(packed=number % 2 == 0)
        steps.launch(number, [rows], [1e-3])
        wanted = train_step(
            plain, [rows.to("cuda")], loss_for(plain), optimizer, autocast=choice.autocast
        )
        losses.append(steps.finished(wait=True)[-1].losses[0])
        assert losses[-1] == pytest.approx(wanted.loss.item(), rel=1e-2), said.lines
    assert losses[2] < losses[0]


def test_all_weights_train_and_answer(tmp_path: Path) -> None:
    folder, rows = save_model(tmp_path / "falcon", "falcon"), make_orders("train", 24)
    given = {**SETTINGS, "device": "cuda", "model": str(folder), "out": tmp_path}
    full = lora.finetune(rows, full=True, name="full", **{**given, "learning_rate": 1e-3})
    assert full.result.best_eval_loss < full.result.start_eval_loss
    model, tokenizer = lora.load_model(full.saved, device="cuda")
    assert isinstance(lora.generate(model, tokenizer, "3 lamps", max_new_tokens=2), str)
