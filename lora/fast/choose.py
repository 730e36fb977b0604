"""Whether the fast step can train a model, and if not, why."""

from __future__ import annotations

import torch
from torch import nn

from lora.decoder.config import DecoderConfig
from lora.decoder.decoder import Decoder
from lora.device import DeviceChoice
from lora.fast.step import trains_whole
from lora.kernels.jit import HAS_TRITON
from lora.lora_module import LoRALinear
from lora.token_rows import RowsEmbedding, RowsLinear

WIDEST_HEAD = 256


def why_not_fast(model: nn.Module, choice: DeviceChoice) -> str | None:
    """Return why `model` cannot take the fast step on this device, or None if it can."""
    if choice.device.type != "cuda":
        return "the fast step is for CUDA devices"
    if choice.compute_dtype is not torch.bfloat16:
        return "the fast step computes in bf16"
    if not HAS_TRITON:
        return "Triton is not installed"
    if not isinstance(model, Decoder):
        return f"{type(model).__name__} is not lora's Decoder"
    return _of_shape(model.config) or _of_training(model)


def _of_shape(config: DecoderConfig) -> str | None:
    half = config.head_dim // 2
    if config.block != "pre_norm":
        return f"blocks of {config.family} have other norms than Llama's"
    if config.attention.qk_norm:
        return f"{config.family} normalises queries and keys"
    if config.feed_forward.activation not in ("silu", "swish"):
        return f"the activation is {config.feed_forward.activation}, not silu"
    if config.embedding_scale != 1:
        return "embeddings are scaled"
    if config.head_dim > WIDEST_HEAD or config.head_dim % 2 or half & (half - 1):
        return f"heads of width {config.head_dim}: a power of two up to {WIDEST_HEAD} is needed"
    if config.hidden_size % 8 or config.intermediate_size % 8:
        return "widths are no multiples of 8"
    return None


def _of_training(model: Decoder) -> str | None:
    if trains_whole(model):
        return None
    if any(isinstance(module, RowsEmbedding | RowsLinear) for module in model.modules()):
        return "token rows train"
    inside = {id(p) for p in model.trunk.blocks().parameters()}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    other = [n for n, p in trained if id(p) not in inside or not n.endswith(("lora_A", "lora_B"))]
    if other:
        return f"{other[0]} trains beside LoRA"
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    if len(trained) != 2 * len(layers):
        return "LoRA wraps other layers than linears"
    if len({m.dropout.p for m in layers if isinstance(m.dropout, nn.Dropout)}) > 1:
        return "dropout differs from layer to layer"
    return None
