"""The decoder: embedding, blocks, final norm, output head.

What differs from the textbook: what the blocks share (rotary tables, masks, the cache) is computed
once per forward and passed to them as one `AttentionInputs`; and a decoder is always built on the
meta device, so that loading spends no time on values that are replaced at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from lora.decoder.attention import (
    AttentionInputs,
    TokenPositions,
    build_mask,
    document_lengths,
    resolve_positions,
)
from lora.decoder.cache import KVCache
from lora.decoder.config import DecoderConfig
from lora.decoder.language_model import LanguageModel
from lora.decoder.layers import BLOCKS, OffsetRMSNorm, RMSNorm
from lora.decoder.quantised.base import QuantisedWeight, dtype_of
from lora.decoder.rope import Rope
from lora.errors import ModelError

INIT_STD = 0.02


def _empty_embedding(rows: int, width: int) -> nn.Embedding:
    """Return an embedding without random init, which on the meta device loads torch's compiler."""
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))


class Trunk(nn.Module):
    """Everything but the output head; subclasses name the parts as their family does."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        distinct = {layer.rope for layer in config.layers if layer.rope is not None}
        self.ropes = {rope: Rope(rope, config.head_dim) for rope in distinct}
        self.needs_lengths = config.longrope_tokens is not None
        self.windows = {layer.window_tokens for layer in config.layers}

    def embedding(self) -> nn.Module:
        """Return the token embedding."""
        raise NotImplementedError

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Return the first hidden states (B, T, C)."""
        raise NotImplementedError

    def blocks(self) -> nn.ModuleList:
        """Return the blocks in order."""
        raise NotImplementedError

    def final_norm(self) -> nn.Module:
        """Return the norm after the last block."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        document_ids: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:  # (B, T) -> (B, T, C)
        positions = resolve_positions(input_ids, position_ids, document_ids, cache)
        return self.through_blocks(self.embed(input_ids, positions.position_ids), positions)

    def through_blocks(
        self, x: Tensor, positions: TokenPositions
    ) -> Tensor:  # (B, T, C) -> (B, T, C)
        """Return the output of the blocks and the final norm, given the embedded tokens."""
        lengths = document_lengths(positions) if self.needs_lengths else None
        inputs = AttentionInputs(
            tables={
                config: rope.tables(positions.position_ids, x.dtype, lengths)
                for config, rope in self.ropes.items()
            },
            masks={window: build_mask(positions, window) for window in self.windows},
            cache=positions.cache,
        )
        for block in self.blocks():
            x = block(x, inputs)
        return self.final_norm()(x)


class LlamaTrunk(Trunk):
    """The trunk of Llama and its relatives."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.embed_tokens = _empty_embedding(config.vocab_size, config.hidden_size)
        block = BLOCKS[config.block]
        self.layers = nn.ModuleList(block(config, la, i) for i, la in enumerate(config.layers))
        norm = OffsetRMSNorm if config.block == "sandwich" else RMSNorm
        self.norm = norm(config.hidden_size, config.norm_eps)

    def embedding(self) -> nn.Module:
        return self.embed_tokens

    def blocks(self) -> nn.ModuleList:
        return self.layers

    def final_norm(self) -> nn.Module:
        return self.norm

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids)


class ScaledTrunk(LlamaTrunk):
    """Granite's trunk: embeddings are scaled."""

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids) * self.config.embedding_scale  # (B, T, C)


