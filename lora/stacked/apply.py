"""Put K adapters on one model at once, and take each off as it would be alone.

An adapter's values go by their names on a model of its own (`blocks.0.proj.lora_A`), without
padding: what `apply_lora` would draw, what `save_adapter` writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lora.adapters.apply import applied_lora, apply_lora, lora_layers, remove_lora, replace_module
from lora.config import LoRAConfig
from lora.errors import ConfigError, TargetError
from lora.lora_module import LoRALinear
from lora.stacked.layers import Stack, StackedEmbedding, StackedLoRALinear, build_stacked_linear

Values = dict[str, Tensor]


@dataclass(frozen=True)
class StackedAdapters:
    """What `apply_stacked` did to a model."""

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
        """Changes adapter `k` in place: takes `values`, as `values` returns them."""
        for name, layer in self.layers.items():
            layer.fill(k, values[f"{name}.lora_A"], values[f"{name}.lora_B"])
        for name, embedding in self.embeddings.items():
            embedding.weight[k].copy_(values[f"{name}.weight"])


def apply_stacked(
    model: nn.Module, configs: Sequence[LoRAConfig], dropout_seeds: Sequence[int]
) -> StackedAdapters:
    """Changes `model` in place: adapter k has the values that `apply_lora` gives `configs[k]`.

    Everything else is frozen. `dropout_seeds[k]` stands for torch's global seed of adapter k alone.

    Raises ConfigError if the configs differ in their layers or in what trains whole, or if the base
    has dropout of its own (which all adapters would draw from one generator), and TargetError for
    layers other than linears and embeddings; `model` is then as it was, frozen.
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
        linear = cast(nn.Linear, model.get_submodule(name))
        layers[name] = build_stacked_linear(linear, stack, ranks, scalings, dropouts)
    embeddings = {name: StackedEmbedding(model.get_submodule(name), stack) for name in saved}  # type: ignore[arg-type]
    for name, module in (layers | embeddings).items():
        replace_module(model, name, module)
    stacked = StackedAdapters(stack, tuple(configs), layers, embeddings)
    for k, values in enumerate(drawn):
        stacked.fill(k, values)
    return stacked


def remove_stacked(model: nn.Module, stacked: StackedAdapters) -> None:
    """Changes `model` in place: the base as it was before `apply_stacked`, frozen."""
    for name, module in (stacked.layers | stacked.embeddings).items():
        replace_module(model, name, module.unwrap())


@contextmanager
def stacked_adapters(
    model: nn.Module, configs: Sequence[LoRAConfig], dropout_seeds: Sequence[int]
) -> Iterator[StackedAdapters]:
    """Within the block `model` has these adapters: see `apply_stacked`; removed however it ends."""
    stacked = apply_stacked(model, configs, dropout_seeds)
    try:
        yield stacked
    finally:
        remove_stacked(model, stacked)


@contextmanager
def single_adapter(model: nn.Module, config: LoRAConfig, values: Values) -> Iterator[nn.Module]:
    """Within the block the plain base `model` has this one adapter, to be saved for example."""
    with _single(model, config), torch.no_grad():
        for name, parameter in _trained(model).items():
            parameter.copy_(values[name])
        yield model


@contextmanager
def _single(model: nn.Module, config: LoRAConfig) -> Iterator[None]:
    if config.init_seed is None:
        raise ConfigError("An adapter was to be stacked without init_seed: give each its seed.")
    apply_lora(model, config)
    try:
        yield
    finally:
        remove_lora(model)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _refuse_other_kinds(model: nn.Module) -> None:
    saved = {name: model.get_submodule(name) for name in applied_lora(model).originals}
    wrong = [n for n, layer in lora_layers(model).items() if not isinstance(layer, LoRALinear)]
    wrong += [n for n, module in saved.items() if type(module) is not nn.Embedding]
    if wrong:
        raise TargetError(
            f"Several adapters were to be stacked on {wrong[0]!r}: allowed are linears, and "
            "embeddings among what trains whole. Leave it out, or train the adapters one by one."
        )


def _refuse_differences(drawn: list[Values]) -> None:
    for k, values in enumerate(drawn):
        if values.keys() != drawn[0].keys():
            other = sorted(values.keys() ^ drawn[0].keys())[0]
            raise ConfigError(
                f"Adapters 0 and {k} were to be stacked, and one of them alone trains {other!r}: "
                "give all the same targets, layers and modules_to_save."
            )


def _refuse_dropout(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise ConfigError(
                f"Several adapters were to train at once on a base with dropout of its own "
                f"({name!r}: {module.p:g}): it would be drawn for all of them together. Set the "
                "base's dropout to 0, or train the adapters one by one."
            )
