"""The settings of a run, and the command line that repeats it, from its record.

The command has only what differs from the defaults. A run that was started from Python on rows in
memory has none.
"""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from lora.config import (
    FULL_LEARNING_RATE,
    BaseWeights,
    DataConfig,
    LoRAConfig,
    RunConfig,
    TrainConfig,
)
from lora.runs.record import RunRecord
from lora.sweep.grid import SWEPT, Grid, short_number

Settings = dict[str, Any]
"""Flags by their names with underscores, in the order of a command; no value is None."""
_OF_SWEEP = ("out", "name", "eval_every_steps", "save_every_steps", "save", "device", "fast")
_OF_COMPARISON = (*_OF_SWEEP, "samples", "sample_tokens")
_NOT_OF_SWEEP = (*SWEPT, "rank_pattern", "alpha_pattern", "init_seed")


def finetune_command(record: RunRecord, name: str) -> str | None:
    """Return the `lora finetune` of a run; None if it was not one, or not on files."""
    return _command("finetune", _on_devices(record, finetune_settings(record, name)))


def sweep_command(record: RunRecord, name: str, full_rate: float | None = None) -> str | None:
    """Return the `lora sweep` of a run; None if it was not on files.

    `full_rate` is the learning rate of full fine-tuning beside it; None: there was none.
    """
    return _command("sweep", _on_devices(record, sweep_settings(record, name, full_rate)))


def comparison_command(record: RunRecord, name: str) -> str | None:
    """Return the `lora compare` of a run; None if it was not on files."""
    return _command("compare", _on_devices(record, comparison_settings(record, name)))


def finetune_settings(record: RunRecord, name: str, *, defaults: bool = False) -> Settings | None:
    """Return the settings of a `lora finetune`, with `defaults` also those that are the defaults.

    None if it was not one, or not on files.
    """
    found = _sources(record)
    if found is None or record.train is None or record.kind not in ("finetune", "candidate"):
        return None
    if record.from_adapter is not None:
        found["from_adapter"] = record.from_adapter
    elif record.lora is None:
        found["full"] = True
    else:
        found |= _changed(record.lora, LoRAConfig, defaults=defaults)
    stored = record.base_dtype
    if record.from_adapter is not None and stored is None:
        stored = "original"  # else the base of that adapter's training would be taken
    found |= _base(stored, record.nf4, defaults=defaults)
    found |= _implementation(record.implementation, defaults=defaults)
    if record.deterministic:
        found["deterministic"] = True
    found |= _changed(record.train, TrainConfig, defaults=defaults)
    found |= _data_settings(record.data_config, defaults=defaults)
    return found | _run_settings(record.run, name, defaults=defaults)


def sweep_settings(
    record: RunRecord, name: str, full_rate: float | None = None, *, defaults: bool = False
) -> Settings | None:
    """Return the settings of a `lora sweep`, as `finetune_settings`; see `sweep_command`."""
    found, sweep = _sources(record), record.sweep
    if found is None or sweep is None:
        return None
    for key in SWEPT:
        values = sweep.grid.get(key)
        if values is not None and (defaults or values != list(getattr(Grid(), key))):
            found[key] = tuple(values)
    if full_rate is not None:
        found["full"] = True
        if full_rate != FULL_LEARNING_RATE:
            found["full_learning_rate"] = full_rate
    if sweep.halving:
        found["halving"] = True
    found |= _base(record.base_dtype, record.nf4, defaults=defaults)
    found |= _implementation(record.implementation, defaults=defaults)
    if record.deterministic:
        found["deterministic"] = True
    found |= _changed(record.lora, LoRAConfig, without=_NOT_OF_SWEEP, defaults=defaults)
    found |= _changed(record.train, TrainConfig, without=SWEPT, defaults=defaults)
    found |= _data_settings(record.data_config, defaults=defaults)
    return found | _run_settings(record.run, name, only=_OF_SWEEP, defaults=defaults)


def comparison_settings(record: RunRecord, name: str, *, defaults: bool = False) -> Settings | None:
    """Return the settings of a `lora compare`, as `finetune_settings`."""
    compare = record.compare
    if compare is None or record.data.in_memory or not isinstance(compare.get("data"), str):
        return None
    found: Settings = {"data": compare["data"]}
    for key in ("model", "eval_data"):
        if isinstance(compare.get(key), str):
            found[key] = compare[key]
    base = compare.get("base")
    if isinstance(base, dict):
        found |= _base(base.get("base_dtype"), base, defaults=defaults)
    found |= _implementation(compare.get("implementation"), defaults=defaults)
    if compare.get("same") == "time":
        found["same"] = "time"
    methods = compare.get("methods")
    if isinstance(methods, list) and "peft" in methods:
        found["peft"] = True
    found |= _rates(compare.get("rates")) | _measures(compare.get("measures"))
    found |= _changed(compare.get("lora"), LoRAConfig, defaults=defaults)
    found |= _changed(compare.get("train"), TrainConfig, defaults=defaults)
    found |= _data_settings(compare.get("data_config"), defaults=defaults)
    return found | _run_settings(record.run, name, only=_OF_COMPARISON, defaults=defaults)


