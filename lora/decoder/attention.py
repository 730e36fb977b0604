"""Attention modules, and the masks that all blocks of a forward share.

A token attends to the tokens of its own document at its own position and before, limited to a
window if its block has one. Padding is document −1: it attends to padding, so that no row of the
mask is empty (softmax would give NaN), and no other token attends to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.decoder.cache import KVCache, NoCache
from lora.decoder.config import DecoderConfig, LayerConfig, RopeConfig
from lora.decoder.rope import Tables, rotate, rotate_part, skip_rotation
from lora.kernels.capped_attention import capped_attention
from lora.kernels.shared_input import call_linears

NO_CACHE = NoCache()


@dataclass(frozen=True)
class TokenPositions:
    """Positions and documents of the tokens of a forward."""

    position_ids: Tensor
    """(B or 1, T) int64."""
    document_ids: Tensor | None
    """(B, T) int64; None if every sequence is one document without padding."""
    cache: KVCache | NoCache


@dataclass(frozen=True)
class AttentionMask:
    """The mask of all blocks with the same window."""

    mask: Tensor | None
    """(B or 1, 1, T, S) bool, true where a query may attend to a key; None: no explicit mask."""
    is_causal: bool
    """Without an explicit mask: whether a query attends to its own and earlier keys only."""


@dataclass(frozen=True)
class AttentionInputs:
    """Inputs of attention besides x: computed once per forward, shared by all blocks."""

    tables: dict[RopeConfig | None, Tables]
    masks: dict[int | None, AttentionMask]
    """By window, in tokens."""
    cache: KVCache | NoCache


def resolve_positions(
    input_ids: Tensor,
    position_ids: Tensor | None,
    document_ids: Tensor | None,
    cache: KVCache | None,
) -> TokenPositions:
    """Return positions and documents of `input_ids` (B, T); a cache stores them too.

    Positions left out count up within each document; with a filled cache, positions and
    documents left out continue each sequence's last token.
    """
    n_new, device = input_ids.shape[1], input_ids.device
    is_one = _is_one_document(document_ids, cache)
    if cache is not None and cache.n_tokens:
        next_positions, same_documents = cache.continued(n_new)
        position_ids = next_positions if position_ids is None else position_ids
        document_ids = same_documents if document_ids is None else document_ids
    if position_ids is None:
        steps = torch.arange(n_new, device=device)
        position_ids = steps[None] if is_one else positions_within(document_ids, steps)  # (B|1, T)
    if cache is None:
        return TokenPositions(position_ids, None if is_one else document_ids, NO_CACHE)
    documents = torch.zeros_like(input_ids) if document_ids is None else document_ids  # (B, T)
    cache.begin(position_ids, documents, is_one_document=is_one)
    is_one = cache.is_one_document
    return TokenPositions(position_ids, None if is_one else documents, cache)


def positions_within(document_ids: Tensor | None, steps: Tensor) -> Tensor:
    """Return positions (B, T) that restart at 0 with every run of equal document ids (B, T)."""
    assert document_ids is not None
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    first = torch.where(starts, steps, 0).cummax(1).values  # (B, T)
    return steps - first


def document_lengths(tokens: TokenPositions) -> Tensor:
    """Return the length of each token's document, (B or 1, T): its last position here, plus 1."""
    positions, documents = tokens.position_ids, tokens.document_ids
    if documents is None:
        return (positions.amax(1, keepdim=True) + 1).expand_as(positions)
    positions = positions.expand_as(documents)  # (B, T)
    changes = documents[:, 1:] != documents[:, :-1]
    number = F.pad(changes.cumsum(1), (1, 0))  # (B, T), of the document in its sequence
    last = torch.zeros_like(positions).scatter_reduce(1, number, positions, "amax")
    return last.gather(1, number) + 1


def _is_one_document(document_ids: Tensor | None, cache: KVCache | None) -> bool:
    if document_ids is None:
        return True
    first = document_ids[:, :1]
    if cache is not None and cache.n_tokens:
        first = cache.documents[:, :1]
    elif document_ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return (
            False  # no host sync while a CUDA graph is captured: an explicit mask is always right
        )
    # The host waits for the device here, before the forward is launched: a mask would cost more.
    return bool((document_ids == first).all())


def build_mask(tokens: TokenPositions, window_tokens: int | None) -> AttentionMask:
    """Return the mask of blocks with this window (None: global attention)."""
    n_new, cache = tokens.position_ids.shape[1], tokens.cache
    n_keys = cache.n_tokens or n_new
    if window_tokens is not None and window_tokens >= n_keys:
        window_tokens = None
    if tokens.document_ids is None and window_tokens is None and n_new in (1, n_keys):
        return AttentionMask(mask=None, is_causal=n_new > 1)
    positions, documents = tokens.position_ids, tokens.document_ids
    key_positions, key_documents = positions, documents
    if isinstance(cache, KVCache):
        key_positions = cache.positions[:, :n_keys]  # (B, S)
        key_documents = cache.documents[:, :n_keys]  # (B, S)
    distance = positions[:, :, None] - key_positions[:, None, :]  # (B|1, T, S)
    mask = distance >= 0
    if window_tokens is not None:
        mask &= distance < window_tokens
    if documents is not None and key_documents is not None:
        mask = mask & (documents[:, :, None] == key_documents[:, None, :])  # (B, T, S)
    return AttentionMask(mask=mask[:, None], is_causal=False)  # (B|1, 1, T, S)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> Tensor:
    """Return softmax(q kᵀ · scale) v; q (B, H, T, D), k and v (B, heads, S, D) -> (B, T, H·D)."""
    is_shared = q.shape[1] != k.shape[1]
    if is_shared and mask.mask is not None and q.is_cuda:
        # CUDA's memory-efficient kernel supports masks but not GQA; the kernel that supports both
        # materialises all logits, (B, H, T, S).
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
        is_shared = False
    y = F.scaled_dot_product_attention(
        q, k, v, mask.mask, is_causal=mask.is_causal, scale=scale, enable_gqa=is_shared
    )  # (B, H, T, D)
    return y.transpose(1, 2).flatten(2)  # (B, T, H·D)


