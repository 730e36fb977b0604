"""The command line that starts a run again, from what `run.json` says was asked.

Only what differs from the defaults is written. A run that was started from Python on rows in
memory has none.
"""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from lora.config import FULL_LEARNING_RATE, DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.sweep.grid import SWEPT, Grid, short_number

IN_MEMORY = "rows given in Python"
_OF_SWEEP = ("out", "name", "eval_every_steps", "save_every_steps", "device")
_OF_COMPARISON = (*_OF_SWEEP, "samples", "sample_tokens", "fast")


def finetune_command(asked: dict[str, Any], name: str) -> str | None:
    """Return the `lora finetune` of a `run.json`; None if it was not one, or not on files."""
    words = _source_words(asked)
    if words is None or not isinstance(asked.get("train"), dict):
        return None
    lora = asked.get("lora")
    from_adapter = asked.get("from_adapter")
    if isinstance(from_adapter, str):
        words += ["--from-adapter", from_adapter]
    elif lora is None:
        words += ["--full"]
    else:
        words += _flags(lora, LoRAConfig)
    words += ["--deterministic"] if asked.get("deterministic") is True else []
    words += _flags(asked["train"], TrainConfig)
    words += _flags(asked.get("data_config"), DataConfig)
    words += _run_flags(asked.get("run"), name)
    return shlex.join(["lora", "finetune", *words])


def sweep_command(asked: dict[str, Any], name: str, full_rate: float | None = None) -> str | None:
    """Return the `lora sweep` of a `run.json`; None if it was not on files.

    `full_rate` is that of full fine-tuning beside it; None: there was none.
    """
    words, sweep = _source_words(asked), asked.get("sweep")
    grid = sweep.get("grid") if isinstance(sweep, dict) else None
    if words is None or not isinstance(grid, dict) or not isinstance(sweep, dict):
        return None
    for key in SWEPT:
        values = grid.get(key)
        default = list(getattr(Grid(), key))
        if isinstance(values, list) and values != default:
            words += [_flag(key), ",".join(_written(value) for value in values)]
    if full_rate is not None:
        words += ["--full"]
        is_default = full_rate == FULL_LEARNING_RATE
        words += [] if is_default else ["--full-learning-rate", _written(full_rate)]
    words += ["--halving"] if sweep.get("halving") is True else []
    words += _flags(asked.get("lora"), LoRAConfig, without=SWEPT)
    words += _flags(asked.get("train"), TrainConfig, without=SWEPT)
    words += _flags(asked.get("data_config"), DataConfig)
    words += _run_flags(asked.get("run"), name, only=_OF_SWEEP)
    return shlex.join(["lora", "sweep", *words])


def comparison_command(asked: dict[str, Any], name: str) -> str | None:
    """Return the `lora compare` of a `run.json`; None if it was not on files."""
    compare = asked.get("compare")
    if not isinstance(compare, dict) or not isinstance(compare.get("data"), str):
        return None
    if compare["data"].endswith(IN_MEMORY):
        return None
    words = ["--data", compare["data"]]
    for key in ("model", "eval_data"):
        if isinstance(compare.get(key), str):
            words += [_flag(key), compare[key]]
    if compare.get("same") == "time":
        words += ["--same", "time"]
    methods = compare.get("methods")
    words += ["--peft"] if isinstance(methods, list) and "peft" in methods else []
    rates = compare.get("rates")
    for key in ("rates", "full_rates"):
        values = rates.get(key) if isinstance(rates, dict) else None
        if isinstance(values, list) and values:
            words += [_flag(key), ",".join(_written(value) for value in values)]
    if isinstance(rates, dict) and rates.get("full_learning_rate") is not None:
        words += ["--full-learning-rate", _written(rates["full_learning_rate"])]
    if isinstance(rates, dict) and rates.get("rates") and rates.get("rate_steps"):
        words += ["--rate-steps", str(rates["rate_steps"])]
    words += _measure_flags(compare.get("measures"))
    words += _flags(compare.get("lora"), LoRAConfig)
    words += _flags(compare.get("train"), TrainConfig)
    words += _flags(compare.get("data_config"), DataConfig)
    words += _run_flags(asked.get("run"), name, only=_OF_COMPARISON)
    return shlex.join(["lora", "compare", *words])


def _measure_flags(measures: Any) -> list[str]:
    """Return the flags of what a comparison measures besides."""
    if not isinstance(measures, dict):
        return []
    words = []
    for key in ("forgetting_data", "metric", "test_data"):
        if isinstance(measures.get(key), str) and measures[key] != "none":
            words += [_flag(key), measures[key]]
    if measures.get("metric") not in (None, "none"):
        for key in ("answers", "answer_tokens"):
            if measures.get(key) is not None:
                words += [_flag(key), _written(measures[key])]
    return words


def _source_words(asked: dict[str, Any]) -> list[str] | None:
    """Return the flags of data and model; None where the rows were given in Python."""
    data = asked.get("data")
    source = data.get("source") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(source, str) or source == IN_MEMORY:
        return None
    words = ["--data", source]
    model = asked.get("model_source")
    if isinstance(model, str):
        words += ["--model", model]
    held_out = data.get("eval_source")
    if isinstance(held_out, str):
        words += ["--eval-data", held_out]
    return words


def _run_flags(values: Any, name: str, only: tuple[str, ...] | None = None) -> list[str]:
    given = values if isinstance(values, dict) else {}
    kept = {k: v for k, v in given.items() if only is None or k in only}
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
    return [flag, _written(value)]


def _written(value: Any) -> str:
    return short_number(value) if isinstance(value, float) else str(value)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
