"""Members of a comparison of character GPTs: killed in the hand-written step, they lose no byte."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from lora.compare.factory import FactoryTarget
from lora.compare.target import MemberTask
from lora.config import RunConfig, TrainConfig
from lora.data.tokenizers.characters import CharTokenizer
from lora.runs.progress import NoProgress
from lora.runs.record import Method
from models.bigram_lm_v2 import BigramLanguageModel, save_bigram
from models.char_compare import CharFactory
from models.char_step import CharStepRunner
from models.classic_settings import ClassicSettings
from tests.distributed.processes import exit_code_of

STEPS, KILLED_AT = 12, 8


class Kill(NoProgress):
    """Kills its process after a step; 0: never."""

    def __init__(self, kill_at: int) -> None:
        self.kill_at = kill_at

    def step(self, step: int, *numbers: object) -> None:
        if step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def train_member(out: Path, base: Path, text: Path, method: Method, kill_at: int) -> None:
    """Train a member from its newest checkpoint, in two threads."""
    torch.set_num_threads(2)
    settings = ClassicSettings(
        data_path=str(text),
        base_checkpoint=str(base),
        use_lora=method == "lora",
        batch_size=4,
        gradient_accumulation=2,
        lora_rank=4,
        max_steps=STEPS,
    )
    run = RunConfig(out=out, name="member", eval_every_steps=6, save_every_steps=3)
    target = FactoryTarget(CharFactory(settings, base))
    resumes = (out / "member").exists()
    task = MemberTask(method, settings.train_config(), run, resume=resumes, evaluate=False)
    target.run_member(task, Kill(kill_at))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = CharTokenizer()
    model = BigramLanguageModel(tokenizer.vocab_size, 32, 2, 2, 16)
    save_bigram(model, tmp_path / "base")
    tokenizer.save(tmp_path / "base" / "vocab.json")
    return tmp_path / "base"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    return path


def results(member: Path) -> dict[str, bytes]:
    paths = [member / "metrics.jsonl", *member.glob("*/*.safetensors")]
    newest = max(member.glob("checkpoints/step-*"))
    return {p.name: p.read_bytes() for p in [*paths, *newest.glob("*.safetensors")]}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_member_killed_between_two_saves_ends_with_the_same_bytes(
    base: Path, text: Path, tmp_path: Path, method: Method
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert exit_code_of(train_member, whole, base, text, method, 0) == 0
    assert exit_code_of(train_member, killed, base, text, method, KILLED_AT) == -signal.SIGKILL
    assert exit_code_of(train_member, killed, base, text, method, 0) == 0
    expected = results(whole / "member")
    assert len(expected) == 3
    assert results(killed / "member") == expected


@pytest.mark.parametrize("method", ["lora", "full"])
def test_both_methods_take_the_step_by_hand(base: Path, text: Path, method: str) -> None:
    settings = ClassicSettings(data_path=str(text), base_checkpoint=str(base))
    setup = CharFactory(settings, base).build(method, TrainConfig(steps=2, batch_size=4))
    assert isinstance(setup.choose_steps(TrainConfig()), CharStepRunner)
