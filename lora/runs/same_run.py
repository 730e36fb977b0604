"""Is a run that is to be resumed still the same run? No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora.errors import CheckpointError, gather

FIXED = (
    "base_fingerprint",
    "learning_rate",
    "from_adapter",
    "lora",
    "train",
    "data_config",
    "deterministic",
    "base_dtype",
    "data",
)
"""Parts of `run.json` that a resumed run must share."""
FREE = {
    "train.steps": "more steps",
    "train.micro_batches": "another split into micro-batches",
    "train.learning_rate": "",  # `learning_rate` has the rate itself
}
FINGERPRINTS = ("data.fingerprint", "data.held_out_fingerprint")
"""Of the data only these count: a file may be moved."""

MACHINE = ("device", "threads", "environment.versions.torch")
"""What may change, and changes the last bits."""


def check_same_run(former: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raise CheckpointError with every difference that would make it another run."""
    if not isinstance(former, dict):
        raise CheckpointError(
            f"{folder / 'run.json'} holds no settings: it is not as lora wrote it. Begin a new run."
        )
    before, after = (_flatten(json.loads(json.dumps(d, default=str))) for d in (former, now))
    faults = [
        f"{name}: {before.get(name, 'not given')} then, {after.get(name, 'not given')} now"
        for name in sorted(before.keys() | after.keys())
        if _is_fixed(name) and before.get(name) != after.get(name)
    ]
    faults = [_with_data(fault, before, after) for fault in faults]
    steps_before, steps_now = before.get("train.steps", 0), after.get("train.steps", 0)
    if not isinstance(steps_before, int) or steps_now < steps_before:
        faults.append(f"train.steps: {steps_before} then, {steps_now} now: fewer")
    if faults:
        allowed = ", ".join(text for text in FREE.values() if text)
        raise CheckpointError(
            gather(
                faults,
                f"The run {folder} cannot be resumed as another one:",
                "Resume with the settings, data and base that it began with, or begin a new run. "
                f"Allowed are: {allowed}, other intervals of evaluations and saves.",
            )
        )


def _with_data(fault: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    """Return `fault` with what is known of both data, if it is about them."""
    kinds = {"data.fingerprint": "examples", "data.held_out_fingerprint": "held_out_examples"}
    kind = kinds.get(fault.partition(":")[0])
    if kind is None:
        return fault
    then, now = (
        f"{known.get(f'data.{kind}')} {kind.replace('_', ' ')} of {known.get('data.source')}"
        for known in (before, after)
    )
    return f"{fault} ({then} then, {now} now)"


def find_changed_machine(former: dict[str, Any], now: dict[str, Any]) -> str:
    """Return a note if the run goes on where other bits may come out, or "" if nothing changed."""
    before, after = _flatten(former), _flatten(now)
    changed = [
        f"{name.rpartition('.')[2]}: {before[name]} then, {after[name]} now"
        for name in MACHINE
        if name in before and name in after and before[name] != after[name]
    ]
    if not changed:
        return ""
    return (
        f"note: the run goes on where other last bits may come out ({'; '.join(changed)}): it will "
        "end near the run without a break, not with the same bytes"
    )


def _is_fixed(name: str) -> bool:
    if name.startswith("data."):
        return name in FINGERPRINTS
    return name.split(".")[0] in FIXED and name not in FREE


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flatten(inner, f"{prefix}.{key}" if prefix else key)
    return found
