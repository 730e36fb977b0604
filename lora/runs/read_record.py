"""Read the files of a run directory into typed records, older versions too. No torch.

Every reader takes `faults`: what is wrong with a file is added to them, each with the file's name.
Without it the reader raises a CheckpointError that lists all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lora.errors import CheckpointError, LoraError, gather
from lora.runs.disk import read_json, read_rows
from lora.runs.record import (
    IN_MEMORY,
    METRICS_FILE,
    RESULT_FILE,
    RUN_FILE,
    SAMPLES_FILE,
    SCHEMA_VERSION,
    TIMINGS_FILE,
    Kind,
    Method,
    MetricsRow,
    RunRecord,
    RunResult,
    SampleRow,
    TimingRow,
)
from lora.runs.typed_json import Faults, parse
from lora.settings.peers import FORMER_NAMES

RecordT = TypeVar("RecordT")
Upgrade = Callable[[dict[str, Any], str, Faults], dict[str, Any]]
"""(values of a file, the file, faults) -> the values as this version has them."""


def read_run_record(directory: Path, faults: Faults | None = None) -> RunRecord:
    """Return what run.json of a run directory holds.

    An older file is read as this version has it; a newer one is refused.
    """
    path = directory / RUN_FILE
    found: Faults = []
    record = RunRecord()
    try:
        values = read_json(path)
    except LoraError as error:
        found.append(str(error))
    else:
        if isinstance(values, dict):
            values = _upgraded(_with_new_names(values), str(path), found)
        record = parse(RunRecord, values, str(path), found) or record
    _settle(path, found, faults)
    return record


def describe_changes(
    then: Mapping[str, Any] | None, now: Mapping[str, Any], names: Iterable[str]
) -> list[str]:
    """Return which of the settings called `names` differ from those that are recorded."""
    return [
        f"{name}: {then[name]} then, {now[name]} now"
        for name in names
        if then is not None and name in then and then[name] != now[name]
    ]


def read_result(directory: Path, faults: Faults | None = None) -> RunResult | None:
    """Return what result.json holds; None if the run is not finished."""
    return read_record_file(RunResult, directory / RESULT_FILE, faults)


def read_record_file(
    kind: type[RecordT],
    path: Path,
    faults: Faults | None = None,
    *,
    upgrade: Upgrade = lambda values, where, faults: values,
) -> RecordT | None:
    """Return the record in a JSON file; None if there is no such file.

    `upgrade` gives an older file's values the names of this version, and refuses a newer file.
    """
    if not path.is_file():
        return None
    found: Faults = []
    record = None
    try:
        values = read_json(path)
        if isinstance(values, dict):
            values = upgrade(values, str(path), found)
        record = parse(kind, values, str(path), found)
    except LoraError as error:
        found.append(str(error))
    _settle(path, found, faults)
    return record


def read_row_file(kind: type[RecordT], path: Path, faults: Faults | None = None) -> list[RecordT]:
    """Return the rows of a JSON-lines file; none if there is no such file."""
    if not path.is_file():
        return []
    found: Faults = []
    rows: list[RecordT] = []
    try:
        values = read_rows(path)
    except LoraError as error:
        found.append(str(error))
    else:
        parsed = (parse(kind, v, f"{path}, line {n}", found) for n, v in enumerate(values, start=1))
        rows = [row for row in parsed if row is not None]
    _settle(path, found, faults)
    return rows


def read_metrics(directory: Path, faults: Faults | None = None) -> list[MetricsRow]:
    """Return the rows of metrics.jsonl."""
    return read_row_file(MetricsRow, directory / METRICS_FILE, faults)


def read_timings(directory: Path, faults: Faults | None = None) -> list[TimingRow]:
    """Return the rows of timings.jsonl of a single run."""
    return read_row_file(TimingRow, directory / TIMINGS_FILE, faults)


def read_samples(directory: Path, faults: Faults | None = None) -> list[SampleRow]:
    """Return the rows of samples.jsonl."""
    return read_row_file(SampleRow, directory / SAMPLES_FILE, faults)


def file_version(
    values: dict[str, Any], first: int, newest: int, where: str, faults: Faults
) -> int:
    """Return a file's schema version, `first` where it has none. One above `newest` is a fault."""
    version = values.get("schema_version", first)
    if isinstance(version, int) and version <= newest:
        return version
    faults.append(
        f"{where} has schema_version {version!r}: this version of lora reads up to {newest}. "
        "Use a newer lora"
    )
    return newest


