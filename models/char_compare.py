"""The character model's members of a comparison: LoRA and full fine-tuning from the same base."""

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
"""As training.py's full fine-tuning has it."""


@dataclass(frozen=True)
class CharFactory:
    """Builds the members of one comparison; see `lora.compare.factory.Factory`."""

    settings: ClassicSettings
    base_path: Path

    @property
    def base_name(self) -> str:
        """What the base is called: its run's folder."""
        path = self.base_path
        return path.parent.name if path.name == "model" else path.name

    def described(self) -> dict[str, Any]:
        """Return what must be the same again for a comparison to be resumed."""
        return {"settings": asdict(self.settings), "base": str(self.base_path)}

    def build(self, method: Method, train: TrainConfig) -> MemberSetup:
        """Return LoRA on the base, or the base whole."""
        settings, choice = self.settings, choose_device(self.settings.device, train.precision)
        base, text = load_base(settings, self.base_path, on_message=lambda note: None)
        check_length(text.validation, base.block_size, "the validation text")
        torch.manual_seed(train.seed)
        model = self._adapted(base, train.seed) if method == "lora" else base
        model.to(choice.device)
        rows = train.micro_batch_size

        def save(folder: Path) -> None:
            if method == "lora":
                save_adapter(model, folder, base_name=self.base_path.name)
            else:
                save_bigram(model, folder)
                text.tokenizer.save(folder / "vocab.json")

        return MemberSetup(
            model=model,
            loss_fn=bigram_loss,
            stream=BlockStream(text.train, model.block_size, rows, train.seed, choice.device),
            eval_batches=lambda: _blocks(text.validation, model, train, choice),
            choice=choice,
            save=save,
            forgetting=_forgetting(text, model, train, choice),
            answer=lambda: [Sample(text.prompt, None, _written(model, text, choice))],
            weight_decay=0.0 if method == "lora" else FULL_WEIGHT_DECAY,
            choose_steps=lambda config: char_steps(model, choice, config),
        )

    def _adapted(self, base: BigramLanguageModel, seed: int) -> BigramLanguageModel:
        return BigramLanguageModelLoRA.from_base(
            base,
            lora_rank=self.settings.lora_rank,
            lora_alpha=self.settings.lora_alpha,
            lora_dropout=self.settings.lora_dropout,
            train_embeddings=self.settings.train_embeddings,
            seed=seed,
        )


def char_config(settings: ClassicSettings) -> CompareConfig:
    """Return the comparison that the variables of training.py ask for."""
    tuned = [replace(settings, use_lora=use, learning_rate=0.0).rate for use in (True, False)]
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
        default_rates=(tuned[0], tuned[1]),
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
    """Return the built-in prose; None if the base's vocabulary cannot write it."""
    corpus = prose()
    try:
        tokens = torch.from_numpy(text.tokenizer.encode(corpus.validation))
    except DataError:
        return None
    return corpus.described, lambda: _blocks(tokens, model, train, choice)


def _written(model: BigramLanguageModel, text: Text, choice: DeviceChoice) -> str:
    return write_sample(model, text, choice.device)[len(text.prompt) :]