def _base(kind: Any, nf4: Any, *, defaults: bool) -> Settings:
    """Return how a quantised base was stored; nothing for one in the compute dtype."""
    if not isinstance(kind, str):
        return {}
    of_nf4 = _changed(nf4, BaseWeights, without=("base_dtype",), defaults=defaults)
    return {"base_dtype": kind, **(of_nf4 if kind == "nf4" else {})}


def _implementation(kind: Any, *, defaults: bool) -> Settings:
    """Return the code that ran the model; a command that repeats the run finds native itself."""
    is_told = kind == "transformers" or (kind == "native" and defaults)
    return {"implementation": kind} if is_told else {}


def _data_settings(values: Any, *, defaults: bool) -> Settings:
    found = _changed(values, DataConfig, defaults=defaults)
    if found.get("packing") is True:  # the default, as the run has resolved it
        del found["packing"]
    return found


def _rates(rates: Any) -> Settings:
    """Return the learning rates that a comparison tries or is given."""
    if not isinstance(rates, dict):
        return {}
    found: Settings = {}
    for key in ("rates", "full_rates"):
        values = rates.get(key)
        if isinstance(values, list) and values:
            found[key] = tuple(values)
    if rates.get("full_learning_rate") is not None:
        found["full_learning_rate"] = rates["full_learning_rate"]
    if rates.get("rates") and rates.get("rate_steps"):
        found["rate_steps"] = rates["rate_steps"]
    return found


def _measures(measures: Any) -> Settings:
    """Return what a comparison measures besides loss, speed and memory."""
    if not isinstance(measures, dict):
        return {}
    found: Settings = {}
    for key in ("forgetting_data", "metric", "test_data"):
        if isinstance(measures.get(key), str) and measures[key] != "none":
            found[key] = measures[key]
    if measures.get("metric") not in (None, "none"):
        for key in ("answers", "answer_tokens"):
            if measures.get(key) is not None:
                found[key] = measures[key]
    return found


def _sources(record: RunRecord) -> Settings | None:
    """Return data and model; None where the rows were given in Python."""
    data = record.data
    if data.source is None or data.in_memory:
        return None
    given = {"data": data.source, "model": record.model_source, "eval_data": data.eval_source}
    return {name: value for name, value in given.items() if value is not None}


def _run_settings(
    values: dict[str, Any] | None,
    name: str,
    only: tuple[str, ...] | None = None,
    *,
    defaults: bool = False,
) -> Settings:
    found = _changed({**(values or {}), "name": name}, RunConfig, defaults=defaults)
    return {key: value for key, value in found.items() if only is None or key in only}


def _changed(
    values: Any, kind: type, without: tuple[str, ...] = (), *, defaults: bool = False
) -> Settings:
    """Return a config's values that are not its defaults, `defaults`: all but empty ones."""
    if not isinstance(values, dict):
        return {}
    found: Settings = {}
    for field in dataclasses.fields(kind):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        value = values.get(field.name, default)
        plain = list(default) if isinstance(default, tuple) else default
        is_default = value in (plain, str(default))
        if field.name in without or value is None or (is_default and not defaults):
            continue
        if value not in ([], {}, ()):
            found[field.name] = value
    return found


def _on_devices(record: RunRecord, settings: Settings | None) -> Settings | None:
    """Return `settings` with the number of processes, which is no setting of a run."""
    if settings is None or record.world_size is None:
        return settings
    return {**settings, "devices": record.world_size}


def _command(command: str, settings: Settings | None) -> str | None:
    if settings is None:
        return None
    words = [word for name, value in settings.items() for word in _words_of(name, value)]
    return shlex.join(["lora", command, *words])


def _words_of(name: str, value: Any) -> list[str]:
    flag = _flag(name)
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, tuple):  # values to try
        return [flag, ",".join(_written(item) for item in value)]
    if isinstance(value, list):
        return [word for item in value for word in (flag, _written(item))]
    if isinstance(value, dict):
        return [w for key, inner in value.items() for w in (f"{flag}.{key}", _written(inner))]
    return _pair(flag, _written(value))


def _pair(flag: str, value: str) -> list[str]:
    """Return a flag with its value; a value like -x would be taken for a flag by itself."""
    return [f"{flag}={value}"] if value.startswith("-") else [flag, value]


def _written(value: Any) -> str:
    return short_number(value) if isinstance(value, float) else str(value)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
