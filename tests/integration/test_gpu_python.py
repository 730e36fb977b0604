"""Python's functions on a GPU: callbacks of late steps, named adapters, transformers' models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lora
from lora.data.reading.orders import make_orders

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SETTINGS: dict[str, Any] = {
    **{"steps": 20, "batch_size": 4, "learning_rate": 2e-2, "max_length": 128},
    **{"eval_every_steps": 10, "save_every_steps": 10},
}
NAME = "adapter_model.safetensors"


class Recorder(lora.Callback):
    """Keeps the steps; stops or fails at one of them."""

    def __init__(self, at: int | None = None, error: Exception | None = None) -> None:
        self.at, self.error = at, error
        self.steps: list[int] = []
        self.evaluated: list[int] = []

    def on_step(self, event: lora.StepEvent) -> None:
        self.steps.append(event.step)
        if event.step == self.at and self.error is not None:
            raise self.error

    def on_eval(self, event: lora.EvalEvent) -> None:
        self.evaluated.append(event.step)


def fine_tune(folder: Path, out: Path, callbacks: Any = (), **settings: Any) -> Any:
    rows = make_orders("train", 24)
    given = {**SETTINGS, "rank": 4, "device": "cuda", "model": str(folder), "out": out, **settings}
    return lora.finetune(rows, callbacks=callbacks, **given)


def test_callbacks_hear_every_step_and_change_no_byte(tiny_folder: Path, tmp_path: Path) -> None:
    plain, recorder = fine_tune(tiny_folder, tmp_path, name="plain"), Recorder()
    called = fine_tune(tiny_folder, tmp_path, recorder, name="called")
    assert recorder.steps == list(range(1, 21))
    assert recorder.evaluated == [0, 10, 20]
    assert (called.saved / NAME).read_bytes() == (plain.saved / NAME).read_bytes()


def test_a_stop_is_evaluated_and_an_error_resumes(tiny_folder: Path, tmp_path: Path) -> None:
    stopping = Recorder(5, lora.StopTraining("enough"))
    stopped = fine_tune(tiny_folder, tmp_path, stopping, name="stopped")
    assert stopped.result.stopped_early
    assert stopped.result.steps in (5, 6)
    assert stopping.evaluated[-1] == stopped.result.steps
    whole = fine_tune(tiny_folder, tmp_path, name="whole")
    with pytest.raises(ZeroDivisionError):
        fine_tune(tiny_folder, tmp_path, Recorder(5, ZeroDivisionError()), name="failed")
    resumed = fine_tune(tiny_folder, tmp_path, name="failed", resume=True)
    assert (resumed.saved / NAME).read_bytes() == (whole.saved / NAME).read_bytes()


def test_named_adapters_follow_the_model_to_the_gpu(tiny_folder: Path, tmp_path: Path) -> None:
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = {}
    for seed, name in enumerate(("first", "second")):
        model, _ = lora.load_model(tiny_folder, device="cpu")
        lora.apply_lora(model, lora.LoRAConfig(rank=2 + seed, init_seed=seed))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("lora_B"):
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))
        lora.save_adapter(model, tmp_path / name)
        expected[name] = model(ids)
    model, _ = lora.load_model(tiny_folder, device="cpu")
    for name in expected:
        lora.load_adapter(model, tmp_path / name, name=name)
    model.cuda()
    for name in ("second", "first", "second"):
        lora.set_adapter(model, name)
        assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
        torch.testing.assert_close(model(ids.cuda()).cpu(), expected[name], rtol=1e-3, atol=1e-3)


def test_a_transformers_model_trains_in_memory(tiny_folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tiny_folder, dtype=torch.float32).cuda()
    lora.apply_lora(model, lora.LoRAConfig(rank=4, init_seed=0))
    rows = make_orders("train", 24)
    done = lora.train(model, tiny_folder, rows, out=tmp_path, name="theirs", **SETTINGS)
    assert done.result.best_eval_loss < done.result.start_eval_loss - 0.1
    again = lora.load_adapter(load(tiny_folder, dtype=torch.float32), done.saved)
    assert lora.active_adapter(again) == "default"
