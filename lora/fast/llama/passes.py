"""A Llama-style decoder's forward and backward pass, written by hand over fixed buffers.

What differs from the textbook: what lies between two matmuls is one pass over memory; gradients
overwrite what they are gradients of; weight gradients wait for the end, where those of all blocks
are a few batched matmuls. What each buffer holds when is the table in `lora.fast.llama.buffers`.
"""

from __future__ import annotations

from torch import Tensor

from lora.fast.llama.attention_pass import AttentionPass
from lora.fast.llama.buffers import Buffers, Inputs
from lora.fast.llama.network import FastNetwork
from lora.fast.weights.flat import accumulate
from lora.fast.weights.projections import Projection
from lora.kernels.step.norm import Branch


class FastPass:
    """One forward and backward pass over the same buffers."""

    def __init__(self, net: FastNetwork, inputs: Inputs, buffers: Buffers, *, packed: bool) -> None:
        self.net, self.inputs, self.buffers = net, inputs, buffers
        self.attention = AttentionPass(net, inputs, buffers, packed=packed)
        self.in_scratch = -1
        """The block whose values lie in the scratch tensors that blocks share."""

    def run(self) -> None:
        """Forward: through all blocks, up to the final norm."""
        net, buffers = self.net, self.buffers
        c, n_layers = net.config.hidden_size, net.qkv.n_layers
        net.use_embedding()
        embedded = net.embed(self.inputs.input_ids)  # (N, C)
        self._add_norm(embedded, None, 0, buffers.residuals[0], buffers.attention_in[0], net.qkv)
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
            fed = self._feed_out(layer)
            self._add_norm(mid_residual, fed, 2 * layer + 2, total, normed, reader)
        self.in_scratch = n_layers - 1

    def _add_norm(
        self,
        residual: Tensor,
        delta: Tensor | None,
        number: int,
        total: Tensor,
        normed: Tensor,
        reader: Projection | None,
    ) -> None:
        """Changes `total` and `normed` in place: what is added and normed at a junction.

        `delta`: the output of the branch before. `reader`: whose inputs `normed` becomes.
        """
        net, c = self.net, self.net.config.hidden_size
        normed = normed[:, :c]  # without the + R columns
        weight, rstd = self._norm(net.junctions[number].before)
        fp8_out = None if reader is None else reader.fp8_inputs(normed)
        branch = None if delta is None else self._branch(number)
        net.ops.add_norm(
            residual, delta, weight, net.config.norm_eps, total[:, :c], normed, rstd, fp8_out,
            branch=branch, offset=net.branches.offset,
        )  # fmt: skip

    def _norm(
        self, norm: int | None, tokens: slice = slice(None)
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the norm's weight (C,) and 1 / rms of `tokens`; None: there is none."""
        if norm is None:
            return None, None
        return self.net.norms.tensors[norm], self.buffers.rstd[norm, tokens]

    def _branch(self, number: int, tokens: slice = slice(None)) -> Branch | None:
        """Return what the branch before a junction goes through; None: it is added as it is."""
        net = self.net
        if not net.branches.is_changed:
            return None
        return Branch(*self._norm(net.junctions[number].after, tokens), net.branches.factor)

    def _attention_out(self, layer: int) -> Tensor:
        """Return where o_proj writes (N, C)."""
        net, buffers = self.net, self.buffers
        if not net.branches.is_changed:
            return buffers.hidden
        return buffers.attention_branch[layer][:, : net.config.hidden_size]

    def _feed_out(self, layer: int) -> Tensor:
        """Return where down writes in the forward pass (N, C)."""
        net, buffers = self.net, self.buffers
        if not (net.branches.is_changed and buffers.feed_branch.is_stored(layer)):
            return buffers.hidden
        return buffers.feed_branch[layer][:, : net.config.hidden_size]

    def _attention(self, layer: int, *, recomputes: bool = False) -> None:
        """From the first norm's output to the second norm's."""
        net, buffers, c = self.net, self.buffers, self.net.config.hidden_size
        x = buffers.attention_in[layer]  # (N, C + R)
        net.qkv.forward(layer, x, buffers.qkv[layer][:, : net.qkv.outputs])
        if buffers.qkv_low_rank.is_stored(layer):
            buffers.qkv_low_rank[layer].copy_(x[:, net.qkv.inputs :])
        self.attention.forward(layer, recomputes=recomputes)
        attended = self._attention_out(layer)
        net.output.forward(layer, buffers.attention_out[layer], attended)
        residual, mid_residual = buffers.residuals[layer][:, :c], buffers.mid_residual[layer]
        normed = buffers.feed_forward_in[layer]
        self._add_norm(residual, attended, 2 * layer + 1, mid_residual, normed, net.gate_up)

    def _feed_forward(self, layer: int) -> None:
        net, buffers, out = self.net, self.buffers, self._feed_out(layer)
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
        self._norm_backward(
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
        self._add_norm(x, None, number, x, normed, reader)  # the sum is written over itself

    def _norm_backward(
        self,
        dy: Tensor,
        number: int,
        x: Tensor,
        d_residual: Tensor | None,
        first: bool,
        reader: Projection | None,
    ) -> None:
        """Changes `x` in place: the sum at a junction becomes its gradient, `d_residual` added.

        Where the branch before has a stored buffer of its own, its gradient is there afterwards.
        `reader`: the projection of the block before whose outputs' gradient that is, if there is.
        """
        net, c, junction = self.net, self.net.config.hidden_size, self.net.junctions[number]
        x, layer, offset = x[:, :c], _block_before(number), self.net.branches.offset
        weight, rstd = self._norm(junction.before)
        self._accumulate_norm(junction.before, dy, x, rstd, first)  # while x is still there
        d_residual = None if d_residual is None else d_residual[:, :c]
        sums = dy, x, rstd, weight, d_residual, x
        d_branch = None if reader is None else self._d_branch(number)
        if reader is None or not net.branches.is_changed:
            fp8_out = None if reader is None else reader.fp8_gradients(layer, x)
            net.ops.norm_backward(*sums, fp8_out, offset=offset)
        elif d_branch is not None and not self._trains(junction.after):
            branch, fp8_out = self._branch(number), reader.fp8_gradients(layer, d_branch)
            ways = {"branch": branch, "d_branch": d_branch, "offset": offset}
            net.ops.norm_backward(*sums, fp8_out, **ways)  # both norms in one pass
        else:
            net.ops.norm_backward(*sums, offset=offset)
            if d_branch is not None:
                self._branch_backward(number, x, d_branch, slice(None), first, reader)

    def _d_branch(self, number: int) -> Tensor | None:
        """Return where the gradient (N, C) of the branch before a junction belongs.

        None: in the residual, or its chunks of tokens come one by one.
        """
        buffers, layer, c = self.buffers, _block_before(number), self.net.config.hidden_size
        if not self.net.branches.is_changed:
            return None
        if number % 2:
            return buffers.attention_branch[layer][:, :c]
        is_there = not self.net.branches.has_norm and len(buffers.chunks) == 1
        if not (is_there or buffers.feed_branch.is_stored(layer)):
            return None
        return buffers.feed_branch[layer][:, :c]

    def _branch_backward(
        self,
        number: int,
        d_total: Tensor,
        d_branch: Tensor,
        tokens: slice,
        first: bool,
        reader: Projection,
    ) -> None:
        """Changes `d_branch` in place: the output of the branch before becomes its gradient."""
        net, junction, branch = self.net, self.net.junctions[number], self._branch(number, tokens)
        assert branch is not None
        self._accumulate_norm(junction.after, d_total, d_branch, branch.rstd, first, branch.factor)
        fp8_out = reader.fp8_gradients(_block_before(number), d_branch)
        net.ops.norm_backward(
            d_total, d_total, None, None, None, None, fp8_out,
            branch=branch, d_branch=d_branch, offset=net.branches.offset,
        )  # fmt: skip

    def _trains(self, norm: int | None) -> bool:
        return norm is not None and self.net.norms.gradient(norm) is not None

    def _accumulate_norm(
        self,
        norm: int | None,
        dy: Tensor,
        x: Tensor,
        rstd: Tensor | None,
        first: bool,
        factor: float = 1.0,
    ) -> None:
        """Add the gradient of the norm's weight to its slot, if it trains; `x` is its input."""
        target = None if norm is None else self.net.norms.gradient(norm)  # (C,)
        if target is not None:
            gradient = self.net.ops.norm_weight_gradient(dy, x, rstd)
            accumulate(target, gradient if factor == 1 else gradient * factor, first=first)

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
        self._norm_backward(buffers.hidden, number, mid_residual, d_residual, first, net.output)

    def _d_feed(self, layer: int, chunk: slice, gate_up: Tensor, begins: bool) -> Tensor:
        """Return the gradient of down's outputs (tokens of `chunk`, C + R)."""
        net, buffers, c = self.net, self.buffers, self.net.config.hidden_size
        # By now the gradient of the block's output.
        d_residual = buffers.residuals[layer + 1][chunk]
        if not net.branches.is_changed:
            return d_residual
        d_feed = buffers.feed_branch.chunk(layer, chunk)
        number = 2 * layer + 2
        if self._d_branch(number) is None:
            if net.branches.has_norm:  # whose backward reads what down has written
                net.down.forward(layer, self._activate(layer, chunk, gate_up), d_feed[:, :c])
            self._branch_backward(number, d_residual[:, :c], d_feed[:, :c], chunk, begins, net.down)
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
            self._norm_backward(buffers.hidden, 2 * layer, x, d_residual, first, reader)

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


def _block_before(number: int) -> int:
    """Return the block whose half is before a junction."""
    return (number - 1) // 2
