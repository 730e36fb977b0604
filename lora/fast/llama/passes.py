"""A Llama-style decoder's forward and backward, written by hand over fixed buffers.

What differs from the textbook: what lies between the products is one pass each; gradients overwrite
what they are gradients of; the gradients of weights are left to the end, where all blocks' are made
together.
"""

from __future__ import annotations

from torch import Tensor

from lora.fast.llama.attention import (
    Attended,
    Shape,
    attend_documents,
    attend_documents_plain,
    attend_rows,
)
from lora.fast.llama.buffers import Buffers, Inputs
from lora.fast.llama.network import FastNetwork
from lora.fast.weights.projections import Projection
from lora.kernels.step.attention import find_begins, find_ends


class FastPass:
    """One forward and the way back over the same buffers."""

    def __init__(self, net: FastNetwork, inputs: Inputs, kept: Buffers, *, packed: bool) -> None:
        self.net, self.inputs, self.kept, self.packed = net, inputs, kept, packed
        self.tables = net.tables(inputs.position_ids)
        self.attended: dict[int, Attended] = {}
        self.held = -1
        """The block whose values lie in what blocks share."""
        self.owns_attention = packed and net.owns_attention(kept.tokens)
        if self.owns_attention:
            self.begins = find_begins(inputs.position_ids)
            self.ends = find_ends(self.begins)

    def run(self) -> None:
        """Go through all blocks."""
        net, kept = self.net, self.kept
        c, n_layers = net.config.hidden_size, net.qkv.n_layers
        embedded = net.embedding.tensors[0].index_select(0, self.inputs.input_ids)  # (N, C)
        self._add_norm(embedded, None, 0, kept.before[0], kept.attention_in[0], net.qkv)
        for layer in range(n_layers):
            self._attention(layer)
            kept.before.store(layer)
            self._feed_forward(layer)
            kept.before.make_room(layer + 1)
            after = kept.attention_in[layer + 1] if layer + 1 < n_layers else kept.final
            between = kept.between[layer][:, :c]
            total, reader = kept.before[layer + 1], None if layer + 1 == n_layers else net.qkv
            self._add_norm(between, kept.hidden, 2 * layer + 2, total, after, reader)
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
        rstd = self.kept.rstd[number]
        normed = normed[:, :c]
        coded = None if reader is None else reader.coded_inputs(normed)
        net.ops.add_norm(residual, delta, weight, eps, total[:, :c], normed, rstd, coded)

    def _attention(self, layer: int, *, again: bool = False) -> None:
        """From the first norm's output to the second norm's."""
        net, kept, c = self.net, self.kept, self.net.config.hidden_size
        self._attend(layer, again=again)
        net.output.forward(layer, kept.attended[layer], kept.hidden)
        before, between = kept.before[layer][:, :c], kept.between[layer]
        number, normed = 2 * layer + 1, kept.feed_in[layer]
        self._add_norm(before, kept.hidden, number, between, normed, net.gate_up)

    def _feed_forward(self, layer: int) -> None:
        net, kept, feed = self.net, self.kept, self.net.down.inputs
        for part in kept.parts:
            gate_up = self._gate_up(layer, part)
            x = kept.activated.part(layer, part)
            out = x[:, :feed]
            net.ops.swiglu(gate_up[:, : net.gate_up.outputs], out, net.down.coded_inputs(out))
            net.down.forward(layer, x, kept.hidden[part])
            if kept.activated_low.stays(layer):
                kept.activated_low[layer][part].copy_(x[:, feed:])
            if kept.feed_low.stays(layer):
                kept.feed_low[layer][part].copy_(kept.feed_in[layer][part, net.gate_up.inputs :])

    def _gate_up(self, layer: int, part: slice) -> Tensor:
        """Return gate and up (tokens of `part`, 2F + extra), just made."""
        net, kept = self.net, self.kept
        gate_up = kept.gate_up.part(layer, part)
        net.gate_up.forward(layer, kept.feed_in[layer][part], gate_up[:, : net.gate_up.outputs])
        return gate_up

    def _qkv(self, layer: int) -> Tensor:
        return self.kept.qkv[layer][:, : self.net.qkv.outputs]

    def _heads(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        sizes = self.net.config
        heads = self._qkv(layer).unflatten(1, (-1, sizes.head_dim))  # (N, heads of all three, D)
        shared = sizes.num_key_value_heads
        q, k, v = heads.split((sizes.num_attention_heads, shared, shared), 1)
        return q, k, v

    def _attend(self, layer: int, *, again: bool) -> None:
        net, kept, sizes = self.net, self.kept, self.net.config
        qkv, x = self._qkv(layer), kept.attention_in[layer]
        net.qkv.forward(layer, x, qkv)
        if kept.attention_low.stays(layer):
            kept.attention_low[layer].copy_(x[:, net.qkv.inputs :])
        own = sizes.layers[layer]
        if own.rope is not None:
            n_heads = sizes.num_attention_heads + sizes.num_key_value_heads
            net.ops.rotate_heads(qkv, *self.tables[own.rope], n_heads)
        if again and kept.attended.stays(layer):
            return  # its graph reads queries, keys and values where they lie again
        window = self._window(layer)
        out = kept.attended[layer][:, : net.output.inputs]
        if self.owns_attention:
            heads, lse = self._sizes_of_heads(), kept.lse[layer]
            net.ops.attend(qkv, self.begins, heads, own.scale, window or 0, out, lse)
            return
        shape = Shape(kept.rows, kept.tokens, own.scale, window)
        q, k, v = self._heads(layer)
        self.attended.pop(self._place(layer), None)
        if not self.packed:
            attended = attend_rows(q, k, v, shape, out)
        else:
            kernel = attend_documents if q.is_cuda else attend_documents_plain
            attended = kernel(q, k, v, self.inputs.bounds, shape, out)
        self.attended[self._place(layer)] = attended

    def _place(self, layer: int) -> int:
        """Return a number that blocks with one tensor in common share."""
        return layer if self.kept.attended.stays(layer) else -1

    def backward(self, d_hidden: Tensor, *, first: bool) -> None:
        """Go back from `d_hidden` (N, C), the gradient of `kept.final`, to the first block."""
        net, kept = self.net, self.kept
        n_layers = net.qkv.n_layers
        reader = (net.down, n_layers - 1)
        self._norm_back(d_hidden, 2 * n_layers, kept.before[n_layers], None, first, reader)
        for layer in reversed(range(net.first, n_layers)):
            kept.before.fetch(layer, net.first)
            self._make_again(layer)
            self._feed_forward_back(layer, first)
            self._attention_back(layer, first)
        kept.before.join()
        net.receive(kept, first=first)
        if net.trains_all:
            self._embedding_back(first)

    def _make_again(self, layer: int) -> None:
        """Make what a block's way forward gave and did not keep, up to its second norm."""
        net, kept = self.net, self.kept
        if kept.attention_in.stays(layer) or self.held == layer:
            return
        self.held = layer
        whole = not kept.between.stays(layer)
        reader: Projection | None = net.qkv if whole else None
        self._norm_again(kept.before[layer], 2 * layer, kept.attention_in[layer], reader)
        if whole:
            self._attention(layer, again=True)
            return
        kept.attention_in[layer][:, net.qkv.inputs :].copy_(kept.attention_low[layer])
        reader = None if kept.gate_up.stays(layer) else net.gate_up
        self._norm_again(kept.between[layer], 2 * layer + 1, kept.feed_in[layer], reader)
        if kept.feed_low.stays(layer):
            kept.feed_in[layer][:, net.gate_up.inputs :].copy_(kept.feed_low[layer])

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
        x, rstd = x[:, :c], self.kept.rstd[number]
        if net.norms.slot is not None:
            gradient = net.ops.norm_weight_gradient(dy, x, rstd)
            target = net.norms.slot.gradients[number]
            target.copy_(gradient) if first else target.add_(gradient)
        beside = None if beside is None else beside[:, :c]
        coded = None if reader is None else reader[0].coded_gradients(reader[1], x)
        net.ops.norm_backward(dy, x, rstd, net.norms.tensors[number], beside, x, coded)

    def _feed_forward_back(self, layer: int, first: bool) -> None:
        net, kept = self.net, self.kept
        dy = kept.before[layer + 1]
        for part in kept.parts:
            begins = first and part.start == 0
            stays = kept.gate_up.stays(layer)
            gate_up = kept.gate_up.part(layer, part) if stays else self._gate_up(layer, part)
            self._activated_back(layer, part, gate_up, begins)
            net.gate_up.backward(layer, gate_up, kept.hidden[part])
            if kept.is_lean:
                self._receive(net.gate_up, layer, kept.feed_in[layer][part], gate_up, begins)
        between, reader = kept.between[layer], (net.output, layer)
        self._norm_back(kept.hidden, 2 * layer + 1, between, dy, first, reader)

    def _activated_back(self, layer: int, part: slice, gate_up: Tensor, begins: bool) -> None:
        """Changes `gate_up` in place: gate and up become their gradients."""
        net, kept, feed = self.net, self.kept, self.net.down.inputs
        dy, d_activated = kept.before[layer + 1][part], kept.d_activated[: part.stop - part.start]
        net.down.backward(layer, dy, d_activated)
        x = kept.activated.part(layer, part)
        out = None if kept.keeps_activations else x[:, :feed]
        both = gate_up[:, : net.gate_up.outputs]
        coded = net.gate_up.coded_gradients(layer, both)
        net.ops.swiglu_backward(both, d_activated, out, coded)
        if out is not None:
            x[:, feed:].copy_(kept.activated_low[layer][part])
            self._receive(net.down, layer, x, dy, begins)

    def _attention_back(self, layer: int, first: bool) -> None:
        net, kept = self.net, self.kept
        dy, qkv = kept.between[layer], kept.qkv[layer]
        net.output.backward(layer, dy, kept.d_attended)
        if kept.is_lean:
            self._receive(net.output, layer, kept.attended[layer], dy, first)
        self._heads_back(layer)
        is_last = layer == net.first and not net.trains_all
        net.qkv.backward(layer, qkv, None if is_last else kept.hidden)
        if kept.is_lean:
            self._receive(net.qkv, layer, kept.attention_in[layer], qkv, first)
        if not is_last:
            reader = (net.down, layer - 1) if layer > net.first else None
            self._norm_back(kept.hidden, 2 * layer, kept.before[layer], dy, first, reader)

    def _receive(
        self, projection: Projection, layer: int, x: Tensor, dy: Tensor, first: bool
    ) -> None:
        projection.receive(slice(layer, layer + 1), x[None], dy[None], first=first)

    def _heads_back(self, layer: int) -> None:
        """Changes queries, keys and values in place: they become their gradients, unrotated."""
        net, kept, own = self.net, self.kept, self.net.config.layers[layer]
        qkv, d_attended = self._qkv(layer), kept.d_attended
        tables = None if own.rope is None else self.tables[own.rope]
        if self.owns_attention:
            out = kept.attended[layer][:, : net.output.inputs]
            net.ops.attend_backward(
                qkv, self.begins, self.ends, self._sizes_of_heads(), own.scale,
                self._window(layer) or 0, out, kept.lse[layer], d_attended, kept.partial, tables,
            )  # fmt: skip
            return
        heads = d_attended.unflatten(1, (-1, net.config.head_dim))  # (N, H, D)
        gradients = self.attended.pop(self._place(layer)).backward(heads)
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
