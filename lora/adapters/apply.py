"""Adapt a whole model: which layers get LoRA, what else trains, what is frozen.

Works on any nn.Module: the layers are found by name and replaced in place. Names of the base's
parameters do not change.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn

from lora.adapters.targets import find_targets, matches
from lora.config import LoRAConfig
from lora.decoder.quantised import has_fp8_base
from lora.errors import ConfigError, LoraError, TargetError, did_you_mean
from lora.layers.build import build_lora_layer
from lora.layers.token_tables import (
    build_trainable_tokens,
    find_token_tables,
    token_ids_by_table,
)
from lora.layers.trainable_tokens import (
    TrainableTokensEmbedding,
    TrainableTokensLayer,
    TrainableTokensLinear,
)
from lora.layers.vocabulary import resize_vocabulary
from lora.lora_module import LoRALayer


@dataclass
class AppliedLoRA:
    """What `apply_lora` did to a model; kept on the model as `applied_lora`."""

    config: LoRAConfig
    target_names: tuple[str, ...]
    """Full names of the layers that were wrapped, in the model's order."""
    originals: dict[str, nn.Module] = field(default_factory=dict)
    """By full name, the module as it was before its copy began to train (`modules_to_save`)."""
    trainable_tokens: dict[str, TrainableTokensLayer] = field(default_factory=dict)
    """By full name, the embedding and the head of which some rows train (`train_token_rows`)."""

    @property
    def base_vocab_size(self) -> int | None:
        """Rows of the base's tables before new ones were added; None: no rows train."""
        return next((layer.base_rows for layer in self.trainable_tokens.values()), None)


def apply_lora(model: nn.Module, config: LoRAConfig | None = None) -> nn.Module:
    """Changes `model` in place: wrap the layers that `config` names, freeze everything else.

    Modules named in `modules_to_save` are replaced by trainable copies, so that a tensor shared
    with them (a tied head) stays as it is. Returns `model`.

    Raises TargetError if names match nothing, if nothing is left to adapt or if `model` has LoRA
    already, and ConfigError for a rank too large for a layer; `model` is then unchanged.
    """
    config = config or LoRAConfig()
    _refuse_second_time(model)
    names = find_targets(model, config)
    saved = _find_saved(model, config, names)
    generator = None
    if config.init_seed is not None:
        generator = torch.Generator().manual_seed(config.init_seed)
    # All layers are built before the first is put in place: an error leaves the model whole.
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        layers = {name: _build_layer(model, name, config, generator) for name in names}
    except LoraError:
        for parameter in trainable:  # building a layer froze its base
            parameter.requires_grad_(True)
        raise
    model.requires_grad_(False)
    for name, layer in layers.items():
        replace_module(model, name, layer)
    applied = AppliedLoRA(config, tuple(names))
    for name in saved:
        applied.originals[name] = model.get_submodule(name)
        trained = copy.deepcopy(applied.originals[name]).requires_grad_(True)
        replace_module(model, name, trained)
    model.applied_lora = applied  # type: ignore[assignment]
    return model


def applied_lora(model: nn.Module) -> AppliedLoRA:
    """Return what `apply_lora` did to `model`. Raises TargetError if it was never applied."""
    applied = vars(model).get("applied_lora")
    if not isinstance(applied, AppliedLoRA):
        raise TargetError(
            f"An adapted model was asked for, and this {type(model).__name__} has no LoRA. "
            "Call apply_lora(model, LoRAConfig(...)) or load_adapter(model, folder) first."
        )
    return applied


def train_token_rows(
    model: nn.Module,
    ids: Sequence[int] | Mapping[str, Sequence[int]],
    *,
    n_known: int | None = None,
) -> nn.Module:
    """Changes `model`, which has LoRA, in place: the rows `ids` of its token tables train too.

    The tables are the embedding and the head; `ids` by full name says which, otherwise both, and a
    tied head always goes with the embedding. Tables that are too small grow first. Ids from
    `n_known` on (by default the table's rows) are new tokens and start at the mean of those before;
    the others start as they are. Returns `model`.

    Raises TargetError for tables that train otherwise already or that cannot be wrapped, and
    ConfigError for ids that are no rows; `model` is then unchanged.
    """
    applied, tables = applied_lora(model), find_token_tables(model)
    by_name = token_ids_by_table(ids, tables)
    _refuse_other_training(by_name, applied)
    base_rows = tables.embedding.num_embeddings
    n_rows = max(base_rows, *(max(chosen) + 1 for chosen in by_name.values()))
    resize_vocabulary(model, n_rows)
    known = base_rows if n_known is None else min(n_known, n_rows)
    applied.trainable_tokens = build_trainable_tokens(
        find_token_tables(model), by_name, known, base_rows
    )
    for name, layer in applied.trainable_tokens.items():
        replace_module(model, name, layer)
    model.requires_grad_(False)
    for parameter in trained_parameters(model):
        parameter.requires_grad_(True)
    return model


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return what trains on an adapted model: A and B, what trains whole, and rows of tokens."""
    applied = applied_lora(model)
    trained = [p for x in lora_layers(model).values() for p in (x.lora_A, x.lora_B)]
    for name in applied.originals:
        trained += model.get_submodule(name).parameters()
    return trained + [layer.token_rows for layer in applied.trainable_tokens.values()]


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Return the LoRA layers of `model` by full name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALayer)}


def remove_lora(model: nn.Module) -> nn.Module:
    """Changes `model` in place: the base as it was before `apply_lora`, all of it frozen."""
    applied = applied_lora(model)
    for name, layer in lora_layers(model).items():
        replace_module(model, name, layer.unwrap())
    for name, original in applied.originals.items():
        replace_module(model, name, _moved_beside(original, model.get_submodule(name)))
    for name in applied.trainable_tokens:
        replace_module(model, name, _current_rows(model, name).unwrap())
    if applied.base_vocab_size is not None:
        resize_vocabulary(model, applied.base_vocab_size)
    del model.applied_lora
    return model


@contextmanager
def disabled_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block `model` computes as its base did; afterwards it is adapted again.

    Tokens that were added are there for the base too: their rows are the mean of its own.
    """
    applied = applied_lora(model)
    adapted = {name: model.get_submodule(name) for name in applied.target_names}
    adapted |= {
        name: model.get_submodule(name) for name in [*applied.originals, *applied.trainable_tokens]
    }
    for name, module in adapted.items():
        if isinstance(module, LoRALayer | TrainableTokensEmbedding | TrainableTokensLinear):
            plain = module.unwrap()
        else:
            plain = _moved_beside(applied.originals[name], module)
        replace_module(model, name, plain.train(module.training))
    try:
        yield model
    finally:
        for name, module in adapted.items():
            replace_module(model, name, module)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Changes `model` in place: put `new` where the submodule called `name` is."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    parent._modules[child] = new  # setattr would refuse the digits of a ModuleList


