"""Trials of learning rates: which errors are a failed trial, and which end the comparison."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora.compare import target
from lora.compare.decoder_target import DecoderTarget
from lora.compare.results import BaseResult, MemberResult, ModelEvaluation
from lora.compare.target import MemberTask, run_rate_trials
from lora.config import RunConfig, TrainConfig
from lora.errors import TrainingError
from lora.runs.comparison_record import RateTrial
from lora.runs.progress import NoProgress, Progress
from lora.training.out_of_memory import explain_out_of_memory


def without_memory(task: MemberTask, progress: Progress) -> MemberResult:
    with explain_out_of_memory(lambda: "in a step."):
        raise RuntimeError("CUDA out of memory")


def diverged(task: MemberTask, progress: Progress) -> MemberResult:
    raise TrainingError("The loss of step 3 is nan.")


def test_memory_of_one_process_among_several_is_no_failed_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "agreed", lambda function, what: function())

    def tried(name: str, member: target.RunMember) -> list[RateTrial]:
        run, train = RunConfig(out=tmp_path / name), TrainConfig(steps=4)
        task = MemberTask("full", train, run, evaluate=False)
        return run_rate_trials(member, task, (1e-3,), NoProgress())

    assert tried("alone", without_memory) == [RateTrial(1e-3, None)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert tried("together", diverged) == [RateTrial(1e-3, None)]
    with pytest.raises(TrainingError, match="Memory ran out in a step"):
        tried("without", without_memory)


def test_members_run_as_the_base_did_also_when_resumed_elsewhere() -> None:
    base = BaseResult("tiny", "cpu", 1.0, ModelEvaluation(), implementation="transformers")
    asked = DecoderTarget("orders.jsonl", "tiny")
    task = MemberTask("lora", TrainConfig(steps=4), RunConfig(name="lora"))
    assert asked.with_base(base).finetune_job(task).implementation == "transformers"
    older = BaseResult("tiny", "cpu", 1.0, ModelEvaluation())  # there was no other then
    assert asked.with_base(older).implementation == "native"
