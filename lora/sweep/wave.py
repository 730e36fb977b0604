"""One wave of a sweep: K candidates on one model, from the step where each stands to the next rung.

    runs/NAME/checkpoints/           the wave that is under way, all of its candidates together
    runs/NAME/candidates/001-…/      of each candidate: metrics.jsonl, state/ between two waves

A candidate that fails keeps its place in the stack to the end of the wave, at rate 0: taking it
out would change the shapes of the others' products, and so the last bits of their results.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lora.data.sequences.batches import BatchStream, TokenSequences, ordered_batches
from lora.device import DeviceChoice, peak_memory_bytes
from lora.errors import CheckpointError
from lora.fast.stacked_runner import choose_stacked_runner
from lora.runs.directory import Run
from lora.runs.disk import reading
from lora.runs.interrupts import StopRequests
from lora.stacked.apply import apply_stacked, remove_stacked
from lora.stacked.losses import stack_batches
from lora.sweep.grid import Candidate
from lora.sweep.ledger import CandidateState, Ledger
from lora.sweep.progress import SweepProgress
from lora.training.checkpoint import list_checkpoints, load_newest, save_checkpoint
from lora.training.optim import learning_rate_at

CHECKPOINTS, CANDIDATES, STATE = "checkpoints", "candidates", "state"
State = dict[str, Tensor]


@dataclass(frozen=True)
class SweepBase:
    """What all waves of a sweep share."""

    model: nn.Module
    """The frozen base, without adapters."""
    train: TokenSequences
    held_out: TokenSequences
    rows: int
    """Of one micro-batch of one candidate, B."""
    micro_batches: int
    eval_every_steps: int
    save_every_steps: int
    choice: DeviceChoice
    run: Run
    progress: SweepProgress
    memory_plan: str = ""
    """What a wave was planned to hold, in words, quoted if memory runs out."""
    fast: bool = True
    """Take the fastest step that can train the candidates; false: the plain one."""


class Wave:
    """K candidates that train together up to step `until`.

    Changes `base.model`: while the wave is open, the candidates' adapters are stacked on it. Use it
    as a context manager.
    """

    def __init__(
        self, base: SweepBase, candidates: Sequence[Candidate], ledger: Ledger, until: int
    ) -> None:
        self.base, self.candidates, self.ledger, self.until = base, candidates, ledger, until
        self.standings = [ledger.states[c.number - 1] for c in candidates]
        self.step = self.noted_step = self.first_step = self.standings[0].step
        """Launched, known to be done (a GPU is one step behind), and where the wave began: at a
        rung, or where a wave was split."""
        self.saved_step: int | None = None
        self.runs = [candidate_run(base.run, c) for c in candidates]
        self.train_s = 0.0
        """Seconds spent in steps by this process."""
        self._n_tokens = 0

    def __enter__(self) -> Wave:
        seeds = [c.train.seed for c in self.candidates]
        model, configs = self.base.model, [c.lora for c in self.candidates]
        self.stacked = apply_stacked(model, configs, seeds)
        model.train()
        self.training = choose_stacked_runner(
            model,
            self.stacked,
            [c.train for c in self.candidates],
            self.base.choice,
            fast=self.base.fast,
            on_message=self._message_first,
        )
        device = self.training.batch_device
        self._streams = [BatchStream(self.base.train, self.base.rows, s, device) for s in seeds]
        return self

    def __exit__(self, *_: object) -> None:
        remove_stacked(self.base.model, self.stacked)

    def begin(self) -> None:
        """Go to where the candidates stand: their first values, or what an earlier rung left."""
        for k, (standing, run) in enumerate(zip(self.standings, self.runs, strict=True)):
            run.cut_metrics_after(standing.step if standing.step else -1)
            if standing.step:
                state, _ = load_newest(run.folder / STATE, self.base.progress.message)
                self._restore(k, state, standing)
            else:
                run.append_metrics({"step": 0, "eval_loss": self.ledger.base_eval_loss})
            standing.status = "training"

    def resume(self, tensors: State, state: dict[str, Any]) -> None:
        """Go to where a checkpoint of this wave says."""
        for k, saved in enumerate(state["standings"]):
            standing = CandidateState(**saved)
            self.standings[k].__dict__.update(vars(standing))
            start = f"{k}."
            own = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
            self._restore(k, own, standing)
            self.runs[k].cut_metrics_after(standing.step)
            if standing.status == "failed":
                self.training.drop(k, standing.reason)
        self.step = self.noted_step = self.saved_step = int(state["wave_step"])

    def run(self, stop: StopRequests) -> None:
        """Take steps to the end of the wave, or until a signal asks to stop; save on the way."""
        while self.step < self.until and stop.received is None and self._any_alive():
            self._one_step()
            is_last = self.step == self.until or not self._any_alive()
            evaluates = is_last or self.step % self.base.eval_every_steps == 0
            saves = is_last or self.step % self.base.save_every_steps == 0
            if evaluates or saves:
                self._note_finished(wait=True)
            if evaluates:
                self._evaluate()
            if saves:
                self.save()
        self._note_finished(wait=True)
        if self.saved_step != self.step:
            self.save()

    @property
    def is_over(self) -> bool:
        """Whether all have come to the wave's end, or none is left."""
        return self.step >= self.until or not self._any_alive()

    def states(self) -> list[State]:
        """Return what each candidate needs to go on."""
        return [self.training.state(k) for k in range(len(self.candidates))]

    def save(self) -> None:
        """Save the whole wave; if the disk refuses, say so: the next save is another try."""
        tensors = {f"{k}.{n}": t for k, s in enumerate(self.states()) for n, t in s.items()}
        state = {
            "numbers": [c.number for c in self.candidates],
            "standings": [vars(s) for s in self.standings],
            "until": self.until,
            "wave_step": self.step,
            "steps_before": self.ledger.steps_taken,
        }
        number = self.ledger.steps_taken + self.step - self.first_step
        try:
            for run in self.runs:
                run.sync()
            save_checkpoint(self.base.run.folder / CHECKPOINTS, number, tensors, state, keep=1)
        except CheckpointError as error:
            self.base.progress.message(f"{error} The next save tries again.")
            return
        self.saved_step = self.step

    def _restore(self, k: int, state: State, standing: CandidateState) -> None:
        self.training.restore(state, step=standing.step, adapter=k)
        own = self._streams[k].state_dict()
        self._streams[k].load_state_dict({**own, "row": standing.row})

    def _any_alive(self) -> bool:
        return len(self.training.failures) < len(self.candidates)

    def _one_step(self) -> None:
        began_s = time.perf_counter()
        micro = [
            stack_batches([next(stream) for stream in self._streams])
            for _ in range(self.base.micro_batches)
        ]
        rates = [learning_rate_at(self.step, c.train) for c in self.candidates]
        self.training.launch(self.step + 1, micro, rates)
        self.step += 1
        self._n_tokens += sum(batch.input_ids.numel() for batch in micro)
        self.train_s += time.perf_counter() - began_s
        self._note_finished(wait=False)
        self.base.progress.step(self._title(), self.ledger.states)

    def _note_finished(self, *, wait: bool) -> None:
        began_s = time.perf_counter()
        finished = self.training.finished(wait=wait)
        self.train_s += time.perf_counter() - began_s
        for outcome in finished:
            self.noted_step = outcome.step
            for k, (standing, loss) in enumerate(zip(self.standings, outcome.losses, strict=True)):
                self._note(k, standing, loss)

    def _note(self, k: int, standing: CandidateState, loss: float) -> None:
        if standing.status == "failed":
            return
        reason = self.training.failures.get(k)
        if reason is not None:
            self._drop(k, reason)
            return
        standing.step, standing.loss = self.noted_step, loss
        standing.row += self.base.rows * self.base.micro_batches
        rate = learning_rate_at(self.noted_step - 1, self.candidates[k].train)
        self.runs[k].append_metrics({"step": self.noted_step, "loss": loss, "learning_rate": rate})

    def _drop(self, k: int, reason: str) -> None:
        self.training.drop(k, reason)
        self.standings[k].fail(reason)
        self.base.progress.message(f"{self.candidates[k].name} is dropped: {reason}")

    def _evaluate(self) -> None:
        batches = ordered_batches(self.base.held_out, self.base.rows, self.base.choice.device)
        losses = self.training.evaluate(batches)
        for k, (standing, loss) in enumerate(zip(self.standings, losses, strict=True)):
            if standing.status == "failed":
                continue
            if not math.isfinite(loss):
                self._drop(k, f"step {self.step}: the held-out loss is {loss}, not finite.")
                continue
            standing.note_eval(loss)
            self.runs[k].append_metrics({"step": self.step, "eval_loss": loss})
        self.base.progress.evaluated(self._title(), self.ledger.states)

    def _message_first(self, text: str) -> None:
        """Say `text`, unless an earlier wave has said it."""
        if self.ledger.steps_taken == 0:
            self.base.progress.message(text)

    def _title(self) -> str:
        speed = self._n_tokens / max(self.train_s, 1e-9)
        memory = peak_memory_bytes(self.base.choice.device) / 1e9
        together = len(self.candidates)
        return (
            f"{together} at once · step {self.step}/{self.until} · {speed:,.0f} tokens/s · "
            f"{memory:.2f} GB"
        )


