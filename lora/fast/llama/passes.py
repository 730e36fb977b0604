"""A Llama-style decoder's forward and backward, written by hand over fixed buffers.

What differs from the textbook: what lies between the products is one pass each; gradients overwrite
what they are gradients of; the gradients of weights are left to the end, where all blocks' are made
together.
"""

from __future__ import annotations

from torch import Tensor

from lora.fast.llama.attention import (
    AttentionGraph,
    AttentionShape,
    attend_packed,
    attend_packed_plain,
    attend_unpacked,
)
from lora.fast.llama.buffers import Buffers, Inputs
from lora.fast.llama.network import FastNetwork
from lora.fast.weights.projections import Projection
from lora.kernels.step.attention import find_begins, find_ends


class FastPass:
    """One forward and the way back over the same buffers."""

    def __init__(self, net: FastNetwork, inputs: Inputs, buffers: Buffers, *, packed: bool) -> None:
        self.net, self.inputs, self.buffers, self.packed = net, inputs, buffers, packed
        self.tables = net.tables(inputs.position_ids)
        self.attention_graphs: dict[int, AttentionGraph] = {}
        self.held = -1
        """The block whose values lie in what blocks share."""
        self.owns_attention = packed and net.owns_attention(buffers.tokens)
        if self.owns_attention:
            self.begins = find_begins(inputs.position_ids)
            self.ends = find_ends(self.begins)

    def run(self) -> None:
        """Go through all blocks."""
        net, buffers = self.net, self.buffers
        c, n_layers = net.config.hidden_size, net.qkv.n_layers
        embedded = net.embedding.tensors[0].index_select(0, self.inputs.input_ids)  # (N, C)
        self._add_norm(embedded, None, 0, buffers.residuals[0], buffers.attention_in[0], net.qkv)
        for layer in range(n_layers):
            self._attention(layer)
            buffers.residuals.offload(layer)
            self._feed_forward(layer)
            buffers.residuals.reserve_slot(layer + 1)
            after = buffers.attention_in[layer + 1] if layer + 1 < n_layers else buffers.final
            mid_residual = buffers.mid_residual[layer][:, :c]
            total, reader = buffers.residuals[layer + 1], None if layer + 1 == n_layers else net.qkv
            self._add_norm(mid_residual, buffers.hidden, 2 * layer + 2, total, after, reader)
        self.held = n_layers - 1

    def _add_norm(
        self,
        residual: Tensor,
        delta: Tensor | None,
        number: int,
        total: Tensor,
        normed: Tensor,
        reader: Projection | None,
    ) -> None:
        """`reader`: whose inputs `normed` becomes."""
        net, c = self.net, self.net.config.hidden_size
        weight, eps = net.norms.tensors[number], net.config.norm_eps
        rstd = self.buffers.rstd[number]
        normed = normed[:, :c]
        coded = None if reader is None else reader.fp8_inputs(normed)
        net.ops.add_norm(residual, delta, weight, eps, total[:, :c], normed, rstd, coded)

    def _attention(self, layer: int, *, again: bool = False) -> None:
        """From the first norm's output to the second norm's."""
        net, buffers, c = self.net, self.buffers, self.net.config.hidden_size
        self._attend(layer, again=again)
        net.output.forward(layer, buffers.attention_out[layer], buffers.hidden)
        residuals, mid_residual = buffers.residuals[layer][:, :c], buffers.mid_residual[layer]
        number, normed = 2 * layer + 1, buffers.feed_forward_in[layer]
        self._add_norm(residuals, buffers.hidden, number, mid_residual, normed, net.gate_up)

    def _feed_forward(self, layer: int) -> None:
        net, buffers, feed = self.net, self.buffers, self.net.down.inputs
        for part in buffers.parts:
            gate_up = self._gate_up(layer, part)
            x = buffers.swiglu_out.chunk(layer, part)
            out = x[:, :feed]
            net.ops.swiglu(gate_up[:, : net.gate_up.outputs], out, net.down.fp8_inputs(out))
            net.down.forward(layer, x, buffers.hidden[part])
            if buffers.down_low_rank.is_stored(layer):
                buffers.down_low_rank[layer][part].copy_(x[:, feed:])
            if buffers.gate_up_low_rank.is_stored(layer):
                buffers.gate_up_low_rank[layer][part].copy_(
                    buffers.feed_forward_in[layer][part, net.gate_up.inputs :]
                )

    def _gate_up(self, layer: int, part: slice) -> Tensor:
        """Return gate and up (tokens of `part`, 2F + extra), just made."""
        net, buffers = self.net, self.buffers
        gate_up = buffers.gate_up.chunk(layer, part)
        net.gate_up.forward(
            layer, buffers.feed_forward_in[layer][part], gate_up[:, : net.gate_up.outputs]
        )
        return gate_up

    def _qkv(self, layer: int) -> Tensor:
        return self.buffers.qkv[layer][:, : self.net.qkv.outputs]

    def _heads(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        sizes = self.net.config
        heads = self._qkv(layer).unflatten(1, (-1, sizes.head_dim))  # (N, heads of all three, D)
        shared = sizes.num_key_value_heads
        q, k, v = heads.split((sizes.num_attention_heads, shared, shared), 1)
        return q, k, v

    def _attend(self, layer: int, *, again: bool) -> None:
        net, buffers, sizes = self.net, self.buffers, self.net.config
        qkv, x = self._qkv(layer), buffers.attention_in[layer]
        net.qkv.forward(layer, x, qkv)
        if buffers.qkv_low_rank.is_stored(layer):
            buffers.qkv_low_rank[layer].copy_(x[:, net.qkv.inputs :])
        own = sizes.layers[layer]
        if own.rope is not None:
            n_heads = sizes.num_attention_heads + sizes.num_key_value_heads
            net.ops.rotate_heads(qkv, *self.tables[own.rope], n_heads)
        if again and buffers.attention_out.is_stored(layer):
            return  # its graph reads queries, keys and values where they lie again
        window = self._window(layer)
        out = buffers.attention_out[layer][:, : net.output.inputs]
        if self.owns_attention:
            heads, lse = self._sizes_of_heads(), buffers.lse[layer]
            net.ops.attend(qkv, self.begins, heads, own.scale, window or 0, out, lse)
            return
        shape = AttentionShape(buffers.rows, buffers.tokens, own.scale, window)
        q, k, v = self._heads(layer)
        self.attention_graphs.pop(self._place(layer), None)
        if not self.packed:
            attention_out = attend_unpacked(q, k, v, shape, out)
        else:
            kernel = attend_packed if q.is_cuda else attend_packed_plain
            attention_out = kernel(q, k, v, self.inputs.bounds, shape, out)
        self.attention_graphs[self._place(layer)] = attention_out

    def _place(self, layer: int) -> int:
        """Return a number that blocks with one tensor in common share."""
        return layer if self.buffers.attention_out.is_stored(layer) else -1

    def backward(self, d_hidden: Tensor, *, first: bool) -> None:
        """Go back from `d_hidden` (N, C), the gradient of `buffers.final`, to the first block."""
        net, buffers = self.net, self.buffers
        n_layers = net.qkv.n_layers
        reader = (net.down, n_layers - 1)
        self._norm_back(d_hidden, 2 * n_layers, buffers.residuals[n_layers], None, first, reader)
        for layer in reversed(range(net.first, n_layers)):
            buffers.residuals.fetch(layer, net.first)
            self._make_again(layer)
            self._feed_forward_back(layer, first)
            self._attention_back(layer, first)
        buffers.residuals.join()
        net.receive(buffers, first=first)
        if net.trains_all:
            self._embedding_back(first)

    def _make_again(self, layer: int) -> None:
        """Make what a block's way forward gave and did not keep, up to its second norm."""
        net, buffers = self.net, self.buffers
        if buffers.attention_in.is_stored(layer) or self.held == layer:
            return
        self.held = layer
        whole = not buffers.mid_residual.is_stored(layer)
        reader: Projection | None = net.qkv if whole else None
        self._norm_again(buffers.residuals[layer], 2 * layer, buffers.attention_in[layer], reader)
        if whole:
            self._attention(layer, again=True)
            return
        buffers.attention_in[layer][:, net.qkv.inputs :].copy_(buffers.qkv_low_rank[layer])
        reader = None if buffers.gate_up.is_stored(layer) else net.gate_up
        self._norm_again(
            buffers.mid_residual[layer], 2 * layer + 1, buffers.feed_forward_in[layer], reader
        )
        if buffers.gate_up_low_rank.is_stored(layer):
            buffers.feed_forward_in[layer][:, net.gate_up.inputs :].copy_(
                buffers.gate_up_low_rank[layer]
            )

    def _norm_again(
        self, residual: Tensor, number: int, normed: Tensor, reader: Projection | None
    ) -> None:
        x = residual[:, : self.net.config.hidden_size]
        self._add_norm(x, None, number, x, normed, reader)

    def _norm_back(
        self,
        dy: Tensor,
        number: int,
        x: Tensor,
        beside: Tensor | None,
        first: bool,
        reader: tuple[Projection, int] | None,
    ) -> None:
        """Changes `x` in place: the norm's input becomes its gradient, `beside` added.

        `reader`: the projection and the block whose outputs' gradient that is.
        """
        net, c = self.net, self.net.config.hidden_size
        x, rstd = x[:, :c], self.buffers.rstd[number]
        if net.norms.slot is not None:
            gradient = net.ops.norm_weight_gradient(dy, x, rstd)
            target = net.norms.slot.gradients[number]
            target.copy_(gradient) if first else target.add_(gradient)
        beside = None if beside is None else beside[:, :c]
        coded = None if reader is None else reader[0].fp8_gradients(reader[1], x)
        net.ops.norm_backward(dy, x, rstd, net.norms.tensors[number], beside, x, coded)

    def _feed_forward_back(self, layer: int, first: bool) -> None:
        net, buffers = self.net, self.buffers
        dy = buffers.residuals[layer + 1]
        for part in buffers.parts:
            begins = first and part.start == 0
            is_stored = buffers.gate_up.is_stored(layer)
            gate_up = (
                buffers.gate_up.chunk(layer, part) if is_stored else self._gate_up(layer, part)
            )
            self._activated_back(layer, part, gate_up, begins)
            net.gate_up.backward(layer, gate_up, buffers.hidden[part])
            if buffers.recomputes:
                self._receive(
                    net.gate_up, layer, buffers.feed_forward_in[layer][part], gate_up, begins
                )
        mid_residual, reader = buffers.mid_residual[layer], (net.output, layer)
        self._norm_back(buffers.hidden, 2 * layer + 1, mid_residual, dy, first, reader)

    def _activated_back(self, layer: int, part: slice, gate_up: Tensor, begins: bool) -> None:
        """Changes `gate_up` in place: gate and up become their gradients."""
        net, buffers, feed = self.net, self.buffers, self.net.down.inputs
        dy, d_swiglu_out = (
            buffers.residuals[layer + 1][part],
            buffers.d_swiglu_out[: part.stop - part.start],
        )
        net.down.backward(layer, dy, d_swiglu_out)
        x = buffers.swiglu_out.chunk(layer, part)
        out = None if buffers.stores_swiglu else x[:, :feed]
        both = gate_up[:, : net.gate_up.outputs]
        coded = net.gate_up.fp8_gradients(layer, both)
        net.ops.swiglu_backward(both, d_swiglu_out, out, coded)
        if out is not None:
            x[:, feed:].copy_(buffers.down_low_rank[layer][part])
            self._receive(net.down, layer, x, dy, begins)

    def _attention_back(self, layer: int, first: bool) -> None:
        net, buffers = self.net, self.buffers
        dy, qkv = buffers.mid_residual[layer], buffers.qkv[layer]
        net.output.backward(layer, dy, buffers.d_attention_out)
        if buffers.recomputes:
            self._receive(net.output, layer, buffers.attention_out[layer], dy, first)
        self._heads_back(layer)
        is_last = layer == net.first and not net.trains_all
        net.qkv.backward(layer, qkv, None if is_last else buffers.hidden)
        if buffers.recomputes:
            self._receive(net.qkv, layer, buffers.attention_in[layer], qkv, first)
        if not is_last:
            reader = (net.down, layer - 1) if layer > net.first else None
            self._norm_back(buffers.hidden, 2 * layer, buffers.residuals[layer], dy, first, reader)

    def _receive(
        self, projection: Projection, layer: int, x: Tensor, dy: Tensor, first: bool
    ) -> None:
        projection.receive(slice(layer, layer + 1), x[None], dy[None], first=first)

    def _heads_back(self, layer: int) -> None:
        """Changes queries, keys and values in place: they become their gradients, unrotated."""
        net, buffers, own = self.net, self.buffers, self.net.config.layers[layer]
        qkv, d_attention_out = self._qkv(layer), buffers.d_attention_out
        tables = None if own.rope is None else self.tables[own.rope]
        if self.owns_attention:
            out = buffers.attention_out[layer][:, : net.output.inputs]
            net.ops.attend_backward(
                qkv, self.begins, self.ends, self._sizes_of_heads(), own.scale,
                self._window(layer) or 0, out, buffers.lse[layer], d_attention_out,
                buffers.partial, tables,
            )  # fmt: skip
            return
        heads = d_attention_out.unflatten(1, (-1, net.config.head_dim))  # (N, H, D)
        gradients = self.attention_graphs.pop(self._place(layer)).backward(heads)
        net.ops.gather_gradients(*gradients, *(tables or (None, None)), qkv)

    def _sizes_of_heads(self) -> tuple[int, int, int]:
        sizes = self.net.config
        return sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim

    def _window(self, layer: int) -> int | None:
        window = self.net.config.layers[layer].window_tokens
        return None if window is not None and window >= self.buffers.tokens else window

    def _embedding_back(self, first: bool) -> None:
        net, slot = self.net, self.net.embedding.slot
        assert slot is not None
        gradients = slot.gradients[0]
        if first and net.head is not net.embedding:
            gradients.zero_()  # a tied head has begun it
        c = net.config.hidden_size
        rows = self.buffers.residuals[0][:, :c].to(gradients.dtype)
        gradients.index_add_(0, self.inputs.input_ids, rows)
