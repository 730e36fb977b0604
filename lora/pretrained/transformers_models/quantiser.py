"""Weights quantised while transformers reads them: one after the other, never the whole model.

transformers calls quantisers that are registered with it. Ours replaces a linear when its weight
has been read, so that names, conversions and reports of what is missing are the plain model's.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora.config import BaseWeights
from lora.decoder.quantised.base import QuantisedWeight, quantised_modules
from lora.decoder.quantised.nf4 import Nf4Weight
from lora.errors import ModelError, gather
from lora.layers.conv1d import is_conv1d
from lora.layers.quantised_model import build_quantised, with_weights_in
from lora.pretrained.quantised.linears import fill_packed
from lora.pretrained.quantised.stored import StoredNf4
from lora.pretrained.transformers_models.four_bit import PackedWeights
from lora.pretrained.transformers_models.quantisable import QuantisableLinears, find_quantisable
from lora.pretrained.transformers_models.quiet import quiet
from lora.pretrained.transformers_models.small_copy import HeadedCopy, refusals, small_copy

METHOD = "lora_lm"
"""Of our quantiser in transformers' table."""
TOLERANCE = 1e-4
"""Of the largest logit, in fp32: what is more is no rounding."""
_found: dict[str, str | None] = {}


@dataclass
class Quantising:
    """How the weights of one model are quantised, and what happened."""

    base: BaseWeights
    device: torch.device
    """Where they are quantised, and stay."""
    linears: QuantisableLinears | None = None
    """Which; known when the model was built."""
    faults: list[str] = field(default_factory=list)
    """Why weights could not be."""
    packed: PackedWeights | None = None
    """Of a folder in 4 bits: what is quantised already; all else stays plain."""
    samples: dict[QuantisedWeight, Tensor] = field(default_factory=dict)
    """Of the values before they were quantised, by linear."""

    def quantise(self, theirs: Any, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Changes `theirs` in place: the linear whose parameter `name` is `weight` is quantised.

        Returns what the parameter becomes; after a fault, what it was.
        """
        owner = name.rpartition(".")[0]
        linear = theirs.get_submodule(owner)
        if isinstance(linear, QuantisedWeight):  # blocks that share it: read under another name
            return {name: linear.weight}
        stored = None if self.packed is None else self.packed.take(weight)
        if self.packed is not None and stored is None:
            return {name: weight}
        shape = tuple(linear.weight.shape)
        # A packed weight is (O, I), whatever the plain one is.
        wanted = shape[::-1] if stored is not None and is_conv1d(linear) else shape
        if weight.shape != wanted:
            self.faults.append(
                f"{name} is {tuple(weight.shape)} in the file: config.json implies {wanted}"
            )
            return {name: linear.weight}
        try:
            if stored is None:
                quantised = self._quantised(linear, owner, weight)
            else:
                quantised = self._as_stored(linear, owner, stored)
        except ModelError as error:
            self.faults.append(str(error))
            return {name: linear.weight}
        self.samples[quantised] = quantised.sample
        replace_everywhere(theirs, linear, quantised)
        return {name: quantised.weight}

    def _quantised(self, linear: nn.Module, name: str, weight: Tensor) -> QuantisedWeight:
        quantised, values = empty_quantised(linear, name, self.base), weight.to(self.device)
        quantised.load(values.T.contiguous() if is_conv1d(linear) else values, f"{name}.weight")
        return quantised

    def _as_stored(self, linear: nn.Module, name: str, stored: StoredNf4) -> QuantisedWeight:
        own = BaseWeights("nf4", nf4_block=stored.block, nf4_double_quant=stored.is_double)
        quantised = empty_quantised(linear, name, own)
        assert isinstance(quantised, Nf4Weight)
        assert self.packed is not None
        fill_packed(quantised, stored, dtype=self.packed.dtype, device=self.device)
        return quantised

    def restore_samples(self) -> None:
        """Changes the linears in place when transformers is done: it empties such buffers."""
        for quantised, sample in self.samples.items():
            quantised.sample = sample


def empty_quantised(linear: nn.Module, name: str, base: BaseWeights) -> QuantisedWeight:
    """Return what stands for `linear` or a Conv1D called `name`: on meta, without values."""
    weight, bias = linear.weight, linear.bias
    assert isinstance(weight, Tensor)
    n_inputs, n_outputs = weight.shape if is_conv1d(linear) else weight.shape[::-1]
    like = nn.Linear(n_inputs, n_outputs, bias=False, dtype=weight.dtype, device="meta")
    like.register_parameter("bias", cast("nn.Parameter | None", bias))
    quantised = build_quantised(like.train(linear.training), name, base)
    quantised.conv1d = type(linear) if is_conv1d(linear) else None
    return quantised


def empty_quantised_linears(
    theirs: Any, base: BaseWeights, only: Collection[str] | None = None
) -> QuantisableLinears:
    """Changes `theirs` in place: its quantisable linears become quantised ones without values.

    Those whose weights are not named in `only` stay as they are.
    """
    found = find_quantisable(theirs)
    for name in with_weights_in(found.names, only):
        linear = theirs.get_submodule(name)
        replace_everywhere(theirs, linear, empty_quantised(linear, name, base))
    return found


def quantise_linears(theirs: Any, base: BaseWeights) -> QuantisableLinears:
    """Changes `theirs`, which has values, in place: its quantisable linears become quantised.

    Raises ModelError for values that are not finite.
    """
    found = find_quantisable(theirs)
    how = Quantising(base, next(theirs.parameters()).device)
    for name in found.names:
        how.quantise(theirs, f"{name}.weight", theirs.get_parameter(f"{name}.weight").detach())
    if how.faults:
        raise ModelError(gather(how.faults, "Cannot quantise the model:", "Load it again."))
    return found


def why_not_quantised(config: Any, base: BaseWeights) -> str | None:
    """Return why models of transformers' `config` cannot be quantised; None: they can.

    Tried on a small random copy: its logits over quantised weights must be those over the same
    values in plain linears. Found once for each configuration in a process.
    """
    key = json.dumps([config.to_dict(), vars(base)], default=str, sort_keys=True)
    if key not in _found:
        with quiet():
            _found[key] = _try_quantised(config, base)
    return _found[key]


@torch.no_grad()
def _try_quantised(config: Any, base: BaseWeights) -> str | None:
    try:
        small = small_copy(config)
    except refusals():
        return None  # nothing can be tried; what its code reads is known from its source
    ids = torch.arange(1, 13)[None]
    body = small.base_model if isinstance(small, HeadedCopy) else small
    twin = copy.deepcopy(small)
    if not quantise_linears(body, base).names:
        return "none of its linears can be quantised"
    plain = twin.base_model if isinstance(twin, HeadedCopy) else twin
    for name, quantised in quantised_modules(body).items():
        linear, values = plain.get_submodule(name), quantised.unpacked()
        linear.weight.copy_(values.T if is_conv1d(linear) else values)
    try:
        found, wanted = small(input_ids=ids).logits, twin(input_ids=ids).logits
    except refusals() as error:
        return f"a small copy of it could not be run ({str(error).splitlines()[0]})"
    if (found - wanted).abs().max() > TOLERANCE * wanted.abs().max():
        return "a small copy of it computes something else over quantised weights"
    return None


def replace_everywhere(theirs: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Changes `theirs` in place: `new` instead of `old`, wherever it is (blocks may share it)."""
    for module in theirs.modules():
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


def quantisation_config(how: Quantising) -> Any:
    """Return what `from_pretrained` takes as quantization_config; transformers is installed."""
    return _registered()(how)


@functools.cache
def _registered() -> Callable[[Quantising], Any]:
    """Register our quantiser with transformers, once; return the class of its settings."""
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Config(QuantizationConfigMixin):
        def __init__(self, how: Quantising) -> None:
            self.quant_method: Any = METHOD
            self.how = how

        def __deepcopy__(self, memo: Any) -> Config:
            return self  # what happens is noted in `how`, also where the config was copied

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": METHOD}  # it is printed, as JSON

    class Quantise(ConversionOps):
        def __init__(self, how: Quantising) -> None:
            self.how = how

        def convert(self, input_dict: Any, *patterns: Any, **more: Any) -> dict[str, Any]:
            done: dict[str, Tensor] = {}
            model = more["model"]
            for name, value in input_dict.items():
                weight = value[0] if isinstance(value, list) else value
                done |= self.how.quantise(model, name, weight)
            return done

    class Quantiser(HfQuantizer):
        @property
        def how(self) -> Quantising:
            found: Quantising = cast(Any, self.quantization_config).how
            return found

        def _process_model_before_weight_loading(self, model: Any, **more: Any) -> None:
            self.how.linears = find_quantisable(model)
            self.names = {f"{name}.weight" for name in self.how.linears.names}

        def param_needs_quantization(self, model: Any, param_name: str, **more: Any) -> bool:
            return param_name in self.names

        def get_quantize_ops(self) -> Any:
            return Quantise(self.how)

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return True

    register_quantization_config(METHOD)(Config)
    register_quantizer(METHOD)(Quantiser)
    return Config


def forget_quantiser(theirs: Any) -> None:
    """Changes `theirs` in place: what transformers noted of the quantiser, which is done, goes."""
    theirs.hf_quantizer.remove_quantization_config(theirs)
    for module in theirs.modules():
        vars(vars(module).get("config", theirs.config)).pop("_is_quantized", None)
