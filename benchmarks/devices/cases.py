"""What `gpu_many.py` measures: a case is a shape, a way to train it, and a number of devices.

A case's name is SHAPE:VARIANT:PARALLEL:DEVICES, such as "8B-4x2048:ours_fp8:ddp:2". Batches grow
with the devices (weak scaling): the shape's sequences are those of each device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from one_gpu.cases import CASES as ONE_DEVICE
from one_gpu.cases import Shape

from lora.config import BaseWeights

SHAPES: dict[str, Shape] = {
    "135M-4x512": replace(ONE_DEVICE["135M-4x512"], warm_up_steps=8, timed_steps=30),
    "1B-4x2048": replace(ONE_DEVICE["1B-4x2048"], warm_up_steps=3, timed_steps=12),
    "8B-4x2048": replace(ONE_DEVICE["8B-4x2048"], warm_up_steps=3, timed_steps=8),
    "8B-1x4096": replace(ONE_DEVICE["8B-1x4096"], warm_up_steps=3, timed_steps=8),
    "70B-1x2048": replace(ONE_DEVICE["70B-1x2048"], warm_up_steps=2, timed_steps=4),
    "70B-1x4096": replace(ONE_DEVICE["70B-1x4096"], warm_up_steps=2, timed_steps=4),
}
SMOKE = Shape(64, 2, 4, 2, 96, 256, 2, 32, False, 1, 3)
"""In place of every shape where only the code is to be run, on a CPU."""
NEMO_70B_TOKENS_PER_S = 1092
"""Of each of eight H100: NeMo AutoModel's published LoRA of a 70B model, bf16, TP2 × FSDP4, 4,096
tokens (docs.nvidia.com/nemo/automodel, Performance Summary, seen on 2026-11-27)."""
TARGETS = {"135M-4x512": {2: 1.8, 4: 3.4}, "1B-4x2048": {2: 1.95, 4: 3.85}}
TARGETS["8B-4x2048"] = TARGETS["1B-4x2048"]
"""Tokens per second over those of one device, by shape and devices."""
SWEEP = "135M-sweep"
SWEEP_TARGETS = {2: 1.8}


@dataclass(frozen=True)
class Case:
    """One row of the results."""

    shape: str
    variant: str
    parallel: str
    """none, ddp or fsdp, as `lora finetune --parallel` calls them."""
    devices: int
    expected_s: int
    """With its processes' start. A case that would end after the budget is not begun."""
    limit_s: int
    """After which it counts as hung."""
    blocks: int | None = None
    """In place of the shape's own number: the time of a block in seconds, not minutes."""

    @property
    def name(self) -> str:
        """What `--only` matches."""
        return f"{self.shape}:{self.variant}:{self.parallel}:{self.devices}"

    @property
    def baseline(self) -> str:
        """The name of the same on one device."""
        return f"{self.shape}:{self.variant}:none:1"

    @property
    def is_full(self) -> bool:
        """Whether all weights train, ours or a peer's."""
        return "full" in self.variant.split("_")

    @property
    def is_packed(self) -> bool:
        """Whether sequences hold several documents."""
        return self.variant.endswith("packed")

    @property
    def base(self) -> BaseWeights:
        """How the frozen linears are stored."""
        return BaseWeights("fp8" if self.variant == "ours_fp8" else "auto")

    def sizes(self, *, smoke: bool = False) -> Shape:
        """Return the sizes of the model and of a step on each device."""
        shape = SMOKE if smoke else SHAPES[self.shape]
        return shape if self.blocks is None or smoke else replace(shape, layers=self.blocks)

    @property
    def target(self) -> float | None:
        """The wanted ratio to one device, if the variant is ours."""
        if self.shape == SWEEP:
            return SWEEP_TARGETS.get(self.devices)
        of_shape = TARGETS.get(self.shape, {}) if self.variant.startswith("ours") else {}
        return of_shape.get(self.devices) if self.parallel == "ddp" else None


def _case(name: str, expected_s: int) -> Case:
    shape, variant, parallel, devices = name.split(":")
    return Case(shape, variant, parallel, int(devices), expected_s, 2 * expected_s + 30)


SECONDS = {"probe": 15, "135M": 7, "1B": 9, "8B": 17, "70B": 35, SWEEP: 30}
"""What a case takes, its processes' start included, by the model; measured on H100s and H200s."""


def _cases(*names: str) -> list[Case]:
    found = []
    for name in names:
        shape = name.partition(":")[0]
        expected_s = SECONDS.get(shape) or SECONDS[shape.partition("-")[0]]
        found.append(_case(name, expected_s))
    return found


def cases_for(devices: int) -> list[Case]:
    """Return the cases for a machine with so many devices, those worth most first.

    Neighbours run at the same time where their devices suffice, so those on one device are
    together.
    """
    n = devices
    return _cases(
        f"probe:probe:ddp:{n}",
        "8B-4x2048:ours:none:1",
        "8B-4x2048:ours_fp8:none:1",
        "1B-4x2048:ours:none:1",
        "135M-4x512:ours:none:1",
        f"8B-4x2048:ours:ddp:{n}",
        f"8B-4x2048:ours_fp8:ddp:{n}",
        f"1B-4x2048:ours:ddp:{n}",
        f"135M-4x512:ours:ddp:{n}",
        f"70B-1x4096:ours_fp8:fsdp:{n}",
        f"70B-1x4096:ours:fsdp:{n}",
        f"70B-1x4096:peft_liger_recompute:fsdp:{n}",
        f"70B-1x2048:ours_fp8:fsdp:{n}",
        f"70B-1x2048:ours:fsdp:{n}",
        f"70B-1x2048:peft_liger_recompute:fsdp:{n}",
        f"8B-4x2048:ours_full:fsdp:{n}",
        f"8B-4x2048:transformers_full_recompute:fsdp:{n}",
        f"8B-4x2048:peft_liger:fsdp:{n}",
        f"{SWEEP}:ours:none:1",
        f"{SWEEP}:ours:ddp:{n}",
        "1B-4x2048:peft_liger:none:1",
        "1B-4x2048:ours_fp8:none:1",
        "135M-4x512:ours_fp8:none:1",
        f"1B-4x2048:peft_liger:ddp:{n}",
        f"1B-4x2048:ours_fp8:ddp:{n}",
        f"135M-4x512:ours_fp8:ddp:{n}",
        f"8B-4x2048:ours:fsdp:{n}",
        f"8B-4x2048:ours_fp8:fsdp:{n}",
        f"8B-4x2048:transformers_full:fsdp:{n}",
    )
