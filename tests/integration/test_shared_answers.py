"""`lora eval` and `lora generate` in several processes print and write what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from lora.cli import main
from lora.distributed.world import World
from tests.distributed.processes import run_processes

SCRIPT = """
import sys
import lora

PROMPTS = ["3 lamps", "a mug for Anna", "red"]


def main():
    model, tokenizer = lora.load_model(sys.argv[1])
    each = [lora.generate(model, tokenizer, prompt, max_new_tokens=5) for prompt in PROMPTS]
    assert lora.generate(model, tokenizer, PROMPTS, max_new_tokens=5) == each
    found = lora.evaluate(model, tokenizer, sys.argv[2], answers=3, max_length=128)
    print(found.scores.loss, found.answers)


main()
"""


def _printed(world: World | None, words: list[str]) -> tuple[int, str, str]:
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = main(words)
    return code, out.getvalue(), err.getvalue()


def _printed_by_each(world: World, calls: list[list[str]]) -> list[tuple[int, str, str]]:
    return [_printed(world, words) for words in calls]


def test_commands_in_two_processes_print_and_write_what_one_does(
    tiny_folder: Path, orders_file: Path, tmp_path: Path
) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("one lamp\ntwo mugs for Bob\nthree\n")
    evaluation = ["eval", str(orders_file), "--model", str(tiny_folder), "--answers", "7"]
    evaluation += ["--max-new-tokens", "4", "--json", "--max-length", "128"]
    asks = ["generate", "hi", "--prompts-file", str(lines), "--model", str(tiny_folder)]
    asks += ["--max-new-tokens", "5", "--seed", "3", "--temperature", "0.8", "--json"]
    refused = [*evaluation, "--predictions", str(tmp_path / "nowhere" / "p.jsonl")]
    one = ["generate", "hi", "--model", str(tiny_folder), "--max-new-tokens", "2", "--json"]
    more = [asks, refused, one]
    calls = [[*evaluation, "--predictions", str(tmp_path / "shared.jsonl")], *more]
    own = [[*evaluation, "--predictions", str(tmp_path / "alone.jsonl")], *more]
    alone = [_printed(None, words) for words in own]
    first, second = run_processes(2, _printed_by_each, calls)
    assert [code for code, _, _ in alone] == [0, 0, 2, 0]
    for (code, out, _), (expected, wanted, _) in zip(first, alone, strict=True):
        assert (code, out) == (expected, wanted)
    assert [(code, out) for code, out, _ in second] == [(0, ""), (0, ""), (2, ""), (0, "")]
    assert (tmp_path / "shared.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    assert "there is no directory" in first[2][2]
    assert "1 of 2 processes have nothing to answer" in first[3][2]


@pytest.mark.slow
def test_python_scripts_under_torchrun_share_and_all_get_all(
    tiny_folder: Path, orders_file: Path, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    inputs = [str(script), str(tiny_folder), str(orders_file)]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    printed = []
    for before in ([], torchrun):
        done = subprocess.run(
            [sys.executable, *before, *inputs],
            env=environment, timeout=60, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.splitlines())
    alone, together = printed
    assert together == 2 * alone
