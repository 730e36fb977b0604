"""The attention of one pass over all blocks: rotary embedding, attention, and their gradients.

Packed sequences of moderate length go through our own kernels, which keep their state in the
buffers; so do all sequences of a model whose attention torch's kernels cannot do. All others go
through torch's kernels, whose state is an autograd graph for each block.

Where queries and keys have norms, the buffers keep them raw, and attention reads the normed ones in
scratch that all blocks share: they are computed again before a block's backward pass.
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
from lora.fast.weights.flat import accumulate
from lora.kernels.step.attention import AttentionSettings, find_begins, find_ends
from lora.kernels.step.head_norm import HeadNorms
from lora.kernels.step.rotary import RotaryTables


class AttentionPass:
    """Attention within queries, keys and values in `buffers`, forward and backward."""

    def __init__(self, net: FastNetwork, inputs: Inputs, buffers: Buffers, *, packed: bool) -> None:
        self.net, self.inputs, self.buffers, self.packed = net, inputs, buffers, packed
        self.tables = net.rope_tables.look_up(inputs.position_ids)
        self.uses_own_kernels = net.uses_own_attention(buffers.tokens, packed=packed)
        self._graphs: dict[int, AttentionGraph] = {}
        self._in_scratch = -1
        """The block whose normed queries and keys are in scratch."""
        if self.uses_own_kernels:
            self.begins = find_begins(inputs.position_ids)
            self.ends = find_ends(self.begins)

    def forward(self, layer: int, *, recomputes: bool) -> None:
        """Changes the block's output in place, and queries and keys: rotated, if they have no norm.

        `recomputes`: in the backward pass, where the output may be stored already.
        """
        net, buffers, sizes = self.net, self.buffers, self.net.config
        tables, has_norms = self._tables(layer), net.head_norms is not None
        if tables is not None and not has_norms:
            n_heads = sizes.num_attention_heads + sizes.num_key_value_heads
            net.ops.rotate_heads(self._qkv(layer), *tables, n_heads, sizes.head_dim)
        if recomputes and buffers.attention_out.is_stored(layer):
            # The graph, or our backward kernel, reads queries, keys and values from the buffer,
            # where they are now again.
            return
        self._norm_heads(layer)
        qk, v = self._split(layer)
        settings = self._settings(layer)
        out = buffers.attention_out[layer][:, : net.output.inputs]  # (N, H·D)
        if self.uses_own_kernels:
            net.ops.attend(qk, v, self.begins, settings, out, buffers.lse[layer])
            return
        shape = AttentionShape(
            buffers.batch_size, buffers.tokens, settings.scale, settings.window_tokens or None
        )
        q, k, v = self._by_head(qk, v)
        # Of blocks that share scratch only one graph is alive: free the former one's tensors first.
        self._graphs.pop(self._graph_key(layer), None)
        if not self.packed:
            graph = attend_unpacked(q, k, v, shape, out)
        else:
            kernel = attend_packed if q.is_cuda else attend_packed_plain
            graph = kernel(q, k, v, self.inputs.bounds, shape, out)
        self._graphs[self._graph_key(layer)] = graph

    def backward(self, layer: int, *, first: bool) -> None:
        """Changes queries, keys and values in place: to their gradients, as the projection made
        them.

        `first`: of the step's micro-batches, so that the norms' gradients are written, not added.
        """
        net, buffers = self.net, self.buffers
        qkv, d_out = self._qkv(layer), buffers.d_attention_out  # (N, W), (N, H·D)
        tables, settings = self._tables(layer), self._settings(layer)
        self._norm_heads(layer)
        qk, v = self._split(layer)
        if self.uses_own_kernels:
            out = buffers.attention_out[layer][:, : net.output.inputs]
            partial = buffers.dkv_partial  # (N, H, 2, D)
            state = self.begins, self.ends, settings, out, buffers.lse[layer], d_out, partial
            if net.head_norms is None:
                net.ops.attend_backward(qkv, *state, tables)
                return
            net.ops.attend_gradients(qk, v, *state)
            dq, _, _ = self._by_head(qk, v)
            # Each key/value head's parts, by the query heads that share it.
            parts = partial.unflatten(1, (net.config.num_key_value_heads, -1))  # (N, heads, …)
            gradients = dq[:, :, None], parts[..., 0, :], parts[..., 1, :]
        else:
            heads = d_out.unflatten(1, (-1, net.config.head_dim))  # (N, H, D)
            # Popped, so that the graph's tensors are free before the next block allocates its own.
            dq, dk, dv = self._graphs.pop(self._graph_key(layer)).backward(heads)
            if net.head_norms is None:
                net.ops.gather_gradients(dq, dk, dv, *(tables or (None, None)), qkv)
                return
            gradients = dq[:, :, None], dk[:, :, None], dv[:, :, None]
        self._norm_backward(layer, gradients, first)

    def _norm_heads(self, layer: int) -> None:
        """Compute the block's normed and rotated queries and keys, unless they are in scratch."""
        norms = self._norms(layer)
        if norms is not None and self._in_scratch != layer:
            self.net.ops.norm_heads(
                self._qkv(layer), norms, self._tables(layer), self.buffers.normed_heads
            )
            self._in_scratch = layer

    def _norm_backward(
        self, layer: int, gradients: tuple[Tensor, Tensor, Tensor], first: bool
    ) -> None:
        """Changes raw queries, keys and values in place: to their gradients."""
        targets = [group.gradient(layer) for group in self.net.head_norms or ()]
        found = self.net.ops.norm_heads_backward(
            *gradients, self._norms(layer), self._tables(layer), self._qkv(layer),
            trains=any(target is not None for target in targets),
        )  # fmt: skip
        self._in_scratch = -1
        for target, gradient in zip(targets, found or (), strict=False):
            if target is not None:
                accumulate(target, gradient, first=first)

    def _norms(self, layer: int) -> HeadNorms | None:
        net = self.net
        if net.head_norms is None:
            return None
        queries, keys = (group.tensors[layer] for group in net.head_norms)
        heads, eps = self._settings(layer).heads, net.config.norm_eps
        return HeadNorms(heads, queries, keys, eps, net.head_norm_offset)

    def _qkv(self, layer: int) -> Tensor:
        return self.buffers.qkv[layer][:, : self.net.qkv.outputs]  # (N, W)

    def _split(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return what attention reads: queries and keys (N, (H + heads) · D), and values."""
        qkv, split = self._qkv(layer), self._settings(layer).split
        qk = qkv[:, :split] if self.net.head_norms is None else self.buffers.normed_heads
        return qk, qkv[:, split:]

    def _by_head(self, qk: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return views of queries, keys and values, (N, heads, D) each."""
        sizes = self.net.config
        n_heads, shared, width = (
            sizes.num_attention_heads,
            sizes.num_key_value_heads,
            sizes.head_dim,
        )
        q, k = qk.unflatten(1, (-1, width)).split((n_heads, shared), 1)
        return q, k, v.unflatten(1, (-1, width))

    def _tables(self, layer: int) -> RotaryTables | None:
        rope = self.net.config.layers[layer].rope
        return None if rope is None else self.tables[rope]

    def _settings(self, layer: int) -> AttentionSettings:
        sizes = self.net.config
        heads = sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim
        own = sizes.layers[layer]
        window = own.window_tokens or 0
        if window >= self.buffers.tokens:  # covers the sequence, so that it hides nothing
            window = 0
        cap = sizes.attention.logit_softcap or 0.0
        return AttentionSettings(heads, own.scale, window, cap)

    def _graph_key(self, layer: int) -> int:
        """Return a key that all blocks share whose output is in the same scratch tensor."""
        return layer if self.buffers.attention_out.is_stored(layer) else -1
