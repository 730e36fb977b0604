"""`lora.finetune(...)`: a finetune job from settings by their names, without their dataclasses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lora.config import LoRAConfig
from lora.data.inspection_report import DataReport
from lora.data.reading.readers import Source
from lora.errors import ConfigError, UnknownSettingError
from lora.finetune.job import GROUPS, FinetuneJob, FinetuneResult
from lora.finetune.run import finetune as run_job
from lora.finetune.unused import check_unused
from lora.runs.progress import Progress, as_progress
from lora.settings.base import by_names_of_today, describe_unknown, names_of
from lora.training.callbacks import Callbacks


def finetune(
    data: Source | FinetuneJob,
    progress: Progress | bool | None = None,
    *,
    show_data: Callable[[DataReport], None] | None = None,
    callbacks: Callbacks = (),
    **settings: Any,
) -> FinetuneResult:
    """Fine-tune a model on `data`; save the adapter, or the whole model after full fine-tuning.

        done = lora.finetune("orders.jsonl", rank=16, steps=300, name="orders")
        done = lora.finetune(rows, model="./llama", learning_rate=5e-4, max_length=2048)
        model, tokenizer = lora.load_model("./llama", adapter=done.saved)

    Args:
        data: a file or directory of examples, a list of dicts, or a whole FinetuneJob.
        progress: True shows a bar and messages on standard error, None nothing; or what is called
            with them.
        show_data: called with the report on the data before the weights are loaded.
        callbacks: a `lora.Callback`, or a list of them, called after steps, evaluations and saves.
        settings: fields of FinetuneJob (`model`, `eval_data`, `from_adapter`, `resume` …) and of
            its groups LoRAConfig, TrainConfig, DataConfig, RunConfig and MemoryConfig, by their
            names, which are those of the flags of `lora finetune`; `full=True` trains all weights.
            A group may also be given whole: `lora=LoRAConfig(rank=16)`.

    Raises ConfigError, DataError or ModelError before anything is written; TrainingError if the
    loss is no longer finite (the newest checkpoint is kept); Interrupted after a signal.
    """
    shown = as_progress(progress, "finetune")
    if not isinstance(data, FinetuneJob):
        job = build_job(data, settings)
        return run_job(job, shown, show_data=show_data, callbacks=callbacks)
    if settings:
        raise ConfigError(
            f"Cannot use {', '.join(settings)} beside a FinetuneJob, which has all settings. Put "
            "them into the job, or give data instead of a job."
        )
    check_unused(data)
    return run_job(data, shown, show_data=show_data, callbacks=callbacks)


def build_job(data: Source, settings: dict[str, Any]) -> FinetuneJob:
    """Return the job with these settings by their names.

    Raises ConfigError for unknown names, and for values or combinations that are not allowed.
    """
    groups, own = _sort(settings)
    is_full = own.pop("full", False)
    if not isinstance(is_full, bool):
        raise ConfigError(f"Cannot fine-tune with full={is_full!r}. Allowed: true or false.")
    is_full = is_full or own.get("lora", LoRAConfig) is None
    names = [*groups.get("lora", ()), *(["lora"] if own.get("lora") is not None else [])]
    if names and (is_full or own.get("from_adapter") is not None):
        other = "full" if is_full else "from_adapter"
        raise ConfigError(
            f"Cannot combine {other} with LoRA settings ({', '.join(names)}): full fine-tuning has "
            "no adapter, and an adapter that exists has its own rank, alpha, dropout and targets. "
            "Remove one or the other."
        )
    for name, values in groups.items():
        given = own.get(name)
        own[name] = GROUPS[name](**values) if given is None else replace(given, **values)
    if is_full:
        own["lora"] = None
    job = FinetuneJob(data=data, **own)
    check_unused(job)
    return job


def _sort(settings: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return the settings by group, and those of the job itself. Raises ConfigError for others."""
    of_job = [name for name in names_of(FinetuneJob) if name != "data"]
    owners = {name: group for group, kind in GROUPS.items() for name in names_of(kind)}
    known = list(dict.fromkeys([*of_job, "full", *owners]))
    wrong = describe_unknown(settings, known)
    if wrong:
        raise UnknownSettingError(f"Cannot fine-tune: {wrong}")
    groups: dict[str, dict[str, Any]] = {}
    own: dict[str, Any] = {}
    for name, value in by_names_of_today(settings, "fine-tune").items():
        is_group = name in GROUPS and isinstance(value, GROUPS[name])
        if name in owners and not is_group:
            groups.setdefault(owners[name], {})[name] = value
        else:
            own[name] = value
    return groups, own
