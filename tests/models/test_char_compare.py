"""Members of a comparison of character GPTs: killed in the hand-written step, they lose no byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora.config import TrainConfig
from lora.data.tokenizers.characters import CharTokenizer
from models.bigram_lm_v2 import BigramLanguageModel, save_bigram
from models.char_compare import CharFactory
from models.char_step import CharStepRunner
from models.classic_settings import ClassicSettings

STEPS, KILLED_AT = 12, 8
MEMBER = f"""
import os, signal, sys
from pathlib import Path
from lora.compare.factory import FactoryTarget
from lora.compare.target import MemberTask
from lora.config import RunConfig
from lora.runs.progress import NoProgress
from models.char_compare import CharFactory
from models.classic_settings import ClassicSettings

out, base, text, method, kill_at = sys.argv[1:]

class Kill(NoProgress):
    def step(self, step, loss, tokens_per_s, memory_bytes):
        if step == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)

settings = ClassicSettings(
    data_path=text, base_checkpoint=base, use_lora=method == "lora", batch_size=4,
    gradient_accumulation=2, lora_rank=4, max_steps={STEPS},
)
run = RunConfig(out=Path(out), name="member", eval_every_steps=6, save_every_steps=3)
target = FactoryTarget(CharFactory(settings, Path(base)))
train = settings.train_config()
task = MemberTask(method, train, run, resume=Path(out, "member").exists(), evaluate=False)
target.run_member(task, Kill())
"""


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


def run_member(out: Path, base: Path, text: Path, method: str, kill_at: int) -> int:
    """Train a member in a subprocess, from its newest checkpoint; return the exit code."""
    command = [sys.executable, "-c", MEMBER, str(out), str(base), str(text), method, str(kill_at)]
    # Two threads, which wait without spinning: other tests run on the same cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(command, env=environment, check=False).returncode


def results(member: Path) -> dict[str, bytes]:
    paths = [member / "metrics.jsonl", *member.glob("*/*.safetensors")]
    newest = max(member.glob("checkpoints/step-*"))
    return {p.name: p.read_bytes() for p in [*paths, *newest.glob("*.safetensors")]}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_member_killed_between_two_saves_ends_with_the_same_bytes(
    base: Path, text: Path, tmp_path: Path, method: str
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_member(whole, base, text, method, 0) == 0
    assert run_member(killed, base, text, method, KILLED_AT) == -signal.SIGKILL
    assert run_member(killed, base, text, method, 0) == 0
    expected = results(whole / "member")
    assert len(expected) == 3
    assert results(killed / "member") == expected


@pytest.mark.parametrize("method", ["lora", "full"])
def test_both_methods_take_the_step_by_hand(base: Path, text: Path, method: str) -> None:
    settings = ClassicSettings(data_path=str(text), base_checkpoint=str(base))
    setup = CharFactory(settings, base).build(method, TrainConfig(steps=2, batch_size=4))
    assert isinstance(setup.choose_steps(TrainConfig()), CharStepRunner)
