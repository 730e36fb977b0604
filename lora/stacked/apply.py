"""Applies K adapters to one model at once, and reads and writes the values of each.

The values of one adapter have the names they would have on a model with that adapter alone
(`blocks.0.proj.lora_A`), and no padding: the values that `apply_lora` draws and `save_adapter`
writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora.adapters.apply import applied_lora, apply_lora, lora_layers, remove_lora, replace_module
from lora.config import LoRAConfig
from lora.errors import ConfigError, TargetError
from lora.layers.quantised import LoRAQuantisedLinear
from lora.lora_module import LoRALinear
from lora.stacked.layers import Stack, StackedEmbedding, StackedLoRALinear
from lora.stacked.quantised import build_stacked_linear

Values = dict[str, Tensor]


@dataclass(frozen=True)
class StackedAdapters:
    """The adapters that `apply_stacked` put on a model."""

    stack: Stack
    configs: tuple[LoRAConfig, ...]
    layers: dict[str, StackedLoRALinear]
    embeddings: dict[str, StackedEmbedding]

    def values(self, k: int) -> Values:
        """Return copies of adapter `k`'s values."""
        values = {f"{name}.weight": e.weight.detach()[k] for name, e in self.embeddings.items()}
        for name, layer in self.layers.items():
            values[f"{name}.lora_A"], values[f"{name}.lora_B"] = layer.adapter(k)
        return {name: tensor.clone() for name, tensor in values.items()}

    @torch.no_grad()
    def fill(self, k: int, values: Values) -> None:
        """Changes adapter `k` in place, to values as `values` returns them."""
        for name, layer in self.layers.items():
            layer.fill(k, values[f"{name}.lora_A"], values[f"{name}.lora_B"])
        for name, embedding in self.embeddings.items():
            embedding.weight[k].copy_(values[f"{name}.weight"])


def apply_stacked(
    model: nn.Module, configs: Sequence[LoRAConfig], dropout_seeds: Sequence[int]
) -> StackedAdapters:
    """Changes `model` in place: adapter k gets the values that `apply_lora` gives `configs[k]`.

    Everything else is frozen. `dropout_seeds[k]` seeds the dropout of adapter k as torch's global
    seed would if it trained alone.

    Raises ConfigError if the configs differ in their layers or fully trained modules, or if the
    base has dropout of its own (which all adapters would draw from one generator), and TargetError
    for layers other than linears and embeddings; `model` is then unchanged, but frozen.
    """
    _refuse_dropout(model)
    drawn, plans = [], []
    for config in configs:
        with _single(model, config):
            drawn.append({n: p.detach().clone() for n, p in _trained(model).items()})
            plans.append({n: (la.rank, la.scaling) for n, la in lora_layers(model).items()})
            _refuse_other_kinds(model)
            saved = list(applied_lora(model).originals)
    _refuse_differences(drawn)
    stack = Stack(tuple(dropout_seeds))
    dropouts = [config.dropout for config in configs]
    layers = {}
    for name in plans[0] if plans else ():
        ranks, scalings = zip(*(plan[name] for plan in plans), strict=True)
        linear = model.get_submodule(name)
        layers[name] = build_stacked_linear(linear, stack, ranks, scalings, dropouts)
    embeddings = {name: StackedEmbedding(model.get_submodule(name), stack) for name in saved}  # type: ignore[arg-type]
    for name, module in (layers | embeddings).items():
        replace_module(model, name, module)
    stacked = StackedAdapters(stack, tuple(configs), layers, embeddings)
    for k, values in enumerate(drawn):
        stacked.fill(k, values)
    return stacked


def remove_stacked(model: nn.Module, stacked: StackedAdapters) -> None:
    """Changes `model` in place: undoes `apply_stacked`; the base stays frozen."""
    for name, module in (stacked.layers | stacked.embeddings).items():
        replace_module(model, name, module.unwrap())


@contextmanager
def stacked_adapters(
    model: nn.Module, configs: Sequence[LoRAConfig], dropout_seeds: Sequence[int]
) -> Iterator[StackedAdapters]:
    """Context manager: `model` has these adapters within the block. See `apply_stacked`."""
    stacked = apply_stacked(model, configs, dropout_seeds)
    try:
        yield stacked
    finally:
        remove_stacked(model, stacked)


@contextmanager
def single_adapter(model: nn.Module, config: LoRAConfig, values: Values) -> Iterator[nn.Module]:
    """Context manager: the plain base `model` has this one adapter within the block."""
    with _single(model, config), torch.no_grad():
        for name, parameter in _trained(model).items():
            parameter.copy_(values[name])
        yield model


@contextmanager
def _single(model: nn.Module, config: LoRAConfig) -> Iterator[None]:
    if config.init_seed is None:
        raise ConfigError("Cannot stack an adapter without init_seed. Give each adapter a seed.")
    apply_lora(model, config)
    try:
        yield
    finally:
        remove_lora(model)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _refuse_other_kinds(model: nn.Module) -> None:
    saved = {name: model.get_submodule(name) for name in applied_lora(model).originals}
    kinds = LoRALinear | LoRAQuantisedLinear
    wrong = [n for n, layer in lora_layers(model).items() if not isinstance(layer, kinds)]
    wrong += [n for n, module in saved.items() if type(module) is not nn.Embedding]
    if wrong:
        raise TargetError(
            f"Cannot stack adapters on {wrong[0]!r}. Allowed: linear layers, and embeddings in "
            "modules_to_save. Leave it out, or train the adapters one by one."
        )


def _refuse_differences(drawn: list[Values]) -> None:
    for k, values in enumerate(drawn):
        if values.keys() != drawn[0].keys():
            other = sorted(values.keys() ^ drawn[0].keys())[0]
            raise ConfigError(
                f"Cannot stack adapters 0 and {k}: only one of them trains {other!r}. Give all of "
                "them the same targets, layers and modules_to_save."
            )


def _refuse_dropout(model: nn.Module) -> None:
    for name, module in model.named_modules():
        for key, probability in _dropouts(module).items():
            if probability > 0:
                full_name = ".".join(part for part in (name, key) if part)
                raise ConfigError(
                    f"Cannot train several adapters at once on a base with dropout ({full_name!r}: "
                    f"{probability:g}): all adapters would share its random numbers. Set the "
                    "base's dropout to 0 in its config.json, or train the adapters one by one."
                )


def _dropouts(module: nn.Module) -> dict[str, float]:
    """Return the probabilities with which `module` itself drops values, by attribute."""
    if isinstance(module, nn.Dropout):
        return {"": module.p}
    # transformers' models also drop by F.dropout, with a number that they store under such a name.
    own = {key: value for key, value in vars(module).items() if "drop" in key}
    return {key: value for key, value in own.items() if isinstance(value, float)}
