"""The loop of one wave: steps of a stack of candidates, evaluations, saves.

A candidate that fails keeps its slot in the stack to the end of the wave, at learning rate 0: with
fewer adapters the matmuls of the others would have other shapes, and other last bits.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from lora.data.sequences.batches import BatchStream, ordered_batches
from lora.device import peak_memory_bytes
from lora.errors import CheckpointError
from lora.fast.stacked_runner import choose_stacked_runner
from lora.runs.directory import Run
from lora.runs.disk import reading
from lora.runs.interrupts import StopRequests
from lora.runs.record import MetricsRow
from lora.runs.sweep_record import CandidateState, SweepRecord
from lora.stacked.apply import StackedAdapters
from lora.stacked.losses import stack_batches
from lora.sweep.context import SweepContext, candidate_run
from lora.sweep.grid import Candidate
from lora.sweep.wave_checkpoint import (
    VALUE,
    SavedWave,
    TensorState,
    WavePosition,
    load_candidate,
    save_wave,
    split_best,
    with_best,
)
from lora.training.optim import learning_rate_at
from lora.training.step_runner import StepOutcome


@dataclass(frozen=True)
class WavePlan:
    """Which candidates train together, up to which step."""

    candidates: list[Candidate]
    until: int
    saved: SavedWave | None = None
    """The checkpoint of an interrupted wave; None: each candidate starts from its own state."""


@dataclass
class WaveMember:
    """One candidate while it trains in a wave."""

    index: int
    """Its index in the stack, k."""
    candidate: Candidate
    state: CandidateState
    run: Run
    """Its own run directory."""
    stream: BatchStream
    best: TensorState = field(default_factory=dict)
    """On the CPU, the values of its best evaluation; none where only the last are saved."""

    def skip_to(self, row: int) -> None:
        """Move the stream to the batch after the first `row` sequences."""
        self.stream.load_state_dict({**self.stream.state_dict(), "row": row})

    def note_step(self, outcome: StepOutcome, n_sequences: int) -> None:
        """Record a finished optimizer step on `n_sequences` sequences of this candidate."""
        loss, rate = outcome.losses[self.index], outcome.learning_rates[self.index]
        self.state.step, self.state.loss = outcome.step, loss
        self.state.row += n_sequences
        self.run.append_metrics(MetricsRow(outcome.step, loss, rate))

    def note_eval(self, step: int, loss: float) -> bool:
        """Record a validation loss; return whether it is the best so far."""
        self.run.append_metrics(MetricsRow(step, eval_loss=loss))
        return self.state.note_eval(loss)

    def keep_best(self, tensors: TensorState) -> None:
        """Hold the values among `tensors`, those of this step, as the best."""
        values = {n: t for n, t in tensors.items() if n.startswith(VALUE)}
        self.best = {n: t.detach().to("cpu", copy=True) for n, t in values.items()}

    def with_best(self, tensors: TensorState) -> TensorState:
        """Return `tensors`, those of this step, with the best values if they are of another."""
        is_now = self.state.best_step == self.state.step
        return tensors if is_now else with_best(tensors, self.best)


@dataclass(frozen=True)
class TrainedMember:
    """A candidate as a wave left it."""

    candidate: Candidate
    state: CandidateState
    run: Run
    tensors: TensorState


class WaveLoop:
    """Steps, evaluations and saves of a stack of candidates; made ready to train.

    Changes the states of `record.candidates` in place. `context.model` has the plan's candidates
    stacked on it.
    """

    def __init__(
        self,
        context: SweepContext,
        record: SweepRecord,
        plan: WavePlan,
        stacked: StackedAdapters,
    ) -> None:
        self.context, self.record, self.until = context, record, plan.until
        context.model.train()
        self.runner = choose_stacked_runner(
            context.model,
            stacked,
            [c.train for c in plan.candidates],
            context.choice,
            fast=context.fast,
            on_message=self._message_first,
        )
        self.members = [self._member(k, c) for k, c in enumerate(plan.candidates)]
        self.step = self.first_step = self.members[0].state.step
        """Launched (a GPU is one step behind); and where the wave began: at a rung, or where a
        larger wave was split."""
        self.saved_step: int | None = None
        self.train_s = 0.0
        """Seconds spent in steps by this process."""
        self._n_tokens = 0
        if plan.saved is None:
            self._start()
        else:
            self._resume(plan.saved)
        self.resumed_step = self.step

    def _start(self) -> None:
        """Start from the candidates' initial values, or restore what their last wave saved."""
        for member in self.members:
            state = member.state
            member.run.cut_metrics_after(state.step if state.step else -1)
            if state.step:
                self._restore(member, load_candidate(self.context, member.run))
            else:
                loss = self.record.base_eval_loss
                member.run.append_metrics(MetricsRow(0, eval_loss=loss))
            state.status = "training"

    def _resume(self, saved: SavedWave) -> None:
        """Restore a checkpoint of this wave."""
        position = saved.position
        for member, state, tensors in zip(
            self.members, position.candidates, saved.tensors, strict=True
        ):
            member.state = self.record.candidates[member.candidate.number - 1] = state
            self._restore(member, tensors)
            member.run.cut_metrics_after(state.step)
            if state.status == "failed":
                self.runner.drop(member.index, state.reason)
        self.step = self.saved_step = position.wave_step

    def train(self, stop: StopRequests) -> None:
        """Take steps to the end of the wave, or until a signal asks to stop; save on the way."""
        while not self.is_over and stop.received is None:
            self._one_step()
            evaluates = self.is_over or self.step % self.context.eval_every_steps == 0
            saves = self.is_over or self.step % self.context.save_every_steps == 0
            if evaluates or saves:
                self._note_finished(wait=True)
            if evaluates:
                self._evaluate()
            if saves:
                self._save()
        self._note_finished(wait=True)
        if self.saved_step != self.step:
            self._save()

    def close(self) -> None:
        """Write the rows that the candidates' runs still hold in memory."""
        for member in self.members:
            member.run.close()

    @property
    def is_over(self) -> bool:
        """Whether all candidates have reached the wave's last step, or all have failed."""
        return self.step >= self.until or len(self.runner.failures) == len(self.members)

    @property
    def _keeps_best(self) -> bool:
        return self.context.save == "best"

    def trained_members(self) -> list[TrainedMember]:
        """Return the candidates with the state that continues their training."""
        return [
            TrainedMember(m.candidate, m.state, m.run, m.with_best(self.runner.state(m.index)))
            for m in self.members
        ]

    def _member(self, k: int, candidate: Candidate) -> WaveMember:
        context = self.context
        return WaveMember(
            index=k,
            candidate=candidate,
            state=self.record.candidates[candidate.number - 1],
            run=candidate_run(context.run, candidate),
            stream=BatchStream(
                context.train,
                context.micro_batch_size,
                candidate.train.seed,
                self.runner.batch_device,
            ),
        )

    def _restore(self, member: WaveMember, tensors: TensorState) -> None:
        with reading(self.context.run.folder):
            own, best = split_best(tensors)
            self.runner.restore(own, step=member.state.step, adapter=member.index)
            member.skip_to(member.state.row)
            member.best = best
            if self._keeps_best and member.state.best_step == member.state.step:
                member.keep_best(own)

    def _save(self) -> None:
        """Save the whole wave; if the disk refuses, report it: the next save tries again."""
        position = WavePosition(
            numbers=[m.candidate.number for m in self.members],
            candidates=[m.state for m in self.members],
            until=self.until,
            wave_step=self.step,
            steps_before=self.record.steps_taken,
        )
        tensors = [m.with_best(self.runner.state(m.index)) for m in self.members]
        saved = SavedWave(position, tensors)
        number = self.record.steps_taken + self.step - self.first_step
        try:
            for member in self.members:
                member.run.sync()
            save_wave(self.context, saved, number)
        except CheckpointError as error:
            self.context.progress.message(f"{error} The next save tries again.")
            return
        self.saved_step = self.step

    def _one_step(self) -> None:
        began_s = time.perf_counter()
        micro_batches = [
            stack_batches([next(member.stream) for member in self.members])  # (K·B, T)
            for _ in range(self.context.micro_batches)
        ]
        rates = [learning_rate_at(self.step, m.candidate.train) for m in self.members]
        self.runner.launch(self.step + 1, micro_batches, rates)
        self.step += 1
        self._n_tokens += sum(batch.input_ids.numel() for batch in micro_batches)
        self.train_s += time.perf_counter() - began_s
        self._note_finished(wait=False)
        self.context.progress.step(self._title(), self.record.candidates)

    def _note_finished(self, *, wait: bool) -> None:
        began_s = time.perf_counter()
        finished = self.runner.finished(wait=wait)
        self.train_s += time.perf_counter() - began_s
        for outcome in finished:
            for member in self.members:
                self._note(member, outcome)

    def _note(self, member: WaveMember, outcome: StepOutcome) -> None:
        if member.state.status == "failed":
            return
        reason = self.runner.failures.get(member.index)
        if reason is not None:
            self._drop(member, reason)
            return
        n_sequences = self.context.micro_batch_size * self.context.micro_batches
        member.note_step(outcome, n_sequences)

    def _drop(self, member: WaveMember, reason: str) -> None:
        self.runner.drop(member.index, reason)
        member.state.fail(reason)
        self.context.progress.message(f"{member.candidate.name} failed: {reason}")

    def _evaluate(self) -> None:
        context = self.context
        batches = ordered_batches(
            context.validation, context.micro_batch_size, context.choice.device
        )
        losses = self.runner.evaluate(batches)
        for member, loss in zip(self.members, losses, strict=True):
            if member.state.status == "failed":
                continue
            if not math.isfinite(loss):
                self._drop(member, f"step {self.step}: the validation loss is {loss}, not finite.")
                continue
            if member.note_eval(self.step, loss) and self._keeps_best:
                member.keep_best(self.runner.state(member.index))
        context.progress.evaluated(self._title(), self.record.candidates)

    def _message_first(self, text: str) -> None:
        """Report `text`, unless an earlier wave, or that of another process, reports it."""
        if self.record.steps_taken == 0 and self.context.world.is_main:
            self.context.progress.message(text)

    def _title(self) -> str:
        speed = self._n_tokens / max(self.train_s, 1e-9)
        memory = peak_memory_bytes(self.context.choice.device) / 1e9
        world = self.context.world
        of_all = "" if world.is_alone else f" on rank {world.rank} of {world.size}"
        return (
            f"{len(self.members)} at once{of_all} · step {self.step}/{self.until} · "
            f"{speed:,.0f} tokens/s · {memory:.2f} GB"
        )
