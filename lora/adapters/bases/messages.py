"""What is said of an adapter on a base with other values than it was trained over."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from lora.adapters.apply import AppliedLoRA
from lora.adapters.bases.change import logits_change
from lora.adapters.bases.linears import (
    block_linears,
    default_kind,
    lacks_values,
    linear_values,
    rounded,
    table_names,
)
from lora.adapters.bases.quantisation import quantisation_of
from lora.decoder.language_model import LanguageModel, transformers_network
from lora.decoder.quantised.record import BaseQuantisation


def describe_change(model: nn.Module, trained: BaseQuantisation | None) -> str:
    """Return what other values the base of `model` has than the adapter on it was trained over.

    And by how much its logits differ from those over these, where both can be computed.
    """
    here = quantisation_of(model)
    over = "a base that is not quantised" if trained is None else f"a base in {trained}"
    now = "not quantised" if here is None else f"in {here}"
    change = measured_change(model, trained)
    far = (
        "the values before quantisation are not at hand, so how far its logits are from those over "
        "that base is not measured"
        if change is None
        else f"its logits differ by {change:.1e} from those over that base (‖difference‖ / "
        "‖reference‖, of random tokens)"
    )
    return (
        f"was trained over {over}, and this one is {now}: {far}. Load the base "
        f"{_way_back(trained, here)} to have the values that it was trained over"
    )


def _way_back(trained: BaseQuantisation | None, here: BaseQuantisation | None) -> str:
    """Return how the base of training is loaded; base_dtype alone gives it with its defaults."""
    if trained is None:
        return "without base_dtype"
    is_other_dtype = here is None or here.dtype != trained.dtype
    if is_other_dtype and trained.has_values_of(default_kind(trained.dtype)):
        return f"with base_dtype={trained.dtype!r}"
    return f"in {trained}"


def measured_change(
    model: nn.Module, trained: BaseQuantisation | None, here: BaseQuantisation | None = None
) -> float | None:
    """Return the relative change of logits from the values trained over to those at hand.

    With `here`, to those at hand rounded so. None where the values before quantisation are not
    known, or the model has no logits.
    """
    before = _values_before(model)
    size = _vocab_size(model)
    if before is None or size is None:
        return None
    applied = vars(model).get("applied_lora")
    whole = applied.originals if isinstance(applied, AppliedLoRA) else {}
    kinds = (trained, here or quantisation_of(model))
    tables = table_names(model) if any(k is not None and k.embeddings for k in kinds) else []
    changed = {
        name: model.get_submodule(name)
        for name in (*block_linears(model), *tables)
        if not any(name == saved or name.startswith(saved + ".") for saved in whole)
    }

    def rounded_as(kind: BaseQuantisation | None, name: str) -> Tensor:
        values = before(name).to(changed[name].get_parameter("weight").device)
        if kind is None or name in kind.kept or (name in tables and not kind.embeddings):
            return values
        return rounded(values, kind, name)

    others, mine = partial(rounded_as, trained), None if here is None else partial(rounded_as, here)
    now = {name: partial(linear_values, module) for name, module in changed.items()}
    return logits_change(model, now, others, size, mine)


def _values_before(model: nn.Module) -> Callable[[str], Tensor] | None:
    """Return what gives the weight (O, I) of a linear as it was before quantisation."""
    if lacks_values(model):
        return None
    if quantisation_of(model) is None:
        return lambda name: linear_values(model.get_submodule(name))
    return model.original_weight if isinstance(model, LanguageModel) else None


def _vocab_size(model: nn.Module) -> int | None:
    if isinstance(model, LanguageModel):
        return model.config.vocab_size
    network = transformers_network(model)
    return None if network is None else int(network.config.get_text_config().vocab_size)
