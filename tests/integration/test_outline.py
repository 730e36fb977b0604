"""Before training one block says what the run will do; the figures are those of the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lora.config import DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.data.reading.orders import make_orders
from lora.finetune import FinetuneJob, finetune
from lora.runs.disk import read_json
from lora.runs.progress import NoProgress


class Heard(NoProgress):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, message: str) -> None:
        self.messages.append(message)

    def outline(self) -> str:
        (block,) = (text for text in self.messages if text.startswith("this run"))
        return block


@pytest.fixture
def job(tiny_folder: Path, tmp_path: Path) -> FinetuneJob:
    return FinetuneJob(
        data=make_orders("train", 24),
        model=str(tiny_folder),
        lora=LoRAConfig(rank=4),
        train=TrainConfig(epochs=0.5, batch_size=4),
        data_config=DataConfig(max_length=256),
        run=RunConfig(out=tmp_path, name="run", samples=0),
    )


def test_the_block_has_the_figures_of_the_run(job: FinetuneJob) -> None:
    heard = Heard()
    done = finetune(job, heard)
    block, record = heard.outline(), read_json(done.folder / "run.json")
    n_sequences, steps = record["data"]["rows"], record["train"]["steps"]
    assert f"examples: {record['data']['examples']} for training" in block
    assert f"packed sequences: {n_sequences} of 256 tokens" in block
    epochs = steps * 4 / n_sequences
    assert f"length: {steps} steps of 4 sequences, {epochs:.4g} epochs\n" in block
    assert "planned memory: " in block
    assert "time: known after the first steps" in block
    result = read_json(done.folder / "result.json")
    assert f"tokens: {result['n_processed_tokens']:,} in all steps" in block
    assert result["n_processed_tokens"] > result["n_tokens"] > 0
    assert heard.messages.index(block) < heard.messages.index(
        next(text for text in heard.messages if text.startswith("step 0"))
    )
    more = Heard()
    finetune(replace(job, train=replace(job.train, epochs=1.0), resume=True), more)
    assert f"for {-(-n_sequences // 4) - steps} more steps, as fast as before" in more.outline()


def test_the_default_length_and_few_sequences_are_explained(job: FinetuneJob) -> None:
    heard = Heard()
    few = replace(job, data=make_orders("train", 4), train=TrainConfig(batch_size=8))

    class Stop(Exception):
        pass

    def stop(step: int, *figures: object) -> None:
        raise Stop

    heard.step = stop  # type: ignore[method-assign]
    with pytest.raises(Stop):
        finetune(few, heard)
    assert "100 steps of 8 sequences" in heard.outline()
    assert "by default 3 epochs, in 100 to 2,000 steps" in heard.outline()
    assert "note: every step has all" in heard.outline()
