"""Low-rank adaptation of one linear layer (arXiv 2106.09685, equation 3).

What differs from the textbook: the LoRA layer owns the linear's `weight` and `bias` under their own
names, so a model's state dict keeps the base's names and gains `lora_A` and `lora_B` beside them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.errors import ConfigError, TargetError

MAX_RANK = 2**16
MAX_ALPHA = 1e9
"""Beyond it, fp32 overflows before long."""


class LoRALayer(nn.Module):
    """Base class of all LoRA layers: the frozen base's parameters, A and B, and the scaling.

    Subclasses: LoRALinear here, layers for other bases in `lora.layers`. `weight` and `bias` are
    the base's own parameters, frozen; `lora_A` is (R, I), `lora_B` is (O, R).
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self,
        base: nn.Module,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        dropout: float,
        *,
        scaling: float | None,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        check_lora_numbers(in_features, out_features, rank, alpha, dropout)
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.alpha = rank, alpha
        self.scaling = alpha / rank if scaling is None else scaling
        # The base's own Parameter objects: nothing is copied, and an optimizer, a tied head or a
        # state dict that refers to them stays right.
        self.weight = base.weight  # type: ignore[assignment]
        self.register_parameter("bias", base.bias)  # type: ignore[arg-type]
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        # At least fp32: an AdamW update is often smaller than half a bf16 rounding of its weight.
        wide = torch.float64 if self.weight.dtype is torch.float64 else torch.float32
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, in_features, dtype=wide))
        self.lora_B = nn.Parameter(self.weight.new_empty(out_features, rank, dtype=wide))
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.train(base.training)
        self.reset_lora(generator)

    @torch.no_grad()
    def reset_lora(self, generator: torch.Generator | None = None) -> None:
        """Draw A Kaiming-uniform (a = √5, as nn.Linear draws) and set B to zero.

        The draw is made on the CPU in fp32, so a seed gives the same A on every device and dtype.
        """
        if self.lora_A.is_meta:
            return
        bound = math.sqrt(3.0) * math.sqrt(2.0 / (1 + 5)) / math.sqrt(self.in_features)
        drawn = torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator)
        self.lora_A.copy_(drawn)
        self.lora_B.zero_()

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return scaling · B A as (O, I), computed in fp32 or wider."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        return (self.lora_B.to(wide) @ self.lora_A.to(wide)) * self.scaling

    def merge(self) -> nn.Module:
        """Return the plain layer with LoRA merged into a new weight; this layer is not changed."""
        raise NotImplementedError

    def unwrap(self) -> nn.Module:
        """Return the plain base layer, sharing this layer's `weight` and `bias`."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, rank={self.rank}, alpha={self.alpha:g}, scaling={self.scaling:g}"


class LoRALinear(LoRALayer):
    """A linear with LoRA: y = x Wᵀ + b + (dropout(x) Aᵀ) Bᵀ · scaling.

    W and b are frozen; B is zero at the start, so the layer then computes what its base does.

    Args:
        base: the linear to adapt; its parameters are reused and frozen.
        rank: R, 1 ≤ rank ≤ MAX_RANK; above min(I, O) B A gains nothing more.
        alpha: numerator of the scaling, > 0.
        dropout: probability that an input of A is set to zero in training.
        scaling: factor of the low-rank part; alpha / rank when None.
        generator: draws the initial A; torch's global generator when None.

    Raises ConfigError for numbers out of range and TargetError if `base` is no nn.Linear.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        *,
        scaling: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(base, nn.Linear):
            seen = type(base).__name__
            raise TargetError(
                f"Cannot wrap a {seen} in LoRALinear. Allowed: nn.Linear. "
                "Pass the linear itself, or adapt a whole model with apply_lora()."
            )
        sizes = base.in_features, base.out_features
        super().__init__(base, *sizes, rank, alpha, dropout, scaling=scaling, generator=generator)

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        y = F.linear(x, self.weight, self.bias)  # (..., O)
        low = F.linear(self.dropout(x).to(self.lora_A.dtype), self.lora_A)  # (..., R)
        return y + (F.linear(low, self.lora_B) * self.scaling).to(y.dtype)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """Return an nn.Linear with weight W + scaling · B A; this layer is not changed."""
        merged = self.weight + self.delta_weight()  # fp32 sum, rounded once below
        return self._plain(nn.Parameter(merged.to(self.weight.dtype), requires_grad=False))

    def unwrap(self) -> nn.Linear:
        return self._plain(self.weight)

    def _plain(self, weight: nn.Parameter) -> nn.Linear:
        with torch.device("meta"):  # no storage: both parameters are replaced at once
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = weight
        linear.bias = self.bias  # type: ignore[assignment]
        return linear.train(self.training)


