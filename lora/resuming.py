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


def check_same_run(former: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raise CheckpointError with every difference that would make it another run."""
    before, after = (_flatten(json.loads(json.dumps(d, default=str))) for d in (former, now))
    faults = [
        f"{name}: {before.get(name, 'not given')} then, {after.get(name, 'not given')} now"
        for name in sorted(before.keys() | after.keys())
        if _is_fixed(name) and before.get(name) != after.get(name)
    ]
    steps_before, steps_now = before.get("train.steps", 0), after.get("train.steps", 0)
    if steps_now < steps_before:
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
