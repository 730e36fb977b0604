"""Pretrained models on files of examples: what `lora compare` compares. No torch here.

The members LoRA and full fine-tuning are runs of `lora finetune`, to the byte.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lora.compare.decoder_job import DecoderJob
from lora.compare.results import BaseResult, MemberResult
from lora.compare.target import MemberTask, run_rate_trials
from lora.config import RunConfig, TrainConfig
from lora.distributed.ranks import is_one_of_several, world_size
from lora.errors import ConfigError
from lora.runs.comparison_record import RateTrial
from lora.runs.progress import Progress
from lora.runs.record import Method


@dataclass(frozen=True)
class DecoderTarget(DecoderJob):
    """A `DecoderJob` as a `ComparisonTarget`; torch is imported when the first method is called."""

    def check(self, methods: tuple[Method, ...], train: TrainConfig) -> None:
        """Raise ConfigError for a base that cannot be stored as asked, or that PEFT cannot train.

        DependencyError if PEFT's member needs a package that is not installed.
        """
        from lora.pretrained.load.task import settled_base
        from lora.pretrained.sources import find_model

        folder = find_model(self.model).folder
        base = settled_base(folder, self.base_weights, is_full="full" in methods)
        if "peft" in methods and is_one_of_several():
            raise ConfigError(
                f"Cannot compare with PEFT in {world_size()} processes: its member trains in one, "
                "so that times would not compare. Leave --peft out, or use one device."
            )
        if "peft" in methods:
            from lora.compare.peft import check_peft

            check_peft(self.lora, self.data_config, base)

    def measure_base(self, train: TrainConfig, run: RunConfig, progress: Progress) -> BaseResult:
        """Evaluate the base model."""
        from lora.compare.member import measure_base

        return measure_base(self, train, run, progress)

    def with_base(self, base: BaseResult) -> DecoderTarget:
        """Return the target with the implementation that the base was measured with."""
        # Before it was recorded there was no other than native.
        return replace(self, implementation=base.implementation or "native")

    def run_member(self, task: MemberTask, progress: Progress) -> MemberResult:
        """Train a member in `task.folder` and evaluate what it saved."""
        from lora.compare.member import run_member

        return run_member(self, task, progress)

    def try_rates(
        self, task: MemberTask, rates: tuple[float, ...], progress: Progress
    ) -> list[RateTrial]:
        """Train LoRA at all learning rates in one pass, full fine-tuning at one after the other."""
        can_stack = not (self.data_config.special_tokens or self.lora.rank_pattern)
        if task.method == "lora" and len(rates) > 1 and can_stack:
            from lora.compare.member import run_stacked_rate_trials

            return run_stacked_rate_trials(self, task, rates, progress)
        return run_rate_trials(self.run_member, task, rates, progress)
