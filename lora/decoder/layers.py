"""Norms, feed-forward layers and decoder blocks. Submodules have Hugging Face's names.

Every linear is called as a module, so that another module (such as LoRA's) can replace it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.decoder.attention import Attention, AttentionInputs, FusedAttention, OneLinearAttention
from lora.decoder.config import BlockKind, DecoderConfig, LayerConfig
from lora.kernels.rms_norm import rms_norm
from lora.kernels.shared_input import call_linears

_gelu_tanh = partial(F.gelu, approximate="tanh")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": F.relu,
}
"""By transformers' names."""


class RMSNorm(nn.Module):
    """x / rms(x) · weight (arXiv 1910.07467); the mean square in fp32 or wider."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., C)
        if x.is_cpu and x.dtype is torch.float32 and self.weight.dtype is torch.float32:
            return rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class OffsetRMSNorm(RMSNorm):
    """Gemma's x / rms(x) · (1 + weight): all in fp32 or wider, rounded once at the end."""

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., C)
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = 1.0 + self.weight.to(wide)
        return F.rms_norm(x.to(wide), weight.shape, weight, self.eps).to(x.dtype)


class GatedFeedForward(nn.Module):
    """down(act(gate(x)) · up(x)), arXiv 2002.05202."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        part, width = config.feed_forward, config.hidden_size
        self.gate_proj = nn.Linear(width, part.intermediate_size, bias=part.bias)
        self.up_proj = nn.Linear(width, part.intermediate_size, bias=part.bias)
        self.down_proj = nn.Linear(part.intermediate_size, width, bias=part.bias)
        self.activation = ACTIVATIONS[part.activation]

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        gate, up = call_linears(x, self.gate_proj, self.up_proj)  # each (B, T, F)
        return self.down_proj(self.activation(gate) * up)


class OneLinearFeedForward(nn.Module):
    """The same with one linear, gate_up_proj, for gate and up (Phi-3)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        part, width = config.feed_forward, config.hidden_size
        self.gate_up_proj = nn.Linear(width, 2 * part.intermediate_size, bias=part.bias)
        self.down_proj = nn.Linear(part.intermediate_size, width, bias=part.bias)
        self.activation = ACTIVATIONS[part.activation]

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        gate, up = self.gate_up_proj(x).chunk(2, -1)  # each (B, T, F)
        return self.down_proj(self.activation(gate) * up)


class PlainFeedForward(nn.Module):
    """proj(act(fc(x))), GPT-2's."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        part, width = config.feed_forward, config.hidden_size
        self.c_fc = nn.Linear(width, part.intermediate_size, bias=part.bias)
        self.c_proj = nn.Linear(part.intermediate_size, width, bias=part.bias)
        self.activation = ACTIVATIONS[part.activation]

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        return self.c_proj(self.activation(self.c_fc(x)))


def _attention(
    config: DecoderConfig, layer: LayerConfig, index: int, norm: type[nn.Module]
) -> Attention:
    kind = OneLinearAttention if config.attention.is_fused else Attention
    return kind(config, layer, index, norm)


def _feed_forward(config: DecoderConfig) -> GatedFeedForward | OneLinearFeedForward:
    kind = OneLinearFeedForward if config.feed_forward.is_fused else GatedFeedForward
    return kind(config)


class PreNormBlock(nn.Module):
    """Llama's block: a norm before each half."""

    def __init__(self, config: DecoderConfig, layer: LayerConfig, index: int) -> None:
        super().__init__()
        sizes = config.hidden_size, config.norm_eps
        self.input_layernorm = RMSNorm(*sizes)
        self.self_attn = _attention(config, layer, index, RMSNorm)
        self.post_attention_layernorm = RMSNorm(*sizes)
        self.mlp = _feed_forward(config)
        self.add = partial(torch.add, alpha=config.residual_multiplier)

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:  # (B, T, C) -> (B, T, C)
        x = self.add(x, self.self_attn(self.input_layernorm(x), inputs))
        return self.add(x, self.mlp(self.post_attention_layernorm(x)))


class PostNormBlock(nn.Module):
    """OLMo 2's block: a norm after each half."""

    def __init__(self, config: DecoderConfig, layer: LayerConfig, index: int) -> None:
        super().__init__()
        sizes = config.hidden_size, config.norm_eps
        self.self_attn = _attention(config, layer, index, RMSNorm)
        self.post_attention_layernorm = RMSNorm(*sizes)
        self.mlp = _feed_forward(config)
        self.post_feedforward_layernorm = RMSNorm(*sizes)
        self.add = partial(torch.add, alpha=config.residual_multiplier)

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:  # (B, T, C) -> (B, T, C)
        x = self.add(x, self.post_attention_layernorm(self.self_attn(x, inputs)))
        return self.add(x, self.post_feedforward_layernorm(self.mlp(x)))


class SandwichBlock(nn.Module):
    """The block of Gemma 2 and 3: a norm before and after each half."""

    def __init__(self, config: DecoderConfig, layer: LayerConfig, index: int) -> None:
        super().__init__()
        sizes = config.hidden_size, config.norm_eps
        self.input_layernorm = OffsetRMSNorm(*sizes)
        self.self_attn = _attention(config, layer, index, OffsetRMSNorm)
        self.post_attention_layernorm = OffsetRMSNorm(*sizes)
        self.pre_feedforward_layernorm = OffsetRMSNorm(*sizes)
        self.mlp = _feed_forward(config)
        self.post_feedforward_layernorm = OffsetRMSNorm(*sizes)
        self.add = partial(torch.add, alpha=config.residual_multiplier)

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:  # (B, T, C) -> (B, T, C)
        attended = self.self_attn(self.input_layernorm(x), inputs)
        x = self.add(x, self.post_attention_layernorm(attended))
        fed = self.mlp(self.pre_feedforward_layernorm(x))
        return self.add(x, self.post_feedforward_layernorm(fed))


class GPT2Block(nn.Module):
    """GPT-2's block: layer norms, fused attention, no gate."""

    def __init__(self, config: DecoderConfig, layer: LayerConfig, index: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.attn = FusedAttention(config, layer, index)
        self.ln_2 = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = PlainFeedForward(config)

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:  # (B, T, C) -> (B, T, C)
        x = x + self.attn(self.ln_1(x), inputs)
        return x + self.mlp(self.ln_2(x))


BLOCKS: dict[BlockKind, type[nn.Module]] = {
    "pre_norm": PreNormBlock,
    "post_norm": PostNormBlock,
    "sandwich": SandwichBlock,
    "gpt2": GPT2Block,
}
