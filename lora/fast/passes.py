"""A Llama-style decoder's forward and backward, written by hand over fixed buffers.

What differs from the textbook: what lies between the products is one pass each; gradients overwrite
what they are gradients of; the gradients of weights are left to the end, where all blocks' are made
together.
"""

from __future__ import annotations

from torch import Tensor

from lora.fast.attention import (
    Attended,
    Shape,
    attend_documents,
    attend_documents_plain,
    attend_rows,
)
from lora.fast.buffers import Buffers, Inputs
from lora.fast.network import FastNetwork
from lora.fast.projections import Projection
from lora.kernels.attention import find_begins, find_ends


class FastPass:
    """One forward and the way back over the same buffers."""

    def __init__(self, net: FastNetwork, inputs: Inputs, kept: Buffers, *, packed: bool) -> None:
        self.net, self.inputs, self.kept, self.packed = net, inputs, kept, packed
        self.tables = net.tables(inputs.position_ids)
        self.attended: dict[int, Attended] = {}
        self.owns_attention = packed and net.owns_attention(kept.tokens)
        if self.owns_attention:
            self.begins = find_begins(inputs.position_ids)
            self.ends = find_ends(self.begins)

    def run(self) -> None:
        """Go through all blocks."""
        net, kept, ops = self.net, self.kept, self.net.ops
        c, n_layers = net.config.hidden_size, net.qkv.n_layers
        embedded = net.embedding.tensors[0].index_select(0, self.inputs.input_ids)  # (N, C)
        self._add_norm(embedded, None, 0, kept.before[0], kept.attention_in[0])
        for layer in range(n_layers):
            self._attend(layer)
            net.output.forward(layer, kept.attended[layer], kept.hidden)
            between = kept.between[layer]
            before = kept.before[layer][:, :c]
            self._add_norm(before, kept.hidden, 2 * layer + 1, between, kept.feed_in[layer])
            net.gate_up.forward(
                layer, kept.feed_in[layer], self._plain(kept.gate_up, net.gate_up, layer)
            )
            x = self._activated(layer)
            ops.swiglu(self._plain(kept.gate_up, net.gate_up, layer), x[:, : net.down.inputs])
            net.down.forward(layer, x, kept.hidden)
            if not kept.keeps_activations:
                kept.activated_low[layer].copy_(x[:, net.down.inputs :])
            after = kept.attention_in[layer + 1] if layer + 1 < n_layers else kept.final
            self._add_norm(
                between[:, :c], kept.hidden, 2 * layer + 2, kept.before[layer + 1], after
            )

    def _add_norm(
        self, residual: Tensor, delta: Tensor | None, number: int, total: Tensor, normed: Tensor
    ) -> None:
        net, c = self.net, self.net.config.hidden_size
        weight, eps = net.norms.tensors[number], net.config.norm_eps
        rstd = self.kept.rstd[number]
        net.ops.add_norm(residual, delta, weight, eps, total[:, :c], normed[:, :c], rstd)

    def _activated(self, layer: int) -> Tensor:
        return self.kept.activated[layer if self.kept.keeps_activations else 0]

    @staticmethod
    def _plain(stack: Tensor, projection: Projection, layer: int) -> Tensor:
        return stack[layer][:, : projection.outputs]

    def _heads(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        sizes = self.net.config
        qkv = self._plain(self.kept.qkv, self.net.qkv, layer)
        heads = qkv.unflatten(1, (-1, sizes.head_dim))  # (N, heads of all three, D)
        shared = sizes.num_key_value_heads
        q, k, v = heads.split((sizes.num_attention_heads, shared, shared), 1)
        return q, k, v

    def _attend(self, layer: int) -> None:
        net, kept, sizes = self.net, self.kept, self.net.config
        qkv = self._plain(kept.qkv, net.qkv, layer)
        net.qkv.forward(layer, kept.attention_in[layer], qkv)
        own = sizes.layers[layer]
        if own.rope is not None:
            n_heads = sizes.num_attention_heads + sizes.num_key_value_heads
            net.ops.rotate_heads(qkv, *self.tables[own.rope], n_heads)
        window = self._window(layer)
        if self.owns_attention:
            out = kept.attended[layer][:, : net.output.inputs]
            heads = self._sizes_of_heads()
            lse = kept.lse[layer]
            net.ops.attend(qkv, self.begins, heads, own.scale, window or 0, out, lse)
            return
        shape = Shape(kept.rows, kept.tokens, own.scale, window)
        q, k, v = self._heads(layer)
        if not self.packed:
            attended = attend_rows(q, k, v, shape)
        else:
            kernel = attend_documents if q.is_cuda else attend_documents_plain
            attended = kernel(q, k, v, self.inputs.bounds, shape)
        kept.attended[layer][:, : net.output.inputs].copy_(attended.result.flatten(1))
        self.attended[layer] = attended

    def backward(self, d_hidden: Tensor, *, first: bool) -> None:
        """Go back from `d_hidden` (N, C), the gradient of `kept.final`, to the first block."""
        net, kept = self.net, self.kept
        n_layers = net.qkv.n_layers
        self._norm_back(d_hidden, 2 * n_layers, kept.before[n_layers], None, first)
        for layer in reversed(range(net.first, n_layers)):
            self._feed_forward_back(layer, first)
            self._attention_back(layer, first)
        net.receive(kept, first=first)
        if net.trains_all:
            self._embedding_back(first)

    def _norm_back(
        self, dy: Tensor, number: int, x: Tensor, beside: Tensor | None, first: bool
    ) -> None:
        """Changes `x` in place: the norm's input becomes its gradient, `beside` added."""
        net, c = self.net, self.net.config.hidden_size
        x, rstd = x[:, :c], self.kept.rstd[number]
        if net.norms.slot is not None:
            gradient = net.ops.norm_weight_gradient(dy, x, rstd)
            target = net.norms.slot.gradients[number]
            target.copy_(gradient) if first else target.add_(gradient)
        beside = None if beside is None else beside[:, :c]
        net.ops.norm_backward(dy, x, rstd, net.norms.tensors[number], beside, x)

    def _feed_forward_back(self, layer: int, first: bool) -> None:
        net, kept = self.net, self.kept
        dy, feed = kept.before[layer + 1], net.down.inputs
        d_activated = kept.wide[:, :feed]
        net.down.backward(layer, dy, d_activated)
        gate_up = self._plain(kept.gate_up, net.gate_up, layer)
        x = self._activated(layer)
        if kept.keeps_activations:
            net.ops.swiglu_backward(gate_up, d_activated, None)
        else:
            net.ops.swiglu_backward(gate_up, d_activated, x[:, :feed])
            x[:, feed:].copy_(kept.activated_low[layer])
            net.down.receive(slice(layer, layer + 1), x[None], dy[None], first=first)
        net.gate_up.backward(layer, kept.gate_up[layer], kept.hidden)
        self._norm_back(kept.hidden, 2 * layer + 1, kept.between[layer], dy, first)

    def _attention_back(self, layer: int, first: bool) -> None:
        net, kept = self.net, self.kept
        dy = kept.between[layer]
        inner = net.output.inputs
        d_attended = kept.wide[:, :inner]
        net.output.backward(layer, dy, d_attended)
        self._heads_back(layer, d_attended)
        is_last = layer == net.first and not net.trains_all
        net.qkv.backward(layer, kept.qkv[layer], None if is_last else kept.hidden)
        if not is_last:
            self._norm_back(kept.hidden, 2 * layer, kept.before[layer], dy, first)

    def _heads_back(self, layer: int, d_attended: Tensor) -> None:
        """Changes queries, keys and values in place: they become their gradients, unrotated."""
        net, kept, own = self.net, self.kept, self.net.config.layers[layer]
        qkv = self._plain(kept.qkv, net.qkv, layer)
        tables = None if own.rope is None else self.tables[own.rope]
        if self.owns_attention:
            out = kept.attended[layer][:, : net.output.inputs]
            net.ops.attend_backward(
                qkv, self.begins, self.ends, self._sizes_of_heads(), own.scale,
                self._window(layer) or 0, out, kept.lse[layer], d_attended, kept.partial, tables,
            )  # fmt: skip
            return
        heads = d_attended.unflatten(1, (-1, net.config.head_dim))  # (N, H, D)
        gradients = self.attended.pop(layer).backward(heads)
        net.ops.gather_gradients(*gradients, *(tables or (None, None)), qkv)

    def _sizes_of_heads(self) -> tuple[int, int, int]:
        sizes = self.net.config
        return sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim

    def _window(self, layer: int) -> int | None:
        window = self.net.config.layers[layer].window_tokens
        return None if window is not None and window >= self.kept.tokens else window

    def _embedding_back(self, first: bool) -> None:
        net, slot = self.net, self.net.embedding.slot
        assert slot is not None
        gradients = slot.gradients[0]
        if first and net.head is not net.embedding:
            gradients.zero_()  # a tied head has begun it
        c = net.config.hidden_size
        rows = self.kept.before[0][:, :c].to(gradients.dtype)
        gradients.index_add_(0, self.inputs.input_ids, rows)
