"""What all quantised weights share, and how a model is asked for them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from lora.errors import ModelError

WeightT = TypeVar("WeightT", bound="QuantisedWeight")

SAMPLES_PER_TENSOR = 64


@dataclass(frozen=True)
class PackedRows:
    """Some rows of a weight, quantised as the whole weight is."""

    codes: Tensor
    """(rows, …), as in `weight`."""
    scales: Tensor
    """(n,), fp32: those that belong to these rows and to no others."""
    first_scale: int
    """Of the whole weight's: where they begin."""


class QuantisedWeight(nn.Module):
    """Base of every layer whose frozen weight (O, I) is stored as codes and scales."""

    kind: ClassVar[str]
    """As in `base_dtype`."""
    why_finite: ClassVar[str]
    """Why a value that is not finite has no code, as a sentence."""
    packed_names: ClassVar[tuple[str, ...]]
    """The buffers beside `weight` that its values are made of."""
    in_features: int
    out_features: int
    weight: nn.Parameter
    """The codes, frozen."""
    bias: nn.Parameter | None
    value_dtype: torch.dtype
    """That of the weight before it was quantised, and of what it is merged into."""
    sample: Tensor
    """Some of the values before quantisation, for the base's fingerprint; none where there were no
    such values."""
    comes_packed: bool = False
    """Whether the model's files have its codes and scales, which are then read as they are."""
    conv1d: type[nn.Module] | None = None
    """transformers' Conv1D, if it stands for one, whose weight is (I, O); None: for nn.Linear."""

    def take_sizes(self, linear: nn.Linear) -> None:
        """Changes this layer in place: sizes, bias and dtype are those of `linear`."""
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.value_dtype = linear.weight.dtype
        self.register_parameter("bias", linear.bias)
        empty = linear.weight.new_empty(0, dtype=torch.int16)
        self.register_buffer("sample", empty, persistent=False)
        self.train(linear.training)

    @property
    def result_dtype(self) -> torch.dtype:
        """The dtype that the layer's results have, unless its input or autocast decides."""
        return self.value_dtype

    def share_packed(self, other: QuantisedWeight) -> None:
        """Changes this layer in place: beside `weight` and `bias`, its tensors are `other`'s."""
        self.value_dtype, self.conv1d = other.value_dtype, other.conv1d
        self.comes_packed = other.comes_packed
        for name in self.packed_names:
            self.register_buffer(name, other.get_buffer(name))
        self.register_buffer("sample", other.sample, persistent=False)

    def plain_layer(self, weight: Tensor) -> nn.Module:
        """Return the layer that this one stands for, with the values `weight` (O, I), frozen."""
        with torch.device("meta"):  # no storage: both parameters are replaced at once
            if self.conv1d is None:
                layer: Any = nn.Linear(self.in_features, self.out_features, self.bias is not None)
            else:
                layer = cast(Any, self.conv1d)(self.out_features, self.in_features)
        own = weight if self.conv1d is None else weight.T.contiguous()
        layer.weight, layer.bias = nn.Parameter(own, requires_grad=False), self.bias
        return cast(nn.Module, layer).train(self.training)

    @abstractmethod
    def unpack_into(self, out: Tensor, first_row: int = 0) -> None:
        """Changes `out` (rows, I) in place: the values of the rows from `first_row` on."""

    @torch.no_grad()
    def unpacked(self, dtype: torch.dtype | None = None) -> Tensor:  # (O, I)
        """Return the values, in `value_dtype` by default."""
        shape = self.out_features, self.in_features
        out = torch.empty(shape, dtype=dtype or self.value_dtype, device=self.weight.device)
        self.unpack_into(out)
        return out

    @abstractmethod
    def multiply(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        """Return x Wᵀ + b in autocast's dtype, or without autocast in that of `x`."""

    @abstractmethod
    def load(self, weight: Tensor, name: str) -> None:
        """Changes this layer in place: quantises `weight` (O, I), which is called `name`.

        Raises ModelError if a value is not finite.
        """

    def check_finite(self, values: Tensor, name: str, first_row: int = 0) -> None:
        """Raise ModelError if one of `values` (rows, I) is not finite in fp32.

        They are the rows from `first_row` on, maybe none, of the weight that is called `name`.
        """
        # The host waits once per tensor. NaN is in both ends; nothing as large as the weight is
        # made.
        if not len(values) or bool(_finite_ends(torch.aminmax(values)).all()):
            return
        rows = (~_finite_ends(torch.aminmax(values, dim=1))).nonzero().flatten() + first_row
        shown = ", ".join(map(str, rows[:8].tolist())) + (" …" if len(rows) > 8 else "")
        raise ModelError(
            f"Cannot quantise {name} to {self.kind}: it has values that are not finite, in rows "
            f"{shown}. {self.why_finite} Download the weights again."
        )

    @property
    @abstractmethod
    def n_scales(self) -> int:
        """How many scales the whole weight has."""

    def rows_to_read(self, rows: slice) -> slice:
        """Return the rows whose values `quantise_rows` takes: `rows`, or a few more."""
        return rows

    @abstractmethod
    def quantise_rows(self, values: Tensor, rows: slice, name: str) -> PackedRows:
        """Return `rows` of a weight of which a process reads no more than it must.

        `values` are those of `rows_to_read(rows)`, in the dtype in which `load` would get them.
        Raises ModelError if a value is not finite.
        """

    @abstractmethod
    def set_scales(self, scales: Tensor) -> None:
        """Changes this layer in place: `scales` (n_scales,) are those of all rows, fp32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move as nn.Module does; codes and scales keep their dtypes: other ones are no values."""
        former = {name: self.get_buffer(name) for name in self.packed_names}
        codes = self.weight.detach()
        super()._apply(fn, recurse)
        for name, buffer in former.items():
            moved = self.get_buffer(name)
            if moved.dtype is not buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        if self.weight.dtype is not codes.dtype:  # float8 counts as floating-point
            self.weight = nn.Parameter(codes.to(self.weight.device), requires_grad=False)
        return self

    @abstractmethod
    def plain_twin(self) -> QuantisedWeight:
        """Return the layer without LoRA that has this one's tensors."""

    def twin_of(self, kind: Callable[[nn.Linear], WeightT]) -> WeightT:
        """Return a layer of this `kind` that has this one's tensors."""
        with torch.device("meta"):  # no storage: all is replaced at once
            twin = kind(nn.Linear(self.in_features, self.out_features, bias=False))
        twin.weight, twin.bias = self.weight, self.bias
        twin.share_packed(self)
        return twin.train(self.training)


class QuantisedLinear(QuantisedWeight):
    """Base of the frozen linears without LoRA."""

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        return self.multiply(x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}"


def quantised_modules(model: nn.Module) -> dict[str, QuantisedWeight]:
    """Return by name the modules of `model` whose weight is quantised, with or without LoRA."""
    found = model.named_modules()
    return {name: module for name, module in found if isinstance(module, QuantisedWeight)}


def base_kind(model: nn.Module) -> str | None:
    """Return how the base of `model` is stored (fp8, nf4, int8), or None if it is not quantised."""
    kinds = (m.kind for m in model.modules() if isinstance(m, QuantisedWeight))
    return next(kinds, None)


def refuse_quantised(model: nn.Module) -> None:
    """Raise ModelError for a model that is to be saved as a plain one, and has quantised layers."""
    kind = base_kind(model)
    if kind is not None:
        raise ModelError(
            f"Cannot save a model with {kind} linears: the format cannot hold their scales. Save "
            "its adapter; the base is where it was loaded from."
        )


def values_of(module: nn.Module) -> Tensor:
    """Return the weight (O, I) of a linear; unpacked where it is quantised."""
    if isinstance(module, QuantisedWeight):
        return module.unpacked()
    return cast(Tensor, module.weight)


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of the first weight of `model`; of a quantised one that of its values."""
    owner = next(m for m in model.modules() if any(True for _ in m.parameters(recurse=False)))
    if isinstance(owner, QuantisedWeight):
        return owner.result_dtype
    return next(owner.parameters(recurse=False)).dtype


def sample_values(tensor: Tensor) -> Tensor:
    """Return the bits of at most 64 evenly spaced values of `tensor` in bf16, int16."""
    # By coordinates, so that neither a transposed nor a sliced tensor is copied whole.
    at = sample_positions(tensor.shape, tensor.device)
    picked = tensor[at] if tensor.dim() else tensor.view(1)
    return picked.to(torch.bfloat16).view(torch.int16)


def sample_positions(shape: Sequence[int], device: torch.device) -> tuple[Tensor, ...]:
    """Return the coordinates of at most 64 evenly spaced values of a tensor."""
    n_values = math.prod(shape)
    count = min(SAMPLES_PER_TENSOR, n_values)
    indices = torch.arange(count, device=device) * (n_values - 1) // max(1, count - 1)
    return torch.unravel_index(indices, tuple(shape)) if shape else ()


def with_autocast(x: Tensor) -> Tensor:
    """Return `x` in the dtype in which a linear multiplies it here."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _finite_ends(ends: Sequence[Tensor]) -> Tensor:
    """Return whether least and largest values, which fp32 is to hold, are both finite."""
    least, largest = ends
    return torch.isfinite(least.float()) & torch.isfinite(largest.float())
