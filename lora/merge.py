"""Merge LoRA into plain linears, and check that the model still answers the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora.apply import applied_lora, lora_layers, output_head_name, replace_module
from lora.errors import AdapterError

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest ‖difference‖ / ‖reference‖ of the logits, by the type of the weights."""

Forward = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class MergeReport:
    """What merging changed."""

    layers: int
    """Layers that were merged."""
    relative_error: float | None
    """‖difference‖ / ‖reference‖ of the logits; None where no inputs were given."""
    max_error: float | None
    """Largest difference of two logits."""
    tolerance: float
    untied_head: bool
    """The head was tied to the embedding and adapted: it now has a weight of its own."""


def merge_lora(
    model: nn.Module,
    inputs: Tensor | None = None,
    *,
    forward: Forward | None = None,
    tolerance: float | None = None,
) -> MergeReport:
    """Changes `model` in place: every LoRA layer becomes the plain layer with W + scaling · B A.

    The logits on `inputs` (token ids, (B, T)) are compared before and after; `forward` returns
    them, by default `model(inputs)` with its `.logits` or first item. Weights are summed in fp32
    and rounded once. What trained whole stays as trained.

    Raises AdapterError if the logits differ by more than the tolerance (by default TOLERANCES of
    the weights' type); `model` is then adapted as before.
    """
    applied_lora(model)  # raises if there is nothing to merge
    layers = lora_layers(model)
    if tolerance is None:
        dtype = next(iter(layers.values())).weight.dtype
        tolerance = TOLERANCES.get(dtype, TOLERANCES[torch.float32])
    was_training, run = model.training, forward or _logits
    model.eval()
    try:
        before = None if inputs is None else _run(run, model, inputs)
        untied = _adapts_tied_head(model)
        for name, layer in layers.items():
            replace_module(model, name, layer.merge())
        relative, largest = None, None
        if before is not None and inputs is not None:
            difference = _run(run, model, inputs) - before
            relative = (difference.norm() / before.norm().clamp(min=1e-30)).item()
            largest = difference.abs().max().item()
            if not relative <= tolerance:  # NaN is refused too
                for name, layer in layers.items():
                    replace_module(model, name, layer)
                raise AdapterError(
                    f"Merging was asked for, and the merged model's logits differ by "
                    f"{relative:.2e} (‖difference‖/‖reference‖); allowed is {tolerance:.0e}. The "
                    "model is left unmerged. Merge in fp32, or use the adapter without merging."
                )
    finally:
        model.train(was_training)
    if untied:
        _untie(model)
    del model.applied_lora
    return MergeReport(len(layers), relative, largest, tolerance, untied)


def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    output = model(inputs)
    if isinstance(output, Tensor):
        return output
    return output[0]  # logits come first: in transformers' outputs without labels, in tuples


@torch.no_grad()
def _run(forward: Forward, model: nn.Module, inputs: Tensor) -> Tensor:
    return forward(model, inputs).double()


def _adapts_tied_head(model: nn.Module) -> bool:
    head = output_head_name(model)
    layer = lora_layers(model).get(head) if head else None
    if layer is None:
        return False
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    return any(weight is layer.weight for weight in weights)


def _untie(model: nn.Module) -> None:
    """Changes `model` in place: a transformers model must not tie its head again when saved."""
    config = vars(model).get("config")
    if config is not None and not isinstance(config, dict):
        config.tie_word_embeddings = False
