"""The junctions of one pass: what halves of blocks add to the residual, the norms, their gradients.

Both norms of a junction and the sum between them are one pass over memory, forward and backward.
"""

from __future__ import annotations

from torch import Tensor

from lora.fast.llama.buffers import Buffers
from lora.fast.llama.network import FastNetwork
from lora.fast.weights.flat import accumulate
from lora.fast.weights.projections import Projection
from lora.kernels.step.norm import Branch


class JunctionPass:
    """Residuals and branches within `buffers`; where norms are: `lora.fast.llama.junctions`."""

    def __init__(self, net: FastNetwork, buffers: Buffers) -> None:
        self.net, self.buffers = net, buffers

    def forward(
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

    def attention_out(self, layer: int) -> Tensor:
        """Return where o_proj writes (N, C)."""
        net, buffers = self.net, self.buffers
        if not net.branches.is_changed:
            return buffers.hidden
        return buffers.attention_branch[layer][:, : net.config.hidden_size]

    def feed_out(self, layer: int) -> Tensor:
        """Return where down writes in the forward pass (N, C)."""
        net, buffers = self.net, self.buffers
        if not (net.branches.is_changed and buffers.feed_branch.is_stored(layer)):
            return buffers.hidden
        return buffers.feed_branch[layer][:, : net.config.hidden_size]

    def backward(
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
        d_branch = None if reader is None else self.d_branch(number)
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
                self.branch_backward(number, x, d_branch, slice(None), first, reader)

    def d_branch(self, number: int) -> Tensor | None:
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

    def branch_backward(
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


def _block_before(number: int) -> int:
    """Return the block whose half is before a junction."""
    return (number - 1) // 2
