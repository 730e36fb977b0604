"""What the hand-written steps share: forward, backward and update over fixed buffers, as graphs.

What differs from the textbook: the host only copies a batch in and launches. Whether the loss is
finite is decided on the device, where a step that is not becomes a step not taken, and the host
reads it one step late.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from lora.data.sequences.batches import IGNORE, Batch, find_bounds
from lora.decoder.decoder import Decoder
from lora.fast.bounds import DocumentBounds, pinned
from lora.fast.graphs import Graphs
from lora.fast.llama.buffers import Buffers, Inputs
from lora.fast.llama.checkpointing import ActivationCheckpointing
from lora.fast.llama.network import FastNetwork
from lora.fast.llama.passes import FastPass
from lora.kernels.step.ops import Ops

MERGE_BELOW_WIDTH = 1024
"""Models narrower than this merge W + s·B·A once a step, wider ones keep LoRA in the matmul of W.
On an H200 a step takes 6.7 ms merged and 7.6 not at width 576, but 9 and 7 at width 2048."""

CAPTURE_BELOW_TOKENS = 2**15
"""Larger micro-batches take seconds where models are large: rehearsing them for a capture costs
more than the launch gaps that a graph saves."""


class OptimizerUpdate(Protocol):
    """The end of a step: counts loss and tokens, then updates what trains."""

    report: Tensor
    """Loss, tokens, gradient norm, whether the step was taken."""
    is_live: Tensor
    """(), bool: false while a step is rehearsed for a capture, which changes nothing."""

    def set_learning_rate(self, lr: Any) -> None:
        """Take the next step at this learning rate, or at one for each adapter."""

    def count_tokens(self, losses: Tensor, is_learned: Tensor, *, first: bool) -> None:
        """Add a micro-batch's losses (N,), and which of its tokens have a target (N,)."""

    def run(self) -> None:
        """Update what trains from its gradients."""


