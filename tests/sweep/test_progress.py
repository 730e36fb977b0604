"""The table of candidates."""

from __future__ import annotations

import io

from rich.console import Console

from lora.runs.sweep_record import CandidateState
from lora.sweep.progress import candidates_table


def test_a_long_reason_takes_no_numbers_room() -> None:
    failed = CandidateState("b", {"rank": 4})
    failed.fail("step 3: the loss is not finite, " + "so the step was not taken " * 20)
    good = CandidateState("a", {"rank": 2}, status="done", step=12, loss=1.2345)
    good.note_eval(2.3456)
    stream = io.StringIO()
    Console(file=stream, width=80).print(candidates_table([failed, good], ("rank",)))
    shown = stream.getvalue()
    for text in ("1.2345", "2.3456 (12)", "failed", "done"):
        assert text in shown
