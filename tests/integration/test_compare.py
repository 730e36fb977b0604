"""Comparisons of a tiny model: the same data, each member as alone, resume, what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora.cli import main
from lora.compare import CompareResult, compare
from lora.compare import run as compare_run
from lora.compare.config import CompareConfig, LearningRates
from lora.compare.decoder_job import EvaluationConfig
from lora.compare.decoder_target import DecoderTarget
from lora.config import DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.data.reading.orders import make_orders
from lora.data.sequences.batches import Batch, BatchStream
from lora.errors import CheckpointError, ConfigError, DataError, DependencyError
from lora.finetune import FinetuneJob, finetune
from lora.pretrained.hf_weights import load_decoder
from lora.runs.comparison_record import read_comparison
from lora.runs.disk import read_json, read_rows
from lora.runs.progress import NoProgress
from lora.runs.read_record import read_run_record
from tests.compare.in_this_process import run_in_this_process

PEFTS_OWN = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
NAMES = {
    *("name", "method", "folder", "learning_rate", "rate_chosen", "rates_tried", "steps"),
    *("train_s", "step_s_median", "peak_memory_bytes", "planned_memory_bytes"),
    *("trainable_parameters", "total_parameters", "stored_bytes", "final_eval_loss"),
    *("best_eval_loss", "forgetting", "task_metric", "samples", "saved_step", "saved_eval_loss"),
    "base_dtype",
}
LORA, FULL = Path("adapter/adapter_model.safetensors"), Path("model/model.safetensors")


@pytest.fixture
def target(tiny_folder: Path) -> DecoderTarget:
    return DecoderTarget(
        data=make_orders("train", 32),
        model=str(tiny_folder),
        eval_data=make_orders("validation", 6),
        lora=LoRAConfig(rank=4, dropout=0.1),
        data_config=DataConfig(max_length=160),
        evaluation=EvaluationConfig(
            forgetting_data=[{"text": "the sea was calm that night " * 20}]
        ),
    )


@pytest.fixture
def config(tmp_path: Path) -> CompareConfig:
    return CompareConfig(
        train=TrainConfig(steps=12, batch_size=4, gradient_accumulation=2),
        run=RunConfig(
            out=tmp_path, name="run", eval_every_steps=4, save_every_steps=3, sample_tokens=6
        ),
        isolated=False,
    )


def saved(done: CompareResult) -> dict[str, bytes]:
    """By member and file: what must be the same again."""
    members = done.folder / "members"
    files = ("metrics.jsonl", LORA, FULL)
    paths = (members / m.name / f for m in done.comparison.members for f in files)
    return {str(p.relative_to(members)): p.read_bytes() for p in paths if p.is_file()}


@PEFTS_OWN
def test_all_members_learn_from_the_same_bytes_in_the_same_order(
    target: DecoderTarget, config: CompareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    given: list[bytes] = []
    take = BatchStream.__next__

    def taken(stream: BatchStream) -> Batch:
        batch = take(stream)
        tensors = (batch.input_ids, batch.labels, batch.position_ids, batch.document_ids)
        given.append(b"".join(t.numpy().tobytes() for t in tensors))
        return batch

    monkeypatch.setattr(BatchStream, "__next__", taken)
    done = compare(target, replace(config, methods=("lora", "full", "peft")))
    n_batches = 12 * 2
    assert len(given) == 3 * n_batches
    assert given[:n_batches] == given[n_batches : 2 * n_batches] == given[2 * n_batches :]
    assert len(set(given[:n_batches])) > 4
    first = [
        read_rows(done.folder / m.folder / "metrics.jsonl")[0]["eval_loss"]
        for m in done.comparison.members
    ]
    assert first == pytest.approx([done.comparison.base_eval_loss] * 3, rel=1e-5)
    assert not any("starts at" in note for note in done.comparison.notes)
    lora, _, peft = done.comparison.members
    assert peft.trainable_parameters == lora.trainable_parameters
    assert peft.final_eval_loss < first[2]


def test_each_member_is_what_finetune_makes_alone_and_the_base_stays(
    target: DecoderTarget, config: CompareConfig, tiny_folder: Path, tmp_path: Path
) -> None:
    before = {p.name: p.read_bytes() for p in tiny_folder.iterdir()}
    done = compare(target, replace(config, isolated=True))
    assert {p.name: p.read_bytes() for p in tiny_folder.iterdir()} == before
    for name, lora, file, rate in (("lora", target.lora, LORA, 1e-3), ("full", None, FULL, 1e-4)):
        alone = finetune(
            FinetuneJob(
                data=target.data, model=target.model, eval_data=target.eval_data, lora=lora,
                train=replace(config.train, learning_rate=rate), data_config=target.data_config,
                run=RunConfig(out=tmp_path, name=f"{name}-alone", eval_every_steps=4),
            )
        )  # fmt: skip
        member = done.folder / "members" / name
        assert (member / file).read_bytes() == (alone.folder / file).read_bytes(), name
        wanted = (alone.folder / "metrics.jsonl").read_bytes()
        assert (member / "metrics.jsonl").read_bytes() == wanted, name


def test_the_record_says_all_that_was_measured(
    target: DecoderTarget, config: CompareConfig
) -> None:
    evaluation = replace(target.evaluation, metric="json-fields", answers=2, answer_tokens=4)
    done = compare(replace(target, evaluation=evaluation), config)
    values = read_json(done.folder / "compare.json")
    assert (values["kind"], values["schema_version"]) == ("compare", 1)
    assert (values["base"], values["same"], values["seed"]) == ("tiny", "steps", 1337)
    for member in values["members"]:
        assert member.keys() == NAMES
        assert member["steps"] == 12
        assert member["task_metric"]["name"] == "JSON fields"
        assert member["forgetting"]["before"] != member["forgetting"]["after"]
        sample = member["samples"][0]
        assert sample.keys() == {"prompt", "expected", "answer", "step", "is_cut"}
        assert member["peak_memory_bytes"] > 1e8
        assert (done.folder / member["folder"] / "run.json").is_file()
    lora, full = values["members"]
    weights = sum(p.numel() for p in load_decoder(str(target.model)).parameters())
    assert full["trainable_parameters"] == full["total_parameters"] == weights
    assert lora["total_parameters"] == weights + lora["trainable_parameters"]
    assert lora["stored_bytes"] < full["stored_bytes"]
    assert full["stored_bytes"] >= 4 * weights
    assert lora["forgetting"]["before"] == full["forgetting"]["before"]
    record = read_run_record(done.folder)
    assert (record.kind, record.data.in_memory) == ("compare", True)
    assert read_comparison(done.folder) == done.comparison
    assert not list(done.folder.glob("members/*/checkpoints"))


def test_each_method_takes_the_best_of_its_own_rates(
    target: DecoderTarget, config: CompareConfig
) -> None:
    rates = LearningRates(rates=("1e-3,2e-2,1e-9",), full_rates=(2e-3, 1e-9), rate_steps=6)
    done = compare(target, replace(config, rates=rates))
    lora, full = done.comparison.members
    assert [t.learning_rate for t in lora.rates_tried] == [1e-3, 2e-2, 1e-9]
    for member in (lora, full):
        losses = {t.learning_rate: t.eval_loss for t in member.rates_tried}
        assert member.rate_chosen == "sweep"
        assert losses[member.learning_rate] == min(losses.values())  # type: ignore[type-var]
    assert (lora.learning_rate, full.learning_rate) == (2e-2, 2e-3)
    assert any("highest" in note for note in done.comparison.notes)
    assert not list((done.folder / "rates").glob("full-*/model"))


def test_members_of_the_same_time_get_lora_s_time(
    target: DecoderTarget, config: CompareConfig
) -> None:
    done = compare(
        target, replace(config, same="time", rates=LearningRates(full_learning_rate=1e-3))
    )
    lora, full = done.comparison.members
    timed = read_json(done.folder / "timing" / "full.json")
    assert full.steps == timed["steps"] == max(1, round(lora.train_s / timed["step_s"]))
    assert (lora.rate_chosen, full.rate_chosen) == ("default", "given")


class Killed(Exception):
    pass


def killed_at(title: str, step: int) -> Callable[[str], NoProgress]:
    class Fragile(NoProgress):
        def step(self, number: int, *_: Any) -> None:
            if number == step:
                raise Killed

    return lambda own: Fragile() if own == title else NoProgress()


@PEFTS_OWN
@pytest.mark.parametrize(
    "title",
    ["LoRA", "full fine-tuning", pytest.param("LoRA, PEFT", marks=pytest.mark.slow)],
)
def test_a_comparison_that_was_stopped_ends_with_the_same_bytes(
    target: DecoderTarget, config: CompareConfig, tmp_path: Path, title: str
) -> None:
    if importlib.util.find_spec("peft") is None and title.endswith("PEFT"):
        pytest.skip("PEFT is not installed")
    if title.endswith("PEFT"):
        config = replace(config, methods=("lora", "full", "peft"))
    whole = compare(target, replace(config, run=replace(config.run, out=tmp_path / "whole")))
    with pytest.raises(Killed):
        compare(target, config, killed_at(title, 8))
    done_before = {
        p: p.stat().st_mtime_ns for p in config.run.out.glob("run/members/*/member.json")
    }
    resumed = compare(target, replace(config, resume=True))
    assert saved(resumed) == saved(whole)
    assert all(p.stat().st_mtime_ns == then for p, then in done_before.items())
    rows = read_rows(resumed.folder / "members" / "lora" / "timings.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))


def test_another_comparison_is_not_resumed(target: DecoderTarget, config: CompareConfig) -> None:
    compare(target, config)
    with pytest.raises(CheckpointError, match=r"(?s)lora.rank: 4 then, 8 now.*same"):
        compare(
            replace(target, lora=replace(target.lora, rank=8)),
            replace(config, resume=True, same="time"),
        )
    with pytest.raises(CheckpointError, match="does not exist"):
        compare(target, replace(config, resume=True, run=replace(config.run, name="other")))


def test_what_is_no_comparison_is_not_resumed(
    target: DecoderTarget, config: CompareConfig, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="another kind of run"):
        compare(target, replace(config, resume=True))


def test_without_peft_the_error_has_the_line_that_installs_it(
    target: DecoderTarget, config: CompareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"pip install 'lora-lm\[bench\]'"):
        compare(target, replace(config, methods=("lora", "full", "peft")))
    assert not config.run.out.joinpath("run").exists()


def test_data_that_cannot_be_evaluated_are_refused_before_anything_is_written(
    target: DecoderTarget, config: CompareConfig
) -> None:
    texts = [{"text": f"number {n} is a plain text of some length"} for n in range(20)]
    evaluation = replace(target.evaluation, metric="exact-match")
    with pytest.raises(DataError, match="none has a question"):
        compare(replace(target, data=texts, eval_data=texts, evaluation=evaluation), config)
    nothing_held_out = replace(target.data_config, eval_fraction=0.0)
    with pytest.raises(DataError, match="nothing is held out"):
        compare(replace(target, eval_data=None, data_config=nothing_held_out), config)
    chats = make_orders("validation", 4)
    for row in chats:
        row["messages"][1]["content"] = "no object"
    evaluation = replace(target.evaluation, metric="json-fields")
    with pytest.raises(DataError, match="exact-match"):
        compare(replace(target, eval_data=chats, evaluation=evaluation), config)
    assert not config.run.out.joinpath("run").exists()


def test_a_learning_rate_that_destroys_the_model_is_a_failed_trial(
    target: DecoderTarget, config: CompareConfig
) -> None:
    rates = LearningRates(rates=(1e-3, 1e-2), full_rates=(1e-3, 1e30), rate_steps=4)
    done = compare(target, replace(config, rates=rates))
    tried = {t.learning_rate: t.eval_loss for t in done.comparison.members[1].rates_tried}
    assert done.comparison.members[1].learning_rate == 1e-3
    assert tried[1e30] is None or tried[1e30] > 100


def command_words(tiny_folder: Path, tmp_path: Path, out: Path, steps: int = 60) -> list[str]:
    file = tmp_path / "orders.jsonl"
    if not file.is_file():
        file.write_text("".join(json.dumps(row) + "\n" for row in make_orders("train", 40)))
    words = f"compare --data {file} --model {tiny_folder} --out {out} --name run --steps {steps}"
    words += (
        " --batch-size 4 --max-length 128 --dropout 0.1 --sample-tokens 4 --save-every-steps 10"
    )
    return words.split()


def test_the_command_prints_a_table_and_json(
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compare_run, "run_in_subprocess", run_in_this_process)
    asked = command_words(tiny_folder, tmp_path, tmp_path / "out", steps=4)
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [m["method"] for m in found["members"]] == ["lora", "full"]
    assert main([*asked, "--resume"]) == 0  # all is done: it is shown again
    out = capsys.readouterr().out
    assert "LoRA against full fine-tuning" in out
    assert "validation loss at the end" in out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--rates", "1e-3,x"], "rates='x'"),
        (["--rates", "1e-3,1e-3"], "given twice"),
        (["--full-rates", "1e-3"], "full_rates without rates"),
        (["--rates", "1e-3", "--learning-rate", "1e-3"], "learning_rate together with rates"),
        (["--rates", "1e-3,1e-2", "--rate-steps", "99"], "rate_steps=99"),
        (["--test-data", "x.jsonl"], "test_data without metric"),
        (["--answers", "0", "--metric", "exact-match"], "answers=0"),
        (["--forgetting-data", "none.txt"], "none.txt"),
    ],
)
def test_the_command_refuses_without_a_traceback(
    more: list[str], said: str, tiny_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    assert main([*command_words(tiny_folder, tmp_path, out), *more]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_resume_without_a_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--data", "x.jsonl", "--resume"]) == 2
    assert "--name" in capsys.readouterr().err


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lora", *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(process: subprocess.Popen[str], metrics: Path, steps: int) -> None:
    while process.poll() is None:
        if metrics.is_file() and metrics.read_bytes().count(b'"loss"') >= steps:
            return
        time.sleep(0.005)


def child_lives(folder: Path) -> bool:
    """Whether the process that is written into the folder's lock still runs."""
    number = int((folder / ".lock").read_text().split()[1].strip(","))
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_kill_9_and_sigterm_change_no_byte(tiny_folder: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert main(command_words(tiny_folder, tmp_path, whole)) == 0
    out = tmp_path / "killed"
    more: list[str] = []
    members = out / "run" / "members"
    moments = (
        ("lora", 13, signal.SIGKILL),
        ("lora", 33, signal.SIGTERM),
        ("full", 22, signal.SIGKILL),
    )
    for member, steps, number in moments:
        process = start([*command_words(tiny_folder, tmp_path, out), *more])
        wait_for(process, members / member / "metrics.jsonl", steps)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == (-9 if number == signal.SIGKILL else 143), said
        until = time.monotonic() + 20
        while child_lives(members / member) and time.monotonic() < until:
            time.sleep(0.02)
        assert not child_lives(members / member)
        more = ["--resume"]
    process = start([*command_words(tiny_folder, tmp_path, out), "--resume"])
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    for name in ("lora/metrics.jsonl", f"lora/{LORA}", "full/metrics.jsonl", f"full/{FULL}"):
        wanted = (whole / "run" / "members" / name).read_bytes()
        assert (members / name).read_bytes() == wanted, name


def test_config_faults_are_gathered() -> None:
    with pytest.raises(ConfigError, match=r"(?s)same='stepz'.*Did you mean 'steps'.*lora first"):
        CompareConfig(same="stepz", methods=("full",))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Did you mean 'exact-match'"):
        EvaluationConfig(metric="exact")  # type: ignore[arg-type]


def test_steps_of_a_trial_are_a_quarter_and_at_least_twenty() -> None:
    def steps(asked: int, rate_steps: int = 0) -> int:
        train = TrainConfig(steps=asked)
        return CompareConfig(
            train=train, rates=LearningRates((1e-3,), rate_steps=rate_steps)
        ).steps_tried

    assert [steps(200), steps(60), steps(12), steps(200, 7)] == [50, 20, 12, 7]


def test_a_full_model_moves_everywhere_and_lora_s_base_nowhere(
    target: DecoderTarget, config: CompareConfig, tiny_folder: Path
) -> None:
    done = compare(target, replace(config, rates=LearningRates(full_learning_rate=1e-2)))
    base = load_decoder(tiny_folder).state_dict()
    full = load_decoder(done.folder / "members" / "full" / "model").state_dict()
    assert all(not torch.equal(base[name], full[name]) for name in base)


def test_a_comparison_takes_epochs_and_a_resume_keeps_its_steps(
    target: DecoderTarget, config: CompareConfig
) -> None:
    train = replace(config.train, steps=None, epochs=0.2)
    done = compare(target, replace(config, train=train))
    asked = read_json(done.folder / "run.json")["compare"]["train"]
    assert 1 <= asked["steps"] < 12
    assert "epochs" not in asked
    assert {member.steps for member in done.comparison.members} == {asked["steps"]}
    again = replace(config, train=replace(train, epochs=None), resume=True)
    assert compare(target, again).comparison.members == done.comparison.members
    with pytest.raises(CheckpointError, match=r"train\.steps: "):
        compare(target, replace(again, train=replace(train, epochs=9.0)))
