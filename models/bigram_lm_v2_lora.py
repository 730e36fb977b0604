"""The character GPT with LoRA on every linear, its head included."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path

from lora.adapters.apply import apply_lora, lora_layers, replace_module
from lora.config import LoRAConfig
from lora.errors import ModelError
from models.bigram_lm_v2 import BigramLanguageModel, BigramSizes, load_bigram

EMBEDDINGS = ("token_embedding_table", "position_embedding_table")


def char_lora_config(
    rank: int, alpha: float, dropout: float, train_embeddings: bool, seed: int | None = None
) -> LoRAConfig:
    """Return the LoRAConfig that adapts all linears; embeddings are fully trained if asked."""
    saved = EMBEDDINGS if train_embeddings else ()
    return LoRAConfig(
        rank=rank, alpha=alpha, dropout=dropout, modules_to_save=saved, init_seed=seed
    )


class BigramLanguageModelLoRA(BigramLanguageModel):
    """BigramLanguageModel with LoRA on key, query, value, proj, both MLP linears and the head.

    Args:
        vocab_size, n_embd, n_head, n_layer, block_size, dropout: the base's sizes.
        lora_rank, lora_alpha, lora_dropout: as in LoRALinear.
        base: a trained BigramLanguageModel, or the path of a saved one; its weights are copied
            before LoRA is applied. None leaves random weights, which only tests need.
        train_embeddings: whether the two embedding tables are fully trained (counted separately).
        seed: of the initial A.

    The base's linears, biases and norms are frozen. Raises ModelError if `base` has other sizes.
    """

    def __init__(
        self,
        vocab_size: int,
        n_embd: int = 64,
        n_head: int = 4,
        n_layer: int = 2,
        block_size: int = 32,
        dropout: float = 0.0,
        *,
        lora_rank: int = LoRAConfig.rank,
        lora_alpha: float = LoRAConfig.alpha,
        lora_dropout: float = LoRAConfig.dropout,
        base: BigramLanguageModel | Path | str | None = None,
        train_embeddings: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__(vocab_size, n_embd, n_head, n_layer, block_size, dropout)
        if base is not None:
            self._take_weights(base)
        apply_lora(
            self, char_lora_config(lora_rank, lora_alpha, lora_dropout, train_embeddings, seed)
        )

    @classmethod
    def from_base(
        cls,
        base: BigramLanguageModel,
        *,
        lora_rank: int = LoRAConfig.rank,
        lora_alpha: float = LoRAConfig.alpha,
        lora_dropout: float = LoRAConfig.dropout,
        train_embeddings: bool = True,
        seed: int | None = None,
    ) -> BigramLanguageModelLoRA:
        """Return an adapted copy of `base`, which is not changed."""
        return cls(
            **asdict(base.sizes),
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            base=base,
            train_embeddings=train_embeddings,
            seed=seed,
        )

    def merge(self) -> BigramLanguageModel:
        """Return a plain BigramLanguageModel with LoRA merged in; this model stays adapted."""
        plain = copy.deepcopy(self)
        for name, layer in lora_layers(plain).items():
            replace_module(plain, name, layer.merge())
        merged = BigramLanguageModel(**asdict(self.sizes))
        merged.load_state_dict(plain.state_dict())
        return merged.train(self.training)

    def _take_weights(self, base: BigramLanguageModel | Path | str) -> None:
        model = base
        if isinstance(model, Path | str):
            model = load_bigram(Path(model), self.sizes)
        if _shape_of(model.sizes) != _shape_of(self.sizes):
            raise ModelError(
                f"Cannot copy the weights of a base with {model.sizes} into a model with "
                f"{self.sizes}: all but dropout must be equal. Build it with the base's sizes."
            )
        self.load_state_dict(model.state_dict())


def _shape_of(sizes: BigramSizes) -> dict[str, float]:
    return {name: value for name, value in asdict(sizes).items() if name != "dropout"}
