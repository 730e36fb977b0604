"""What a memory plan depends on, and what it says: bytes at the peak of a step, by part."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from lora.config import BaseWeights, LoRAConfig, MemoryConfig
from lora.decoder.language_model import ModelConfig
from lora.fast.llama.checkpointing import ActivationCheckpointing

NOT_RECORDED = (
    *("checkpointing", "leaner_modes", "devices", "parallel", "nf4_saving", "recomputed_blocks"),
)


@dataclass(frozen=True)
class PlanInputs:
    """What a run's memory depends on."""

    config: ModelConfig
    lora: LoRAConfig | None
    """None: all weights train."""
    micro_batch_size: int
    """Sequences of one device, B."""
    tokens: int
    """Of a sequence, T."""
    device_type: str
    """cpu or cuda."""
    compute_dtype: torch.dtype
    micro_batches: int = 1
    packed: bool = True
    learned_fraction: float = 1.0
    """Of the tokens: those with a target in the loss."""
    fast: bool = True
    """Take the fastest step that can train the model; false: the plain one."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """The fast step's mode of activation checkpointing; "auto" without `memory_gb` is "none"."""
    checkpointing: ActivationCheckpointing | None = None
    """The same where it is decided already, as in a resumed run."""
    base: BaseWeights = field(default_factory=BaseWeights)
    """How the frozen linears are stored."""
    quantised_weights: frozenset[str] | None = None
    """Names of those that are stored so, where a folder in 4 bits leaves some plain; None: all."""
    embedding_rows: int = 0
    """Rows of embedding and head that train beside LoRA: the tokens of `special_tokens`."""
    devices: int = 1
    """Processes that train together, each with a device and `micro_batch_size` sequences."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Whether each device has all weights, or they are sharded."""
    machine_devices: int | None = None
    """Of one machine, if the fast step shards the weights over each machine's devices alone; None:
    over all of them."""

    @property
    def shards(self) -> int:
        """Among how many devices the fast step's weights are sharded."""
        return self.machine_devices or self.devices


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes at the peak of a step on one device, by part."""

    step: str
    """Which step was planned: plain, fast or captured."""
    trained_parameters: int
    parameters: int
    weights: int
    gradients: int
    """Those that exist while activations peak, or all where these are more."""
    optimizer: int
    activations: int
    loss: int
    other: int
    """Of the process: Python and its libraries, the allocator's fragments; on a GPU cuBLAS's
    workspace, and a validation pass beside a graph that holds its buffers."""
    checkpointing: ActivationCheckpointing | None = None
    """What the fast step stores of its blocks."""
    reason: str = ""
    """The same in one line, with the reason."""
    leaner_modes: tuple[tuple[str, int], ...] = ()
    """Modes of activation checkpointing that hold less, and the bytes planned for each."""
    devices: int = 1
    """Processes that train together, of which this plans one."""
    parallel: str | None = None
    """How: ddp or fsdp; None for a process alone."""
    nf4_saving: int = 0
    """About how many bytes a base in nf4 would save; 0 where it has one, or nothing is frozen."""
    recomputed_blocks: int | None = None
    """How many blocks FSDP2 recomputes on a GPU; None in other steps, and on a CPU."""

    @property
    def total(self) -> int:
        """All parts together."""
        parts = (self.weights, self.gradients, self.optimizer, self.activations)
        return sum(parts) + self.loss + self.other

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as values that JSON holds, under the names of the first version."""
        record = {**asdict(self), "total": self.total}
        for name in NOT_RECORDED:
            del record[name]
        policy = self.checkpointing
        record["keep"] = None if policy is None else policy.to_record()
        return record
