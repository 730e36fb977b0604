"""Processes that train together take one plan, that of the device with the least memory."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import lora.finetune.memory as memory_module
from lora.config import LoRAConfig, MemoryConfig, TrainConfig
from lora.data.prepare import PreparedData
from lora.device import DeviceChoice
from lora.distributed.world import World
from lora.errors import ConfigError
from lora.finetune.memory import ChosenMemory, describe_plan, plan_run
from lora.pretrained.load.models import model_config

CPU = DeviceChoice(torch.device("cpu"), torch.float32, "")


CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 300,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@dataclass(frozen=True)
class Two(World):
    """One of two processes of a machine, whose other one answers `other` where it has a number."""

    size: int = 2
    local_size: int = 2
    other: int = 0

    def gather(self, value: Any, what: str) -> list[Any]:
        return [value, self.other if "free" in what else value]


def plan(folder: Path, world: World, **settings: Any) -> ChosenMemory:
    sequences = SimpleNamespace(sequence_length=32, fill_fraction=1.0, n_target_tokens=100)
    data = SimpleNamespace(train=_Sized(sequences), train_examples=[0] * 8)
    return plan_run(
        model_config(folder),
        LoRAConfig(rank=2),
        TrainConfig(batch_size=4),
        cast(PreparedData, data),
        CPU,
        fast=True,
        memory=MemoryConfig(),
        world=world,
        **settings,
    )


class _Sized:
    def __init__(self, values: SimpleNamespace) -> None:
        vars(self).update(vars(values))

    def __len__(self) -> int:
        return 8


def test_a_process_plans_its_part_of_the_batch(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_module, "available_bytes", lambda kind: 10**12)
    chosen = plan(folder, Two(other=3 * 10**11))
    assert chosen.planner.inputs.micro_batch_size == 2
    assert (chosen.parallel, chosen.planner.inputs.devices) == ("ddp", 2)
    # The other process has less free than this one's half of the machine.
    assert f"of {0.95 * 300:.1f} planned on each" in chosen.parallel_reason
    assert describe_plan(chosen.plan).startswith("planned memory of each of 2 processes: ")
    alone = plan(folder, World())
    assert describe_plan(alone.plan).startswith("planned memory: ")
    assert (alone.parallel, alone.parallel_reason) == (None, "")
    assert alone.planner.inputs.micro_batch_size == 4
    assert plan(folder, Two(other=10**11), parallel="fsdp").parallel == "fsdp"
    with pytest.raises(ConfigError, match="'fsdp' with one process"):
        plan(folder, World(), parallel="fsdp")


def test_the_mode_is_fitted_to_the_device_with_the_least_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = memory_module.PlanInputs

    def on_a_gpu(**values: Any) -> Any:
        return inputs(**{**values, "device_type": "cuda", "compute_dtype": torch.bfloat16})

    monkeypatch.setattr(memory_module, "PlanInputs", on_a_gpu)
    chosen = plan(folder, Two(other=10**12))
    assert chosen.plan.checkpointing is not None
    assert chosen.plan.checkpointing.mode == "none"
    messages: list[str] = []
    chosen.on_message = messages.append
    chosen.world = replace(cast(Two, chosen.world), other=memory_module.CAPTURE_BYTES)
    stored = chosen.refit(10**12)
    assert stored is not None
    assert stored.mode != "none"
    assert "beside weights and optimizer 1.5 GB are free" in messages[0]
    # Sharded weights have no graph that needs memory of its own.
    room = memory_module.CAPTURE_BYTES - memory_module.LAUNCHED_BYTES
    needed = memory_module._step_bytes(chosen.plan)
    assert needed < room
    chosen.world = replace(cast(Two, chosen.world), other=needed + memory_module.LAUNCHED_BYTES)
    chosen.parallel = "fsdp"
    assert chosen.refit(10**12) == stored
    assert len(messages) == 1