def recorded_steps(directory: Path) -> int | None:
    """Return the optimizer steps that the run in `directory` was to take; None if no record tells.

    Of a comparison they are in its own settings.
    """
    if not (directory / RUN_FILE).is_file():
        return None
    record = read_run_record(directory)
    own = record.train or (record.compare or {}).get("train")
    steps = own.get("steps") if isinstance(own, dict) else None
    return steps if isinstance(steps, int) else None


def recorded_packing(directory: Path) -> bool | None:
    """Return whether the run in `directory` packs its examples; None if no record tells."""
    if not (directory / RUN_FILE).is_file():
        return None
    packing = (read_run_record(directory).data_config or {}).get("packing")
    return packing if isinstance(packing, bool) else None


def step_times(directory: Path) -> list[float]:
    """Return the seconds of each optimizer step of the run in `directory`.

    Raises CheckpointError if none is there.
    """
    times = [row.step_s for row in read_timings(directory) if row.step_s is not None]
    if not times:
        raise CheckpointError(f"Cannot use {directory / TIMINGS_FILE}: it holds no step times.")
    return times


def measured_peak(directory: Path, peak_bytes: int) -> int:
    """Return a run's peak memory in bytes over all its steps, those before a resume included."""
    return max([peak_bytes, *(row.peak_memory_bytes or 0 for row in read_timings(directory))])


def stored_bytes(directory: Path) -> int:
    """Return the bytes of the safetensors files in `directory`."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def _upgraded(values: dict[str, Any], where: str, faults: Faults) -> dict[str, Any]:
    """Return the values of a run.json as this version has them."""
    if file_version(values, 0, SCHEMA_VERSION, where, faults) == SCHEMA_VERSION:
        return values
    upgraded = {**values, "kind": _kind_before_1(values), "method": _method_before_1(values)}
    upgraded["activation_checkpointing"] = values.get("kept_of_blocks")
    data, compare = values.get("data"), values.get("compare")
    if isinstance(compare, dict) and str(compare.get("data")).endswith(IN_MEMORY):
        upgraded["data"] = {"in_memory": True}  # with the number of rows before it
    elif isinstance(data, str):  # training.py wrote one line
        upgraded["data"] = {"source": data}
    elif isinstance(data, dict) and data.get("source") == IN_MEMORY:
        upgraded["data"] = {**data, "in_memory": True}
    return upgraded


def _with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a run.json with the names that its settings have today."""
    return {
        FORMER_NAMES.get(key, key): _with_new_names(inner) if isinstance(inner, dict) else inner
        for key, inner in values.items()
    }


def _kind_before_1(values: dict[str, Any]) -> Kind:
    if isinstance(values.get("sweep"), dict):
        return "sweep"
    if values.get("kind") == "compare":
        return "compare"
    if isinstance(values.get("settings"), dict):
        return "character"
    if "method" in values:
        return "member"
    return "candidate" if "sweep" in values else "finetune"


def _method_before_1(values: dict[str, Any]) -> Method | None:
    named, settings = values.get("method"), values.get("settings")
    if named in ("lora", "full", "peft"):
        return named
    if isinstance(settings, dict):
        is_adapter = settings.get("use_lora") is True and values.get("base") is not None
        return "lora" if is_adapter else "full"
    if "lora" not in values:
        return None
    is_lora = values["lora"] is not None or values.get("from_adapter") is not None
    return "lora" if is_lora else "full"


def _settle(path: Path, found: Faults, faults: Faults | None) -> None:
    """Add what was found to the reader's faults, or raise it."""
    if faults is not None:
        faults.extend(found)
    elif found:
        advice = "Restore the file from a backup, or start a new run."
        raise CheckpointError(gather(found, f"Cannot use the run {path.parent}:", advice))
