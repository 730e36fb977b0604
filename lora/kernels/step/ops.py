"""The hand-written step's operations between its matmuls: plain PyTorch, or Triton on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora.kernels.step import (
    adamw,
    attention,
    attention_triton,
    dropout,
    fp8,
    head_norm,
    low_rank,
    norm,
    rotary,
    swiglu,
    token_loss,
)


# A table of functions, not a class with two children: tests replace single operations in it.
@dataclass(frozen=True)
class Ops:
    """Everything between the matmuls of cuBLAS; each writes into tensors that it is given."""

    name: str
    add_norm: Callable[..., None]
    norm_backward: Callable[..., None]
    norm_weight_gradient: Callable[..., Tensor]
    swiglu: Callable[..., None]
    swiglu_backward: Callable[..., None]
    rotate_heads: Callable[..., None]
    gather_gradients: Callable[..., None]
    token_loss: Callable[..., None]
    adamw: Callable[..., None]
    drop: Callable[..., None]
    add_dropped: Callable[..., None]
    add_low_rank: Callable[..., None]
    attend: Callable[..., None]
    attend_gradients: Callable[..., None]
    attend_backward: Callable[..., None]
    norm_heads: Callable[..., None]
    norm_heads_backward: Callable[..., tuple[Tensor, Tensor] | None]
    stacked_adamw: Callable[..., None]
    quantise_rows: Callable[..., None]
    scaled_matmul: Callable[..., None]
    transpose_codes: Callable[..., None]
    fp8_dtype: torch.dtype = fp8.FP8
    """Of fp8 rows; a wider dtype rounds nothing, so that tests can compare the rest in fp64."""


PLAIN = Ops(
    name="plain torch",
    add_norm=norm.add_norm,
    norm_backward=norm.norm_backward,
    norm_weight_gradient=norm.norm_weight_gradient,
    swiglu=swiglu.swiglu,
    swiglu_backward=swiglu.swiglu_backward,
    rotate_heads=rotary.rotate_heads,
    gather_gradients=rotary.gather_gradients,
    token_loss=token_loss.token_loss,
    adamw=adamw.adamw,
    drop=dropout.drop,
    add_dropped=dropout.add_dropped,
    add_low_rank=low_rank.add_low_rank,
    attend=attention.attend,
    attend_gradients=attention.attend_gradients,
    attend_backward=attention.attend_backward,
    norm_heads=head_norm.norm_heads,
    norm_heads_backward=head_norm.norm_heads_backward,
    quantise_rows=fp8.quantise_rows,
    scaled_matmul=fp8.scaled_matmul,
    transpose_codes=fp8.transpose_codes,
    stacked_adamw=adamw.stacked_adamw,
)

TRITON = Ops(
    name="Triton",
    add_norm=norm.add_norm_triton,
    norm_backward=norm.norm_backward_triton,
    norm_weight_gradient=norm.norm_weight_gradient_triton,
    swiglu=swiglu.swiglu_triton,
    swiglu_backward=swiglu.swiglu_backward_triton,
    rotate_heads=rotary.rotate_heads_triton,
    gather_gradients=rotary.gather_gradients_triton,
    token_loss=token_loss.token_loss_triton,
    adamw=adamw.adamw_triton,
    drop=dropout.drop_triton,
    add_dropped=dropout.add_dropped_triton,
    add_low_rank=low_rank.add_low_rank_triton,
    attend=attention_triton.attend_triton,
    attend_gradients=attention_triton.attend_gradients_triton,
    attend_backward=attention_triton.attend_backward_triton,
    norm_heads=head_norm.norm_heads_triton,
    norm_heads_backward=head_norm.norm_heads_backward_triton,
    quantise_rows=fp8.quantise_rows_triton,
    scaled_matmul=fp8.scaled_matmul_device,
    transpose_codes=fp8.transpose_codes_triton,
    stacked_adamw=adamw.stacked_adamw_triton,
)
