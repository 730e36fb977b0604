from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora.errors import CheckpointError, ConfigError
from lora.report.page import find_facts, find_findings
from lora.report.records.collect import read_report
from lora.runs.directory import Run
from lora.runs.sweep_record import WaveTiming, append_wave_timing

Make = Callable[..., Path]


def rewrite(path: Path, change: Callable[[Any], None]) -> None:
    """Change a JSON file's value in place."""
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def test_a_run_is_read_with_all_its_figures(make_run: Make, tmp_path: Path) -> None:
    report = read_report([make_run()], tmp_path)
    (run,) = report.runs
    assert (run.name, run.method, run.status) == ("orders", "lora", "finished")
    assert (run.rank, run.alpha, run.learning_rate, run.seed) == (8, 16.0, 1e-3, 1337)
    assert (run.steps, run.total_steps, run.best_step) == (20, 20, 20)
    assert run.best_eval_loss == run.eval_loss == pytest.approx(0.5)
    assert (run.step_s, run.train_s, run.tokens_per_s) == (0.25, 5.0, 400.0)
    assert run.peak_memory_bytes == 1_000_000_000
    assert (run.trainable_parameters, run.total_parameters) == (640, 10_640)
    assert run.trainable_share == pytest.approx(640 / 10_640)
    assert run.stored_bytes is not None
    assert run.stored_bytes > 4 * 640
    assert [p.step for p in run.held_out] == [0, 5, 10, 15, 20]
    assert [p.time_s for p in run.held_out] == [0.0, 1.25, 2.5, 3.75, 5.0]
    assert len(run.training) == 20
    assert run.memory is not None
    assert run.memory.planned_total == 850_000_000
    assert list(run.memory.planned)[:2] == ["weights", "gradients"]
    assert run.notes == ("2 examples are there twice",)
    assert run.samples[-1].expected == '{"n": 2}'


def test_a_run_that_is_under_way_is_told_as_it_stands(make_run: Make, tmp_path: Path) -> None:
    folder = make_run()
    (folder / "result.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:9]) + '{"step": 8, "lo')  # cut by a crash
    (run,) = read_report([folder], tmp_path).runs
    assert (run.status, run.steps, run.total_steps) == ("unfinished", 7, 20)
    assert run.held_out[-1].step == 5
    assert run.memory is None
    assert run.trainable_parameters == 640  # from the adapter's header


def test_a_run_without_a_step_has_dashes_only(make_run: Make, tmp_path: Path) -> None:
    folder = make_run()
    for name in ("result.json", "metrics.jsonl", "timings.jsonl", "samples.jsonl"):
        (folder / name).unlink()
    (folder / "metrics.jsonl").touch()
    (run,) = read_report([folder], tmp_path).runs
    assert (run.steps, run.eval_loss, run.step_s, run.peak_memory_bytes) == (None,) * 4


def test_a_last_loss_that_is_not_finite_is_no_earlier_one(make_run: Make, tmp_path: Path) -> None:
    folder = make_run()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "eval_not_finite": "nan"}\n')
    (run,) = read_report([folder], tmp_path).runs
    assert run.eval_loss is None
    assert run.best_eval_loss == pytest.approx(0.5)
    assert "The validation loss at step 20 is nan, not finite." in run.notes


def test_a_sweep_knows_its_sweet_spot(make_sweep: Make, tmp_path: Path) -> None:
    report = read_report([make_sweep()], tmp_path)
    (sweep,) = report.sweeps
    assert sweep.best == "ranks/003-rank16-rate0.001"
    assert report.runs[0].name == sweep.best
    assert report.runs[0].label == "r16 1e-3"
    spot = sweep.sweet_spot
    assert spot is not None
    assert (spot.rank, spot.best_rank) == (8, 16)
    assert spot.noise == pytest.approx(0.0035)
    assert "one seed" in spot.noise_from
    assert [(t.rank, t.learning_rate, t.loss) for t in sweep.tried] == [
        (4, 1e-3, 0.4), (8, 3e-4, 0.8), (8, 1e-3, 0.352), (16, 1e-3, 0.35)
    ]  # fmt: skip
    by_status = {run.status: run for run in report.runs}
    assert by_status["failed"].reason == "the loss of step 3 is nan"
    assert by_status["stopped"].reason.startswith("halving at step 10")
    assert report.runs[0].total_parameters == 10_000 + 80 * 16
    assert (sweep.train_s, sweep.peak_memory_bytes) == (12.5, 2_000_000_000)


