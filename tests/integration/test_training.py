"""training.py as a user runs it: a process, the environment, a folder of results."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import training
from lora.compare import run as compare_run
from tests.compare.in_this_process import run_in_this_process

# Its base is trained once, in one of the workers that share the tests.
pytestmark = pytest.mark.xdist_group("training")

ROOT = Path(__file__).parents[2]
TINY = {"N_EMBD": "32", "N_HEAD": "2", "N_LAYER": "1", "BLOCK_SIZE": "16", "BATCH_SIZE": "4"}
TINY |= {"BASE_STEPS": "20", "MAX_STEPS": "12", "EVAL_INTERVAL": "6", "OMP_NUM_THREADS": "1"}
Runner = Callable[..., subprocess.CompletedProcess[str]]
LORA_MODULES = ("lora_module", "layers", "adapters", "stacked")


def environment(out: Path, **variables: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("LORA_")}
    return {**kept, **TINY, "OUTPUT_DIR": str(out), **variables}


def run(out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "training.py")]
    return subprocess.run(
        command, env=environment(out, **variables), capture_output=True, text=True, check=False
    )


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    """As `run`, in this process: it need not import torch."""

    def run_here(out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        for name, value in environment(out, **variables).items():
            monkeypatch.setenv(name, value)
        code = training.main()
        printed = capsys.readouterr()
        return subprocess.CompletedProcess("training.py", code, printed.out, printed.err)

    return run_here


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    out = tmp_path_factory.mktemp("base")
    done = run(out, DATA_PATH=str(text))
    assert done.returncode == 0, done.stderr
    return out / "base"


def test_a_base_leaves_a_whole_folder(base: Path) -> None:
    names = {path.name for path in base.iterdir()}
    wanted = {"run.json", "metrics.jsonl", "timings.jsonl", "result.json", "samples.json"}
    assert wanted | {"loss.png", "model", "checkpoints", "report.html"} <= names
    assert (base / "loss.png").read_bytes()[:4] == b"\x89PNG"
    result = json.loads((base / "result.json").read_text())
    assert result["steps"] == 20
    assert result["eval_loss"] < 3.0
    assert result["peak_memory_bytes"] > 50e6
    assert {path.name for path in (base / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "vocab.json",
    }


def adapt(base: Path, text: Path, out: Path) -> tuple[Path, str]:
    """Return the run directory of an adapter, and what was printed."""
    variables = {"LORA_RANK": "4", "LORA_ALPHA": "8.0", "LORA_DROPOUT": "0.1", "USE_LORA": "True"}
    done = run(out, BASE_CHECKPOINT=str(base), DATA_PATH=str(text), **variables)
    assert done.returncode == 0, done.stderr
    return out / "lora-r4", done.stdout


@pytest.fixture(scope="module")
def adapted(base: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return adapt(base, text, tmp_path_factory.mktemp("adapted"))


def test_lora_saves_the_adapter_alone_and_loads_it_again(adapted: tuple[Path, str]) -> None:
    folder, printed = adapted
    assert "LoRA (A and B)" in printed
    assert "the same to the last digit" in printed
    assert "saves nothing" not in printed
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert not (folder / "model").exists()
    described = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"], described["lora_dropout"]) == (4, 8, 0.1)
    assert set(json.loads((folder / "samples.json").read_text())) == {"before", "after"}


def test_an_adapter_larger_than_its_base_is_noted() -> None:
    from models.bigram_lm_v2 import BigramLanguageModel
    from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
    from training import outweighs

    base = BigramLanguageModel(vocab_size=97, n_embd=32, n_head=2, n_layer=1, block_size=16)
    small, large = (BigramLanguageModelLoRA.from_base(base, lora_rank=r) for r in (8, 200))
    assert outweighs(small, base) is None
    assert "Try a lower LORA_RANK" in (outweighs(large, base) or "")


def test_two_runs_give_the_same_metrics_to_the_byte(
    base: Path, text: Path, tmp_path: Path, adapted: tuple[Path, str]
) -> None:
    again, _ = adapt(base, text, tmp_path)
    assert (again / "metrics.jsonl").read_bytes() == (adapted[0] / "metrics.jsonl").read_bytes()


def test_plain_training_is_the_same_where_loras_code_is_absent(
    base: Path, text: Path, tmp_path: Path
) -> None:
    assert all(importlib.util.find_spec(f"lora.{name}") for name in LORA_MODULES)
    absent = "".join(f"sys.modules['lora.{name}'] = None\n" for name in LORA_MODULES)
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{absent}import training\n"
    code += "sys.exit(training.main())"
    variables = environment(tmp_path, DATA_PATH=str(text))
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    metrics = (tmp_path / "base" / "metrics.jsonl").read_bytes()
    assert metrics == (base / "metrics.jsonl").read_bytes()


def test_lora_without_a_base_trains_one_and_reuses_it(tmp_path: Path, here: Runner) -> None:
    # On the text that comes with the project, in batches that are evaluated fast.
    first = here(tmp_path, USE_LORA="True", BATCH_SIZE="256")
    assert first.returncode == 0, first.stderr
    assert "LoRA on random weights is meaningless" in first.stdout
    second = here(tmp_path, USE_LORA="True", BATCH_SIZE="256")
    assert second.returncode == 0, second.stderr
    assert "base: reusing" in second.stdout
    bases = [path.name for path in tmp_path.iterdir() if path.name.startswith("base")]
    assert len(bases) == 1
    assert {"lora-r8", "lora-r8-2"} <= {path.name for path in tmp_path.iterdir()}


def test_full_fine_tuning_from_the_same_base(
    base: Path, text: Path, tmp_path: Path, here: Runner
) -> None:
    done = here(tmp_path, BASE_CHECKPOINT=str(base), DATA_PATH=str(text))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "full" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("content", "variables", "seen"),
    [
        (None, {}, "does not exist"),
        ("", {}, "is empty"),
        ("aaaa", {}, "only the character 'a'"),
        ("short text", {}, "block_size + 1 = 17"),
        ("héllo wörld " * 100, {"BASE": "yes"}, "Allowed: 1%"),
        ("plain " * 100, {"LORA_RNAK": "8"}, "Did you mean 'LORA_RANK'"),
        ("plain " * 100, {"USE_LORA": "maybe"}, "must be True or False"),
        ("plain " * 100, {"USE_LORA": "True", "BASE": "yes", "LORA_RANK": "0"}, "rank=0"),
        (
            "plain " * 100,
            {"BASE_CHECKPOINT": "nowhere"},
            "BASE_CHECKPOINT=nowhere: it does not exist",
        ),
        ("plain " * 100, {"DEVICE": "gpu"}, "device='gpu'"),
    ],
)
def test_bad_input_ends_with_one_message_and_leaves_nothing(
    base: Path,
    tmp_path: Path,
    here: Runner,
    content: str | None,
    variables: dict[str, str],
    seen: str,
) -> None:
    path, out = tmp_path / "text.txt", tmp_path / "out"
    if content is not None:
        path.write_text(content)
    variables = {**variables}
    if variables.pop("BASE", None):
        variables["BASE_CHECKPOINT"] = str(base)
    ask = run if content is None else here
    done = ask(out, DATA_PATH=str(path), **variables)
    assert done.returncode == 2
    assert seen in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists() or not any(out.iterdir())


@pytest.mark.parametrize("isolated", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compare_sets_lora_beside_full_fine_tuning(
    base: Path,
    text: Path,
    tmp_path: Path,
    here: Runner,
    isolated: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not isolated:
        monkeypatch.setattr(compare_run, "run_in_subprocess", run_in_this_process)
    variables = {"BASE_CHECKPOINT": str(base), "DATA_PATH": str(text)}
    rates = {"COMPARE": "True", "COMPARE_RATES": "5e-3,2e-2", "COMPARE_FULL_RATES": "1e-3,1e-2"}
    done = here(tmp_path, **variables, **rates)
    assert done.returncode == 0, done.stderr
    assert "LoRA against full fine-tuning" in done.stdout
    folder = tmp_path / "compare-r8"
    found = json.loads((folder / "compare.json").read_text())
    lora, full = found["members"]
    assert (lora["method"], full["method"], found["base"]) == ("lora", "full", "base")
    assert {t["learning_rate"] for t in full["rates_tried"]} == {1e-3, 1e-2}
    assert lora["steps"] == full["steps"] == 12
    assert lora["trainable_parameters"] < full["trainable_parameters"]
    assert lora["final_eval_loss"] < found["base_eval_loss"]
    tokens = [
        [row["tokens"] for row in map(json.loads, path.read_text().splitlines()) if "loss" in row]
        for path in sorted(folder.glob("members/*/metrics.jsonl"))
    ]
    assert tokens[0] == tokens[1] == [64 * n for n in range(1, 13)]
    rate = str(lora["learning_rate"])
    for name in rates:
        monkeypatch.delenv(name)
    alone = here(tmp_path, **variables, USE_LORA="True", LEARNING_RATE=rate)
    assert alone.returncode == 0, alone.stderr
    name = "adapter/adapter_model.safetensors"
    wanted = (tmp_path / "lora-r8" / name).read_bytes()
    assert (folder / "members" / "lora" / name).read_bytes() == wanted


def test_rates_to_compare_want_a_comparison(tmp_path: Path, here: Runner) -> None:
    done = here(tmp_path, COMPARE_RATES="1e-3")
    assert done.returncode == 2
    assert "COMPARE=True" in done.stderr
    done = here(tmp_path, COMPARE="True", COMPARE_RATES="1e-3,x")
    assert done.returncode == 2
    assert "'x'" in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("unbuffered", ["1", ""])
def test_a_reader_that_is_gone_costs_no_model(tmp_path: Path, text: Path, unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    settings = {"DATA_PATH": str(text), "BASE_STEPS": "2", "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        [sys.executable, str(ROOT / "training.py")],
        env=environment(tmp_path, **settings),
        stdout=writer,
        stderr=writer,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 0
    assert (tmp_path / "base" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "base" / "result.json").is_file()
