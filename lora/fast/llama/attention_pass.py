"""The attention of one pass over all blocks: rotary embedding, attention, and their gradients.

Packed sequences of moderate length go through our own kernels, which keep their state in the
buffers. All others go through torch's kernels, whose state is an autograd graph for each block.
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
from lora.kernels.step.attention import Heads, find_begins, find_ends


class AttentionPass:
    """Attention within queries, keys and values in `buffers`, forward and backward."""

    def __init__(self, net: FastNetwork, inputs: Inputs, buffers: Buffers, *, packed: bool) -> None:
        self.net, self.inputs, self.buffers, self.packed = net, inputs, buffers, packed
        self.tables = net.rope_tables(inputs.position_ids)
        self.uses_own_kernels = packed and net.uses_own_attention(buffers.tokens)
        self._graphs: dict[int, AttentionGraph] = {}
        if self.uses_own_kernels:
            self.begins = find_begins(inputs.position_ids)
            self.ends = find_ends(self.begins)

    def forward(self, layer: int, *, recomputes: bool) -> None:
        """Changes the block's queries, keys and output in place: rotated, and attended.

        `recomputes`: in the backward pass, where the output may be stored already.
        """
        net, buffers, sizes = self.net, self.buffers, self.net.config
        qkv, own = self._qkv(layer), sizes.layers[layer]
        if own.rope is not None:
            n_heads = sizes.num_attention_heads + sizes.num_key_value_heads
            net.ops.rotate_heads(qkv, *self.tables[own.rope], n_heads)
        if recomputes and buffers.attention_out.is_stored(layer):
            # The graph, or our backward kernel, reads queries, keys and values from the buffer,
            # where they are now again.
            return
        window = self._window(layer)
        out = buffers.attention_out[layer][:, : net.output.inputs]  # (N, H·D)
        if self.uses_own_kernels:
            lse = buffers.lse[layer]
            net.ops.attend(qkv, self.begins, self._sizes(), own.scale, window or 0, out, lse)
            return
        shape = AttentionShape(buffers.batch_size, buffers.tokens, own.scale, window)
        q, k, v = self._split(layer)
        # Of blocks that share scratch only one graph is alive: free the former one's tensors first.
        self._graphs.pop(self._graph_key(layer), None)
        if not self.packed:
            graph = attend_unpacked(q, k, v, shape, out)
        else:
            kernel = attend_packed if q.is_cuda else attend_packed_plain
            graph = kernel(q, k, v, self.inputs.bounds, shape, out)
        self._graphs[self._graph_key(layer)] = graph

    def backward(self, layer: int) -> None:
        """Changes queries, keys and values in place: to their gradients, before the rotation."""
        net, buffers, own = self.net, self.buffers, self.net.config.layers[layer]
        qkv, d_out = self._qkv(layer), buffers.d_attention_out  # (N, W), (N, H·D)
        tables = None if own.rope is None else self.tables[own.rope]
        if self.uses_own_kernels:
            out = buffers.attention_out[layer][:, : net.output.inputs]
            net.ops.attend_backward(
                qkv, self.begins, self.ends, self._sizes(), own.scale, self._window(layer) or 0,
                out, buffers.lse[layer], d_out, buffers.dkv_partial, tables,
            )  # fmt: skip
            return
        heads = d_out.unflatten(1, (-1, net.config.head_dim))  # (N, H, D)
        # Popped, so that the graph's tensors are free before the next block allocates its own.
        gradients = self._graphs.pop(self._graph_key(layer)).backward(heads)
        net.ops.gather_gradients(*gradients, *(tables or (None, None)), qkv)

    def _qkv(self, layer: int) -> Tensor:
        return self.buffers.qkv[layer][:, : self.net.qkv.outputs]  # (N, W)

    def _split(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return views of queries, keys and values, (N, heads, D) each."""
        n_heads, n_kv_heads, width = self._sizes()
        heads = self._qkv(layer).unflatten(1, (-1, width))  # (N, heads of all three, D)
        q, k, v = heads.split((n_heads, n_kv_heads, n_kv_heads), 1)
        return q, k, v

    def _sizes(self) -> Heads:
        sizes = self.net.config
        return sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim

    def _window(self, layer: int) -> int | None:
        window = self.net.config.layers[layer].window_tokens
        # A window that covers the sequence hides nothing.
        return None if window is not None and window >= self.buffers.tokens else window

    def _graph_key(self, layer: int) -> int:
        """Return a key that all blocks share whose output is in the same scratch tensor."""
        return layer if self.buffers.attention_out.is_stored(layer) else -1