def test_of_waves_side_by_side_the_slowest_counts(make_sweep: Make, tmp_path: Path) -> None:
    folder = make_sweep()
    (folder / "timings.jsonl").unlink()
    for step, train_s, rank in ((10, 4.0, 0), (10, 5.0, 1), (20, 7.5, 0)):
        n_steps = 5 if step == 10 else 10
        append_wave_timing(Run(folder), WaveTiming(step, train_s, n_steps, 10, rank=rank))
    (sweep,) = read_report([folder], tmp_path).sweeps
    assert sweep.train_s == 5.0 + 7.5


def test_noise_is_measured_where_there_are_seeds(make_sweep: Make, tmp_path: Path) -> None:
    folder = make_sweep()
    ledger = folder / "sweep.json"
    losses = {"001": 0.400, "002": 0.360, "003": 0.350}

    def add_seed(values: Any) -> None:
        for state in list(values["candidates"]):
            loss = losses.get(state["name"][:3])
            if loss is None:
                continue
            other = {**state, "name": state["name"] + "-seed2", "eval_loss": loss + 0.02}
            old, new = (folder / "candidates" / s["name"] for s in (state, other))
            new.mkdir()
            text = (old / "run.json").read_text().replace('"seed": 1337', '"seed": 2')
            (new / "run.json").write_text(text)
            (new / "metrics.jsonl").write_text(f'{{"step": 20, "eval_loss": {loss + 0.02}}}\n')
            values["candidates"].append(other)

    rewrite(ledger, add_seed)
    report = read_report([folder], tmp_path)
    assert not [line for line in find_findings(report) if "One seed" in line]
    (sweep,) = report.sweeps
    spot = sweep.sweet_spot
    assert spot is not None
    # Pairs 0.40/0.42, 0.352/0.38, 0.35/0.37: variances 2e-4, 3.92e-4, 2e-4.
    assert spot.noise == pytest.approx((7.92e-4 / 3) ** 0.5)
    assert spot.noise_from == "one standard deviation between 2 seeds"
    assert spot.rank == 8
    assert next(t for t in sweep.tried if t.rank == 16).n_seeds == 2


def test_the_time_of_a_sweep_that_was_killed_is_not_known(make_sweep: Make, tmp_path: Path) -> None:
    folder = make_sweep()
    rewrite(folder / "sweep.json", lambda v: v.update(steps_taken=26))
    (sweep,) = read_report([folder], tmp_path).sweeps
    assert sweep.train_s is None
    assert sweep.peak_memory_bytes == 2_000_000_000


def test_an_unfinished_sweep_has_no_best(make_sweep: Make, tmp_path: Path) -> None:
    (sweep,) = read_report([make_sweep(is_finished=False)], tmp_path).sweeps
    assert (sweep.status, sweep.best) == ("unfinished", None)


def test_full_fine_tuning_stands_beside_a_sweep(
    make_sweep: Make, make_run: Make, tmp_path: Path
) -> None:
    folder = make_sweep()
    make_run("full", full=True, out=folder, end=0.6)
    report = read_report([folder], tmp_path)
    assert report.runs[-1].method == "full"
    (ratio,) = report.ratios  # the best candidate alone
    assert ratio.run == "ranks/003-rank16-rate0.001"
    assert ratio.loss_difference == pytest.approx(0.35 - 0.6)
    assert ratio.step_speed is None  # candidates share their steps


def test_a_comparison_gives_ratios(make_comparison: Make, tmp_path: Path) -> None:
    report = read_report([make_comparison()], tmp_path)
    (ratio,) = report.ratios
    assert ratio.step_speed == 2.0
    assert ratio.total_speed == 2.0
    assert ratio.memory_saved == pytest.approx(0.6)
    assert ratio.stored_fraction == pytest.approx(0.064)
    assert ratio.loss_difference == pytest.approx(-0.1)
    (comparison,) = report.comparisons
    lora, full = comparison.members
    assert [t.learning_rate for t in full.rates_tried] == [3e-5, 1e-4]
    assert lora.forgetting is not None
    assert (lora.forgetting.name, lora.forgetting.after) == ("the prose", 3.5)
    assert lora.task is not None
    assert lora.task.after == 0.75


def test_a_comparison_under_way_tells_its_members(make_comparison: Make, tmp_path: Path) -> None:
    report = read_report([make_comparison(is_finished=False)], tmp_path)
    assert [run.method for run in report.runs] == ["full", "lora"]
    assert report.comparisons[0].status == "unfinished"


