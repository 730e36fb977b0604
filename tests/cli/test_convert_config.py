"""`lora convert-config` writes a file that `lora finetune` takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora.cli import build_app, main
from lora.cli.flags.values import name_pairs
from lora.cli.flags.yaml_file import read_settings

FILE = """\
base_model: some/llama
datasets: [{path: "data/my tickets: all.jsonl", field_messages: talk}]
adapter: lora
lora_r: 4
lora_target_modules: [q_proj, v_proj]
micro_batch_size: 2
gradient_accumulation_steps: 3
learning_rate: 1e-4
wandb_project: "line\\nbreak"
"""


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A file of axolotl."""
    path = tmp_path / "other.yml"
    path.write_text(FILE)
    return path


def test_the_file_is_taken_by_finetune(
    other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.yaml"
    assert main(["convert-config", str(other), "--out", str(out)]) == 0
    printed, told = capsys.readouterr()
    assert printed == ""
    assert f"wrote {out}: lora finetune {out}" in told
    assert "wandb_project: " in told
    settings = read_settings(out)
    app = build_app("finetune", [(settings, str(out))])
    _, bound, _ = app.parse_args(name_pairs(["finetune"]), exit_on_error=False)
    given = bound.arguments
    assert given["data"] == Path("data/my tickets: all.jsonl")
    assert given["data_config"].columns == {"messages": "talk"}
    assert given["lora"].targets == ("q_proj", "v_proj")
    assert (given["train"].batch_size, given["train"].learning_rate) == (6, 1e-4)


def test_without_out_it_is_printed(other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert-config", str(other)]) == 0
    assert capsys.readouterr().out.startswith("# Settings of lora finetune, converted from axolotl")


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (["--out", "{other}", "--overwrite"], "is read by this command"),
        (["--overwrite"], "Cannot use --overwrite without --out"),
        (["--out", "nowhere/run.yaml"], "there is no directory nowhere"),
    ],
)
def test_what_cannot_be_written_is_refused(
    words: list[str], seen: str, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("{other}", str(other)) for word in words]
    assert main(["convert-config", str(other), *words]) == 2
    assert seen in capsys.readouterr().err
    assert other.read_text() == FILE


def test_variables_of_the_environment_have_underscores(
    other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.yaml"
    monkeypatch.setenv("LORALM_CONVERT_CONFIG_OUT", str(out))
    assert main(["convert-config", str(other)]) == 0
    assert out.is_file()
    monkeypatch.setenv("LORALM_CONVERT_CONFIG_OTU", "x")
    assert main(["convert-config", str(other)]) == 2
    assert "Did you mean 'LORALM_CONVERT_CONFIG_OUT'" in capsys.readouterr().err