def apply_lora_to_linear(
    linear: nn.Linear, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0
) -> LoRALinear:
    """Return `linear` wrapped by a LoRALinear; the linear's own parameters become frozen."""
    return LoRALinear(linear, rank=rank, alpha=alpha, dropout=dropout)


def check_lora_numbers(
    in_features: int, out_features: int, rank: int, alpha: float, dropout: float
) -> None:
    """Raise ConfigError unless the numbers make sense for a linear (O, I)."""
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise ConfigError(
            f"rank={rank!r} for a linear with {in_features} inputs and {out_features} outputs: "
            f"allowed is an int from 1 to {MAX_RANK}. Choose a smaller rank, or leave this linear "
            "out of the targets."
        )
    if not (_is_number(alpha) and 0 < alpha <= MAX_ALPHA):
        raise ConfigError(
            f"alpha={alpha!r}: allowed is a finite number > 0, at most {MAX_ALPHA:g} (usual: "
            "2 · rank)."
        )
    if not (_is_number(dropout) and 0 <= dropout < 1):
        raise ConfigError(f"dropout={dropout!r}: allowed is 0 ≤ dropout < 1 (usual: 0 to 0.1).")


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond a float
        return False


@dataclass(frozen=True)
class ParameterCounts:
    """How many parameters are trainable and how many frozen; a shared tensor counts once."""

    lora: int
    """Parameters in A and B."""
    other_trainable: int
    """Trainable parameters beside LoRA: embeddings in `modules_to_save`, for example."""
    frozen: int

    @property
    def trainable(self) -> int:
        return self.lora + self.other_trainable

    @property
    def total(self) -> int:
        return self.trainable + self.frozen

    @property
    def lora_fraction(self) -> float:
        """A and B as a fraction of all parameters, their own included."""
        return self.lora / self.total if self.total else 0.0

    @property
    def trainable_fraction(self) -> float:
        """Trainable parameters as a fraction of all."""
        return self.trainable / self.total if self.total else 0.0

    @property
    def saved_fraction(self) -> float:
        """The fraction of the base's parameters that full fine-tuning trains and LoRA does not."""
        base = self.frozen + self.other_trainable
        return 1 - self.trainable / base if base else 0.0


def n_values(parameter: Tensor) -> int:
    """Return how many values `parameter` has: two in each byte of a 4-bit weight."""
    # No other weights are of bytes: see `Nf4Weight` in `lora.decoder.quantised.nf4`.
    return parameter.numel() * (2 if parameter.dtype is torch.uint8 else 1)


def count_lora_parameters(model: nn.Module) -> ParameterCounts:
    """Count the parameters of `model`: LoRA's, other trainable ones, frozen ones."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALayer)]
    of_lora = {id(p) for layer in layers for p in (layer.lora_A, layer.lora_B)}
    lora = other = frozen = 0
    for parameter in model.parameters():
        if id(parameter) in of_lora:
            lora += parameter.numel()
        elif parameter.requires_grad:
            other += parameter.numel()
        else:
            frozen += n_values(parameter)
    return ParameterCounts(lora=lora, other_trainable=other, frozen=frozen)
