"""What a model or a device has that a fast step cannot train: the reasons against each step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lora.decoder.config import DecoderConfig
from lora.decoder.decoder import Decoder
from lora.decoder.language_model import LanguageModel
from lora.decoder.layers import RMSNorm
from lora.decoder.quantised.base import QuantisedWeight, base_kind
from lora.decoder.quantised.fp8 import has_fp8_base
from lora.device import DeviceChoice
from lora.fast.llama.junctions import NORM_NAMES
from lora.fast.llama.network import GELU_NAMES
from lora.fast.step import trains_all_weights
from lora.kernels.step.fp8 import FP8_GEMM_MULTIPLE
from lora.kernels.step.jit import HAS_TRITON
from lora.layers.quantised import LoRAQuantisedLinear
from lora.layers.trainable_tokens import TrainableTokensEmbedding, TrainableTokensLinear
from lora.lora_module import LoRALayer, LoRALinear
from lora.stacked.apply import StackedAdapters

MAX_HEAD_WIDTH = 256
MIN_FP8_CAPABILITY = (9, 0)
"""Hopper: older GPUs have no fp8 GEMM with a scale for each row (torch._scaled_mm)."""


def why_not_fast(model: nn.Module, choice: DeviceChoice) -> str | None:
    """Return why `model` cannot take the fast step on this device, or None if it can."""
    if not isinstance(model, Decoder):
        return _why_not_device(choice) or f"{type(model).__name__} is not lora's Decoder"
    why = _why_not_device(choice) or why_not_hand_written(model)
    return why or (why_not_fp8(choice) if has_fp8_base(model) else None)


def why_not_stacked(model: nn.Module, stacked: StackedAdapters, choice: DeviceChoice) -> str | None:
    """Return why the adapters of `stacked` cannot take the fast stacked step, or None."""
    if not isinstance(model, Decoder):
        return _why_not_device(choice) or f"{type(model).__name__} is not lora's Decoder"
    return (
        _why_not_device(choice)
        or _why_not_shape(model.config)
        or why_not_stacked_hand_written(model, stacked)
    )


def why_not_stacked_hand_written(model: Decoder, stacked: StackedAdapters) -> str | None:
    """Return what of `stacked` the hand-written stacked step cannot train, or None."""
    if has_fp8_base(model):
        return "the base is fp8"
    # The step forms K gradients for linears of the blocks only; embedding and head are shared.
    blocks = set(model.trunk.blocks().modules())
    outside = [name for name, layer in stacked.layers.items() if layer not in blocks]
    if stacked.embeddings or outside:
        return f"{(*stacked.embeddings, *outside)[0]} trains beside the blocks"
    # One kernel draws all masks from one seed, and a candidate must see those it would see alone.
    if any(config.dropout for config in stacked.configs):
        return "each candidate draws its own dropout"
    return None


def why_not_fp8(choice: DeviceChoice) -> str | None:
    """Return why this GPU cannot multiply fp8 weights in fp8, or None if it can."""
    major, minor = torch.cuda.get_device_capability(choice.device)
    if (major, minor) >= MIN_FP8_CAPABILITY:
        return None
    return f"fp8 matmuls need a GPU of compute capability 9.0; this one has {major}.{minor}"


def why_not_hand_written(model: Decoder) -> str | None:
    """Return what in `model` the hand-written step cannot train, or None."""
    why = _why_not_shape(model.config) or _why_not_trained(model)
    return why or (_why_not_fp8_shape(model.config) if has_fp8_base(model) else None)


def why_not_sharded(model: Decoder) -> str | None:
    """Return why the hand-written step cannot train `model` over sharded weights, or None."""
    modules = (model.get_input_embeddings(), model.output_head())
    packed = [module.kind for module in modules if isinstance(module, QuantisedWeight)]
    if packed:
        return f"embedding and head are in {packed[0]}, and it gathers plain ones alone"
    linears = [m for m in model.trunk.blocks().modules() if isinstance(m, nn.Linear | LoRALayer)]
    if base_kind(model) is not None and not all(isinstance(m, QuantisedWeight) for m in linears):
        return "some of the blocks' linears are quantised, and it gathers blocks that are alike"
    tables = {id(module.weight) for module in modules}
    whole = [n for n, p in model.named_parameters() if id(p) in tables and p.requires_grad]
    return f"{whole[0]} is fully trained, but sharded tables are frozen" if whole else None


def why_not_captured(model: nn.Module) -> str | None:
    """Return why `model`'s step cannot be captured as it is, or None if it can."""
    if not isinstance(model, LanguageModel):
        return f"{type(model).__name__} has a loss of its own"
    return None


