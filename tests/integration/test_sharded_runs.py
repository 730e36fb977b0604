"""Whole runs with --parallel fsdp end as those of one process, and each resumes the other's."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import lora
from lora.adapters.bases.rules import QUANTISATION_KEY
from lora.config import DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.data.reading.orders import make_orders
from lora.distributed.world import World
from lora.errors import ConfigError
from lora.finetune.job import FinetuneJob
from lora.finetune.run import finetune
from lora.runs.disk import read_json, read_rows
from lora.training.callbacks import Callback, StepEvent
from tests.distributed.processes import run_processes
from tests.finetune.tiny_models import save_tiny
from tests.integration.conftest import make_tokenizer

# Its processes are started once, in one of the workers that share the tests.
pytestmark = pytest.mark.xdist_group("sharded_runs")

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora": LoRAConfig(rank=4)},
    "nf4": {"lora": LoRAConfig(rank=4), "base_dtype": "nf4"},
    "full": {"lora": None},
    "tokens": {
        "lora": LoRAConfig(rank=2),
        "data_config": DataConfig(max_length=96, special_tokens=("<|note|>",)),
    },
}
RESUMED = ("nf4", "full")
STEPS = 12


@dataclass
class Fails(Callback):
    """Raises after a step."""

    step: int

    def on_step(self, event: StepEvent) -> None:
        if event.step == self.step:
            raise RuntimeError("of a user")


def job_of(kind: str, out: Path, steps: int, **settings: Any) -> FinetuneJob:
    """Return a job on the tiny model beside `out`; its rate does not depend on its end."""
    run = RunConfig(
        out=out,
        name=kind,
        eval_every_steps=4,
        save_every_steps=4,
        samples=1,
        sample_tokens=3,
        **settings,
    )
    rate = {"learning_rate": 3e-3, "schedule": "constant", "warmup_fraction": 0.0}
    train = TrainConfig(steps=steps, batch_size=6, gradient_accumulation=2, **rate)
    job = FinetuneJob(
        data=make_orders("train", 30),
        model=str(out.parent / "model"),
        train=train,
        data_config=DataConfig(max_length=96),
        run=run,
    )
    return replace(job, **KINDS[kind])


def run_sharded(world: World, folder: Path) -> list[str]:
    """Run all kinds sharded; leave runs that ddp began and that broke off. Return what was said."""
    for kind in KINDS:
        finetune(job_of(kind, folder / f"fsdp{world.size}", STEPS, parallel="fsdp"))
    for kind in RESUMED:
        finetune(job_of(kind, folder / "resumed", 4, parallel="ddp"))
    said: list[str] = []
    job = job_of("full", folder / "failed", STEPS, parallel="fsdp")
    with pytest.raises(RuntimeError, match="of a user" if world.is_main else None):
        finetune(job, _Heard(said), callbacks=Fails(7) if world.is_main else ())
    return said


def resume_sharded(world: World, folder: Path) -> None:
    """Go on where two processes of ddp, or a failed run, ended."""
    for kind in RESUMED:
        job = job_of(kind, folder / "resumed", 8, parallel="fsdp")
        finetune(replace(job, resume=True))


class _Heard:
    """Keeps what was said."""

    def __init__(self, said: list[str]) -> None:
        self._said = said

    def start(self, total_steps: int, done_steps: int) -> None: ...
    def stop(self) -> None: ...
    def step(self, *numbers: Any) -> None: ...
    def message(self, message: str) -> None:
        self._said.append(message)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs: `one` process, `fsdp2` and `fsdp3`, and `resumed`, by ddp, fsdp and one."""
    folder = tmp_path_factory.mktemp("sharded")
    tokenizer = make_tokenizer()
    save_tiny(folder / "model", "tied", vocab_size=tokenizer.vocab_size)
    tokenizer.save(folder / "model")
    for kind in KINDS:
        finetune(job_of(kind, folder / "one", STEPS))
    (said, _) = run_processes(2, run_sharded, folder)
    (folder / "said").write_text("\n".join(said))
    run_processes(3, resume_sharded, folder)
    for kind in RESUMED:
        finetune(replace(job_of(kind, folder / "resumed", STEPS), resume=True))
    return folder


def saved(run: Path) -> dict[str, torch.Tensor]:
    """Return the tensors that a run saved."""
    (path,) = (run / name for name in ("adapter", "model") if (run / name).is_dir())
    (file,) = path.glob("*.safetensors")
    return load_file(file)


def assert_same_end(run: Path, expected: Path) -> None:
    """Check metrics, samples, checkpoints and weights against those of another run."""
    for row, other in zip(
        read_rows(run / "metrics.jsonl"), read_rows(expected / "metrics.jsonl"), strict=True
    ):
        assert row == pytest.approx(other, rel=1e-6)
    assert (run / "samples.jsonl").read_bytes() == (expected / "samples.jsonl").read_bytes()
    assert_close(saved(run), saved(expected))
    names = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert names == sorted(path.name for path in (expected / "checkpoints").glob("step-*"))
    for name in names:
        files = (path / "checkpoints" / name / "tensors.safetensors" for path in (run, expected))
        assert_close(*map(load_file, files))


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        difference = (tensor.double() - other[name].double()).norm()
        assert difference <= 1e-5 * other[name].double().norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_run_ends_as_one_of_one_process(kind: str, folder: Path) -> None:
    assert_same_end(folder / "fsdp2" / kind, folder / "one" / kind)
    record = read_json(folder / "fsdp2" / kind / "run.json")
    alone = read_json(folder / "one" / kind / "run.json")
    assert (record["world_size"], record["parallel"]) == (2, "fsdp")
    assert record["base_fingerprint"] == alone["base_fingerprint"]


def test_the_adapter_names_the_base_and_its_codes_as_that_of_one_process(folder: Path) -> None:
    found = []
    for run in ("one", "fsdp2", "resumed"):
        with safe_open(folder / run / "nf4/adapter/adapter_model.safetensors", "pt") as file:
            found.append(file.metadata())
            del found[-1]["lora_lm_tensors_sha256"]  # they differ in their last bits
    assert found[0] == found[1] == found[2]
    assert json.loads(found[0][QUANTISATION_KEY])["dtype"] == "nf4"


@pytest.mark.parametrize("kind", RESUMED)
def test_ddp_fsdp_and_one_process_resume_each_other(kind: str, folder: Path) -> None:
    run, expected = folder / "resumed" / kind, folder / "one" / kind
    assert_close(saved(run), saved(expected))
    rows, others = (read_rows(path / "metrics.jsonl") for path in (run, expected))
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=1e-6)


def test_what_fails_on_rank_0_alone_does_not_wait_for_the_others(folder: Path) -> None:
    assert "a callback failed: step 7 is not saved, because" in (folder / "said").read_text()
    (kept,) = (folder / "failed" / "full" / "checkpoints").glob("step-*")
    assert kept.name == "step-000004"


def test_a_saved_model_and_adapter_load(folder: Path) -> None:
    model, _ = lora.load_model(folder / "fsdp2" / "full" / "model")
    assert model is not None
    adapted, _ = lora.load_model(folder / "model", adapter=folder / "fsdp2" / "tokens")
    assert adapted is not None


def test_one_process_cannot_shard(folder: Path) -> None:
    with pytest.raises(ConfigError, match="parallel='fsdp' with one process"):
        finetune(job_of("lora", folder / "refused", 2, parallel="fsdp"))
    assert not (folder / "refused").exists()
