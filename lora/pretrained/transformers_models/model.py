"""One of transformers' causal models as a `LanguageModel`.

The wrapper shares the very tables of modules, parameters and buffers that the model has: names are
theirs, and what is replaced in one is replaced in both. It adds hidden states without logits,
documents that do not see each other, and a cache for batches of prompts.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lora.decoder.attention import positions_within
from lora.decoder.language_model import LanguageModel, TokenCache
from lora.errors import ModelError
from lora.pretrained.transformers_models.cache import (
    RecomputingCache,
    RotaryCache,
    TransformersCache,
    each_alone,
)
from lora.pretrained.transformers_models.config import (
    Traits,
    TransformersConfig,
    rotary_limit,
    setting,
)
from lora.pretrained.transformers_models.masks import documents_apart
from lora.terminal import escaping_log

log = escaping_log(__name__)

HEAD_TOLERANCE = 0.01
"""Of the largest logit, in any dtype: what a factor or a cap changes is more."""


class TransformersModel(LanguageModel):
    """A view of `theirs`, one of transformers' causal models.

    Args:
        theirs: the model; it stays usable beside this one.
        traits: of its architecture, from `probe`.
    """

    config: TransformersConfig
    theirs: Any

    def __init__(self, theirs: Any, traits: Traits) -> None:
        is_training = theirs.training
        vars(self)["theirs"] = theirs  # no child: its parts are ours already
        super().__init__()
        for table in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            vars(self)[table] = vars(theirs)[table]
        for mark in ("applied_lora", "stored_adapters"):
            if mark in vars(theirs):
                vars(self)[mark] = vars(theirs)[mark]
        self.training = is_training
        self.traits = traits
        self.config = TransformersConfig(theirs.config, traits)
        self.rotary_limit = rotary_limit(self.config.text)
        """Longer sequences go through one by one: their length chooses the rotary frequencies."""
        if traits.is_head_assumed and not self._has_plain_head():
            self.traits = dataclasses.replace(traits, needs_all_logits=True)
            self.config = TransformersConfig(theirs.config, self.traits)

    @property
    def training(self) -> bool:
        """Whether dropout is on, in both."""
        return bool(self.theirs.training)

    @training.setter
    def training(self, mode: bool) -> None:
        self.theirs.training = mode

    @property
    def needs_all_logits(self) -> bool:
        """Whether its logits exist only all at once: hidden states are then the logits."""
        return self.traits.needs_all_logits

    @property
    def why_not_packed(self) -> str | None:
        """Why the examples of a packed sequence would see each other; None: they do not."""
        return self.traits.why_not_packed_in(next(self.parameters()).dtype)

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Return the output head's input: (B, T, C) after the final norm.

        Tokens of different documents do not see each other; document −1 is padding. Where
        `needs_all_logits`, these are the logits (B, T, V).
        """
        if cache is not None:
            return cache.run(self.run, input_ids, position_ids, document_ids)
        if input_ids.shape[1] > self.rotary_limit:
            documents = torch.zeros_like(input_ids) if document_ids is None else document_ids
            return self._each_alone(input_ids, documents)
        if document_ids is None:
            return self.run(input_ids, position_ids)
        # No value may be read on the host while a CUDA graph is captured: a mask is always right.
        is_capturing = document_ids.is_cuda and torch.cuda.is_current_stream_capturing()
        if not is_capturing and is_right_padded(document_ids):
            # Earlier tokens do not see later ones: padding after them needs no mask.
            if position_ids is not None:
                steps = torch.arange(input_ids.shape[1], device=input_ids.device)
                position_ids = torch.where(document_ids >= 0, position_ids, steps)
            return self.run(input_ids, position_ids)
        if self.why_not_packed is not None:
            return self._each_alone(input_ids, document_ids)
        if position_ids is None:
            steps = torch.arange(input_ids.shape[1], device=input_ids.device)
            position_ids = positions_within(document_ids, steps)
        return self.run_masked(input_ids, position_ids, document_ids)

    def run_masked(
        self, input_ids: Tensor, position_ids: Tensor | None, document_ids: Tensor
    ) -> Tensor:
        """Return the hidden states with a mask of the documents, whether it is needed or not."""
        with documents_apart(self.config.text, document_ids):
            return self.run(input_ids, position_ids)

    def _each_alone(self, input_ids: Tensor, document_ids: Tensor) -> Tensor:
        return each_alone(lambda tokens: self.run(tokens, None), input_ids, document_ids)

    def run(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        *,
        use_cache: bool = False,
        **more: Any,
    ) -> Tensor:
        """Return the hidden states of one forward, each sequence a document, without our masks.

        `more` goes to transformers' forward, where that takes it.
        """
        self._check_positions(input_ids, position_ids, is_cached=use_cache)
        whole = self.needs_all_logits
        network = self.theirs if whole else self._network()
        kind: Any = type(network)
        known = _inputs_of(kind)
        inputs: dict[str, Any] = {"position_ids": position_ids, "use_cache": use_cache, **more}
        given = {n: value for n, value in inputs.items() if n in known and value is not None}
        if "cache_params" in known and "past_key_values" in more:  # Mamba's name for it
            given["cache_params"] = more["past_key_values"]
            if input_ids.shape[1] == 1:  # the mask is of the tokens that are given
                given.pop("attention_mask", None)
        output: Any = network(input_ids=input_ids, **given)
        hidden: Tensor = output.logits if whole else output[0]
        if whole or torch.is_autocast_enabled(hidden.device.type):
            return hidden
        return hidden.to(self.output_head().weight.dtype)  # Mamba's are fp32 beside bf16 weights

    def _check_positions(
        self, input_ids: Tensor, position_ids: Tensor | None, *, is_cached: bool
    ) -> None:
        """Raise ModelError for a position that the table has no row for."""
        limit = self.position_table_rows
        if limit is None:
            return
        longest = input_ids.shape[1]
        if position_ids is not None and (longest <= limit or not self._has_stored_mask):
            if type(position_ids) is not Tensor or (position_ids.is_cuda and not is_cached):
                return  # a plan's have no values, and reading a GPU's would make the host wait
            longest = int(position_ids.max()) + 1
        if longest > limit:
            raise ModelError(
                f"Cannot run {longest} positions: this model has position embeddings for "
                f"{limit} only. Use sequences of at most {limit} tokens."
            )

    @functools.cached_property
    def _has_stored_mask(self) -> bool:
        """Whether attention reads a mask (P, P) of all positions (GPT-Neo), packed or not."""
        limit = self.config.max_position_embeddings
        return any(b.shape == (1, 1, limit, limit) for b in self._network().buffers())

    @functools.cached_property
    def position_table_rows(self) -> int | None:
        """How many positions its table has rows for; None: any position can be computed."""
        if self.config.text is not self.theirs.config:
            return None  # a tower for images has tables of positions too
        limit, network = self.config.max_position_embeddings, self._network()
        of_tokens = set(network.get_input_embeddings().modules())
        others = (module for module in network.modules() if module not in of_tokens)
        n_rows = [table.num_embeddings for table in others if isinstance(table, nn.Embedding)]
        # OPT's has two rows more, before those of the positions; GPT-J's is computed, but once.
        has_buffer = any(b.dim() == 2 and len(b) == limit for b in network.buffers())
        is_table = has_buffer or any(limit <= rows <= limit + 2 for rows in n_rows)
        return limit if is_table else None

    def _network(self) -> Any:
        """Return what makes hidden states: of a multimodal model the part for text."""
        is_text = self.config.text is self.theirs.config
        found: Any = self.theirs.base_model if is_text else self.theirs.get_decoder()
        if found is not self.theirs:
            return found
        # Its name for it is that of another model (Llama 4): the part that holds the embedding.
        embedding = self.get_input_embeddings()
        parts = (m for m in self.theirs.children() if embedding in m.modules() and m != embedding)
        return next(parts, found)

    @torch.no_grad()
    def _has_plain_head(self) -> bool:
        """Whether the head's logits of a few tokens are the model's; assumed without values."""
        first = next(self.parameters())
        if first.is_meta:
            return True
        was_training = self.training
        self.theirs.eval()
        ids = torch.arange(1, 4, device=first.device)[None]
        found, wanted = self.logits_of(self.run(ids, None)), self.theirs(input_ids=ids).logits
        self.theirs.train(was_training)
        tolerance = HEAD_TOLERANCE * wanted.abs().max()
        return bool((found - wanted).abs().max() <= tolerance)

    def logits_of(self, hidden: Tensor) -> Tensor:
        """Return the logits (…, V) of hidden states (…, C): the head's, scaled and capped."""
        return hidden if self.needs_all_logits else super().logits_of(hidden)

    def output_head(self) -> nn.Linear:
        """Return the linear C -> V; its weight is the embedding's where the config ties them."""
        head: nn.Linear = self.theirs.get_output_embeddings()
        return head

    def get_output_embeddings(self) -> nn.Module:
        """Return the output head."""
        return self.output_head()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        embedding: nn.Module = self.theirs.get_input_embeddings()
        return embedding

    def resize_token_embeddings(self, new_num_tokens: int, *, mean_resizing: bool) -> nn.Module:
        """Change the token tables in place, as transformers does."""
        embedding: nn.Module = self.theirs.resize_token_embeddings(
            new_num_tokens, mean_resizing=mean_resizing
        )
        return embedding

    def blocks(self) -> nn.ModuleList:
        """Return the blocks in order: the list of modules that is as long as the config says."""
        n_blocks = self.config.num_hidden_layers
        lists = [m for m in self.theirs.get_decoder().modules() if isinstance(m, nn.ModuleList)]
        of_length = [found for found in lists if len(found) == n_blocks]
        return of_length[0] if of_length else max(lists, key=len, default=nn.ModuleList())

    def new_cache(self, batch_size: int, max_tokens: int) -> TokenCache:
        """Return an empty cache for `batch_size` sequences; it grows as it is filled.

        Keys and values are stored as they come: where the model is, and in its dtype.
        """
        if not self.traits.has_cache:
            _tell_of_recomputing(self.config.family)
            return RecomputingCache()
        if max_tokens > self.rotary_limit:
            return RotaryCache(self._new_cache, self.rotary_limit)
        return self._new_cache(batch_size)

    def _new_cache(self, batch_size: int) -> TransformersCache:
        from transformers import DynamicCache

        return TransformersCache(batch_size, DynamicCache(config=self.theirs.config))

    def token_cache_bytes(self) -> int:
        """Return what a cache holds of one token of one sequence, in bytes; windows count whole."""
        text, first = self.config.text, next(self.parameters())
        n_heads = setting(text, "num_attention_heads") or 1
        head_dim = setting(text, "head_dim") or self.config.hidden_size // n_heads
        shared = setting(text, "num_key_value_heads", "num_kv_heads") or n_heads
        n_values = 2 * self.config.num_hidden_layers * shared * head_dim
        return int(n_values * first.element_size())


@functools.cache
def _inputs_of(kind: Any) -> frozenset[str]:
    """Return the names of what a class's forward takes."""
    return frozenset(inspect.signature(kind.forward).parameters)


@functools.cache
def _tell_of_recomputing(family: str) -> None:
    """Warn, once for each family in a process."""
    log.warning(
        "a %s cannot continue padded prompts from its own state: each new token costs a forward of "
        "all before it",
        family,
    )


def is_right_padded(document_ids: Tensor) -> bool:
    """Whether each row of (B, T) is document 0 and then padding, or padding alone.

    The host waits for the device.
    """
    before, after = document_ids[:, :-1], document_ids[:, 1:]
    is_plain = (document_ids <= 0).all() & (after <= before).all()
    return bool(is_plain)
