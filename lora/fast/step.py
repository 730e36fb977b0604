"""The hand-written training step of one model: LoRA or all weights, alone or in several processes.

Several processes sum their gradients between the backward pass and the update, and decide in the
first step together whether there is memory for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora.data.sequences.batches import Batch
from lora.decoder.decoder import Decoder
from lora.decoder.quantised.base import base_kind
from lora.distributed.world import ALONE, World
from lora.fast.hand_written import MERGE_BELOW_WIDTH, HandWrittenStep
from lora.fast.llama.checkpointing import ActivationCheckpointing
from lora.fast.llama.network import FastNetwork
from lora.fast.sharded.base import ShardedBase, load_small
from lora.fast.sharded.hooks import gather_in_forward
from lora.fast.sharded.ring import ShardRing
from lora.fast.weights.adapted import DropoutMasks
from lora.fast.weights.flat import FlatParameters
from lora.fast.weights.update import N_TOTALS, FlatUpdate
from lora.kernels.step.ops import Ops
from lora.layers.wide import keep_outputs_narrow
from lora.lora_module import LoRALayer
from lora.training.out_of_memory import is_out_of_memory


class FastStep(HandWrittenStep):
    """Trains `model` on batches of one shape.

    Args:
        model: a decoder of which LoRA trains, maybe with embedding rows, token tables and norms, or
            all of which trains. What trains becomes views of one flat buffer, and frozen weights
            take `dtype`.
        ops: operations between the matmuls.
        dtype: compute dtype, and that of the activations.
        weight_decay: of matrices.
        max_grad_norm: for gradient clipping; 0: no clipping.
        seed: of dropout's masks, with the step's number.
        merges: merge s·B·A into the weights once a step; None decides by the model's width.
        own_attention: our own kernels for packed sequences; None decides by their length.
        checkpointing: which activations are stored; None: nearly all.
        base: where frozen weights come from that are sharded, and on the meta device in `model`.
        world: processes that have parts of each micro-batch.
        first_sequence: of this process's part in the micro-batch, for dropout's masks.
        whole_rate_fraction: of the learning rate, for what trains beside LoRA.
    """

    def __init__(
        self,
        model: Decoder,
        ops: Ops,
        dtype: torch.dtype,
        *,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        seed: int = 0,
        merges: bool | None = None,
        own_attention: bool | None = None,
        checkpointing: ActivationCheckpointing | None = None,
        base: ShardedBase | None = None,
        world: World = ALONE,
        first_sequence: int = 0,
        whole_rate_fraction: float = 1.0,
    ) -> None:
        self.seed, self.world, self._first_sequence = seed, world, first_sequence
        self.has_agreed = False
        """Whether all processes have had the memory for the passes of a step."""
        device = next(model.parameters()).device if base is None else base.device
        # Values, gradients and moments in fp32: steps of the learning rate's size vanish in bf16.
        wide = torch.promote_types(dtype, torch.float32)
        self.flat = FlatParameters(device, wide, 0 if world.is_alone else N_TOTALS)
        self.masks = _find_masks(model, device)
        # Quantised weights stay so: merging would need a base in the compute dtype beside them.
        self.base_kind = base_kind(model)
        narrow = model.config.hidden_size < MERGE_BELOW_WIDTH and self.base_kind is None
        self.merges = narrow if merges is None else merges
        model.cache_dtype = keep_outputs_narrow(model) or model.cache_dtype
        ring = None
        if base is not None:
            self.merges = False  # the sum would have to be gathered in every step
            load_small(model, base, dtype)
            ring = ShardRing(base, model)
        with torch.no_grad():
            network = FastNetwork(
                model,
                self.flat,
                ops,
                dtype,
                trains_all=trains_all_weights(model),
                merges=self.merges,
                masks=self.masks,
                own_attention=own_attention,
                ring=ring,
                whole_rate_fraction=whole_rate_fraction,
            )
            self.flat.allocate()
            network.fill()
        if ring is not None:
            gather_in_forward(model, ring)
        self.update = FlatUpdate(
            self.flat,
            ops.adamw,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            world=world,
        )
        self.taken_steps = self.update.taken_steps
        super().__init__(model, ops, network, self.update, checkpointing)
        self._is_shared = not world.is_alone

    def describe(self) -> str:
        """Return in words how it is launched, its kernels and dtype, and how LoRA is computed."""
        ring = self.network.ring
        graph = "one CUDA graph" if self.device.type == "cuda" and ring is None else "no graph"
        kind = str(self.network.dtype).removeprefix("torch.")
        about = (
            f"fast step: {graph}, {self.ops.name} kernels, {kind} matmuls; {self._describe_lora()}"
        )
        if self.network.scratch is not None:
            about += f"; {self.base_kind} weights unpacked for each of them"
        if ring is not None:
            about += f"; {ring.describe()}"
            if ring.base.world.size < self.world.size:
                about += ", on each machine"
        return about

    def _describe_lora(self) -> str:
        # The kinds of projection that `FastNetwork` chooses between, most special first.
        if trains_all_weights(self.model):
            return "all weights train"
        if self.network.fp8_buffers is not None:
            return "frozen matmuls in fp8, LoRA beside them"
        if self.masks is not None:
            return "LoRA beside the weights, with dropout"
        if self.merges:
            width = self.model.config.hidden_size
            return f"LoRA merged once a step (width {width} < {MERGE_BELOW_WIDTH})"
        return "LoRA inside the weights' matmuls"

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """Return AdamW's state by parameter name, views of the step's tensors."""
        return self.update.optimizer_state(self.model)

    @torch.no_grad()
    def load_optimizer_state(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Changes AdamW's state in place, after the model's parameters were restored."""
        self.update.load_optimizer_state(self.model, saved)
        self.network.refresh()  # merged weights are of the parameters before

    def _run_passes(self, batches: Sequence[Batch], lr: Any, number: int) -> None:
        """Run forward and backward; in the first step all processes have memory for it, or none.

        Raises what ran out of memory, here or in another process: nothing was trained then.
        """
        if self.world.is_alone or self.has_agreed:
            super()._run_passes(batches, lr, number)
            return
        failure: Exception | None = None
        try:
            super()._run_passes(batches, lr, number)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = error
            self.network.catch_up()  # the others are waiting, or will be
        if self.world.any(failure is not None, "the memory of the first step"):
            raise failure or torch.OutOfMemoryError("out of memory in another process")
        self.has_agreed = True

    def _sum_over_processes(self, number: int) -> None:
        self.update.sum_over_processes(f"the gradients of step {number}")

    def _allocate(self, batch: Batch) -> None:
        super()._allocate(batch)
        if self.masks is not None:
            self.masks.first_row = self._first_sequence * batch.input_ids.shape[1]

    def _seed_dropout(self, number: int, index: int) -> None:
        if self.masks is not None:
            # A value on the device, not an argument: the graph is the same in every step.
            self.masks.seed.fill_(_mask_seed(self.seed, number, index))


def _find_masks(model: Decoder, device: torch.device) -> DropoutMasks | None:
    layers = [m for m in model.modules() if isinstance(m, LoRALayer)]
    probabilities = {m.dropout.p for m in layers if isinstance(m.dropout, nn.Dropout)}
    return DropoutMasks(probabilities.pop(), device) if probabilities else None


def _mask_seed(seed: int, step: int, index: int) -> int:
    """Return a seed that no other micro-batch of a run has, the same after a resume."""
    return ((seed * 1_000_003 + step) * 1_009 + index) % 2**31


def trains_all_weights(model: nn.Module) -> bool:
    """Whether every parameter of `model` trains."""
    return all(p.requires_grad for p in model.parameters())