class GemmaTrunk(LlamaTrunk):
    """Gemma's trunk: embeddings are scaled, by a factor rounded to their dtype as in training."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.scales = {
            kind: torch.tensor(config.embedding_scale, dtype=kind, device="cpu").item()
            for kind in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        }

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)  # (B, T, C)
        return x * self.scales[x.dtype]


class GPT2Trunk(Trunk):
    """GPT-2's trunk: learned positions."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.wte = _empty_embedding(config.vocab_size, config.hidden_size)
        self.wpe = _empty_embedding(config.max_position_embeddings, config.hidden_size)
        block = BLOCKS[config.block]
        self.h = nn.ModuleList(block(config, la, i) for i, la in enumerate(config.layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, config.norm_eps)

    def embedding(self) -> nn.Module:
        return self.wte

    def blocks(self) -> nn.ModuleList:
        return self.h

    def final_norm(self) -> nn.Module:
        return self.ln_f

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        limit = self.config.max_position_embeddings
        # On a GPU only the length is checked: reading the positions would make the host wait.
        longest = input_ids.shape[1] if position_ids.is_cuda else int(position_ids.max()) + 1
        if longest > limit:
            raise ModelError(
                f"Cannot run {longest} positions: this model has learned position embeddings for "
                f"{limit}. Use sequences of at most {limit} tokens."
            )
        return self.wte(input_ids) + self.wpe(position_ids)  # (B, T, C)


def _trunk_of(config: DecoderConfig) -> tuple[str, type[Trunk]]:
    """Return Hugging Face's name for the trunk, and its class."""
    if config.block == "gpt2":
        return "transformer", GPT2Trunk
    if config.block == "sandwich":
        return "model", GemmaTrunk
    return "model", LlamaTrunk if config.embedding_scale == 1 else ScaledTrunk


class Decoder(LanguageModel):
    """A causal language model whose parameters have exactly Hugging Face's names.

    Made by `build_decoder` (random values) or `load_decoder`. `position_ids` and `document_ids`
    are (B, T) int64, see `lora.data.sequences.batches`; if they are left out, every sequence is
    one document from position 0, or with a filled cache continues its last token.
    """

    config: DecoderConfig

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk_name, trunk = _trunk_of(config)
        self.add_module(self.trunk_name, trunk(config))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_head()

    @property
    def position_table_rows(self) -> int | None:
        """How many positions its table has rows for; None: any position can be computed."""
        return self.config.max_position_embeddings if self.config.block == "gpt2" else None

    @property
    def trunk(self) -> Trunk:
        """Everything but the output head."""
        return cast(Trunk, self._modules[self.trunk_name])

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return the output head's input: (B, T, C) after the final norm."""
        if cache is None or self.config.longrope_tokens is None:
            return self.trunk(input_ids, position_ids, document_ids, cache)
        n_new = input_ids.shape[1]
        if cache.outgrows(self.config.longrope_tokens, position_ids, n_new):
            # Longer documents rotate otherwise, so that what is stored of all tokens changes.
            input_ids = torch.cat((cache.input_ids[:, : cache.n_tokens], input_ids), 1)  # (B, S)
            position_ids, document_ids = cache.restart(n_new, position_ids, document_ids)
        hidden = self.trunk(input_ids, position_ids, document_ids, cache)
        cache.input_ids[:, cache.n_tokens - input_ids.shape[1] : cache.n_tokens] = input_ids
        return hidden[:, -n_new:]

    def output_head(self) -> nn.Linear:
        """Return the linear C -> V; its weight is the embedding's where the config ties them."""
        return self.lm_head

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding, under the name it has in transformers."""
        return self.trunk.embedding()

    def blocks(self) -> nn.ModuleList:
        """Return the blocks in order."""
        return self.trunk.blocks()

    def token_cache_bytes(self) -> int:
        """Return what a cache holds of one token of one sequence, in bytes."""
        heads = self.config.attention
        each = heads.num_key_value_heads * heads.head_dim
        return 2 * self.config.num_hidden_layers * each * dtype_of(self).itemsize

    def tie_head(self) -> None:
        """Changes the head in place: its weight becomes the embedding's, if the config says so."""
        if self.config.tie_word_embeddings:
            embedding, head = cast(nn.Embedding, self.trunk.embedding()), self.lm_head
            head.weight = embedding.weight
            if isinstance(embedding, QuantisedWeight) and isinstance(head, QuantisedWeight):
                head.share_packed(embedding)

    def new_cache(
        self,
        batch_size: int,
        max_tokens: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> KVCache:
        """Return an empty cache for `batch_size` sequences of up to `max_tokens` tokens each.

        `dtype` and `device` default to those of the model's first parameter, or `cache_dtype`.
        """
        first = next(self.parameters())
        device = first.device if device is None else torch.device(device)
        kind = dtype or self.cache_dtype or dtype_of(self)
        return KVCache(self.config, batch_size, max_tokens, kind, device)


def build_empty_decoder(config: DecoderConfig) -> Decoder:
    """Return a decoder without values: all parameters are on the meta device."""
    with torch.device("meta"):
        return Decoder(config)


def build_decoder(
    config: DecoderConfig,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Decoder:
    """Return a decoder with random values: normal with std 0.02, biases 0, norms the identity.

    Values are drawn on the CPU in fp32, so a seed gives the same values on every device.
    """
    model = build_empty_decoder(config)
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        name: _first_value(model, name, generator).to(device=device, dtype=dtype)
        for name, _ in model.named_parameters()
    }
    assign_parameters(model, drawn.items())
    return model


def assign_parameters(model: Decoder, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Changes `model` in place: its parameters become `tensors`, not copies; the head is tied."""
    for name, tensor in tensors:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
    model.tie_head()


def _first_value(model: Decoder, name: str, generator: torch.Generator) -> Tensor:
    owner_name, _, leaf = name.rpartition(".")
    owner, shape = model.get_submodule(owner_name), model.get_parameter(name).shape
    if isinstance(owner, nn.Linear | nn.Embedding) and leaf == "weight":
        return torch.empty(shape).normal_(0.0, INIT_STD, generator=generator)
    is_zero = leaf == "bias" or isinstance(owner, OffsetRMSNorm)
    return torch.zeros(shape) if is_zero else torch.ones(shape)
