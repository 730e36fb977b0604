"""Settings that were given and that the job has no use for: refused, not ignored."""

from __future__ import annotations

from lora.config import LoRAConfig, RunConfig, TrainConfig
from lora.data.task import UNUSED_ADVICE
from lora.errors import ConfigError, gather
from lora.finetune.job import FinetuneJob


def check_unused(job: FinetuneJob) -> None:
    """Raise ConfigError for settings that cannot apply in `job`, all of them at once.

    A run that is resumed has been checked when it began, by the rules of its time.
    """
    if job.resume:
        return
    faults = job.why_split_is_unused()
    refuse_unused(faults, job.train, trains_modules=_trains_modules(job))


def refuse_unused(faults: list[str], train: TrainConfig, *, trains_modules: bool) -> None:
    """Raise ConfigError for `faults` and for what cannot apply in `train`, all of it at once.

    `trains_modules`: whether modules are fully trained beside LoRA.
    """
    found, default = list(faults), TrainConfig()
    if train.whole_rate_fraction != default.whole_rate_fraction and not trains_modules:
        found.append(
            f"whole_rate_fraction={train.whole_rate_fraction!r}: it is for modules that are "
            "fully trained beside LoRA (modules_to_save, special_tokens), and there are none"
        )
    has_minimum = train.min_rate_fraction != default.min_rate_fraction
    if train.schedule == "constant" and has_minimum:
        found.append(
            f"min_rate_fraction={train.min_rate_fraction!r}: the schedule constant stays at "
            "the peak. Allowed with cosine and linear"
        )
    if found:
        raise ConfigError(gather(found, "Cannot use all of these settings:", UNUSED_ADVICE))


def check_patience(run: RunConfig, *, resume: bool, has_validation: bool) -> None:
    """Raise ConfigError for early stopping without a validation loss."""
    if run.patience and not has_validation and not resume:
        raise ConfigError(
            f"Cannot stop early (patience={run.patience}): there are no validation data. Give "
            "eval_data, more examples or an eval_fraction above 0, or leave patience out."
        )


def _trains_modules(job: FinetuneJob) -> bool:
    if job.lora is None and job.from_adapter is None:
        return False
    # An adapter that is trained on may have such modules itself.
    of_lora = LoRAConfig() if job.lora is None else job.lora
    is_given = of_lora.modules_to_save or job.data_config.special_tokens
    return bool(is_given) or job.from_adapter is not None
