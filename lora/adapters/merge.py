"""Merge LoRA into plain linears, and check that the model still computes the same logits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora.adapters.apply import (
    AppliedLoRA,
    applied_lora,
    lora_layers,
    refuse_disabled,
    replace_module,
    stored_adapters,
)
from lora.adapters.bases.linears import linear_values
from lora.adapters.targets import output_head_name
from lora.decoder.config import DecoderConfig
from lora.decoder.decoder import Decoder
from lora.decoder.language_model import LanguageModel, transformers_network
from lora.decoder.quantised.base import QuantisedWeight
from lora.errors import AdapterError, ModelError
from lora.layers.conv1d import LoRAConv1D
from lora.layers.trainable_tokens import TrainableTokensLayer, TrainableTokensLinear, plain_linear
from lora.lora_module import LoRALayer

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}
"""Largest ‖difference‖ / ‖reference‖ of the logits, by the dtype of the weights.

Measured on random Llamas of 30 blocks, the worst case: 5e-16, 4e-6, 5e-2 and 6e-3."""

Forward = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class MergeReport:
    """What merging changed in the model. Errors are relative: ‖difference‖ / ‖reference‖."""

    layers: int
    """Number of merged layers."""
    relative_error: float | None
    """Of the merged model's logits against the adapted one's; None without sample inputs."""
    max_error: float | None
    """Largest absolute difference of two logits; None without sample inputs."""
    tolerance: float
    """Largest `relative_error` allowed."""
    rounding_error: float
    """Of the merged weights against W + scaling · B A, from rounding to the weights' dtype."""
    update_error: float
    """The same rounding against scaling · B A alone: the fraction of the update that was lost."""
    untied_head: bool
    """Whether the head was tied to the embedding and has a weight of its own now."""


def merge_lora(
    model: nn.Module,
    sample_inputs: Any = None,
    *,
    forward: Forward | None = None,
    tolerance: float | None = None,
) -> MergeReport:
    """Changes `model` in place: every LoRA layer becomes the plain layer with W + scaling · B A.

    The logits on `sample_inputs` (token ids, (B, T)) are compared before and after; `forward`
    returns them, by default `model(sample_inputs)`. Weights are summed in fp32 and rounded once,
    into new tensors: for a moment both versions are in memory. Fully trained modules stay as they
    are; trained embedding rows are written into the embedding and the head. A tied head whose
    weight is no longer the embedding's is untied in the model's config too, so that it is saved.

    Layers over a quantised base become plain ones of its unpacked values, in its compute dtype.

    Raises AdapterError if the logits differ by more than `tolerance` (by default TOLERANCES of the
    weights' dtype), a merged weight is not finite, other adapters are loaded beside the active one,
    or within `disabled_adapter`; `model` is then adapted as before.
    """
    refuse_disabled(model, "merge")
    applied, layers = applied_lora(model), lora_layers(model)
    _refuse_others(model)
    was_tied = _is_tied_before(model, applied)
    if tolerance is None:
        tolerance = max(TOLERANCES.get(_value_dtype(x), 1e-4) for x in layers.values())
    merged = {name: layer.merge() for name, layer in layers.items()}
    rounding_error, update_error = _rounding(layers, merged)
    merged |= _merge_token_tables(applied)
    errors: tuple[float, float] | None = None
    if sample_inputs is None:
        _replace_modules(model, merged)
    else:
        errors = _replace_checked(
            model,
            {**layers, **applied.trainable_tokens},
            merged,
            sample_inputs,
            forward or default_forward,
            tolerance,
        )
    del model.applied_lora
    if isinstance(model, LanguageModel) and model.known_quantisation is not None:
        # What was noted of the base before it was unpacked is not of the merged weights.
        model.known_quantisation = model.known_fingerprint = None
    if isinstance(model, LanguageModel):
        model.original_weight = None
    untied_head = was_tied and not _is_tied(model)
    if untied_head:
        _untie_config(model)
    return MergeReport(
        layers=len(layers),
        relative_error=errors[0] if errors else None,
        max_error=errors[1] if errors else None,
        tolerance=tolerance,
        rounding_error=rounding_error,
        update_error=update_error,
        untied_head=untied_head,
    )


def _value_dtype(layer: LoRALayer) -> torch.dtype:
    return layer.value_dtype if isinstance(layer, QuantisedWeight) else layer.weight.dtype


def _merge_token_tables(applied: AppliedLoRA) -> dict[str, nn.Module]:
    """Return the plain token tables, by name; a tied head gets the embedding's new weight."""
    merged: dict[str, nn.Module] = {}
    first: TrainableTokensLayer | None = None
    for name, layer in applied.trainable_tokens.items():
        if not torch.isfinite(layer.token_rows).all():
            raise AdapterError(
                f"Cannot merge: trained embedding rows of {name} are not finite. The model is "
                "still adapted. Check the adapter."
            )
        if (
            first is not None
            and isinstance(layer, TrainableTokensLinear)
            and layer.token_rows is first.token_rows
        ):
            shared = cast(nn.Embedding, next(iter(merged.values()))).weight
            merged[name] = plain_linear(shared, layer)
        else:
            first, merged[name] = layer, layer.merge()
    return merged


