"""Settings files, settings in Python and command lines: answered, or refused with words.

A command ends with 0 or 2 and never with a traceback.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import strategies as st
from torch import nn

from lora import cli
from lora.config import DataConfig, LoRAConfig, RunConfig, SamplingConfig, TrainConfig
from lora.device import choose_device
from lora.distributed.world import ALONE
from lora.runs.directory import create_run, read_start_time
from lora.runs.progress import NoProgress
from lora.runs.record import RunRecord
from lora.runs.sweep_record import CandidateState, read_sweep_record
from lora.training.checkpoint import load_checkpoint, save_checkpoint
from lora.training.job import LoopState, resume_loop_state
from lora.training.plain_step import PlainStepRunner

CONFIGS = (LoRAConfig, TrainConfig, DataConfig, RunConfig, SamplingConfig)
WORDS = (
    *("--data", "--model", "--out", "--name", "--rank", "--steps", "--full", "--resume", "--json"),
    *("--targets", "--learning-rate", "--device", "--config", "--adapter", "--no-packing", "-1"),
    *("--rank-pattern.q_proj", "--layers", "--seed", "--debug", "--", "--prompt", "--help", "cpu"),
    *("--max-length", "1e9", "nan", "inf", "9" * 400, "x.jsonl", "../../x", "--special-tokens"),
)


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs `lora` with the given words in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORALM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lora.pretrained.sources.DEFAULT_PACKAGE", "no_such_package")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(words: list[str]) -> str:
        said, told = io.StringIO(), io.StringIO()
        stdin = io.StringIO("")
        monkeypatch.setattr("sys.stdin", stdin)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
            code = cli.main([word for word in words if word != "--debug"])
        assert code in (0, 2), (code, told.getvalue())
        assert code == 0 or (told.getvalue() + said.getvalue()).strip()
        assert "Traceback" not in told.getvalue()
        return told.getvalue()

    return run


def test_any_command_line(fuzz: Any, answer: Any) -> None:
    quick = cli.COMMANDS.keys() - {"doctor"}  # which trains
    commands = st.sampled_from([*sorted(quick), "finetun", "--version", ""])
    text = st.text(max_size=9).filter(lambda word: "\x00" not in word)
    words = st.lists(st.sampled_from(WORDS) | text, max_size=6)
    fuzz(st.tuples(commands, words).map(lambda parts: [parts[0], *parts[1]]), answer)


def test_any_settings_file(
    fuzz: Any, make: dict[str, Any], answer: Any, tmp_path: Path, tiny_folder: Path
) -> None:
    path, data = tmp_path / "settings.yaml", tmp_path / "x.jsonl"
    data.write_text('{"text": "a text that is learned"}\n' * 3)
    names = sorted({field.name for config in CONFIGS for field in fields(config)})
    settings = st.dictionaries(
        st.sampled_from(names) | st.text(max_size=5), make["json"](), max_size=3
    )
    written = settings.map(lambda value: yaml.safe_dump(value).encode())
    aliases = st.just(b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n")
    # A few depths only: PyYAML's time grows with the square of the depth.
    deep = st.sampled_from([1, 30, 300, 5000]).map(lambda depth: b"rank: " + b"[" * depth)

    def check(contents: bytes) -> None:
        path.write_bytes(contents)
        answer(["data", "x.jsonl", "--model", str(tiny_folder), "--config", str(path)])

    fuzz(written | st.binary(max_size=30) | aliases | deep, check)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_any_values_of_settings(config: Any, fuzz: Any, make: dict[str, Any]) -> None:
    names = [field.name for field in fields(config)]
    values = st.dictionaries(st.sampled_from(names), make["json"](), min_size=1, max_size=3)
    fuzz(values, lambda found: config(**found))


def test_any_environment(
    fuzz: Any, answer: Any, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    Path("x.jsonl").write_text('{"text": "a text that is learned"}\n' * 3)
    names = st.sampled_from(["MAX_LENGTH", "PACKING", "JSON", "EVAL_FRACTION", "RANKS", "_", ""])
    text = st.text(st.characters(exclude_characters="\x00", exclude_categories=("Cs",)), max_size=9)

    def check(found: dict[str, str]) -> None:
        with monkeypatch.context() as patched:
            for name, value in found.items():
                patched.setitem(os.environ, f"LORALM_DATA_{name}", value)
            answer(["data", "x.jsonl", "--model", str(tiny_folder)])

    fuzz(st.dictionaries(names, text, max_size=3), check)


def test_any_files_of_a_run(fuzz: Any, make: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step-000001"
    folder.mkdir(parents=True)
    values = make["json"]().map(lambda value: json.dumps(value).encode()) | st.binary(max_size=30)
    manifest = st.fixed_dictionaries(
        {"tensors.safetensors": make["json"](), "state.json": make["json"]()}
    ).map(lambda value: json.dumps(value).encode())

    def begun() -> None:
        read_start_time(tmp_path / "run")

    def rows() -> None:
        with create_run(tmp_path, "run", resume=True) as run:
            run.cut_metrics_after(3)

    def ledger() -> None:
        read_sweep_record(tmp_path / "run")

    checks = {
        "manifest.json": lambda: load_checkpoint(folder),
        "run.json": lambda: (begun(), create_run(tmp_path, "run", **resumed).close()),
        "metrics.jsonl": rows,
        "sweep.json": ledger,
    }
    resumed: dict[str, Any] = {"resume": True, "record": RunRecord(train={"steps": 3})}
    (folder / "tensors.safetensors").write_bytes(b"")
    (folder / "state.json").write_bytes(b"{}")

    def check(found: tuple[str, bytes]) -> None:
        name, data = found
        place = folder if name == "manifest.json" else tmp_path / "run"
        (place / name).write_bytes(data)
        checks[name]()
        (place / name).unlink()

    state = make["object"](vars(CandidateState("a", {})))
    told = {
        "candidates": [vars(CandidateState("a", {})), vars(CandidateState("b", {}))],
        "rungs": [4, 8],
    }
    whole = {**told, "at_once": 2, "base_eval_loss": 1.5, "steps_taken": 4}
    ledgers = make["object"](whole) | state.map(lambda s: {**whole, "candidates": [s, s]})
    described = {
        "train": {"steps": 3},
        "data": {"now": "2026-01-01"},
        "sweep": {"grid": {}, "halving": False, "steps": 3},
    }
    likely = (ledgers | make["object"](described)).map(lambda value: json.dumps(value).encode())
    fuzz(st.tuples(st.sampled_from(sorted(checks)), values | manifest | likely), check)


def test_any_state_in_a_checkpoint_whose_digests_are_right(
    fuzz: Any, make: dict[str, Any], tmp_path: Path
) -> None:
    def never_called(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError(batch)

    model = nn.Linear(2, 1)
    steps = PlainStepRunner(model, never_called, choose_device("cpu"), TrainConfig())
    run = create_run(tmp_path, "run")
    valid = {"position": vars(LoopState()), "stream": {"row": 0}}

    class Rows:
        def load_state_dict(self, state: dict[str, Any]) -> None:
            int(state["row"])

    job = SimpleNamespace(run=run, steps=steps, stream=Rows(), progress=NoProgress())
    job.train_config, job.world = TrainConfig(steps=3), ALONE

    def check(state: Any) -> None:
        save_checkpoint(run.folder / "checkpoints", 1, steps.state(), state, keep=1)
        resume_loop_state(job)  # type: ignore[arg-type]

    positions = make["object"](valid["position"]).map(lambda value: {**valid, "position": value})
    with run:
        fuzz(positions | make["object"](valid), check)
