"""`memory: auto` takes a leaner mode if the first step runs out of memory; others advise it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lora.finetune.memory as memory_module
import lora.finetune.run as run_module
from lora.config import DataConfig, LoRAConfig, MemoryConfig, RunConfig, TrainConfig
from lora.data.reading.orders import make_orders
from lora.errors import TrainingError
from lora.fast.llama.checkpointing import ActivationCheckpointing
from lora.fast.llama.network import FastNetwork
from lora.fast.memory.plan import PlanInputs
from lora.fast.runner import FastStepRunner
from lora.finetune import FinetuneJob, finetune
from lora.finetune.memory import CAPTURE_BYTES
from lora.runs.progress import NoProgress


class Messages(NoProgress):
    """Keeps what a user would read."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is a GPU's and the fast step trains, on a CPU."""

    def plan_inputs(**values: Any) -> PlanInputs:
        return PlanInputs(**{**values, "device_type": "cuda", "compute_dtype": torch.bfloat16})

    def choose(model: Any, choice: Any, config: Any, **settings: Any) -> FastStepRunner:
        planned = settings["planned"]
        return FastStepRunner(
            model, choice, config, checkpointing=planned.checkpointing, leaner=planned.leaner
        )

    monkeypatch.setattr(memory_module, "PlanInputs", plan_inputs)
    monkeypatch.setattr(run_module, "choose_steps", choose)


@pytest.fixture
def job(tiny_folder: Path, tmp_path: Path) -> Callable[..., FinetuneJob]:
    def make(memory: MemoryConfig, name: str = "run", steps: int = 4) -> FinetuneJob:
        return FinetuneJob(
            data=make_orders("train", 60),
            model=str(tiny_folder),
            lora=LoRAConfig(rank=4),
            train=TrainConfig(steps=steps, batch_size=2),
            data_config=DataConfig(max_length=128),
            run=RunConfig(out=tmp_path, name=name, samples=0, device="cpu", save_every_steps=2),
            memory=memory,
        )

    return make


def starve(monkeypatch: pytest.MonkeyPatch, modes: tuple[str, ...]) -> None:
    """Buffers of these modes do not fit."""
    whole = FastNetwork.buffers

    def buffers(
        self: FastNetwork, size: int, tokens: int, stored: ActivationCheckpointing | None = None
    ) -> object:
        if stored is not None and stored.mode in modes and not self.embedding.tensors[0].is_meta:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 37.60 GiB.")
        return whole(self, size, tokens, stored)

    monkeypatch.setattr(FastNetwork, "buffers", buffers)


def test_auto_goes_on_with_a_leaner_mode_and_says_so(
    as_on_a_gpu: None,
    job: Callable[..., FinetuneJob],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    starve(monkeypatch, ("none", "cheap"))
    progress = Messages()
    done = finetune(job(MemoryConfig("auto", 10.0)), progress)
    told = [line for line in progress.lines if line.startswith("memory ran out in the first step")]
    assert "(none, 0.0 GB planned), before anything was trained; trying again: " in told[0]
    assert "activation checkpointing full" in told[-1]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["ran_out_of_memory"][0] == "none, 0.0 GB planned"
    assert len(record["ran_out_of_memory"]) == len(told)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["memory"]["planned"]["keep"] == record["activation_checkpointing"]
    assert result["memory"]["planned"]["total"] == done.memory.plan.total
    # The same adapter as that of a run which began with this mode, and a resumed run keeps it.
    stored = ActivationCheckpointing.from_record(record["activation_checkpointing"])
    assert stored.mode.startswith("full")
    finetune(job(MemoryConfig("full", 10.0), name="direct"))
    adapters = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("run", "direct")
    ]
    assert adapters[0] == adapters[1]
    finetune(replace(job(MemoryConfig("auto", 10.0), steps=6), resume=True))
    resumed = json.loads((tmp_path / "run" / "run.json").read_text())
    for key in ("activation_checkpointing", "ran_out_of_memory"):
        assert resumed[key] == record[key]


def test_a_mode_that_was_named_is_kept_and_the_advice_names_leaner_ones_first(
    as_on_a_gpu: None, job: Callable[..., FinetuneJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    starve(monkeypatch, ("cheap",))
    with pytest.raises(TrainingError) as caught:
        finetune(job(MemoryConfig("cheap", 10.0)))
    advice = str(caught.value).partition("Try, in this order: ")[2]
    order = ["--memory full (about", "--memory full+offload (about", "a smaller model"]
    positions = [advice.index(way) for way in order]
    assert positions == sorted(positions)


def test_auto_gives_up_after_the_leanest_mode(
    as_on_a_gpu: None, job: Callable[..., FinetuneJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    starve(monkeypatch, ("none", "cheap", "full", "full+offload"))
    with pytest.raises(TrainingError, match="Memory ran out at step 1 of 4") as caught:
        finetune(job(MemoryConfig("auto", 10.0)))
    assert "--memory" not in str(caught.value)


def test_a_mode_is_chosen_again_when_the_weights_leave_less_than_was_planned_with(
    as_on_a_gpu: None, job: Callable[..., FinetuneJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Messages()
    monkeypatch.setattr(run_module, "free_bytes", lambda device: int(CAPTURE_BYTES) + 10**6)
    done = finetune(job(MemoryConfig("auto", 10.0)), progress)
    plan = done.memory.plan
    assert plan.checkpointing is not None
    assert plan.checkpointing.mode == "full+offload"
    assert any(
        line.startswith("beside weights and optimizer 1.5 GB are free, too little for 0.0: ")
        for line in progress.lines
    )
    record = json.loads((done.folder / "run.json").read_text())
    assert record["activation_checkpointing"] == plan.checkpointing.to_record()
    assert "ran_out_of_memory" not in record
