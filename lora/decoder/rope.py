"""Rotary position embedding (arXiv 2104.09864) in Hugging Face's layout: halves, not pairs.

What differs from the textbook: the sine table carries the sign of the half it belongs to, so a
rotation is x · cos + swapped(x) · sin with the halves of x swapped; the gradient is the inverse
rotation, computed without autograd's intermediate tensors.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from lora.decoder.config import RopeConfig

Tables = tuple[Tensor, Tensor]
"""Cosine and signed sine, each (B or 1, T, 1, D)."""


class Rope:
    """Frequencies of one rotary embedding, and the cosine and sine tables of given positions.

    Not a buffer: a model cast to bf16 keeps its frequencies in fp32.
    """

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        self.config = config
        width = head_dim if config.rotary_dim is None else config.rotary_dim
        self._frequencies = {torch.device("cpu"): inverse_frequencies(config, width)}

    def tables(
        self, position_ids: Tensor, dtype: torch.dtype, lengths: Tensor | None = None
    ) -> Tables:
        """Return cosine and signed sine for `position_ids` (B or 1, T); angles are fp32.

        `lengths`, (B or 1, T), are those of the documents of the tokens, which longrope needs;
        None: every sequence is one document.
        """
        device = position_ids.device
        if device not in self._frequencies:  # copied once per device, not per forward
            self._frequencies[device] = self._frequencies[torch.device("cpu")].to(device)
        frequencies = self._frequencies[device]  # (D/2,), longrope: (2, D/2)
        if self.config.rope_type == "longrope":
            if lengths is None:
                lengths = position_ids.amax(1, keepdim=True) + 1  # (B, 1)
            is_long = lengths > self.config.original_max_position_embeddings
            short, long = frequencies
            frequencies = torch.where(is_long[..., None], long, short)  # (B, T, D/2)
        angles = position_ids[..., None].float() * frequencies  # (B, T, D/2)
        cos, sin = angles.cos(), angles.sin()
        factor = self.config.attention_factor
        cos = torch.cat((cos, cos), -1).mul_(factor)  # (B, T, D)
        sin = torch.cat((-sin, sin), -1).mul_(factor)  # (B, T, D)
        return cos.to(dtype).unsqueeze(2), sin.to(dtype).unsqueeze(2)  # (B, T, 1, D)


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Return the angle per position of each pair of dimensions, (D/2,) fp32, on the CPU.

    longrope: (2, D/2), of short documents and of long ones.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim  # (D/2,)
    frequencies = config.rope_theta**-exponents  # (D/2,)
    return _SCALINGS[config.rope_type](frequencies, config)


def _keep(frequencies: Tensor, config: RopeConfig) -> Tensor:
    return frequencies


def _scale_linear(frequencies: Tensor, config: RopeConfig) -> Tensor:
    return frequencies / config.factor


def _scale_llama3(frequencies: Tensor, config: RopeConfig) -> Tensor:
    """Divide low frequencies by `factor`, keep high ones, interpolate between (Llama 3.1)."""
    turns = config.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = config.low_freq_factor, config.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: divided by factor, 1: unchanged
    return frequencies * (kept + (1 - kept) / config.factor)


def _scale_yarn(frequencies: Tensor, config: RopeConfig) -> Tensor:
    """Like llama3, with a ramp linear in the dimension (YaRN, arXiv 2309.00071, section 3.2)."""
    n_pairs = len(frequencies)

    def pair_that_turns(turns: float) -> float:
        wave = config.original_max_position_embeddings / (turns * 2 * math.pi)
        return n_pairs * math.log(wave) / math.log(config.rope_theta)

    first, last = pair_that_turns(config.beta_fast), pair_that_turns(config.beta_slow)
    if config.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * n_pairs - 1)
    width = last - first if last != first else 0.001
    ramp = (torch.arange(n_pairs, dtype=torch.float32, device="cpu") - first) / width
    stretched = ramp.clamp(0, 1)
    return frequencies * (1 - stretched + stretched / config.factor)


def _scale_longrope(frequencies: Tensor, config: RopeConfig) -> Tensor:
    """Divide each frequency by a factor of its own (LongRoPE, arXiv 2402.13753)."""
    factors = torch.tensor((config.short_factor, config.long_factor), device="cpu")  # (2, D/2)
    return frequencies / factors


_SCALINGS = {
    "default": _keep,
    "linear": _scale_linear,
    "llama3": _scale_llama3,
    "yarn": _scale_yarn,
    "longrope": _scale_longrope,
}


def rotate_plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x (B, T, H, D) rotated by tables (B or 1, T, 1, D); the plain twin of `_Rotate`."""
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), -1)  # (B, T, H, D)
    return x * cos + swapped * sin


class _Rotate(torch.autograd.Function):
    """`rotate_plain` with fewer passes over memory; the backward is the inverse rotation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, -1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), -1)  # (B, T, H, D)
    return swapped.mul_(sin if direction > 0 else -sin).addcmul_(x, cos)


def rotate(q: Tensor, k: Tensor, tables: Tables | None) -> tuple[Tensor, Tensor]:
    """Return queries and keys (B, T, heads, D) rotated by `tables`."""
    cos, sin = cast(Tables, tables)  # None only for blocks that were built with `skip_rotation`
    return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)


def rotate_part(q: Tensor, k: Tensor, tables: Tables | None) -> tuple[Tensor, Tensor]:
    """Return queries and keys with as many of their first dimensions rotated as `tables` has."""
    width = cast(Tables, tables)[0].shape[-1]
    rotated = rotate(q[..., :width], k[..., :width], tables)
    whole = [torch.cat((part, x[..., width:]), -1) for part, x in zip(rotated, (q, k), strict=True)]
    return whole[0], whole[1]


def skip_rotation(q: Tensor, k: Tensor, tables: Tables | None) -> tuple[Tensor, Tensor]:
    """Return queries and keys unchanged: blocks without a rope call this instead of `rotate`."""
    return q, k
