"""One wave: it is trained before it is finished, the base stays plain, failures stay their own."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lora.config import LoRAConfig, TrainConfig
from lora.data.sequences.batches import TokenSequences, build_sequences
from lora.data.sequences.documents import DocumentsBuilder
from lora.decoder.decoder import build_decoder
from lora.device import DeviceChoice
from lora.errors import CheckpointError
from lora.runs.directory import Run
from lora.runs.disk import read_rows
from lora.runs.interrupts import StopRequests
from lora.runs.sweep_record import CandidateState, SweepRecord, find_best, read_sweep_record
from lora.sweep import wave_loop
from lora.sweep.context import SweepContext
from lora.sweep.grid import Grid, build_candidates
from lora.sweep.progress import NoSweepProgress
from lora.sweep.rounds import settle_wave, train_rounds
from lora.sweep.wave import finish_wave, train_wave
from lora.sweep.wave_checkpoint import (
    CHECKPOINTS,
    TensorState,
    load_wave,
    remove_waves,
    values_to_save,
)
from lora.sweep.wave_loop import WavePlan
from lora.training.checkpoint import load_newest, save_checkpoint
from tests.fast.memory.conftest import TINY

STEPS = 6


def make_sequences() -> TokenSequences:
    builder, draw = DocumentsBuilder(), np.random.default_rng(0)
    for n in range(8):
        ids = draw.integers(3, TINY.vocab_size, 15).astype(np.int32)
        builder.add(ids, np.ones(15, np.bool_), n)
    return build_sequences(builder.build(), 16, packing=False, pad_id=0, seed=0)


@pytest.fixture
def context(tmp_path: Path) -> SweepContext:
    train = TrainConfig(steps=STEPS, batch_size=2)
    candidates = build_candidates(
        Grid(rank=(2, 4), learning_rate=(1e-3, 1e-2)), LoRAConfig(), train
    )
    model, sequences = build_decoder(TINY, 0), make_sequences()
    return SweepContext(
        candidates=tuple(candidates),
        model=model.requires_grad_(False),
        train=sequences,
        validation=sequences,
        micro_batch_size=2,
        micro_batches=1,
        eval_every_steps=2,
        save_every_steps=2,
        choice=DeviceChoice(torch.device("cpu"), torch.float32, "a test"),
        run=Run(tmp_path),
        progress=NoSweepProgress(),
    )


@pytest.fixture
def record(context: SweepContext) -> SweepRecord:
    states = [CandidateState(c.name, c.settings()) for c in context.candidates]
    return SweepRecord(states, (3, STEPS), at_once=4, base_eval_loss=5.7)


class StopAfter(StopRequests):
    """A signal that comes while a step is taken."""

    def __init__(self, steps: int) -> None:
        super().__init__(lambda text: None)
        self._left = steps

    @property
    def received(self) -> object:  # type: ignore[override]
        self._left -= 1
        return "SIGINT" if self._left < 0 else None

    @received.setter
    def received(self, value: object) -> None:
        pass


def parameters(context: SweepContext) -> dict[str, torch.Tensor]:
    return {name: p.clone() for name, p in context.model.named_parameters()}


def is_plain(context: SweepContext, before: dict[str, torch.Tensor]) -> bool:
    now = dict(context.model.named_parameters())
    return now.keys() == before.keys() and all(torch.equal(now[n], before[n]) for n in now)


def test_a_wave_is_trained_and_finished_and_the_next_goes_on(
    context: SweepContext, record: SweepRecord
) -> None:
    saved: list[str] = []
    before, never = parameters(context), StopAfter(100)
    for until, status in ((3, "waiting"), (STEPS, "done")):
        wave = train_wave(context, record, WavePlan(list(context.candidates), until), never)
        assert is_plain(context, before)
        assert (wave.is_over, wave.step, wave.n_steps) == (True, until, 3)
        finish_wave(context, record, wave, lambda candidate, tensors: saved.append(candidate.name))
        assert {c.status for c in record.candidates} == {status}
        assert read_sweep_record(context.run.folder) == record
        assert not (context.run.folder / "checkpoints").exists()
    assert saved == 2 * [c.name for c in context.candidates]
    assert record.steps_taken == STEPS
    for candidate, state in zip(context.candidates, record.candidates, strict=True):
        folder = context.run.folder / "candidates" / candidate.name
        assert not (folder / "state").exists()
        rows = read_rows(folder / "metrics.jsonl")
        assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
        assert [row["step"] for row in rows if "eval_loss" in row] == [0, 2, 3, 4, 6]
        assert (state.step, state.row) == (STEPS, 2 * STEPS)


def test_an_interrupted_wave_cannot_be_finished(context: SweepContext, record: SweepRecord) -> None:
    plan = WavePlan(list(context.candidates), 3)
    wave = train_wave(context, record, plan, StopAfter(1))
    assert (wave.is_over, wave.step) == (False, 1)
    with pytest.raises(ValueError, match="interrupted"):
        finish_wave(context, record, wave, lambda candidate, tensors: pytest.fail("was saved"))
    assert read_sweep_record(context.run.folder) is None


def test_a_saved_wave_ends_as_one_that_was_never_stopped(
    context: SweepContext, record: SweepRecord, tmp_path: Path
) -> None:
    (tmp_path / "whole").mkdir()
    whole, expected = replace(context, run=Run(tmp_path / "whole")), deepcopy(record)
    plan = WavePlan(list(context.candidates), 3)
    plain = train_wave(whole, expected, plan, StopAfter(100))
    train_wave(context, deepcopy(record), plan, StopAfter(1))  # the record on disk stays behind
    saved = load_wave(context, record)
    assert saved is not None
    wave = train_wave(context, record, replace(plan, saved=saved), StopAfter(100))
    assert (wave.timed_steps, wave.n_steps) == (2, 3)
    assert record == expected
    for member, other in zip(wave.members, plain.members, strict=True):
        assert member.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(t, other.tensors[n]) for n, t in member.tensors.items())


def test_a_checkpoint_of_version_1_is_read(context: SweepContext, record: SweepRecord) -> None:
    train_wave(context, deepcopy(record), WavePlan(list(context.candidates), 3), StopAfter(2))
    expected = load_wave(context, record)
    folder = context.run.folder / CHECKPOINTS
    tensors, state = load_newest(folder, lambda text: None)
    state["standings"] = state.pop("candidates")  # as lora-lm wrote it before
    save_checkpoint(folder, state.pop("step"), tensors, state, keep=1)
    found = load_wave(context, record)
    assert expected is not None
    assert found is not None
    assert found.position == expected.position


def test_a_split_wave_leaves_every_candidate_where_it_was(
    context: SweepContext, record: SweepRecord
) -> None:
    train_wave(context, deepcopy(record), WavePlan(list(context.candidates), 3), StopAfter(2))
    saved = load_wave(context, record)
    assert saved is not None
    adapters: list[str] = []
    n_steps = settle_wave(context, record, saved, lambda c, tensors: adapters.append(c.name))
    remove_waves(context, record, n_steps)
    assert adapters == []
    assert load_wave(context, record) is None
    assert {(c.status, c.step) for c in record.candidates} == {("waiting", 2)}
    assert record.steps_taken == 2
    half = WavePlan(list(context.candidates[:2]), 3)
    wave = train_wave(context, record, half, StopAfter(100))
    assert (wave.step, wave.n_steps, len(wave.members)) == (3, 1, 2)


def test_a_complete_wave_that_was_never_closed_is_finished_when_others_follow(
    context: SweepContext, record: SweepRecord
) -> None:
    whole = WavePlan(list(context.candidates[:3]), STEPS)
    train_wave(context, deepcopy(record), whole, StopAfter(100))  # killed before it is finished
    saved: list[str] = []
    smaller = replace(record, at_once=2)
    train_rounds(context, smaller, StopAfter(100), lambda c, tensors: saved.append(c.name))
    assert {c.status for c in smaller.candidates} == {"done"}
    # The fourth is saved at the first rung too.
    assert saved == [c.name for c in (*context.candidates, context.candidates[3])]
    assert smaller.steps_taken == 2 * STEPS
    assert not (context.run.folder / CHECKPOINTS).exists()


def test_the_base_is_plain_again_after_an_error(
    context: SweepContext, record: SweepRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no memory")

    before, plan = parameters(context), WavePlan(list(context.candidates), 3)
    for name in ("stack_batches", "choose_stacked_runner"):
        with monkeypatch.context() as patched:
            patched.setattr(wave_loop, name, refuse)
            with pytest.raises(RuntimeError, match="no memory"):
                train_wave(context, record, plan, StopAfter(100))
        assert is_plain(context, before)


def test_a_checkpoint_of_other_candidates_is_refused(
    context: SweepContext, record: SweepRecord
) -> None:
    train_wave(context, record, WavePlan(list(context.candidates), 3), StopAfter(1))
    fewer = replace(context, candidates=context.candidates[:2])
    with pytest.raises(CheckpointError, match="Cannot resume"):
        load_wave(fewer, record)


def test_a_candidate_that_fails_keeps_its_slot_and_is_not_saved(
    context: SweepContext, record: SweepRecord
) -> None:
    broken = replace(context.candidates[1], train=TrainConfig(steps=STEPS, learning_rate=1e30))
    candidates = (context.candidates[0], broken, *context.candidates[2:])
    context, saved = replace(context, candidates=candidates), list[str]()

    def save(candidate: object, tensors: TensorState) -> None:
        saved.append(candidate.name)  # type: ignore[attr-defined]

    wave = train_wave(context, record, WavePlan(list(candidates), STEPS), StopAfter(100))
    finish_wave(context, record, wave, save)
    assert [c.status for c in record.candidates] == ["done", "failed", "done", "done"]
    assert "not finite" in record.candidates[1].reason
    assert saved == [c.name for c in candidates if c is not broken]


def scripted(monkeypatch: pytest.MonkeyPatch, losses: dict[int, list[float]]) -> None:
    """The validation losses of the four candidates after each step that evaluates are these."""
    evaluate = wave_loop.WaveLoop._evaluate

    def scripted_evaluate(loop: wave_loop.WaveLoop) -> None:
        loop.runner.evaluate = lambda batches: losses[loop.step]  # type: ignore[method-assign]
        evaluate(loop)

    monkeypatch.setattr(wave_loop.WaveLoop, "_evaluate", scripted_evaluate)


LOSSES = {2: [3.0, 3.0, 5.0, 4.0], 3: [4.0, 2.5, 4.0, 4.5], 4: [4.0] * 4, 6: [4.5, 2.0, 3.0, 5.0]}


@pytest.mark.parametrize("stop_after", [100, 1, 2, 4])
def test_each_candidate_saves_its_best_also_after_a_stop(
    context: SweepContext,
    record: SweepRecord,
    monkeypatch: pytest.MonkeyPatch,
    stop_after: int,
) -> None:
    scripted(monkeypatch, LOSSES)
    plans = WavePlan(list(context.candidates), 3), WavePlan(list(context.candidates), STEPS)
    values: dict[int, list[TensorState]] = {}
    adapters: dict[str, TensorState] = {}
    saves = wave_loop.WaveLoop._save

    def watched(loop: wave_loop.WaveLoop) -> None:
        states = [loop.runner.state(k) for k in range(4)]
        values[loop.step] = [
            {n.removeprefix("value."): t.clone() for n, t in s.items() if n.startswith("value.")}
            for s in states
        ]
        saves(loop)

    monkeypatch.setattr(wave_loop.WaveLoop, "_save", watched)
    for plan in plans:
        wave = train_wave(context, record, plan, StopAfter(stop_after))
        if not wave.is_over:
            saved = load_wave(context, record)
            assert saved is not None
            wave = train_wave(context, record, replace(plan, saved=saved), StopAfter(100))
        finish_wave(
            context,
            record,
            wave,
            lambda candidate, tensors: adapters.update(
                {candidate.name: values_to_save(tensors)[0]}
            ),
        )
    best_steps = [2, 6, 6, 2]
    for number, (state, step) in enumerate(zip(record.candidates, best_steps, strict=True)):
        assert (state.saved_step, state.best_step) == (step, step)
        assert state.saved_eval_loss == state.best_eval_loss == LOSSES[step][number]
        expected = values[step][number]
        assert adapters[state.name].keys() == expected.keys()
        assert all(torch.equal(adapters[state.name][n], t) for n, t in expected.items())
    assert find_best(record.candidates) is record.candidates[1]


def test_the_last_values_are_saved_on_request(
    context: SweepContext, record: SweepRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, LOSSES)
    last = replace(context, save="last")
    wave = train_wave(last, record, WavePlan(list(last.candidates), STEPS), StopAfter(100))
    finish_wave(last, record, wave, lambda candidate, tensors: None)
    assert not any(name.startswith("best.") for m in wave.members for name in m.tensors)
    assert [c.saved_step for c in record.candidates] == [STEPS] * 4
    assert [c.result_loss for c in record.candidates] == LOSSES[STEPS]
