"""Signals to a run: the first one asks it to stop, a second one ends it."""

from __future__ import annotations

import signal

import pytest

from lora.runs import interrupts
from lora.runs.interrupts import LAUNCHER_VARIABLE, StopRequests

NUMBERS = [signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_second_signal_ends_the_process(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(LAUNCHER_VARIABLE, raising=False)
    with StopRequests(lambda text: None) as stop:
        signal.raise_signal(number)
        assert stop.received == number
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            signal.raise_signal(number)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_launcher_that_passes_a_signal_on_costs_no_save(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LAUNCHER_VARIABLE, "a run")
    said: list[str] = []
    with StopRequests(said.append) as stop:
        signal.raise_signal(number)  # Slurm's, to every process of the step
        signal.raise_signal(number)  # torchrun's, which got it too
        assert (stop.received, len(said)) == (number, 1)
        monkeypatch.setattr(interrupts, "REPEAT_S", 0.0)
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            signal.raise_signal(number)


def test_a_handler_that_was_set_meanwhile_stays() -> None:
    former = signal.getsignal(signal.SIGTERM)
    try:
        with StopRequests(lambda text: None):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a process that lost another does
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, former)
