"""How a base was quantised, as adapters name it in their files.

{"dtype": "nf4", "block": 64, "double_quant": true, "embeddings": false,
 "compute_dtype": "bfloat16", "kept": [], "fingerprint": "…"}
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lora.settings.checks import is_nf4_block

_WEIGHTS: dict[str, Any] = {"compute_dtype": "float32", "fingerprint": ""}
_SCALES: dict[str, Any] = {**_WEIGHTS, "double_quant": None}
"""What does not count where values, or codes alone, are compared."""
COMPUTE_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""By name: what the weights were before they were quantised, and are when they are unpacked."""


@dataclass(frozen=True)
class BaseQuantisation:
    """The settings that give the values of a quantised base, and a hash of its codes."""

    dtype: str
    """fp8, nf4 or int8."""
    block: int | None = None
    """Values of a block of nf4."""
    double_quant: bool | None = None
    """Whether the scales of nf4's blocks are quantised themselves."""
    embeddings: bool = False
    """Whether the embedding and the output head are quantised too."""
    compute_dtype: str = "float32"
    """Dtype of the weights before they were quantised, and after they are unpacked."""
    kept: tuple[str, ...] = ()
    """Linears of the blocks that are not quantised, by full name."""
    fingerprint: str = ""
    """As `base_fingerprint`, of codes in place of values; scales do not count."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """`compute_dtype` as PyTorch's."""
        return COMPUTE_DTYPES[self.compute_dtype]

    def __str__(self) -> str:
        if self.block is None:
            return self.dtype
        scales = "double quantisation" if self.double_quant else "no double quantisation"
        tables = ", embeddings too" if self.embeddings else ""
        kept = f", {len(self.kept)} linears not quantised" if self.kept else ""
        return f"{self.dtype} (blocks of {self.block}, {scales}{tables}{kept})"

    def has_values_of(self, other: BaseQuantisation) -> bool:
        """Whether both give the same values of the same weights, up to the compute dtype."""
        return replace(self, **_WEIGHTS) == replace(other, **_WEIGHTS)

    def has_codes_of(self, other: BaseQuantisation) -> bool:
        """Whether the codes of the same weights, and so the fingerprints, are the same."""
        return replace(self, **_SCALES) == replace(other, **_SCALES)

    def to_json(self) -> str:
        """Return it as the metadata of an adapter's file has it."""
        return json.dumps({k: v for k, v in asdict(self).items() if v is not None})

    @classmethod
    def from_json(cls, text: str) -> BaseQuantisation:
        """Return what `to_json` wrote; unknown keys are of newer versions and are left out.

        Raises ValueError for a text that it did not write.
        """
        try:
            read = json.loads(text)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        if not isinstance(read, dict) or not isinstance(read.get("dtype"), str):
            raise ValueError("it names no dtype")
        known = {name: read[name] for name in cls.__dataclass_fields__ if name in read}
        kept = known.get("kept", ())
        if not isinstance(kept, list | tuple) or not all(isinstance(name, str) for name in kept):
            raise ValueError("kept is no list of names")
        found = cls(**{**known, "kept": tuple(kept)})
        is_nf4 = found.dtype == "nf4"
        allowed = {
            "dtype": found.dtype in ("fp8", "int8", "nf4"),
            "block": is_nf4_block(found.block) if is_nf4 else found.block is None,
            "double_quant": isinstance(found.double_quant, bool) == is_nf4,
            "embeddings": isinstance(found.embeddings, bool),
            "compute_dtype": found.compute_dtype in [*COMPUTE_DTYPES],
            "fingerprint": isinstance(found.fingerprint, str),
        }
        for name, is_allowed in allowed.items():
            if not is_allowed:
                raise ValueError(f"its {name} {vars(found)[name]!r} is not known")
        return found