def test_any_mix_is_one_report(
    make_run: Make, make_sweep: Make, make_comparison: Make, tmp_path: Path
) -> None:
    report = read_report([make_run(), make_sweep(), make_comparison()], tmp_path)
    names = [run.name for run in report.runs]
    assert len(names) == len(set(names)) == 1 + 6 + 2
    assert {run.group for run in report.runs} == {"", "ranks", "fair"}


def test_runs_that_are_called_alike_are_told_apart(make_run: Make, tmp_path: Path) -> None:
    folders = [make_run("same", out=tmp_path / part) for part in ("a", "b")]
    assert [run.name for run in read_report(folders, tmp_path).runs] == ["a/same", "b/same"]


def test_what_forbids_comparing_is_noted(make_run: Make, tmp_path: Path) -> None:
    one, other = make_run("one"), make_run("other")
    assert read_report([one, other], tmp_path).notes == ()
    rewrite(other / "run.json", lambda v: v["data"].update(held_out_fingerprint="held-2"))
    rewrite(other / "run.json", lambda v: v.update(base_fingerprint="base-2"))
    notes = read_report([one, other], tmp_path).notes
    assert any("evaluated on different validation data" in note for note in notes)
    assert any("different bases" in note for note in notes)


def test_how_the_base_was_stored_is_shown_and_noted(make_run: Make, tmp_path: Path) -> None:
    one, other = make_run("one"), make_run("other")
    assert "base" not in dict(find_facts(read_report([one, other], tmp_path)))
    nf4 = {"nf4_block": 64, "nf4_double_quant": True, "nf4_embeddings": False}
    rewrite(other / "run.json", lambda v: v.update(base_dtype="nf4", nf4=nf4))
    report = read_report([one, other], tmp_path)
    words = "nf4 (blocks of 64, double quantisation)"
    assert dict(find_facts(report))["base"] == f"not quantised · {words}"
    assert any(f"other values of the base ({words}; not quantised)" in n for n in report.notes)
    assert report.runs[1].settings["base_dtype"] == "nf4"


def test_every_fault_of_every_folder_is_told_at_once(make_run: Make, tmp_path: Path) -> None:
    broken, wrong = make_run("broken"), make_run("wrong")
    (broken / "run.json").write_text('{"model": ')
    (wrong / "metrics.jsonl").write_text('{"step": 1, "loss": "low"}\nnonsense\n')
    rewrite(wrong / "result.json", lambda v: v.update(train_s=[1]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError) as caught:
        read_report([broken, wrong, tmp_path / "empty", tmp_path / "brokn"], tmp_path / "out")
    text = str(caught.value)
    for words in (
        f"{broken / 'run.json'}: it is not valid JSON",
        f"{wrong / 'metrics.jsonl'}, line 2: it is not valid JSON",
        f"{wrong / 'result.json'}: train_s is [1], not a number",
        "empty is not a run directory: it has no run.json",
        "brokn does not exist. Did you mean 'broken'?",
    ):
        assert words in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["[]", "3", '"run"', "{}", '{"train": 3, "lora": [], "data": 7}'])
def test_a_strange_run_file_is_a_fault_or_a_bare_run(
    make_run: Make, tmp_path: Path, text: str
) -> None:
    folder = make_run()
    (folder / "run.json").write_text(text)
    if text == "{}":
        assert read_report([folder], tmp_path).runs[0].method == "unknown"
        return
    with pytest.raises(CheckpointError, match=r"run\.json"):
        read_report([folder], tmp_path)


def test_a_damaged_adapter_is_named(make_run: Make, tmp_path: Path) -> None:
    folder = make_run()
    (folder / "result.json").unlink()
    file = folder / "adapter" / "adapter_model.safetensors"
    file.write_bytes(b"\xff" * 20)
    with pytest.raises(
        CheckpointError, match=r"adapter_model\.safetensors is not a safetensors file"
    ):
        read_report([folder], tmp_path)


def test_a_candidate_never_leads_out_of_its_sweep(make_sweep: Make, tmp_path: Path) -> None:
    folder = make_sweep()
    rewrite(folder / "sweep.json", lambda v: v["candidates"][0].update(name=f"..{os.sep}.."))
    with pytest.raises(CheckpointError, match="no name of a folder"):
        read_report([folder], tmp_path)


def test_nothing_and_twice_are_refused(make_run: Make, tmp_path: Path) -> None:
    folder = make_run()
    with pytest.raises(ConfigError, match="Give at least one run directory"):
        read_report([], tmp_path)
    with pytest.raises(ConfigError, match="Cannot report on a run twice"):
        read_report([folder, folder / ".." / folder.name], tmp_path)