def default_forward(model: nn.Module, inputs: Any) -> Tensor:
    """Return the logits of `model(inputs)`: its result, the result's `logits` or first item.

    Raises ModelError if the result holds no tensor there.
    """
    output = model(inputs)
    if isinstance(output, Mapping):  # transformers' outputs
        output = output.get("logits")
    elif isinstance(output, tuple) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise ModelError(
            f"Cannot find the logits of a {type(model).__name__}: its output is no tensor, no "
            "tuple that starts with one, and has no `logits`. Pass forward=, a function of model "
            "and inputs that returns the logits."
        )
    return output


def _refuse_others(model: nn.Module) -> None:
    others = sorted(stored_adapters(model))
    if others:
        raise AdapterError(
            f"Cannot merge the active adapter: {', '.join(others)} are loaded beside it, and "
            "belong to the base as it is now. Call delete_adapter(model, name) for each first."
        )


def _replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        replace_module(model, name, module)


@torch.no_grad()
def _replace_checked(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    merged: dict[str, nn.Module],
    inputs: Any,
    forward: Forward,
    tolerance: float,
) -> tuple[float, float]:
    """Changes `model` in place unless it raises; return relative and largest error of logits."""
    modes = {name: module.training for name, module in model.named_modules()}
    is_merged = False
    model.eval()  # dropout would make the two runs differ
    try:
        before = forward(model, inputs).double()
        _replace_modules(model, {name: module.eval() for name, module in merged.items()})
        difference = forward(model, inputs).double() - before
        relative = (difference.norm() / before.norm().clamp(min=1e-30)).item()
        if not relative <= tolerance:  # NaN is refused too
            raise AdapterError(
                f"Cannot merge: the merged model's logits differ by {relative:.2e} (‖difference‖ / "
                f"‖reference‖), allowed is {tolerance:.2g}. The model is still adapted. Merge it "
                "in fp32, or use the adapter without merging."
            )
        is_merged = True
    finally:
        if not is_merged:
            _replace_modules(model, layers)
        for name, module in model.named_modules():
            module.training = modes[name]
    return relative, difference.abs().max().item()


@torch.no_grad()
def _rounding(layers: dict[str, LoRALayer], merged: dict[str, nn.Module]) -> tuple[float, float]:
    """Return the rounding error of the merged weights: relative to W + s·B·A, and to s·B·A."""
    lost = total = update = 0.0  # squared norms, summed over the layers
    for name, layer in layers.items():
        weight = cast(Tensor, merged[name].weight)
        if not torch.isfinite(weight).all():
            raise AdapterError(
                f"Cannot merge: the merged weight of {name} is not finite in {weight.dtype}. The "
                "model is still adapted. Check the adapter, or merge in fp32."
            )
        wide = torch.float64 if weight.dtype in (torch.float32, torch.float64) else torch.float32
        delta = (layer.lora_B.to(wide) @ layer.lora_A.to(wide)) * layer.scaling  # (O, I)
        delta = delta.T if isinstance(layer, LoRAConv1D) else delta  # (I, O) for Conv1D
        base = linear_values(layer)  # (O, I)
        exact = (base.T if isinstance(layer, LoRAConv1D) else base).to(wide) + delta
        lost += (weight.to(wide) - exact).norm().item() ** 2
        total += exact.norm().item() ** 2
        update += delta.norm().item() ** 2
    return (
        math.sqrt(lost / total) if total else 0.0,
        math.sqrt(lost / update) if update else 0.0,
    )


def _is_tied_before(model: nn.Module, applied: AppliedLoRA) -> bool:
    """Whether the base's head shared its weight with an embedding, before training."""
    name = output_head_name(model)
    if name is None:
        return False
    head = applied.originals.get(name) or model.get_submodule(name)
    owners = [model, *applied.originals.values()]
    return any(_is_embedding_of(head, module) for owner in owners for module in owner.modules())


def _is_tied(model: nn.Module) -> bool:
    name = output_head_name(model)
    head = model.get_submodule(name) if name else None
    return head is not None and any(_is_embedding_of(head, m) for m in model.modules())


def _is_embedding_of(head: nn.Module, module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and module.weight is head.weight


def has_tied_head(model: Decoder) -> bool:
    """Whether head and embedding would share one weight once the adapter on `model` is merged."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, LoRALayer) or head.weight is not embedding.weight:
        return False
    head_rows, rows = (_token_rows(table) for table in (head, embedding))
    return head_rows is rows


def _token_rows(table: nn.Module) -> Tensor | None:
    return table.token_rows if isinstance(table, TrainableTokensLayer) else None


def untied_config(config: DecoderConfig) -> DecoderConfig:
    """Return `config` for a model whose head has a weight of its own."""
    source = {**config.source, "tie_word_embeddings": False}
    return dataclasses.replace(config, tie_word_embeddings=False, source=source)


def _untie_config(model: nn.Module) -> None:
    """Changes the config of `model`, or saving would drop the head and loading tie it again."""
    if isinstance(model, Decoder):
        model.config = untied_config(model.config)
        return
    network = transformers_network(model)
    if network is not None:
        config = network.config
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
