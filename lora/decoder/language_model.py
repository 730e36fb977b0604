"""What every job needs of a causal language model, whoever wrote its network.

Native decoders (`lora.decoder.decoder`) and transformers' models
(`lora.pretrained.transformers_models.model`) are both of this class. The jobs know nothing else;
what only native decoders can do asks for a `Decoder` and says why not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora.decoder.quantised.record import BaseQuantisation


class ModelConfig(Protocol):
    """Sizes of a causal language model, under Hugging Face's names."""

    @property
    def family(self) -> str:
        """model_type in config.json."""

    @property
    def vocab_size(self) -> int:
        """V."""

    @property
    def hidden_size(self) -> int:
        """C."""

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks."""

    @property
    def max_position_embeddings(self) -> int:
        """Context length, in tokens."""

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the output head shares the embedding's weight."""

    @property
    def source(self) -> dict[str, Any]:
        """config.json as read."""

    @property
    def logit_scale(self) -> float:
        """Multiplies the output head's logits."""

    @property
    def logit_softcap(self) -> float | None:
        """The scaled logits become softcap · tanh(logits / softcap); None: they stay."""

    def is_transposed_in_files(self, name: str) -> bool:
        """Whether files hold the parameter `name` as (I, O) where the module has (O, I)."""


class TokenCache(Protocol):
    """What a model stores of the tokens so far, for generation: all sequences advance together."""

    n_tokens: int

    def select_sequences(self, indices: Tensor) -> None:
        """Keep only the sequences at `indices` (int64): those that ended are dropped."""


class LanguageModel(nn.Module):
    """A causal language model: hidden states, and an output head that makes logits of them."""

    config: ModelConfig

    theirs: nn.Module | None = None
    """transformers' model, if this is a view of one; then no child of this module."""

    def __init__(self) -> None:
        super().__init__()
        self.known_fingerprint: str | None = None
        """Of the base whose values are not all in this process, or that were unpacked from codes;
        None: it follows from them."""
        self.known_quantisation: BaseQuantisation | None = None
        """Of the same bases; None: it follows from the layers."""
        self.original_weight: Callable[[str], Tensor] | None = None
        """Returns the weight (O, I) of a linear, by its name, as it was before the base was
        quantised; None: not known."""
        self.is_sharded = False
        """Whether several processes share its weights out: all of them then run it together."""
        self.is_forward_only = False
        """Whether its frozen weights are there while it computes alone: no backward pass then."""
        self.cache_dtype: torch.dtype | None = None
        """Of keys and values, if it is not that of the parameters."""

    @property
    def needs_all_logits(self) -> bool:
        """Whether logits exist only all at once: `hidden_states` then returns them."""
        return False

    @property
    def why_not_packed(self) -> str | None:
        """Why the examples of a packed sequence would see each other; None: they do not."""
        return None

    @property
    def position_table_rows(self) -> int | None:
        """How many positions its table has rows for; None: any position can be computed."""
        return None

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Return the logits (B, T, V) of `input_ids` (B, T); `cache` stores the tokens."""
        hidden = self.hidden_states(
            input_ids, position_ids=position_ids, document_ids=document_ids, cache=cache
        )
        return self.logits_of(hidden)

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Return the output head's input: (B, T, C) after the final norm.

        Tokens of different documents do not see each other; document −1 is padding.
        """
        raise NotImplementedError

    def logits_of(self, hidden: Tensor) -> Tensor:
        """Return the logits (…, V) of hidden states (…, C): the head's, scaled and capped."""
        return transform_logits(self.output_head()(hidden), self.config)

    def output_head(self) -> nn.Linear:
        """Return the linear C -> V; its weight is the embedding's where the config ties them."""
        raise NotImplementedError

    def get_output_embeddings(self) -> nn.Module:
        """Return the output head, under the name it has in transformers."""
        return self.output_head()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding, under the name it has in transformers."""
        raise NotImplementedError

    def blocks(self) -> nn.ModuleList:
        """Return the blocks in order."""
        raise NotImplementedError

    def new_cache(self, batch_size: int, max_tokens: int) -> TokenCache:
        """Return an empty cache for `batch_size` sequences of up to `max_tokens` tokens each."""
        raise NotImplementedError

    def token_cache_bytes(self) -> int:
        """Return what a cache holds of one token of one sequence, in bytes."""
        raise NotImplementedError


def transformers_network(model: nn.Module) -> Any:
    """Return the PreTrainedModel that `model` is or is a view of, or None for other networks.

    Never imports transformers.
    """
    network = model.theirs if isinstance(model, LanguageModel) else model
    loaded = sys.modules.get("transformers.modeling_utils")
    return network if loaded is not None and isinstance(network, loaded.PreTrainedModel) else None


def transform_logits(logits: Tensor, config: ModelConfig) -> Tensor:
    """Return the output head's logits scaled and capped as `config` says."""
    if config.logit_scale != 1:
        logits = logits * config.logit_scale
    if config.logit_softcap is not None:
        logits = torch.tanh(logits / config.logit_softcap) * config.logit_softcap
    return logits