def attend_capped(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, *, softcap: float
) -> Tensor:
    """Return what `attend` does, with logits softcap · tanh(q kᵀ · scale / softcap)."""
    y = capped_attention(q, k, v, mask.mask, scale, softcap, is_causal=mask.is_causal)
    return y.transpose(1, 2).flatten(2)  # (B, T, H·D)


def repeat_heads(x: Tensor, n_heads: int) -> Tensor:
    """Return x (B, heads, S, D) with every head repeated, (B, n_heads, S, D)."""
    return x.repeat_interleave(n_heads // x.shape[1], dim=1)


class Attention(nn.Module):
    """Llama's attention: separate q, k and v projections, grouped-query heads, rotary positions."""

    def __init__(
        self, config: DecoderConfig, layer: LayerConfig, index: int, norm: type[nn.Module]
    ) -> None:
        super().__init__()
        heads, width = config.attention, config.hidden_size
        inner = heads.num_attention_heads * heads.head_dim
        shared = heads.num_key_value_heads * heads.head_dim
        self.layer, self.index, self.head_dim = layer, index, heads.head_dim
        self._build_projections(width, inner, shared, bias=heads.qkv_bias)
        self.o_proj = nn.Linear(inner, width, bias=heads.output_bias)
        self.rotate = _rotation(layer.rope)
        widths = (inner, shared) if heads.qk_norm == "width" else (heads.head_dim, heads.head_dim)
        self.q_norm, self.k_norm = (
            norm(width, config.norm_eps) if heads.qk_norm else nn.Identity() for width in widths
        )
        self.norm_widths = widths
        cap = heads.logit_softcap
        self.attend = attend if cap is None else partial(attend_capped, softcap=cap)

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:  # (B, T, C) -> (B, T, C)
        shape = *x.shape[:-1], -1, self.head_dim
        q, k, v = self.project(x)
        q_width, k_width = self.norm_widths  # of a head, or of all heads together
        q = self.q_norm(q.view(*x.shape[:-1], -1, q_width)).view(shape)  # (B, T, H, D)
        k = self.k_norm(k.view(*x.shape[:-1], -1, k_width)).view(shape)  # (B, T, heads, D)
        v = v.view(shape).transpose(1, 2)  # (B, heads, T, D)
        q, k = self.rotate(q, k, inputs.tables.get(self.layer.rope))
        k, v = inputs.cache.append(self.index, k.transpose(1, 2), v)  # (B, heads, S, D)
        mask = inputs.masks[self.layer.window_tokens]
        return self.o_proj(self.attend(q.transpose(1, 2), k, v, mask, self.layer.scale))

    def _build_projections(self, width: int, inner: int, shared: int, *, bias: bool) -> None:
        self.q_proj = nn.Linear(width, inner, bias=bias)
        self.k_proj = nn.Linear(width, shared, bias=bias)
        self.v_proj = nn.Linear(width, shared, bias=bias)

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """Return queries, keys and values of x (B, T, C): (B, T, H·D), twice (B, T, heads·D)."""
        return call_linears(x, self.q_proj, self.k_proj, self.v_proj)


class OneLinearAttention(Attention):
    """Phi-3's attention: one linear, qkv_proj, for queries, keys and values."""

    def _build_projections(self, width: int, inner: int, shared: int, *, bias: bool) -> None:
        self.qkv_widths = inner, shared, shared
        self.qkv_proj = nn.Linear(width, sum(self.qkv_widths), bias=bias)

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """Return queries, keys and values of x (B, T, C): (B, T, H·D), twice (B, T, heads·D)."""
        return self.qkv_proj(x).split(self.qkv_widths, -1)


def _rotation(rope: RopeConfig | None) -> Callable[..., tuple[Tensor, Tensor]]:
    if rope is None:
        return skip_rotation
    return rotate if rope.rotary_dim is None else rotate_part


class FusedAttention(nn.Module):
    """GPT-2's attention: one projection for queries, keys and values."""

    def __init__(self, config: DecoderConfig, layer: LayerConfig, index: int) -> None:
        super().__init__()
        heads, width = config.attention, config.hidden_size
        self.layer, self.index, self.n_heads = layer, index, heads.num_attention_heads
        self.c_attn = nn.Linear(width, 3 * width, bias=heads.qkv_bias)
        self.c_proj = nn.Linear(width, width, bias=heads.output_bias)

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:  # (B, T, C) -> (B, T, C)
        qkv = self.c_attn(x).unflatten(-1, (3, self.n_heads, -1))  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, T, D)
        k, v = inputs.cache.append(self.index, k, v)  # (B, H, S, D)
        mask = inputs.masks[self.layer.window_tokens]
        return self.c_proj(attend(q, k, v, mask, self.layer.scale))
