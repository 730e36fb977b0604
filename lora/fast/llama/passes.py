"""A Llama-style decoder's forward and backward pass, written by hand over fixed buffers.

What differs from the textbook: what lies between two matmuls is one pass over memory; gradients
overwrite what they are gradients of; weight gradients wait for the end, where those of all blocks
are a few batched matmuls. What each buffer holds when is the table in `lora.fast.llama.buffers`.
"""

from __future__ import annotations

from torch import Tensor

from lora.fast.llama.attention_pass import AttentionPass
from lora.fast.llama.buffers import Buffers, Inputs
from lora.fast.llama.junction_pass import JunctionPass
from lora.fast.llama.network import FastNetwork
from lora.fast.weights.projections import Projection


class FastPass:
    """One forward and backward pass over the same buffers."""

    def __init__(self, net: FastNetwork, inputs: Inputs, buffers: Buffers, *, packed: bool) -> None:
        self.net, self.inputs, self.buffers = net, inputs, buffers
        self.attention = AttentionPass(net, inputs, buffers, packed=packed)
        self.junctions = JunctionPass(net, buffers)
        self.in_scratch = -1
        """The block whose values lie in the scratch tensors that blocks share."""

    def run(self) -> None:
        """Forward: through all blocks, up to the final norm."""
        net, buffers = self.net, self.buffers
        c, n_layers = net.config.hidden_size, net.qkv.n_layers
        net.use_embedding()
        embedded = net.embed(self.inputs.input_ids)  # (N, C)
        self.junctions.forward(
            embedded, None, 0, buffers.residuals[0], buffers.attention_in[0], net.qkv
        )
        for layer in range(n_layers):
            net.use_block(layer, layer + 1)
            self._attention(layer)
            buffers.residuals.offload(layer)  # its last reader, the sum after attention, has run
            self._feed_forward(layer)
            buffers.residuals.reserve_slot(layer + 1)
            is_last = layer + 1 == n_layers
            normed = buffers.final if is_last else buffers.attention_in[layer + 1]
            total, reader = buffers.residuals[layer + 1], None if is_last else net.qkv
            # The block's second residual addition and the next block's first norm in one pass.
            mid_residual = buffers.mid_residual[layer][:, :c]
            fed = self.junctions.feed_out(layer)
            self.junctions.forward(mid_residual, fed, 2 * layer + 2, total, normed, reader)
        self.in_scratch = n_layers - 1

    def _attention(self, layer: int, *, recomputes: bool = False) -> None:
        """From the first norm's output to the second norm's."""
        net, buffers, c = self.net, self.buffers, self.net.config.hidden_size
        x = buffers.attention_in[layer]  # (N, C + R)
        net.qkv.forward(layer, x, buffers.qkv[layer][:, : net.qkv.outputs])
        if buffers.qkv_low_rank.is_stored(layer):
            buffers.qkv_low_rank[layer].copy_(x[:, net.qkv.inputs :])
        self.attention.forward(layer, recomputes=recomputes)
        attended = self.junctions.attention_out(layer)
        net.output.forward(layer, buffers.attention_out[layer], attended)
        residual, mid_residual = buffers.residuals[layer][:, :c], buffers.mid_residual[layer]
        normed = buffers.feed_forward_in[layer]
        self.junctions.forward(residual, attended, 2 * layer + 1, mid_residual, normed, net.gate_up)

    def _feed_forward(self, layer: int) -> None:
        net, buffers, out = self.net, self.buffers, self.junctions.feed_out(layer)
        for chunk in buffers.chunks:
            x = self._activate(layer, chunk, self._gate_up(layer, chunk))
            net.down.forward(layer, x, out[chunk])
            if buffers.down_low_rank.is_stored(layer):
                buffers.down_low_rank[layer][chunk].copy_(x[:, net.down.inputs :])
            if buffers.gate_up_low_rank.is_stored(layer):
                low = buffers.feed_forward_in[layer][chunk, net.gate_up.inputs :]  # (tokens, R)
                buffers.gate_up_low_rank[layer][chunk].copy_(low)

    def _activate(self, layer: int, chunk: slice, gate_up: Tensor) -> Tensor:
        """Return down's inputs (tokens of `chunk`, F + R), just computed."""
        net = self.net
        x = self.buffers.swiglu_out.chunk(layer, chunk)
        out = x[:, : net.down.inputs]
        both = gate_up[:, : net.gate_up.outputs]
        net.ops.swiglu(both, out, net.down.fp8_inputs(out), gelu=net.has_gelu)
        return x

    def _gate_up(self, layer: int, chunk: slice) -> Tensor:
        """Return gate and up (tokens of `chunk`, 2F + R), just computed."""
        net, buffers = self.net, self.buffers
        gate_up, x = buffers.gate_up.chunk(layer, chunk), buffers.feed_forward_in[layer][chunk]
        net.gate_up.forward(layer, x, gate_up[:, : net.gate_up.outputs])
        return gate_up

    def backward(self, d_hidden: Tensor, *, first: bool) -> None:
        """Backward from `d_hidden` (N, C), the gradient of `buffers.final`, to the first block.

        `first`: of the step's micro-batches, so that gradients are written instead of added.
        """
        net, buffers = self.net, self.buffers
        n_layers = net.qkv.n_layers
        self.junctions.backward(
            d_hidden, 2 * n_layers, buffers.residuals[n_layers], None, first, net.down
        )
        # Below the first adapted block nothing needs a gradient.
        for layer in reversed(range(net.first_trained, n_layers)):
            net.use_block(layer, layer - 1 if layer > net.first_trained else -1)
            buffers.residuals.fetch(layer, net.first_trained)
            self._recompute(layer)
            self._feed_forward_backward(layer, first)
            self._attention_backward(layer, first)
        buffers.residuals.join()
        net.accumulate_gradients(buffers, first=first)
        if net.embedding.trains:
            self._embedding_backward(first)

    def _recompute(self, layer: int) -> None:
        """Recompute what forward did not store of a block, up to its second norm."""
        net, buffers = self.net, self.buffers
        # The last block's values are still in scratch when the backward pass begins.
        if buffers.attention_in.is_stored(layer) or self.in_scratch == layer:
            return
        self.in_scratch = layer
        whole = not buffers.mid_residual.is_stored(layer)
        # Where q, k and v are stored, no matmul reads the norm's output again: only the weight
        # gradient does, and not in fp8.
        reader: Projection | None = net.qkv if whole else None
        self._recompute_norm(
            buffers.residuals[layer], 2 * layer, buffers.attention_in[layer], reader
        )
        if whole:
            self._attention(layer, recomputes=True)
            return
        low = buffers.attention_in[layer][:, net.qkv.inputs :]  # (N, R)
        low.copy_(buffers.qkv_low_rank[layer])
        reader = None if buffers.gate_up.is_stored(layer) else net.gate_up
        norm, x = 2 * layer + 1, buffers.feed_forward_in[layer]
        self._recompute_norm(buffers.mid_residual[layer], norm, x, reader)
        if buffers.gate_up_low_rank.is_stored(layer):
            x[:, net.gate_up.inputs :].copy_(buffers.gate_up_low_rank[layer])

    def _recompute_norm(
        self, residual: Tensor, number: int, normed: Tensor, reader: Projection | None
    ) -> None:
        x = residual[:, : self.net.config.hidden_size]
        self.junctions.forward(x, None, number, x, normed, reader)  # the sum is written over itself

    def _feed_forward_backward(self, layer: int, first: bool) -> None:
        net, buffers = self.net, self.buffers
        for chunk in buffers.chunks:
            begins = first and chunk.start == 0  # later chunks add to the weight gradients
            is_stored = buffers.gate_up.is_stored(layer)
            gate_up = (
                buffers.gate_up.chunk(layer, chunk) if is_stored else self._gate_up(layer, chunk)
            )
            dy = self._d_feed(layer, chunk, gate_up, begins)
            self._swiglu_backward(layer, chunk, gate_up, dy, begins)
            net.gate_up.backward(layer, gate_up, buffers.hidden[chunk])
            if buffers.recomputes:
                x = buffers.feed_forward_in[layer][chunk]
                self._accumulate(net.gate_up, layer, x, gate_up, begins)
        mid_residual, d_residual = buffers.mid_residual[layer], buffers.residuals[layer + 1]
        number = 2 * layer + 1
        self.junctions.backward(buffers.hidden, number, mid_residual, d_residual, first, net.output)

    def _d_feed(self, layer: int, chunk: slice, gate_up: Tensor, begins: bool) -> Tensor:
        """Return the gradient of down's outputs (tokens of `chunk`, C + R)."""
        net, buffers, c = self.net, self.buffers, self.net.config.hidden_size
        # By now the gradient of the block's output.
        d_residual = buffers.residuals[layer + 1][chunk]
        if not net.branches.is_changed:
            return d_residual
        d_feed = buffers.feed_branch.chunk(layer, chunk)
        number = 2 * layer + 2
        if self.junctions.d_branch(number) is None:
            if net.branches.has_norm:  # whose backward reads what down has written
                net.down.forward(layer, self._activate(layer, chunk, gate_up), d_feed[:, :c])
            self.junctions.branch_backward(
                number, d_residual[:, :c], d_feed[:, :c], chunk, begins, net.down
            )
        return d_feed

    def _swiglu_backward(
        self, layer: int, chunk: slice, gate_up: Tensor, dy: Tensor, begins: bool
    ) -> None:
        """Changes `gate_up` in place: gate and up become their gradients; `dy` is down's."""
        net, buffers, feed = self.net, self.buffers, self.net.down.inputs
        d_swiglu_out = buffers.d_swiglu_out[: chunk.stop - chunk.start]  # (tokens, F)
        net.down.backward(layer, dy, d_swiglu_out)
        x = buffers.swiglu_out.chunk(layer, chunk)  # (tokens, F + R)
        out = None if buffers.stores_swiglu else x[:, :feed]
        both = gate_up[:, : net.gate_up.outputs]  # (tokens, 2F)
        fp8_out = net.gate_up.fp8_gradients(layer, both)
        net.ops.swiglu_backward(both, d_swiglu_out, out, fp8_out, gelu=net.has_gelu)
        if out is not None:
            # down's weight gradient now, while its recomputed input is in scratch.
            x[:, feed:].copy_(buffers.down_low_rank[layer][chunk])
            self._accumulate(net.down, layer, x, dy, begins)

    def _attention_backward(self, layer: int, first: bool) -> None:
        net, buffers = self.net, self.buffers
        is_changed, qkv = net.branches.is_changed, buffers.qkv[layer]  # (N, W + R)
        dy = (buffers.attention_branch if is_changed else buffers.mid_residual)[layer]  # (N, C + R)
        net.output.backward(layer, dy, buffers.d_attention_out)
        if buffers.recomputes or (is_changed and not buffers.attention_branch.is_stored(layer)):
            self._accumulate(net.output, layer, buffers.attention_out[layer], dy, first)
        self.attention.backward(layer, first=first)
        is_last = layer == net.first_trained and not net.needs_input_gradient
        net.qkv.backward(layer, qkv, None if is_last else buffers.hidden)
        if buffers.recomputes:
            self._accumulate(net.qkv, layer, buffers.attention_in[layer], qkv, first)
        if not is_last:
            reader = net.down if layer > net.first_trained else None
            x, d_residual = buffers.residuals[layer], buffers.mid_residual[layer]
            self.junctions.backward(buffers.hidden, 2 * layer, x, d_residual, first, reader)

    def _accumulate(
        self, projection: Projection, layer: int, x: Tensor, dy: Tensor, first: bool
    ) -> None:
        one = slice(layer, layer + 1)
        projection.accumulate_gradients(one, x[None], dy[None], first=first)

    def _embedding_backward(self, first: bool) -> None:
        net, c = self.net, self.net.config.hidden_size
        # A tied head has written its gradient there already.
        first = first and not net.embedding.shares_gradient(net.head)
        rows = self.buffers.residuals[0][:, :c]  # (N, C)
        net.embedding.accumulate_embedded(
            self.inputs.input_ids, rows, first=first, factor=net.embedding_scale
        )
