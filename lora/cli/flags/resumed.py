"""The settings of a run that is resumed: from its record, so that `--resume --name x` is enough."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora.config import FULL_LEARNING_RATE, BaseWeights, RunConfig
from lora.distributed.ranks import spans_machines
from lora.errors import CheckpointError, ConfigError
from lora.report.records.command import (
    Settings,
    comparison_settings,
    finetune_settings,
    sweep_settings,
)
from lora.runs.directory import check_run_directory
from lora.runs.read_record import read_run_record
from lora.runs.record import RUN_FILE, Kind, RunRecord

COMMAND_OF: dict[Kind, str] = {"finetune": "finetune", "sweep": "sweep", "compare": "compare"}
"""By kind of run: the command that resumes it."""
FULL = "full"
"""Of a sweep: the run directory of full fine-tuning on the same batches."""
_OFF = ("false", "no", "off", "0")
_LENGTHS = {"steps", "epochs"}
"""Either says how long a run is: what is given replaces what was recorded."""
_NF4 = BaseWeights().nf4_settings.keys()
"""What does not apply to another dtype: the run refuses that one, not settings nobody gave."""


def settings_to_resume(command: str, given: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """Return the recorded settings of the run that `given` resumes, and the file they come from.

    `given` are the settings of a call by name, with underscores. Nothing is returned for a new run,
    and for one on rows in memory. Raises ConfigError without a name, RunNotFoundError for a run
    that does not exist, and CheckpointError for one that another command started.

    On several machines rank 0 reads the record for all: the others need not have the run directory,
    and they resume if rank 0 does.
    """
    if command not in COMMAND_OF.values():
        return {}, ""
    is_resumed = given.get("resume", "false").lower() not in _OFF
    if not spans_machines():
        return _settings_here(command, given) if is_resumed else ({}, "")
    from lora.distributed.start import from_first

    found = from_first("resumed", lambda: _settings_here(command, given) if is_resumed else None)
    if found is None and is_resumed:
        raise ConfigError(
            "Cannot resume: rank 0 was started without --resume. Give it on every machine."
        )
    settings, path = found or ({}, "")
    return (settings | {"resume": "true"} if found else {}), path


def _settings_here(command: str, given: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """Return the recorded settings of a run whose directory is on this machine."""
    name = given.get("name")
    if not name:
        raise ConfigError("Cannot resume: no run is named. Name it with --name.")
    out = Path(given.get("out", RunConfig.out)).expanduser()
    check_run_directory(out, name, resume=True)
    path = out / name / RUN_FILE
    if not path.is_file():
        return {}, ""
    record = read_run_record(path.parent)
    theirs = COMMAND_OF.get(record.kind)
    if theirs is not None and theirs != command:
        raise CheckpointError(
            f"Cannot resume {path.parent} with lora {command}: lora {theirs} started it. Use lora "
            f"{theirs} --resume."
        )
    found = _recorded(command, record, path.parent) or {}
    replaced = {"name", "out"} | (_LENGTHS if _LENGTHS & given.keys() else set())
    if given.get("base_dtype", "nf4") != "nf4":
        replaced |= _NF4
    return {
        key.replace("_", "-"): _as_text(value)
        for key, value in found.items()
        if key not in replaced
    }, str(path)


def settings_to_scale(command: str, given: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """Return the settings of the run that `lora scale --run` names, and the file they come from.

    They are without its name, unless it is resumed. Raises what reading a run raises, and
    ConfigError for a run that `lora finetune` cannot repeat.
    """
    if command != "scale" or not given.get("run"):
        return {}, ""
    directory = Path(given["run"]).expanduser()
    settings = finetune_settings(read_run_record(directory), directory.name)
    if settings is None:
        raise ConfigError(
            f"Cannot scale the run {directory}: lora finetune did not start it, or its rows were "
            "given in Python. Allowed: a run of lora finetune on files."
        )
    if given.get("resume", "false").lower() in _OFF:
        del settings["name"]
    texts = {key.replace("_", "-"): _as_text(value) for key, value in settings.items()}
    return texts, str(directory / RUN_FILE)


def _recorded(command: str, record: RunRecord, directory: Path) -> Settings | None:
    name = directory.name
    if command == "sweep":
        return sweep_settings(record, name, _full_rate(directory), defaults=True)
    if command == "compare":
        return comparison_settings(record, name, defaults=True)
    return finetune_settings(record, name, defaults=True)


def _full_rate(sweep: Path) -> float | None:
    """Return the learning rate of the full fine-tuning beside a sweep; None if none has begun."""
    if not (sweep / FULL / RUN_FILE).is_file():
        return None
    return read_run_record(sweep / FULL).learning_rate or FULL_LEARNING_RATE


def _as_text(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return [_as_text(item) for item in value]
    if isinstance(value, dict):
        return {key: _as_text(inner) for key, inner in value.items()}
    return str(value)
