"""Apply LoRA to a model, remove it, and disable it for a while.

Works on any nn.Module: layers are found by name and replaced in place, and everything that does not
train is frozen. The names of the base's parameters do not change.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import nn

from lora.adapters.experts import is_first_note, note_left_out
from lora.adapters.targets import (
    ALL_LINEAR,
    check_saved,
    find_saved,
    find_targets,
    matches,
    refuse_shared,
)
from lora.config import LoRAConfig
from lora.errors import AdapterError, ConfigError, LoraError, TargetError
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
from lora.layers.wide import outside_dtype
from lora.lora_module import LoRALayer
from lora.terminal import escaping_log

log = escaping_log(__name__)


@dataclass
class AppliedLoRA:
    """What `apply_lora` did to a model, stored on it as `model.applied_lora`."""

    config: LoRAConfig
    target_names: tuple[str, ...]
    """Full names of the wrapped layers, in the model's order."""
    originals: dict[str, nn.Module] = field(default_factory=dict)
    """The fully trained modules (`modules_to_save`) by full name, as they were before training."""
    trainable_tokens: dict[str, TrainableTokensLayer] = field(default_factory=dict)
    """By full name, the embedding and the head if some of their rows train (`train_token_rows`)."""

    base_vocab_size: int | None = None
    """Rows of the base's token tables before any were added; None if they could not grow."""
    folder: Path | None = None
    """Directory that the adapter was loaded from."""
    name: str = "default"
    """Of several adapters on the model: see `lora.adapters.named.switch`."""
    is_disabled: bool = False
    """Whether this is within `disabled_adapter`."""
    filled_tables: tuple[str, ...] = ()
    """Full names of tables whose added rows came from a file, and not from their mean."""


def apply_lora(model: nn.Module, config: LoRAConfig | None = None) -> nn.Module:
    """Changes `model` in place: wrap the layers that `config` selects, freeze everything else.

    Modules named in `modules_to_save` are replaced by trainable copies, so that a tensor shared
    with them (a tied head) stays frozen. Returns `model`.

    Raises TargetError if a name matches nothing, if nothing is left to adapt or if `model` has LoRA
    already, AdapterError within `disabled_adapter`, and ConfigError for a rank too large for a
    layer; `model` is then unchanged.
    """
    config = config or LoRAConfig()
    _refuse_second_time(model)
    return _wrap(model, config, find_targets(model, config), find_saved(model, config))


