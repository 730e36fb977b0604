"""Check that a run to be resumed is still the same run. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora.errors import CheckpointError, gather
from lora.runs.record import RunRecord

FIXED = (
    "base_fingerprint",
    "learning_rate",
    "from_adapter",
    "from_adapter_fingerprint",
    "lora",
    "train",
    "data_config",
    "deterministic",
    "base_dtype",
    "nf4",
    "implementation",
    "data",
)
"""Fields of the record that a resumed run must share."""
FREE = {
    "train.steps": "more steps",
    "train.epochs": "",  # given in place of steps, which are what is recorded
    "train.gradient_accumulation": "another split into micro-batches",
    "train.learning_rate": "",  # the field learning_rate has the value that was used
    # The data's fingerprint has what these write.
    "data_config.chat_template": "",
    "data_config.raw": "",
    "data_config.template": "",
    "data_config.system": "",
}
FINGERPRINTS = ("data.fingerprint", "data.held_out_fingerprint")
"""The fields of the data that count: a file may be moved."""

MACHINE = (
    *("device", "threads", "environment.versions.torch", "environment.versions.transformers"),
    *("world_size", "parallel"),
)
"""Fields that may change, at the price of different last bits."""


def check_same_run(former: RunRecord, now: RunRecord, directory: Path) -> None:
    """Raise CheckpointError with every difference that would make it another run."""
    before, after = _flatten(former), _flatten(now)
    if former.implementation is None and now.implementation is not None:
        before["implementation"] = "native"  # older versions had no other
    if former.from_adapter_fingerprint is not None:  # else of an older version: the path tells
        before["from_adapter"] = after["from_adapter"] = None
    else:
        after.pop("from_adapter_fingerprint", None)
    faults = [
        f"{name}: {before.get(name, 'not set')} then, {after.get(name, 'not set')} now"
        for name in sorted(before.keys() | after.keys())
        if _is_fixed(name)
        and before.get(name) != after.get(name)
        and not _is_new(name, before, after)
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
                f"Cannot resume the run {directory} with another configuration:",
                f"Allowed to change: {allowed}, other intervals of evaluations and saves. Resume "
                "with the configuration, data and base it started with, or start a new run.",
            )
        )


def find_changed_machine(former: RunRecord, now: RunRecord) -> str:
    """Return a note if the last bits may differ on this machine, or "" if nothing changed."""
    before, after = _flatten(former), _flatten(now)
    for values in (before, after):
        values.setdefault("world_size", 1)  # one process does not write it
    changed = [
        f"{name.rpartition('.')[2]}: {before[name]} then, {after[name]} now"
        for name in MACHINE
        if name in before and name in after and before[name] != after[name]
    ]
    if not changed:
        return ""
    return (
        f"note: the run is resumed where the last bits may differ ({'; '.join(changed)}): it will "
        "end close to an uninterrupted run, not with the same bytes"
    )


def _with_data(fault: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    """Return `fault` with the size and source of both data, if it is about them."""
    kinds = {"data.fingerprint": "examples", "data.held_out_fingerprint": "held_out_examples"}
    kind = kinds.get(fault.partition(":")[0])
    if kind is None:
        return fault
    then, now = (
        f"{known.get(f'data.{kind}')} {kind.replace('_', ' ')} of {known.get('data.source')}"
        for known in (before, after)
    )
    return f"{fault} ({then} then, {now} now)"


def _is_fixed(name: str) -> bool:
    if name.startswith("data."):
        return name in FINGERPRINTS
    if name.startswith("data_config.columns"):  # the data's fingerprint has what they give
        return False
    return name.split(".")[0] in FIXED and name not in FREE


def _is_new(name: str, before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Return whether a setting came after the former run was made, and is off, as it was then."""
    return name not in before and after[name] in (False, None, [], {})


def _flatten(record: RunRecord) -> dict[str, Any]:
    """Return the leaves of run.json by dotted name."""
    return _leaves(json.loads(json.dumps(record.to_json(), default=str)), "")


def _leaves(value: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _leaves(inner, f"{prefix}.{key}" if prefix else key)
    return found