def _find_saved(model: nn.Module, config: LoRAConfig, adapted: list[str]) -> list[str]:
    modules = [n for n, m in model.named_modules() if n and any(True for _ in m.parameters())]
    saved: list[str] = []
    for wanted in config.modules_to_save:
        found = [name for name in modules if matches(name, wanted)]
        if not found:
            with_weights = {n.rpartition(".")[0] for n, _ in model.named_parameters()}
            near = did_you_mean(wanted, {n.rpartition(".")[2] for n in with_weights})
            raise TargetError(
                f"modules_to_save names {wanted!r}, which is no module with parameters of this "
                f"{type(model).__name__}.{near} Name a module such as an embedding."
            )
        saved += [name for name in found if name not in saved]
    _refuse_eight_bits(model, saved)
    for outer in saved:
        both = [name for name in adapted if name == outer or name.startswith(outer + ".")]
        if both:
            raise TargetError(
                f"{both[0]!r} is both a LoRA target and in modules_to_save ({outer!r}). "
                "A layer trains either whole or through LoRA: take it out of one of the two."
            )
        nested = [name for name in saved if name.startswith(outer + ".")]
        if nested:
            raise TargetError(
                f"modules_to_save names {nested[0]!r} and {outer!r}, which contains it. "
                "Name one of the two."
            )
    return saved


def _refuse_eight_bits(model: nn.Module, saved: list[str]) -> None:
    for name in saved:
        if has_fp8_base(model.get_submodule(name)):
            raise TargetError(
                f"modules_to_save names {name!r}, whose linears are kept in fp8: eight bits cannot "
                "train whole. Adapt it through LoRA, or load the base without fp8."
            )


def _build_layer(
    model: nn.Module, name: str, config: LoRAConfig, generator: torch.Generator | None
) -> LoRALayer:
    rank = _by_name(name, config.rank_pattern, config.rank)
    alpha = _by_name(name, config.alpha_pattern, config.alpha)
    scaling = alpha / (rank**0.5 if config.rslora else rank)
    try:
        return build_lora_layer(
            model.get_submodule(name),
            rank=cast(int, rank),
            alpha=alpha,
            dropout=config.dropout,
            scaling=scaling,
            generator=generator,
        )
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _by_name(name: str, pattern: dict[str, int] | dict[str, float], default: float) -> float:
    return next((v for key, v in pattern.items() if matches(name, key)), default)


def _moved_beside(original: nn.Module, trained: nn.Module) -> nn.Module:
    """Changes `original` in place: to the device and type that its trained copy now has."""
    return original.to(next(trained.parameters()))  # in place, so a tied head follows


def _refuse_other_training(by_name: dict[str, tuple[int, ...]], applied: AppliedLoRA) -> None:
    if applied.trainable_tokens:
        raise TargetError(
            "Rows of tokens were to train in a model of which rows train already. Merge it "
            "(merge_lora) and begin anew, or give all the tokens at once."
        )
    for name in by_name:
        if any(matches(name, saved) or name.startswith(f"{saved}.") for saved in applied.originals):
            raise TargetError(
                f"Rows of {name!r} were to train, which modules_to_save trains whole. A table "
                "trains either whole or by rows: leave it out of modules_to_save."
            )


def _current_rows(model: nn.Module, name: str) -> TrainableTokensLayer:
    return cast(TrainableTokensLayer, model.get_submodule(name))


def _refuse_second_time(model: nn.Module) -> None:
    wrapped = next(iter(lora_layers(model)), None)
    if wrapped is not None:
        raise TargetError(
            f"LoRA was asked for a model that already has it (at {wrapped!r}, for one). "
            "Merge it (merge_lora) or take it off (remove_lora) first."
        )