def apply_lora_by_full_names(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Changes `model` in place, as `apply_lora`, for values that are loaded next.

    Every name in `config` is a full name, so one that is the ending of another means itself alone.
    The parameters of fully trained modules have no values yet.
    """
    _refuse_second_time(model)
    refuse_shared(model, list(config.targets))
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    return _wrap(
        model,
        config,
        sorted(config.targets, key=order.__getitem__),
        sorted(config.modules_to_save, key=order.__getitem__),
        has_values=False,
    )


def _wrap(
    model: nn.Module,
    config: LoRAConfig,
    names: list[str],
    saved: list[str],
    *,
    has_values: bool = True,
) -> nn.Module:
    """Changes `model` in place: `names` get LoRA, `saved` train fully, the rest is frozen."""
    check_saved(model, saved, names)
    generator = None
    if config.init_seed is not None:
        generator = torch.Generator().manual_seed(config.init_seed)
    # All layers are built before the first replaces its base: an error leaves the model unchanged.
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        layers = {name: _build_layer(model, name, config, generator) for name in names}
    except LoraError:
        for parameter in trainable:  # building a layer froze its base
            parameter.requires_grad_(True)
        raise
    if has_values:  # an adapter that is loaded was noted when it was made
        _note_high_ranks(model, layers)
        note_left_out(model, names, is_all_linear=config.targets == ALL_LINEAR)
    model.requires_grad_(False)
    for name, layer in layers.items():
        replace_module(model, name, layer)
    applied = AppliedLoRA(config, tuple(names))
    for name in saved:
        applied.originals[name] = model.get_submodule(name)
        copied = _copy_module(applied.originals[name], has_values=has_values)
        replace_module(model, name, copied.requires_grad_(True))
    model.applied_lora = applied  # type: ignore[assignment]
    return model


def _note_high_ranks(model: nn.Module, layers: Mapping[str, LoRALayer]) -> None:
    high = [n for n, x in layers.items() if x.rank > min(x.in_features, x.out_features)]
    if high and is_first_note(model, "high ranks", *high):
        layer = layers[high[0]]
        log.warning(
            "the rank is above the smaller side of %s (%s: rank %d, %d inputs, %d outputs): "
            "the same update needs no more than that side",
            "1 layer" if len(high) == 1 else f"{len(high)} layers",
            *(high[0], layer.rank, layer.in_features, layer.out_features),
        )


def _copy_module(module: nn.Module, *, has_values: bool = True) -> nn.Module:
    """Return a copy with tensors of its own; without values it takes no memory yet."""
    # Tensors are copied by value: deepcopy would also copy the mode that the fake tensors of a
    # memory plan belong to, and tensors of two modes do not mix.
    copied = torch.clone if has_values else torch.empty_like
    memo: dict[int, object] = {id(p): nn.Parameter(copied(p.detach())) for p in module.parameters()}
    memo |= {id(b): b.detach().clone() for b in module.buffers()}
    return copy.deepcopy(module, memo)


def applied_lora(model: nn.Module) -> AppliedLoRA:
    """Return what `apply_lora` did to `model`. Raises TargetError if it was never applied."""
    applied = vars(model).get("applied_lora")
    if not isinstance(applied, AppliedLoRA):
        raise TargetError(
            f"Cannot use an adapter: this {type(model).__name__} has no LoRA. Call "
            "apply_lora(model, LoRAConfig(...)) or load_adapter(model, folder) first."
        )
    return applied


def train_token_rows(
    model: nn.Module,
    ids: Sequence[int] | Mapping[str, Sequence[int]],
    *,
    n_known: int | None = None,
) -> nn.Module:
    """Changes `model`, which has LoRA, in place: the rows of token `ids` train too.

    They are PEFT's `trainable_token_indices`: rows of the embedding and of the output head. A plain
    list is for both tables, a mapping for those it names; a tied head shares the embedding's rows
    unless it is given others, or is given alone. Tables that are too small grow first. Ids from
    `n_known` on (by default the table's rows) are new tokens, whose rows start at the mean of those
    before; the others start as they are.
    Returns `model`.

    Raises TargetError for tables that train in another way already or cannot be wrapped,
    ConfigError for invalid ids, and AdapterError within `disabled_adapter`; `model` is then
    unchanged.
    """
    refuse_disabled(model, "train tokens")
    applied, tables = applied_lora(model), find_token_tables(model)
    by_name = token_ids_by_table(ids, tables)
    _refuse_other_training(by_name, applied)
    base_rows = tables.embedding.num_embeddings
    n_rows = max(base_rows, *(max(chosen) + 1 for chosen in by_name.values()))
    resize_vocabulary(model, n_rows)
    known = base_rows if n_known is None else min(n_known, n_rows)
    if applied.base_vocab_size is None:
        applied.base_vocab_size = base_rows
    applied.trainable_tokens = build_trainable_tokens(
        find_token_tables(model), by_name, known, applied.base_vocab_size
    )
    for name, layer in applied.trainable_tokens.items():
        replace_module(model, name, layer)
    model.requires_grad_(False)
    for parameter in trained_parameters(model):
        parameter.requires_grad_(True)
    return model


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return what trains: A and B, fully trained modules, and the rows of trainable tokens."""
    applied = applied_lora(model)
    trained = [p for x in lora_layers(model).values() for p in (x.lora_A, x.lora_B)]
    for name in applied.originals:
        trained += model.get_submodule(name).parameters()
    return trained + [layer.token_rows for layer in applied.trainable_tokens.values()]


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Return the LoRA layers of `model` by full name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALayer)}


def remove_lora(model: nn.Module) -> nn.Module:
    """Changes `model` in place: the base as it was before `apply_lora`, all of it frozen.

    Adapters that were loaded beside the active one are forgotten. Raises AdapterError within
    `disabled_adapter`; `model` is then unchanged.
    """
    refuse_disabled(model, "remove LoRA")
    applied = applied_lora(model)
    for name, layer in lora_layers(model).items():
        replace_module(model, name, layer.unwrap())
    for name, original in applied.originals.items():
        replace_module(model, name, _moved_beside(original, model.get_submodule(name)))
    for name in applied.trainable_tokens:
        replace_module(model, name, _token_layer(model, name).unwrap())
    if applied.base_vocab_size is not None:
        resize_vocabulary(model, applied.base_vocab_size)
    del model.applied_lora
    vars(model).pop("stored_adapters", None)
    return model