def _why_not_device(choice: DeviceChoice) -> str | None:
    if choice.device.type != "cuda":
        return "the fast step is for CUDA devices"
    # Buffers, kernels and the tests that compare them with the plain step are of bf16.
    if choice.compute_dtype is not torch.bfloat16:
        return "the fast step computes in bf16"
    if not HAS_TRITON:
        return "Triton is not installed"
    return None


def _why_not_shape(config: DecoderConfig) -> str | None:
    if config.block not in NORM_NAMES:
        return f"{config.family} places its norms otherwise than Llama"
    if config.feed_forward.activation not in ("silu", "swish", *GELU_NAMES):
        return f"the activation is {config.feed_forward.activation}, not silu or gelu_pytorch_tanh"
    if config.head_dim > MAX_HEAD_WIDTH or config.head_dim % 2:
        return f"the head width is {config.head_dim}, not an even number up to {MAX_HEAD_WIDTH}"
    # Rows of bf16 tensors must begin at multiples of 16 bytes for cuBLAS's fast kernels.
    if config.hidden_size % 8 or config.intermediate_size % 8:
        return "the hidden or feed-forward width is not a multiple of 8"
    if config.num_key_value_heads * config.head_dim % 8:
        return "the width of all key/value heads is not a multiple of 8"
    return None


def _why_not_fp8_shape(config: DecoderConfig) -> str | None:
    heads = config.attention
    # Each width is the inner dimension of a forward or a backward GEMM, which cuBLASLt restricts.
    columns = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads together": heads.num_attention_heads * heads.head_dim,
        "queries, keys and values together": heads.head_dim
        * (heads.num_attention_heads + 2 * heads.num_key_value_heads),
    }
    odd = [f"{name} {width}" for name, width in columns.items() if width % FP8_GEMM_MULTIPLE]
    if not odd:
        return None
    return f"fp8 matmuls need widths that are multiples of {FP8_GEMM_MULTIPLE}, not {odd[0]}"


def _why_not_trained(model: Decoder) -> str | None:
    if trains_all_weights(model):
        return None
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # By identity, because a tied head is the embedding: its name alone says nothing.
    inside = {id(p) for p in model.trunk.blocks().parameters()}
    of_lora = [n for n, p in trained.items() if n.endswith(("lora_A", "lora_B"))]
    beside = {id(p) for p in _trains_beside(model)}
    other = [n for n, p in trained.items() if n not in of_lora and id(p) not in beside]
    if other:
        return f"{other[0]} trains beside LoRA"
    other = [n for n in of_lora if id(trained[n]) not in inside | beside]
    if other:
        return f"LoRA with dropout is on the head ({other[0]})"
    # Other layers (Conv1D) have A and B too, but no projection that reads them.
    layers = [m for m in model.modules() if isinstance(m, LoRALinear | LoRAQuantisedLinear)]
    if len(of_lora) != 2 * len(layers):
        return "LoRA wraps layers that are not linear"
    # One kernel draws the masks of all layers, with one dropout probability.
    if len({m.dropout.p for m in layers if isinstance(m.dropout, nn.Dropout)}) > 1:
        return "dropout differs from layer to layer"
    return None


def _trains_beside(model: Decoder) -> Iterator[Tensor]:
    """Yield what the step can train beside LoRA in blocks: token tables and norms, or parts."""
    for table in (model.get_input_embeddings(), model.output_head()):
        yield table.get_parameter("weight")
        if isinstance(table, TrainableTokensEmbedding | TrainableTokensLinear):
            yield table.token_rows
    head = model.output_head()
    # It takes tokens in chunks, but dropout's masks are drawn for all tokens at once.
    if isinstance(head, LoRALinear) and not isinstance(head.dropout, nn.Dropout):
        yield from (head.lora_A, head.lora_B)
    for norm in model.trunk.modules():
        if isinstance(norm, RMSNorm):
            yield norm.weight
