"""The models, sizes and variants of our own that `gpu_step.py` measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora.config import BaseWeights

RANK = 16


@dataclass(frozen=True)
class Shape:
    """The sizes of a model and of a training step."""

    hidden: int
    layers: int
    heads: int
    shared: int
    feed_forward: int
    vocabulary: int
    rows: int
    tokens: int
    tied: bool = True
    warm_up_steps: int = 5
    timed_steps: int = 30
    config: dict[str, Any] | None = None
    """config.json of a model that is no Llama of these sizes."""
    device: str = "cuda"

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def parameters(self) -> int:
        """Number of parameters in matmuls, the head included once."""
        kv = self.shared * self.head_dim
        block = self.hidden * (2 * self.hidden + 2 * kv + 3 * self.feed_forward)
        return self.layers * block + self.vocabulary * self.hidden


CASES = {
    "135M-4x512": Shape(576, 30, 9, 3, 1536, 49152, 4, 512),
    "1B-1x512": Shape(2048, 16, 32, 8, 8192, 128256, 1, 512),
    "1B-4x2048": Shape(2048, 16, 32, 8, 8192, 128256, 4, 2048),
    "8B-1x2048": Shape(4096, 32, 32, 8, 14336, 128256, 1, 2048, False, 3, 12),
    "8B-4x2048": Shape(4096, 32, 32, 8, 14336, 128256, 4, 2048, False, 3, 8),
    "8B-1x4096": Shape(4096, 32, 32, 8, 14336, 128256, 1, 4096, False, 3, 10),
    "8B-2x4096": Shape(4096, 32, 32, 8, 14336, 128256, 2, 4096, False, 3, 8),
    "70B-1x2048": Shape(8192, 80, 64, 8, 28672, 128256, 1, 2048, False, 2, 4),
    "70B-1x4096": Shape(8192, 80, 64, 8, 28672, 128256, 1, 4096, False, 2, 4),
    "8B-1x32768": Shape(4096, 32, 32, 8, 14336, 128256, 1, 32768, False, 2, 4),
    "8B-1x131072": Shape(4096, 32, 32, 8, 14336, 128256, 1, 131072, False, 1, 2),
}
TINY = {"hidden": 128, "layers": 2, "heads": 4, "shared": 2, "feed_forward": 256,
        "vocabulary": 512, "tokens": 512, "warm_up_steps": 2, "timed_steps": 6}  # fmt: skip
"""Sizes of a dry run."""
MEMORY_GB = {"ours_lora_cheap": 32.0}
"""The memory budget of a mode; the default is the free memory."""
BASES = {
    "fp8": BaseWeights("fp8"),
    "int8": BaseWeights("int8"),
    "nf4": BaseWeights("nf4"),
    "nf4_embeddings": BaseWeights("nf4", nf4_embeddings=True),
}
MODES = ("", "_auto", "_cheap", "_full", "_offload", "_packed")
OURS = (
    *(f"ours_lora{mode}" for mode in MODES),
    *(f"ours_lora_{base}{mode}" for base in BASES for mode in MODES),
    "ours_lora_captured",
    "ours_lora_plain",
    "ours_lora_nf4_plain",
    "ours_full",
    "theirs_lora_plain",
    "theirs_lora_captured",
    "theirs_lora_compiled",
    "theirs_lora_captured_packed",
    "theirs_lora_compiled_packed",
)
"""`theirs` is transformers' model with `apply_lora` and our trainer. auto, cheap, full and offload
are modes of `lora finetune --memory`; without one it is none. fp8, int8 and nf4 are `--base-dtype`,
nf4_embeddings is nf4 with `--nf4-embeddings`."""


def base_and_mode(variant: str) -> tuple[BaseWeights, str]:
    """Return what stores the base of one of our variants, and its mode or other suffix."""
    kind = variant.removeprefix("ours_lora")
    for name in sorted(BASES, key=len, reverse=True):
        if kind.startswith(f"_{name}"):
            return BASES[name], kind.removeprefix(f"_{name}")
    return BaseWeights(), kind
