"""Files of `lora scale`, run in Bash with stand-ins for the schedulers: every value arrives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora import cli
from lora.cli.flags import resumed
from lora.finetune.job import FinetuneJob

ODD = """it's "odd" $HOME `x` \\ #1
two lines {text} {label}"""
WORDS = [
    *("my data.jsonl", "--targets", "q_proj,v_proj", "--rank-pattern", "q_proj=4,a.b=2"),
    *(
        "--lr",
        "1.23456789012e-4",
        "--batch-size",
        "64",
        "--no-packing",
        "--special-tokens",
        "<|a|>,-b",
    ),
    *("--template", ODD, "--system", "", "--layers", "0,1", "--name", "it's $HOME", "--no-report"),
    *("--out=-runs", "--memory-gb", "3.5", "--deterministic", "--precision", "fp32"),
]
TASK_FIELDS = {
    "name": str,
    "num_nodes": int,
    "resources": dict,
    "file_mounts": dict,
    "setup": str,
    "run": str,
}
"""Of a SkyPilot task: docs.skypilot.co/en/latest/reference/yaml-spec.html."""


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[FinetuneJob]:
    """The jobs that lora finetune would run."""
    seen: list[FinetuneJob] = []

    def run(job: FinetuneJob, *_: Any, **__: Any) -> None:
        seen.append(job)
        raise KeyboardInterrupt

    monkeypatch.setattr("lora.finetune.run.finetune", run)
    return seen


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with an odd name, in which `lora scale` is called."""
    folder = tmp_path / "user's $dir"
    folder.mkdir()
    (folder / "my data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    monkeypatch.chdir(folder)
    return folder


class Machines:
    """Stand-ins for the programs that start files call: each records the words it was given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.record = folder / "words"
        self.environment = {**os.environ, "PATH": f"{folder}:/usr/bin:/bin", "HOME": str(folder)}
        for name in ("torchrun", "python"):
            self.program(name, f'printf "%s\\0" "$@" > "{self.record}"')
        self.program("scontrol", f'echo "$1" >> "{folder}/calls"; echo node7; echo node8')
        self.program("srun", 'while [[ $1 = --* ]]; do shift; done; exec "$@"')
        self.environment |= {"PYTHON": str(folder / "python"), "SLURM_JOB_ID": "123456"}
        self.environment |= {"SLURM_JOB_NODELIST": "node[7-8]", "HEAD": "node7"}
        self.environment |= {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.9\n10.0.0.5"}
        (folder / "lora-env" / "bin").mkdir(parents=True)
        (folder / "lora-env" / "bin" / "activate").touch()

    def program(self, name: str, body: str) -> None:
        """Put a program into the PATH."""
        path = self.folder / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def run(self, script: str, *words: str) -> list[str]:
        """Run a script in Bash; return the words that torchrun got."""
        subprocess.run(["bash", "-n", "-c", script], check=True)
        command = ["bash", "-c", script, "bash", *words]
        subprocess.run(command, check=True, env=self.environment, cwd="/", timeout=60)
        return self.record.read_text().split("\0")[:-1]


@pytest.fixture
def machines(tmp_path: Path) -> Machines:
    """Machines whose programs are stand-ins."""
    return Machines(tmp_path / "machines")


def scripts_of(to: str, *words: str) -> str:
    """Return the script that `lora scale` writes for `words`; of a SkyPilot task what it runs."""
    gpu = ["--gpu", "H100"] if to == "skypilot" else []
    assert cli.main(["scale", *words, "--to", to, *gpu, "--file", "start", "--overwrite"]) == 0
    text = Path("start").read_text()
    return str(yaml.safe_load(text)["run"]) if to == "skypilot" else text


def launched(words: list[str]) -> list[str]:
    """Return the words of `lora` among those that torchrun got."""
    return words[words.index("lora") + 1 :]


@pytest.mark.parametrize("nodes", ["1", "2"])
@pytest.mark.parametrize("to", ["torchrun", "slurm", "skypilot"])
def test_every_value_arrives_through_the_shell(
    to: str, nodes: str, folder: Path, machines: Machines, jobs: list[FinetuneJob]
) -> None:
    script = scripts_of(to, *WORDS, "--nodes", nodes, "--devices", "4")
    got = machines.run(script)
    assert f"--nnodes={nodes}" in got
    assert "--nproc-per-node=4" in got
    assert cli.main(launched(got)) == 130
    assert cli.main(["finetune", *WORDS]) == 130
    assert jobs[0] == jobs[1]


def test_where_the_processes_meet(folder: Path, machines: Machines) -> None:
    words = ["my data.jsonl", "--name", "a b", "--devices", "2"]
    assert "--standalone" in machines.run(scripts_of("torchrun", *words))
    words += ["--nodes", "2"]
    got = machines.run(scripts_of("torchrun", *words), "--steps", "7")
    assert {"--rdzv-backend=c10d", "--rdzv-endpoint=node7:29400", "--rdzv-id=a-b"} <= set(got)
    assert got[-2:] == ["--steps", "7"]
    got = machines.run(scripts_of("slurm", *words))
    assert {"--rdzv-endpoint=node7:23456", "--rdzv-id=123456"} <= set(got)
    got = machines.run(scripts_of("skypilot", *words))
    assert {"--node-rank=1", "--master-addr=10.0.0.9"} <= set(got)


@pytest.mark.parametrize("to", ["torchrun", "slurm", "skypilot"])
def test_started_again_it_continues_the_run(to: str, folder: Path, machines: Machines) -> None:
    script = scripts_of(to, "my data.jsonl", "--name", "it's", "--devices", "2", "--out", "o o")
    assert "--resume" not in machines.run(script)
    begun = (machines.folder / "lora-run" if to == "skypilot" else folder) / "o o" / "it's"
    begun.mkdir(parents=True)
    (begun / "run.json").touch()
    assert machines.run(script)[-1] == "--resume"


def test_before_the_time_limit_slurm_s_job_saves_and_goes_back_into_the_queue(
    folder: Path, machines: Machines
) -> None:
    marks = machines.folder
    trap = f'trap "sleep 0.3; touch {marks}/saved; exit 143" TERM; touch {marks}/began'
    machines.program("python", f"echo $$ > {marks}/pid; {trap}; while :; do sleep 0.05; done")
    machines.program(
        "scancel", f'[[ "$*" = "--signal=TERM 123456" ]] && kill -TERM $(<{marks}/pid)'
    )
    script = scripts_of("slurm", "my data.jsonl", "--name", "a", "--devices", "2")
    job = subprocess.Popen(["bash", "-c", script], env=machines.environment)
    while job.poll() is None and not (marks / "began").exists():
        time.sleep(0.02)
    assert (marks / "calls").read_text() == "show\n"
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == 143
    assert (marks / "saved").exists()
    assert (marks / "calls").read_text() == "show\nrequeue\n"


def test_slurm_s_options_come_before_the_first_command(folder: Path) -> None:
    words = ["my data.jsonl", "--name=-a\"b c'", "--nodes", "2", "--devices", "4"]
    lines = scripts_of("slurm", *words, "--gpu", "h100").splitlines()
    options = [line for line in lines[1 : lines.index("#")] if line.startswith("#SBATCH --")]
    assert len(options) == lines.index("#") - 1
    assert {
        "#SBATCH --job-name=a-b-c",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --gpus-per-node=h100:4",
        "#SBATCH --signal=B:USR1@600",
        "#SBATCH --requeue",
    } <= set(options)
    on_cpu = scripts_of("slurm", *words, "--device", "cpu")
    assert "gpus" not in on_cpu
    assert "#SBATCH --cpus-per-task=4\n" in on_cpu


def test_a_skypilot_task_has_the_fields_of_its_specification(folder: Path) -> None:
    (folder.parent / "more.jsonl").touch()
    (folder / "adapter").mkdir()
    assert (
        cli.main(
            [
                *("scale", "my data.jsonl", "--eval-data", "../more.jsonl", "--nodes", "2"),
                *("--from-adapter", "./adapter@best", "--model", "owner/model", "--name", "a"),
                *("--devices", "4", "--to", "skypilot", "--gpu", "H100"),
            ]
        )
        == 0
    )
    task = yaml.safe_load(Path("a.sky.yaml").read_text())
    assert {name: type(value) for name, value in task.items()} == TASK_FIELDS
    assert task["num_nodes"] == 2
    assert task["resources"] == {
        "accelerators": "H100:4",
        "job_recovery": {"max_restarts_on_errors": 3},
    }
    above = os.path.abspath(folder.parent / "more.jsonl")
    mounts = dict(task["file_mounts"])
    assert "pyproject.toml" in os.listdir(mounts.pop("~/lora-lm"))
    assert mounts == {
        "~/lora-run/my data.jsonl": str(folder / "my data.jsonl"),
        "~/lora-run/adapter": str(folder / "adapter"),
        above: above,
    }
    assert f"--eval-data {above}" in task["run"]
    assert "--from-adapter adapter@best" in task["run"]
    assert 'uv pip install "$HOME/lora-lm[data,hub,track]"' in task["setup"]
    assert "smollm2" not in task["setup"]
    subprocess.run(["bash", "-n", "-c", task["setup"]], check=True)


def test_a_file_the_environment_and_a_run_give_settings(
    folder: Path,
    machines: Machines,
    jobs: list[FinetuneJob],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("run.yaml").write_text("data: my data.jsonl\nlora:\n  rank: 4\nsteps: 10\nname: x\n")
    monkeypatch.setenv("LORALM_FINETUNE_LORA_ALPHA", "7")
    monkeypatch.setenv("LORALM_FINETUNE_STEPS", "8")
    got = machines.run(scripts_of("slurm", "run.yaml", "--devices", "2", "--rank", "2"))
    assert cli.main(launched(got)) == 130
    job = jobs[-1]
    assert job.lora is not None
    assert (job.lora.rank, job.lora.alpha, job.train.steps, job.run.name) == (2, 7.0, 8, "x")

    monkeypatch.delenv("LORALM_FINETUNE_STEPS")
    monkeypatch.delenv("LORALM_FINETUNE_LORA_ALPHA")
    recorded = {
        "data": "my data.jsonl",
        "name": "old",
        "steps": 5,
        "seed": 3,
        "targets": ["q", "v"],
    }
    monkeypatch.setattr(resumed, "read_run_record", lambda directory: None)
    monkeypatch.setattr(resumed, "finetune_settings", lambda record, name: dict(recorded))
    words = ["--run", "runs/old", "--devices", "2", "--steps", "6"]
    got = machines.run(scripts_of("slurm", *words, "--name", "new"))
    assert cli.main(launched(got)) == 130
    job = jobs[-1]
    assert job.lora is not None
    assert (job.train.steps, job.train.seed, job.run.name) == (6, 3, "new")
    assert job.lora.targets == ("q", "v")
    assert cli.main(["scale", *words, "--to", "slurm", "--file", "b"]) == 2
    script = scripts_of("slurm", *words, "--resume")
    assert script.count("--resume") == 1
    assert "--name old" in script


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "without a name"),
        ("--name a/b", "Cannot name a run"),
        ("--name a --devices 0", "devices=0"),
        ("--name a --devices -1", "devices=-1"),
        ("--name a --devices x", "devices"),
        ("--name a --nodes 0", "nodes=0"),
        ("--name a --max-restarts -1", "max_restarts=-1"),
        ("--name a --to skypilot", "without a type of GPU"),
        ("--name a --to skypilot --gpu H100:8", "a type of GPU such as"),
        ("--name a --to skypilot --gpu H100 --resume", "--resume with --to skypilot"),
        ("--name a --to torchrun --gpu H100", "Cannot use --gpu H100"),
        ("--name a --to skypilot --device cpu", "--device cpu with --to skypilot"),
        ("--name a --gpu H100 --device cpu", "Cannot combine --gpu H100 with --device cpu"),
        ("--name a --device cuda:1", "--device cuda:1 in several processes"),
        ("--name a --devices 1 --parallel fsdp", "parallel='fsdp' with one process"),
        ("--name a --to sge", "sge"),
        ("--name a --nodes 8", "Cannot train with 16 processes: a micro-batch has 8 sequences"),
        ("--name a --full --rank 8", "Cannot combine full, rank"),
        ("--name a --full --base-dtype fp8", "base_dtype='fp8'"),
        ("--name a --eval-data x --eval-fraction 0.5", "eval_fraction=0.5"),
        ("--name a --micro-batch-size 3", "effective batch size"),
        ("--name a --jason", "--jason"),
    ],
)
def test_what_cannot_start_is_refused_and_nothing_is_written(
    words: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words.split()
    for flag, value in (("--devices", "2"), ("--to", "slurm")):
        given += [] if flag in given else [flag, value]
    assert cli.main(["scale", "my data.jsonl", *given]) == 2
    assert said in capsys.readouterr().err
    assert os.listdir(folder) == ["my data.jsonl"]


def test_the_file_replaces_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["my data.jsonl", "--name", "a", "--devices", "2", "--to", "slurm"]
    assert cli.main(["scale", *words]) == 0
    assert "wrote a.slurm.sh. Start with: sbatch a.slurm.sh" in capsys.readouterr().out
    assert cli.main(["scale", *words]) == 2
    assert "file exists" in capsys.readouterr().err
    assert cli.main(["scale", *words, "--file", "my data.jsonl", "--overwrite"]) == 2
    assert "is read by this command" in capsys.readouterr().err
    assert sys.executable in Path("a.slurm.sh").read_text()