def finish_wave(wave: Wave, states: list[State]) -> None:
    """Write the ledger and what the candidates need for the next rung; the checkpoint goes."""
    base, ledger = wave.base, wave.ledger
    for standing, run, state in zip(wave.standings, wave.runs, states, strict=True):
        if standing.status == "training" and wave.until == ledger.rungs[-1]:
            standing.status = "done"
        elif standing.status == "training":
            standing.status = "waiting"
            save_checkpoint(run.folder / STATE, standing.step, state, {}, keep=1)
        if standing.status == "done":
            shutil.rmtree(run.folder / STATE, ignore_errors=True)
    ledger.steps_taken += wave.step - wave.first_step
    ledger.write(base.run)
    shutil.rmtree(base.run.folder / CHECKPOINTS, ignore_errors=True)


def load_wave(base: SweepBase, ledger: Ledger) -> tuple[State, dict[str, Any]] | None:
    """Return the checkpoint of the wave that was under way, or None if there is none.

    Raises CheckpointError if there are checkpoints and none of them can be used.
    """
    folder = base.run.folder / CHECKPOINTS
    if not list_checkpoints(folder):
        return None
    tensors, state = load_newest(folder, base.progress.message)
    with reading(folder):
        before = state["steps_before"]
    if before != ledger.steps_taken:  # of a wave that the ledger has already
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return tensors, state


