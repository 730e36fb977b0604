"""Comparison of the character model: LoRA and full fine-tuning from the same base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora.adapters.save_load import save_adapter
from lora.compare.config import CompareConfig, LearningRates
from lora.compare.factory import MemberSetup
from lora.config import RunConfig, TrainConfig
from lora.data.reading.embedded import prose
from lora.data.sequences.blocks import BlockStream, check_length, ordered_blocks
from lora.device import DeviceChoice, choose_device
from lora.errors import DataError
from lora.runs.comparison_record import Sample
from lora.runs.record import Method
from models.bigram_lm_v2 import BigramLanguageModel, bigram_loss, save_bigram
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from models.char_step import char_steps
from models.char_text import EVAL_TOKENS, Text, load_base, write_sample
from models.classic_settings import ClassicSettings

FULL_WEIGHT_DECAY = 0.01
"""As in full fine-tuning by training.py."""


@dataclass(frozen=True)
class CharFactory:
    """Builds the members of one comparison; see `lora.compare.factory.Factory`."""

    settings: ClassicSettings
    base_path: Path

    @property
    def base_name(self) -> str:
        """Name of the base model: that of its run directory."""
        path = self.base_path
        return path.parent.name if path.name == "model" else path.name

    def described(self) -> dict[str, Any]:
        """Return the settings that must be equal for a comparison to be resumed."""
        return {"settings": asdict(self.settings), "base": str(self.base_path)}

    def build(self, method: Method, train: TrainConfig) -> MemberSetup:
        """Return the base with LoRA, or with all of its weights trainable."""
        settings, choice = self.settings, choose_device(self.settings.device, train.precision)
        base, text = load_base(settings, self.base_path, on_message=lambda note: None)
        check_length(text.validation, base.block_size, "the validation text")
        torch.manual_seed(train.seed)
        model = self._with_lora(base, train.seed) if method == "lora" else base
        model.to(choice.device)

        def save(folder: Path) -> None:
            if method == "lora":
                save_adapter(model, folder, base_name=self.base_path.name)
            else:
                save_bigram(model, folder)
                text.tokenizer.save(folder / "vocab.json")

        return MemberSetup(
            model=model,
            loss_fn=bigram_loss,
            stream=BlockStream(
                text.train, model.block_size, train.micro_batch_size, train.seed, choice.device
            ),
            eval_batches=lambda: _blocks(text.validation, model, train, choice),
            choice=choice,
            save=save,
            forgetting=_forgetting(text, model, train, choice),
            answer=lambda: [Sample(text.prompt, None, _continuation(model, text, choice))],
            weight_decay=0.0 if method == "lora" else FULL_WEIGHT_DECAY,
            choose_steps=lambda config: char_steps(model, choice, config),
        )

    def _with_lora(self, base: BigramLanguageModel, seed: int) -> BigramLanguageModel:
        return BigramLanguageModelLoRA.from_base(
            base,
            lora_rank=self.settings.lora_rank,
            lora_alpha=self.settings.lora_alpha,
            lora_dropout=self.settings.lora_dropout,
            train_embeddings=self.settings.train_embeddings,
            seed=seed,
        )


def char_config(settings: ClassicSettings) -> CompareConfig:
    """Return the settings of a comparison from the environment variables of training.py."""
    # A learning rate of 0 in the settings stands for the default that was tuned for the method.
    defaults = [replace(settings, use_lora=use, learning_rate=0.0).rate for use in (True, False)]
    train = replace(settings.train_config(), learning_rate=settings.learning_rate or None)
    return CompareConfig(
        train=train,
        run=RunConfig(
            out=Path(settings.output_dir),
            name=settings.run_name or f"compare-r{settings.lora_rank}",
            eval_every_steps=settings.eval_interval,
            device=settings.device,
        ),
        rates=LearningRates(_words(settings.compare_rates), _words(settings.compare_full_rates)),
        default_rates=(defaults[0], defaults[1]),
    )


def _words(rates: str) -> tuple[str, ...]:
    return (rates,) if rates else ()


def _blocks(
    tokens: Tensor, model: BigramLanguageModel, train: TrainConfig, choice: DeviceChoice
) -> Iterator[tuple[Tensor, Tensor]]:
    return ordered_blocks(tokens, model.block_size, train.batch_size, EVAL_TOKENS, choice.device)


def _forgetting(
    text: Text, model: BigramLanguageModel, train: TrainConfig, choice: DeviceChoice
) -> tuple[str, Callable[[], Iterator[tuple[Tensor, Tensor]]]] | None:
    """Return the built-in prose; None if a character of it is not in the base's vocabulary."""
    corpus = prose()
    try:
        tokens = torch.from_numpy(text.tokenizer.encode(corpus.validation))
    except DataError:
        return None
    return corpus.described, lambda: _blocks(tokens, model, train, choice)


def _continuation(model: BigramLanguageModel, text: Text, choice: DeviceChoice) -> str:
    return write_sample(model, text, choice.device)[len(text.prompt) :]
