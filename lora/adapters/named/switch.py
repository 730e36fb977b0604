"""Switch between several adapters of one model, with PEFT's names and meaning.

    load_adapter(model, "style")                      # called "default", and active
    load_adapter(model, "runs/x/adapter", name="x")   # loaded beside it, not active
    set_adapter(model, "x")

The layers of the active adapter are in the model, as those of a single adapter are, so neither
numerics nor speed change. The layers of the others are in `model.stored_adapters`; they share the
base's tensors, and replace the model's layers when they become active.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lora.adapters.apply import (
    AppliedLoRA,
    applied_lora,
    plain_module,
    refuse_disabled,
    remove_lora,
    replace_module,
    stored_adapters,
)
from lora.errors import AdapterError, did_you_mean
from lora.layers.token_tables import find_token_tables
from lora.layers.trainable_tokens import TrainableTokensEmbedding, TrainableTokensLinear
from lora.lora_module import LoRALayer

SharesWeight = LoRALayer | TrainableTokensEmbedding | TrainableTokensLinear


@dataclass
class StoredAdapter:
    """An adapter that is not active."""

    applied: AppliedLoRA
    modules: dict[str, nn.Module]
    """By full name: what stands in the model when the adapter is active."""
    dtypes: dict[str, torch.dtype]
    """By full name: of the base's module when this was taken off."""


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the adapters of `model`, sorted."""
    return sorted([active_adapter(model), *stored_adapters(model)])


def active_adapter(model: nn.Module) -> str:
    """Return the name of the adapter that `model` computes with. Raises TargetError without one."""
    return applied_lora(model).name


def set_adapter(model: nn.Module, name: str) -> nn.Module:
    """Changes `model` in place: the adapter called `name` becomes the active one.

    What trains in each adapter stays as it was loaded. Returns `model`. Raises AdapterError for a
    name that is not loaded, and within `disabled_adapter`.
    """
    refuse_disabled(model, "switch adapters")
    if name == active_adapter(model):
        return model
    _find(model, name, "activate")
    former = detach(model)
    stored = stored_adapters(model)
    attach(model, cast(StoredAdapter, stored.pop(name)))
    stored[former.applied.name] = former
    return model


def delete_adapter(model: nn.Module, name: str) -> nn.Module:
    """Changes `model` in place: forget the adapter called `name`. Returns `model`.

    Raises AdapterError for the active one and for a name that is not loaded.
    """
    if name == active_adapter(model):
        raise AdapterError(
            f"Cannot delete the adapter {name!r}: it is active. Call set_adapter(model, …) with "
            "another one first, or remove_lora(model) to get the base back."
        )
    _find(model, name, "delete")
    del stored_adapters(model)[name]
    return model


@contextmanager
def active(model: nn.Module, name: str | None) -> Iterator[None]:
    """Within the block the adapter called `name` is active; None: the one that is."""
    former = active_adapter(model)
    set_adapter(model, former if name is None else name)
    try:
        yield
    finally:
        set_adapter(model, former)


@contextmanager
def loading_beside(model: nn.Module, name: str) -> Iterator[None]:
    """Within the block the base of `model` gets another adapter, which is then stored as `name`.

    The one that was active is active again afterwards, also after an error.
    """
    _check_new_name(model, name)
    stored = stored_adapters(model)
    former = detach(model)
    trains = {key: p.requires_grad for key, p in model.named_parameters()}
    try:
        yield
        applied_lora(model).name = name
        try:
            stored[name] = detach(model)
        except AdapterError:
            remove_lora(model)  # and with it the rows of its tokens
            raise
    finally:
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(trains[key])
        attach(model, former)
        if stored:  # a first adapter that was refused leaves nothing
            model.stored_adapters = stored  # type: ignore[assignment]


def detach(model: nn.Module) -> StoredAdapter:
    """Changes `model` in place: take the active adapter off it and return it.

    Raises AdapterError if it added tokens: without it the tables would be too small.
    """
    applied = applied_lora(model)
    _refuse_added_tokens(model, applied)
    names = [*applied.target_names, *applied.originals, *applied.trainable_tokens]
    modules = {name: model.get_submodule(name) for name in names}
    dtypes = {}
    for name, module in modules.items():
        plain = plain_module(applied, name, module)
        dtypes[name] = _first_tensor(plain).dtype
        replace_module(model, name, plain)
    del model.applied_lora
    return StoredAdapter(applied, modules, dtypes)


def attach(model: nn.Module, stored: StoredAdapter) -> None:
    """Changes `model` in place: put a stored adapter on it, where the base is now."""
    applied = stored.applied
    for name, module in stored.modules.items():
        base = model.get_submodule(name)
        if isinstance(module, SharesWeight):
            # The same objects as a rule; others if the base was moved to a place of another kind.
            module.weight = cast(nn.Parameter, base.weight)
            if isinstance(module, LoRALayer):
                module.bias = cast("nn.Parameter | None", base.bias)
        else:
            applied.originals[name] = base
        first = _first_tensor(base)
        module.to(first.device).train(base.training)
        if first.dtype != stored.dtypes[name]:  # the model was cast meanwhile, and so is this
            module.to(first.dtype)
        replace_module(model, name, module)
    model.applied_lora = applied  # type: ignore[assignment]


def _first_tensor(module: nn.Module) -> Tensor:
    return next(iter([*module.parameters(), *module.buffers()]))


def _refuse_added_tokens(model: nn.Module, applied: AppliedLoRA) -> None:
    base = applied.base_vocab_size
    if base is not None and find_token_tables(model).embedding.num_embeddings > base:
        raise AdapterError(
            f"Cannot have several adapters on a model when one of them ({applied.name!r}) adds "
            "tokens: each would need a vocabulary of another size. Load it alone, or merge it "
            "(merge_lora) first and train the others on the merged model."
        )


def check_adapter_name(name: object) -> str:
    """Return `name`. Raises AdapterError unless it can be an adapter's name."""
    if isinstance(name, str) and name and "." not in name:
        return name
    raise AdapterError(
        f"Cannot call an adapter {name!r}. Allowed: a string that is not empty and has no dot."
    )


def _check_new_name(model: nn.Module, name: str) -> None:
    loaded = adapter_names(model)
    if check_adapter_name(name) in loaded:
        raise AdapterError(
            f"Cannot load an adapter as {name!r}: there is one of this name. Loaded: "
            f"{', '.join(loaded)}. Choose another name, or delete_adapter(model, {name!r}) first."
        )


def _find(model: nn.Module, name: str, what: str) -> None:
    if name not in stored_adapters(model):
        loaded = adapter_names(model)
        raise AdapterError(
            f"Cannot {what} the adapter {name!r}: it is not loaded."
            f"{did_you_mean(str(name), loaded)} Loaded: {', '.join(loaded)}. Load it with "
            "load_adapter(model, folder, name=…)."
        )