def split_wave(
    base: SweepBase,
    ledger: Ledger,
    candidates: Sequence[Candidate],
    tensors: State,
    state: dict[str, Any],
) -> None:
    """Let each candidate of a saved wave wait where it is, so that fewer go on at once."""
    members = [candidates[number - 1] for number in state["numbers"]]
    first_step = ledger.states[members[0].number - 1].step
    for k, (member, saved) in enumerate(zip(members, state["standings"], strict=True)):
        standing, start = ledger.states[member.number - 1], f"{k}."
        standing.__dict__.update(vars(CandidateState(**saved)))
        if standing.status == "training":
            standing.status = "waiting"
            own = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
            run = candidate_run(base.run, member)
            save_checkpoint(run.folder / STATE, standing.step, own, {}, keep=1)
    ledger.steps_taken += int(state["wave_step"]) - first_step
    ledger.write(base.run)
    shutil.rmtree(base.run.folder / CHECKPOINTS, ignore_errors=True)
    step = state["wave_step"]
    base.progress.message(f"the {len(members)} that were at step {step} go on in parts")


def candidate_run(run: Run, candidate: Candidate) -> Run:
    """Return the candidate's own folder, made if it is not there."""
    folder = run.folder / CANDIDATES / candidate.name
    folder.mkdir(parents=True, exist_ok=True)
    return Run(folder, on_trouble=run.on_trouble)