@contextmanager
def disabled_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block `model` computes as its base did; afterwards it is adapted again.

    Added tokens exist in the base too: their rows are the mean of its own.
    """
    applied = applied_lora(model)
    if applied.is_disabled:  # a block within a block
        yield model
        return
    names = [*applied.target_names, *applied.originals, *applied.trainable_tokens]
    adapted = {name: model.get_submodule(name) for name in names}
    for name, module in adapted.items():
        replace_module(model, name, plain_module(applied, name, module))
    applied.is_disabled = True
    try:
        yield model
    finally:
        applied.is_disabled = False
        for name, module in adapted.items():
            replace_module(model, name, module)


def plain_module(applied: AppliedLoRA, name: str, adapted: nn.Module) -> nn.Module:
    """Return the base's module in place of one that is `adapted`, in the same mode."""
    if isinstance(adapted, LoRALayer | TrainableTokensEmbedding | TrainableTokensLinear):
        plain: nn.Module = adapted.unwrap()
    else:
        plain = _moved_beside(applied.originals[name], adapted)
    return plain.train(adapted.training)


def refuse_disabled(model: nn.Module, what: str) -> None:
    """Raise AdapterError within `disabled_adapter`, which puts back what it took off."""
    if applied_lora(model).is_disabled:
        raise AdapterError(
            f"Cannot {what} within disabled_adapter(model), which brings back the adapter that was "
            "active. Do it before or after the block."
        )


def stored_adapters(model: nn.Module) -> dict[str, object]:
    """Return the adapters of `model` that are not active, by name. Asking changes nothing."""
    return cast("dict[str, object]", vars(model).get("stored_adapters", {}))


@contextmanager
def unchanged_on_error(model: nn.Module, grows_from: int | None = None) -> Iterator[None]:
    """An error within the block leaves `model`, which has no LoRA, as it was before.

    `grows_from`: the rows of the vocabulary, if it grows within the block.
    """
    modules = [(module, dict(module._modules)) for module in model.modules()]
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    is_done = False
    try:
        yield
        is_done = True
    finally:
        if not is_done:
            vars(model).pop("applied_lora", None)
            for module, children in modules:
                module._modules.clear()
                module._modules.update(children)
            if grows_from is not None:
                resize_vocabulary(model, grows_from)
            for name, parameter in model.named_parameters():  # the tables' may be new ones
                parameter.requires_grad_(trains[name])


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Changes `model` in place: replace the submodule called `name` by `new`."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    parent._modules[child] = new  # setattr would refuse the digits of a ModuleList


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
        raise ConfigError(f"Cannot adapt {name!r}: {error}") from None


def _by_name(name: str, pattern: dict[str, int] | dict[str, float], default: float) -> float:
    return next((v for key, v in pattern.items() if matches(name, key)), default)


def _moved_beside(original: nn.Module, trained: nn.Module) -> nn.Module:
    """Changes `original` in place: to the device of its trained copy, and the dtype around it."""
    device = next(trained.parameters()).device
    return original.to(device, outside_dtype(trained))  # in place, so a tied head follows


def _refuse_other_training(by_name: dict[str, tuple[int, ...]], applied: AppliedLoRA) -> None:
    if applied.trainable_tokens:
        raise TargetError(
            "Cannot train more tokens: this model has trainable tokens already. Give all of them "
            "at once, or merge it (merge_lora) and start again."
        )
    for name in by_name:
        if any(matches(name, saved) or name.startswith(f"{saved}.") for saved in applied.originals):
            raise TargetError(
                f"Cannot train selected tokens in {name!r}: modules_to_save trains all of it. "
                "Leave it out of modules_to_save."
            )


def _token_layer(model: nn.Module, name: str) -> TrainableTokensLayer:
    return cast(TrainableTokensLayer, model.get_submodule(name))


def _refuse_second_time(model: nn.Module) -> None:
    if "applied_lora" in vars(model):
        refuse_disabled(model, "apply LoRA")
    wrapped = next(iter(lora_layers(model)), None)
    if wrapped is not None:
        raise TargetError(
            f"Cannot apply LoRA: the model already has it (at {wrapped!r}, for one). Merge it "
            "(merge_lora) or remove it (remove_lora) first."
        )