class HandWrittenStep:
    """What the hand-written steps share: copy a batch in, forward, backward, optimizer update.

    Args:
        model: what trains.
        ops: operations between the matmuls.
        network: the tensors that the model's parameters have become views of.
        update: the optimizer update.
        checkpointing: which activations are stored; None: nearly all.
    """

    def __init__(
        self,
        model: Decoder,
        ops: Ops,
        network: FastNetwork,
        update: OptimizerUpdate,
        checkpointing: ActivationCheckpointing | None = None,
    ) -> None:
        self.model, self.ops, self.network = model, ops, network
        self.checkpointing = checkpointing or ActivationCheckpointing()
        self.device = update.is_live.device
        self.optimizer_update = update
        self.report = update.report
        sizes = model.config
        self._logits = {"scale": sizes.logit_scale, "softcap": sizes.logit_softcap}
        self.graphs = Graphs(self.device, update.is_live)
        self._is_shared = False
        """Whether other processes have parts of each batch: the update waits for all of them."""
        self.buffers: Buffers | None = None
        self.inputs: Inputs | None = None

    @torch.no_grad()
    def launch(self, batches: Sequence[Batch], lr: Any, number: int = 1) -> None:
        """Train step `number` on the micro-batches; `report` holds its outcome afterwards.

        All batches of a run have one shape (B, T). On a GPU this returns before the step is done.
        """
        self._run_passes(batches, lr, number)
        if len(batches) > 1 or self._is_shared:
            self._sum_over_processes(number)
            self.graphs.run(("update",), self._update)

    def _run_passes(self, batches: Sequence[Batch], lr: Any, number: int) -> None:
        """Run forward and backward of all micro-batches, and the update of one that is alone."""
        self.network.expect(len(batches))
        self._allocate(batches[0])
        self.optimizer_update.set_learning_rate(lr)
        self.graphs.accumulate(len(batches), lambda index: self._run_pass(batches, index, number))

    def _run_pass(self, batches: Sequence[Batch], index: int, number: int) -> bool:
        """Run one micro-batch of step `number`; return whether it was rehearsed."""
        key = self._copy_in(batches[index])
        self._seed_dropout(number, index)
        if len(batches) == 1 and not self._is_shared:
            # Without gradient accumulation the update is in the same graph: one launch a step.
            return self.graphs.run(("step", *key), partial(self._whole, key))
        first = index == 0
        return self.graphs.run(("micro", first, *key), partial(self._micro, key, first=first))

    def _sum_over_processes(self, number: int) -> None:
        """Changes gradients in place, between backward and update; alone there is nothing to do."""

    def restart(self, checkpointing: ActivationCheckpointing) -> None:
        """Free what a step holds beside weights and optimizer; the next one stores this."""
        self.checkpointing = checkpointing
        self.graphs.clear()  # they hold memory of their own
        self.buffers = self.inputs = None
        self.network.release()

    def _seed_dropout(self, number: int, index: int) -> None:
        """Seed what is random in micro-batch `index` of step `number`."""

    def _allocate(self, batch: Batch) -> None:
        shape = batch_size, tokens = batch.input_ids.shape
        if self.buffers is not None and (self.buffers.batch_size, self.buffers.tokens) == shape:
            return
        self.graphs.clear()  # they read and write the addresses of the old buffers
        # Gathers are collectives: a rehearsal on one process alone would wait for the others.
        is_sharded = self.network.ring is not None
        self.graphs.captures = not is_sharded and batch_size * tokens < CAPTURE_BELOW_TOKENS
        self.buffers = None  # released before the new ones are allocated
        if self.device.type == "cuda":
            # Cached blocks of other sizes serve neither the buffers nor a graph's private pool.
            torch.cuda.empty_cache()
        self.buffers = self.network.buffers(batch_size, tokens, self.checkpointing)
        n = batch_size * tokens
        ids, labels, positions = torch.zeros(
            3, n, dtype=torch.int64, device=self.device
        ).unbind()  # (N,) each
        self.bounds = DocumentBounds(self.device, n)
        self.inputs = Inputs(ids, labels, positions, self.bounds.tensor)

    def _copy_in(self, batch: Batch) -> tuple[bool, int]:
        """Copy `batch` to the addresses that the step reads.

        Returns what decides which graph runs: whether it needs more than torch's causal attention,
        as packed sequences and windows do, and the length of `bounds`.
        """
        inputs = cast(Inputs, self.inputs)
        for target, source in (
            (inputs.input_ids, batch.input_ids),
            (inputs.labels, batch.labels),
            (inputs.position_ids, batch.position_ids),
        ):
            target.copy_(pinned(source.reshape(-1), target.device), non_blocking=True)
        tokens = batch.input_ids.shape[1]
        # Asked of the batch on the CPU: asking the device would make the host wait for it.
        is_plain = not (self._has_windows(tokens) or self.network.needs_own_attention)
        if is_plain and bool((batch.document_ids == 0).all()):
            return False, 0
        if self.network.uses_own_attention(tokens):
            return True, 0  # our kernels find the documents from the position ids
        return True, self._copy_bounds(batch.document_ids, inputs)

    def _copy_bounds(self, documents: Tensor, inputs: Inputs) -> int:
        """Copy where documents begin, for torch's attention; return the length of `bounds`."""
        if self.bounds.copy_in(find_bounds(documents)):
            self.graphs.clear()
            inputs.bounds = self.bounds.tensor
        return len(inputs.bounds)

    def _has_windows(self, tokens: int) -> bool:
        windows = (layer.window_tokens for layer in self.model.config.layers)
        return any(window is not None and window < tokens for window in windows)

    def _whole(self, key: tuple[bool, int]) -> None:
        self._micro(key, first=True)
        self._update()

    def _micro(self, key: tuple[bool, int], *, first: bool) -> None:
        inputs, buffers = cast(Inputs, self.inputs), cast(Buffers, self.buffers)
        self.network.begin_pass()
        step = FastPass(self.network, inputs, buffers, packed=key[0])
        step.run()
        self._head_and_loss(inputs.labels, buffers, first)
        step.backward(buffers.hidden, first=first)

    def _head_and_loss(self, labels: Tensor, buffers: Buffers, first: bool) -> None:
        """Changes `buffers.hidden` in place: the gradient of `buffers.final`; sums the loss."""
        head = self.network.head
        self.network.use_head()
        n_chunk = len(buffers.logits)
        # By chunks of tokens: forward and backward of one before the logits of the next.
        for start in range(0, buffers.n_tokens, n_chunk):
            chunk = slice(start, min(start + n_chunk, buffers.n_tokens))
            hidden, logits = buffers.final[chunk], buffers.logits[: chunk.stop - chunk.start]
            head.project(hidden, logits)  # (tokens, V)
            self.ops.token_loss(logits, labels[chunk], buffers.losses[chunk], **self._logits)
            # The logits are their gradient now.
            begins = first and start == 0
            head.project_backward(logits, hidden, buffers.hidden[chunk], first=begins)
        self.optimizer_update.count_tokens(buffers.losses, labels != IGNORE, first=first)

    def _update(self) -> None:
        self.optimizer_update.run()
        self.network.refresh()
