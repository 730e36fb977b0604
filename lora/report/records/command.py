"""The command line that repeats a run, from its record.

It has only what differs from the defaults. A run that was started from Python on rows in memory has
none.
"""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from lora.config import FULL_LEARNING_RATE, DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.runs.record import RunRecord
from lora.sweep.grid import SWEPT, Grid, short_number

_OF_SWEEP = ("out", "name", "eval_every_steps", "save_every_steps", "device")
_OF_COMPARISON = (*_OF_SWEEP, "samples", "sample_tokens", "fast")


def finetune_command(record: RunRecord, name: str) -> str | None:
    """Return the `lora finetune` of a run; None if it was not one, or not on files."""
    words = _source_words(record)
    if words is None or record.train is None or record.kind not in ("finetune", "candidate"):
        return None
    if record.from_adapter is not None:
        words += _pair("--from-adapter", record.from_adapter)
    elif record.lora is None:
        words += ["--full"]
    else:
        words += _flags(record.lora, LoRAConfig)
    words += ["--deterministic"] if record.deterministic else []
    words += _flags(record.train, TrainConfig)
    words += _flags(record.data_config, DataConfig)
    words += _run_flags(record.run, name)
    return shlex.join(["lora", "finetune", *words])


def sweep_command(record: RunRecord, name: str, full_rate: float | None = None) -> str | None:
    """Return the `lora sweep` of a run; None if it was not on files.

    `full_rate` is the learning rate of full fine-tuning beside it; None: there was none.
    """
    words, sweep = _source_words(record), record.sweep
    if words is None or sweep is None:
        return None
    for key in SWEPT:
        values = sweep.grid.get(key)
        if values is not None and values != list(getattr(Grid(), key)):
            words += [_flag(key), ",".join(_written(value) for value in values)]
    if full_rate is not None:
        words += ["--full"]
        is_default = full_rate == FULL_LEARNING_RATE
        words += [] if is_default else ["--full-learning-rate", _written(full_rate)]
    words += ["--halving"] if sweep.halving else []
    words += _flags(record.lora, LoRAConfig, without=SWEPT)
    words += _flags(record.train, TrainConfig, without=SWEPT)
    words += _flags(record.data_config, DataConfig)
    words += _run_flags(record.run, name, only=_OF_SWEEP)
    return shlex.join(["lora", "sweep", *words])


def comparison_command(record: RunRecord, name: str) -> str | None:
    """Return the `lora compare` of a run; None if it was not on files."""
    compare = record.compare
    if compare is None or record.data.in_memory or not isinstance(compare.get("data"), str):
        return None
    words = _pair("--data", compare["data"])
    for key in ("model", "eval_data"):
        if isinstance(compare.get(key), str):
            words += _pair(_flag(key), compare[key])
    if compare.get("same") == "time":
        words += ["--same", "time"]
    methods = compare.get("methods")
    words += ["--peft"] if isinstance(methods, list) and "peft" in methods else []
    words += _rate_flags(compare.get("rates"))
    words += _measure_flags(compare.get("measures"))
    words += _flags(compare.get("lora"), LoRAConfig)
    words += _flags(compare.get("train"), TrainConfig)
    words += _flags(compare.get("data_config"), DataConfig)
    words += _run_flags(record.run, name, only=_OF_COMPARISON)
    return shlex.join(["lora", "compare", *words])


def _rate_flags(rates: Any) -> list[str]:
    """Return the flags of the learning rates that a comparison tries or is given."""
    if not isinstance(rates, dict):
        return []
    words = []
    for key in ("rates", "full_rates"):
        values = rates.get(key)
        if isinstance(values, list) and values:
            words += [_flag(key), ",".join(_written(value) for value in values)]
    if rates.get("full_learning_rate") is not None:
        words += ["--full-learning-rate", _written(rates["full_learning_rate"])]
    if rates.get("rates") and rates.get("rate_steps"):
        words += ["--rate-steps", str(rates["rate_steps"])]
    return words


def _measure_flags(measures: Any) -> list[str]:
    """Return the flags of what a comparison measures besides loss, speed and memory."""
    if not isinstance(measures, dict):
        return []
    words = []
    for key in ("forgetting_data", "metric", "test_data"):
        if isinstance(measures.get(key), str) and measures[key] != "none":
            words += _pair(_flag(key), measures[key])
    if measures.get("metric") not in (None, "none"):
        for key in ("answers", "answer_tokens"):
            if measures.get(key) is not None:
                words += [_flag(key), _written(measures[key])]
    return words


def _source_words(record: RunRecord) -> list[str] | None:
    """Return the flags of data and model; None where the rows were given in Python."""
    data = record.data
    if data.source is None or data.in_memory:
        return None
    words = _pair("--data", data.source)
    words += [] if record.model_source is None else _pair("--model", record.model_source)
    words += [] if data.eval_source is None else _pair("--eval-data", data.eval_source)
    return words


def _run_flags(
    values: dict[str, Any] | None, name: str, only: tuple[str, ...] | None = None
) -> list[str]:
    kept = {k: v for k, v in (values or {}).items() if only is None or k in only}
    return _flags({**kept, "name": name}, RunConfig)


def _flags(values: Any, kind: type, without: tuple[str, ...] = ()) -> list[str]:
    """Return the flags of a config's values that are not its defaults."""
    if not isinstance(values, dict):
        return []
    words: list[str] = []
    for field in dataclasses.fields(kind):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        value = values.get(field.name, default)
        plain = list(default) if isinstance(default, tuple) else default
        if field.name in without or value is None or value in (plain, str(default)):
            continue
        words += _words_of(field.name, value)
    return words


def _words_of(name: str, value: Any) -> list[str]:
    flag = _flag(name)
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
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
