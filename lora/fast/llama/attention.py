"""Attention through torch's kernels, and when our own take its place.

Torch's take one document a sequence, or packed documents. Both have an autograd graph of their own,
the only ones in the hand-written step. Queries, keys and values come as views (N, heads, D).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lora.decoder.config import DecoderConfig

MAX_OWN_ATTENTION_TOKENS = 2048
"""Packed sequences up to this length use our own attention kernels; beyond, torch's are faster."""
MAX_OWN_ATTENTION_WIDTH = 128
"""Of a head, for our kernels where torch's can do it too."""
TORCH_ATTENTION_MULTIPLE = 8
"""Of a head's width, for torch's kernel for packed sequences."""

Gradients = tuple[Tensor, Tensor, Tensor]


def needs_own_attention(config: DecoderConfig) -> bool:
    """Whether torch's attention kernels cannot do what this decoder's attention does."""
    is_capped = config.attention.logit_softcap is not None
    return is_capped or config.head_dim % TORCH_ATTENTION_MULTIPLE != 0


def is_own_attention_faster(config: DecoderConfig, tokens: int) -> bool:
    """Whether our own kernels take packed sequences of `tokens` tokens, where torch's could."""
    is_short = tokens <= MAX_OWN_ATTENTION_TOKENS
    return is_short and config.head_dim <= MAX_OWN_ATTENTION_WIDTH


@dataclass(frozen=True)
class AttentionShape:
    """How N tokens are laid out, and which of them a token sees."""

    batch_size: int
    tokens: int
    """Of a sequence, T."""
    scale: float
    window_tokens: int | None


@dataclass
class SavedTensor:
    """A tensor that autograd saved for the backward pass, in a box that can be refilled."""

    tensor: Tensor


class AttentionGraph:
    """The autograd graph of one block's attention, whose output lies in a buffer.

    Args:
        output: what torch's attention returned, with its graph; its memory is released.
        inputs: queries, keys and values, the leaves of the graph.
        saved: the tensors that the graph saved.
        out: (N, H · D), takes the output's values; the graph reads them from there.
    """

    def __init__(
        self, output: Tensor, inputs: Gradients, saved: list[SavedTensor], out: Tensor
    ) -> None:
        self._shape, self._inputs = output.shape, inputs
        self._edge = get_gradient_edge(output)  # holds the graph, and not the output
        heads = out.unflatten(1, (-1, output.shape[-1]))  # (N, H, D)
        if output.ndim == 4:
            heads = _by_sequence(heads, output.shape[0])  # (B, H, T, D)
        heads.copy_(output.detach())
        # The output is saved for its own backward. Pointing that at the buffer frees torch's copy:
        # one (N, H · D) a block.
        for one in saved:
            if _is_same(one.tensor, output):
                one.tensor = heads

    def backward(self, d_result: Tensor) -> Gradients:
        """Return the gradients of queries, keys and values, each (N, heads, D)."""
        if len(self._shape) == 4:  # (B, H, T, D)
            d_output = _by_sequence(d_result, self._shape[0])
            grads = torch.autograd.grad(self._edge, self._inputs, d_output)
            return tuple(g.transpose(1, 2).flatten(0, 1) for g in grads)  # type: ignore[return-value]
        return torch.autograd.grad(self._edge, self._inputs, d_result)  # type: ignore[return-value]


def attend_unpacked(
    q: Tensor, k: Tensor, v: Tensor, shape: AttentionShape, out: Tensor
) -> AttentionGraph:
    """Attention where every sequence is one document without padding."""
    q, k, v = (_by_sequence(x, shape.batch_size).requires_grad_() for x in (q, k, v))
    is_grouped = q.shape[1] != k.shape[1]  # query heads share key/value heads
    with torch.enable_grad(), _capture_saved() as saved:
        # Causal order without a mask tensor, so that torch takes cuDNN's or FlashAttention's
        # kernel.
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=shape.scale, enable_gqa=is_grouped
        )  # (B, H, T, D)
    return AttentionGraph(y, (q, k, v), saved, out)


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, shape: AttentionShape, out: Tensor
) -> AttentionGraph:
    """Attention within documents whose `bounds` (documents + 1,) lie on a GPU."""
    q, k, v = (x.data.requires_grad_() for x in (q, k, v))
    window = -1 if shape.window_tokens is None else shape.window_tokens - 1
    with torch.enable_grad(), _capture_saved() as saved:
        # The operation itself: it takes bounds on the device and the longest document as a number
        # (here T, its upper bound), so that a captured step never asks the device for one.
        y = torch.ops.aten._flash_attention_forward(
            q, k, v, bounds, bounds, shape.tokens, shape.tokens, 0.0, True, False,
            scale=shape.scale, window_size_left=window, window_size_right=0,
        )[0]  # (N, H, D)  # fmt: skip
    return AttentionGraph(y, (q, k, v), saved, out)


def attend_packed_plain(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, shape: AttentionShape, out: Tensor
) -> AttentionGraph:
    """The plain twin of `attend_packed`: one document after the other."""
    q, k, v = (x.data.requires_grad_() for x in (q, k, v))
    # `bounds` has spare entries behind the last document, all N: documents of no tokens.
    sizes = [size for size in bounds.diff().tolist() if size]
    with torch.enable_grad(), _capture_saved() as saved:
        documents = zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
        y = torch.cat([_attend_document(*one, shape) for one in documents])  # (N, H, D)
    return AttentionGraph(y, (q, k, v), saved, out)


def _attend_document(q: Tensor, k: Tensor, v: Tensor, shape: AttentionShape) -> Tensor:
    index = torch.arange(len(q), device=q.device)
    mask = index[:, None] >= index  # (n, n)
    if shape.window_tokens is not None:
        mask &= index[:, None] - index < shape.window_tokens
    is_grouped = q.shape[1] != k.shape[1]
    heads = [x.transpose(0, 1)[None] for x in (q, k, v)]  # each (1, heads, n, D)
    return F.scaled_dot_product_attention(
        heads[0], heads[1], heads[2], mask, scale=shape.scale, enable_gqa=is_grouped
    )[0].transpose(0, 1)  # (n, H, D)


@contextmanager
def _capture_saved() -> Iterator[list[SavedTensor]]:
    """Within the block, tensors that autograd saves go into boxes that can be refilled later."""
    saved: list[SavedTensor] = []

    def pack(tensor: Tensor) -> SavedTensor:
        saved.append(SavedTensor(tensor))
        return saved[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
        yield saved


def _is_same(one: Tensor, other: Tensor) -> bool:
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
    )


def _by_sequence(x: Tensor, batch_size: int) -> Tensor:
    # .data has a version counter of its own: writes to other columns of the buffer, or to the
    # whole buffer in the next step, would otherwise count as changes of what autograd saved.
    return x.data.unflatten(0, (batch_size, -1)).transpose(1, 2)  # (B, heads, T, D)
