"""Save and load adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Loading is strict: every name, shape and setting is checked, and one error lists all faults before
the model is changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from lora.adapters.apply import (
    applied_lora,
    apply_lora_by_full_names,
    lora_layers,
    refuse_disabled,
    train_token_rows,
    trained_parameters,
    unchanged_on_error,
)
from lora.adapters.bases.messages import describe_change
from lora.adapters.bases.rules import BaseCheck, base_metadata, check_base, read_trained_base
from lora.adapters.experts import why_not_expert_tensors
from lora.adapters.named.switch import (
    active,
    check_adapter_name,
    loading_beside,
)
from lora.adapters.peft_config import (
    build_config,
    describe_adapter,
    parse_description,
    read_description,
)
from lora.adapters.peft_files import AdapterFiles, read_adapter_files, write_adapter_files
from lora.adapters.peft_tensors import (
    PREFIX,
    adapter_tensors,
    check_tensors,
    expected_tensors,
    is_finite,
    take_saved_modules,
    widened,
    without_base_copies,
    without_peft_wrappers,
)
from lora.adapters.peft_tokens import (
    FIELD,
    FileRows,
    TokenIds,
    describe_trainable_tokens,
    fill_new_rows,
    find_trainable_tokens,
    rows_in_file,
    split_copies,
    table_copies,
)
from lora.config import LoRAConfig
from lora.decoder.language_model import transformers_network
from lora.errors import AdapterError, LoraError, gather
from lora.layers.vocabulary import resize_vocabulary
from lora.terminal import escaping_log

_ADVICE = "Load it onto the base it was trained on, with both files as they were saved."

log = escaping_log(__name__)


def save_adapter(
    model: nn.Module,
    folder: Path | str,
    *,
    base_name: str | None = None,
    name: str | None = None,
) -> None:
    """Write an adapter of `model`: A and B, fully trained modules, and trained embedding rows.

    It is the active one, or the one called `name`.

    Both files are complete on disk before they replace a former adapter's, so a failed save leaves
    that as it was. `base_name` is the base that PEFT should load; None: the name under which
    transformers or `lora.load_model` loaded it, if they did.

    Raises AdapterError for values that are not finite and within `disabled_adapter`, and
    CheckpointError if a file cannot be written.
    """
    refuse_disabled(model, "save an adapter")
    with active(model, name):
        _save_active(model, Path(folder), base_name)


def _save_active(model: nn.Module, folder: Path, base_name: str | None) -> None:
    applied = applied_lora(model)
    described = describe_adapter(
        model, applied, base_name or _loaded_name(model)
    ) | describe_trainable_tokens(model, applied)
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in (
            adapter_tensors(model)
            | {PREFIX + name: tensor for name, tensor in table_copies(model, applied).items()}
        ).items()
    }
    faults = [f"{n} has values that are not finite" for n, t in tensors.items() if not is_finite(t)]
    if faults:
        advice = "Nothing was written. Go back to a checkpoint from before the loss diverged."
        raise AdapterError(gather(faults, f"Cannot save the adapter to {folder}:", advice))
    metadata = {"format": "pt"} | base_metadata(model)
    write_adapter_files(folder, described, tensors, metadata)


def _loaded_name(model: nn.Module) -> str | None:
    """Return the name or path from which transformers or `lora.load_model` loaded `model`."""
    reference = vars(model).get("model_reference")
    if isinstance(reference, str):
        return reference
    network = transformers_network(model)
    return None if network is None else str(network.config.name_or_path) or None


def load_adapter(
    model: nn.Module,
    folder: Path | str,
    *,
    name: str | None = None,
    trainable: bool = False,
    release: Callable[[], None] | None = None,
) -> nn.Module:
    """Changes `model` in place: load the adapter in `folder` onto it. Returns `model`.

    A model without LoRA is wrapped as the adapter's config says; one with LoRA must have the same
    layers, ranks and scalings, and its values are overwritten. With `trainable`, what the adapter
    trained can train again; everything else is frozen either way. Values are cast to the model's
    dtypes. A vocabulary too small for the adapter's tokens grows, with a warning in the log.
    `release` is of a mapped base that is merged next: it gives back pages that were read, and fully
    trained modules then are the file's tensors, in its dtypes.

    With a `name`, a model that has LoRA keeps its active adapter and gets this one beside it, to be
    switched to by `set_adapter(model, name)`; on a model without LoRA it is active under that name.

    Raises AdapterError that lists every fault: another base (by its fingerprint), missing, extra
    or misshapen tensors, and settings that change the result and are not supported. `model` is then
    unchanged. An adapter without a fingerprint loads, with a warning in the log. So does one that
    was trained over other values of the same base (one in nf4, or one that is not): the warning
    says by how much the logits differ, which two passes over a few tokens measure.
    """
    name = None if name is None else check_adapter_name(name)
    has_lora = "applied_lora" in vars(model)
    if has_lora:
        refuse_disabled(model, "load an adapter")
    if has_lora and name is not None:
        with loading_beside(model, name):
            return _load(model, folder, trainable, release)
    _load(model, folder, trainable, release)
    if name is not None:
        applied_lora(model).name = name
    return model


def _load(
    model: nn.Module, folder: Path | str, trainable: bool, release: Callable[[], None] | None
) -> nn.Module:
    files = read_adapter_files(Path(folder))
    why_not = why_not_expert_tensors(model, files.tensors)
    if why_not is not None:
        raise AdapterError(gather([why_not], f"Cannot load the adapter {folder}:", _ADVICE))
    config, faults = read_description(files.described, model)
    base = _check_base(files, model, release)
    faults = files.faults + faults + [*base.faults]
    tensors, ids, fills = files.tensors, cast(TokenIds, {}), cast(dict[str, Tensor], {})
    rows = FileRows(None)
    if config is not None and not files.faults:
        ids, wrong = find_trainable_tokens(model, files.described.get(FIELD), config)
        tensors, doubled = without_peft_wrappers(tensors, config.modules_to_save)
        rows, tensors, fills = _split_copies(model, config, ids, tensors)
        expected = expected_tensors(model, config, ids, rows)
        expected = widened(expected, tensors) if release is not None else expected
        tensors, changed = without_base_copies(model, expected, tensors, rows)
        faults += wrong + doubled + changed + check_tensors(expected, tensors)
        faults += _check_same_layers(model, config, ids) if lora_layers(model) else []
    if config is None or faults:
        raise AdapterError(gather(faults, f"Cannot load the adapter {folder}:", _ADVICE))
    if not lora_layers(model):
        try:
            _apply(model, config, ids, rows)
        except LoraError as error:
            fault = gather([str(error)], f"Cannot load the adapter {folder}:", _ADVICE)
            raise AdapterError(fault) from None
        if rows.grows:
            words = "%s adds tokens: the vocabulary grows from %d to %d%s"
            log.warning(words, folder, rows.base, rows.needed, _unknown_rows(rows, tensors, fills))
    applied_lora(model).folder = files.folder
    fill_new_rows(model, fills, rows.base)
    model.requires_grad_(False)
    taken = take_saved_modules(model, tensors) if release is not None else set()
    with torch.no_grad():
        for name, tensor in adapter_tensors(model).items():
            if name not in taken:
                tensor.copy_(tensors[name])
    if base.is_changed and release is None:  # what is mapped is merged, and compared there
        trained = read_trained_base(files.metadata).quantisation
        log.warning("the adapter %s %s", folder, describe_change(model, trained))
    for parameter in trained_parameters(model):
        parameter.requires_grad_(trainable)
    return model


def read_adapter_config(folder: Path | str) -> LoRAConfig:
    """Return the LoRAConfig of the adapter in `folder`, its layers by full name.

    Raises AdapterError for damaged files and for settings that are not supported.
    """
    files = read_adapter_files(Path(folder))
    description, faults = parse_description(files.described)
    names, ending = [], ".lora_A.weight"
    for key in files.tensors:
        if key.startswith(PREFIX) and key.endswith(ending):
            names.append(key.removeprefix(PREFIX).removesuffix(ending))
    faults = files.faults + faults
    if not names and not files.faults:
        faults.append(f"no tensor has a name {PREFIX}…{ending}")
    if description is None or faults:
        raise AdapterError(gather(faults, f"Cannot use the adapter {folder}:", _ADVICE))
    return build_config(description, names, list(description.saved))


def _apply(model: nn.Module, config: LoRAConfig, ids: TokenIds, rows: FileRows) -> None:
    """Changes `model` in place unless it raises: LoRA, new rows and trainable tokens."""
    with unchanged_on_error(model, rows.base if rows.grows else None):
        if rows.grows:  # before LoRA, whose B has a row for each of an adapted head's
            resize_vocabulary(model, rows.needed)
        # A fixed seed, so that drawing A (overwritten later) leaves torch's global generator alone.
        apply_lora_by_full_names(model, replace(config, init_seed=0))
        applied = applied_lora(model)
        applied.config = config
        applied.base_vocab_size = rows.base if rows.grows else None
        if ids:
            train_token_rows(model, ids)


def _unknown_rows(rows: FileRows, tensors: dict[str, Tensor], fills: dict[str, Tensor]) -> str:
    """Return words on the tables whose new rows are not in the file."""
    tables = rows.tables
    if tables is None:
        return ""
    known = {name for name, values in fills.items() if len(values)}
    known |= {key.removeprefix(PREFIX).partition(".token_adapter.")[0] for key in tensors}
    known |= {key.removeprefix(PREFIX).removesuffix(".weight") for key in tensors}
    if tables.is_tied and known & tables.by_name.keys():
        return ""
    unknown = [name for name in tables.by_name if name not in known]
    words = "; the file does not hold the new rows of %s, which are the mean of the others"
    return words % ", ".join(unknown) if unknown else ""


def _split_copies(
    model: nn.Module, config: LoRAConfig, ids: TokenIds, tensors: dict[str, Tensor]
) -> tuple[FileRows, dict[str, Tensor], dict[str, Tensor]]:
    inside = {k.removeprefix(PREFIX): t for k, t in tensors.items() if k.startswith(PREFIX)}
    outside = {k: t for k, t in tensors.items() if not k.startswith(PREFIX)}
    rows = rows_in_file(model, ids, inside)
    kept, fills = split_copies(rows, config.modules_to_save, inside)
    return rows, {PREFIX + name: tensor for name, tensor in kept.items()} | outside, fills


def _check_base(
    files: AdapterFiles, model: nn.Module, release: Callable[[], None] | None
) -> BaseCheck:
    if files.faults:
        return BaseCheck()
    try:
        trained = read_trained_base(files.metadata)
    except ValueError as error:
        return BaseCheck((f"what it says of its base's quantisation is damaged: {error}",))
    name = files.described.get("base_model_name_or_path")
    check = check_base(trained, model, f" ({name})" if name else "", release)
    if check.warning is not None:
        log.warning("%s %s", files.folder, check.warning)
    return check


def _check_same_layers(model: nn.Module, config: LoRAConfig, ids: TokenIds) -> list[str]:
    layers, saved = lora_layers(model), set(applied_lora(model).originals)
    wanted = set(config.targets)
    faults = [f"adapted on the model, not in the file: {n}" for n in layers.keys() - wanted]
    faults += [f"in the file, not adapted on the model: {n}" for n in wanted - layers.keys()]
    in_file = set(config.modules_to_save)
    faults += [f"fully trained on the model, not in the file: {n}" for n in saved - in_file]
    faults += [f"fully trained in the file, not on the model: {n}" for n in in_file - saved]
    here = {name: layer.ids for name, layer in applied_lora(model).trainable_tokens.items()}
    for name in here.keys() | ids.keys():
        if here.get(name) != ids.get(name):
            seen = f"{list(ids.get(name, ()))} in the file, {list(here.get(name, ()))} on the model"
            faults.append(f"trainable tokens of {name}: {seen}")
    for name in layers.keys() & wanted:
        rank = config.rank_pattern.get(name, config.rank)
        alpha = config.alpha_pattern.get(name, config.alpha)
        scaling, layer = alpha / (math.sqrt(rank) if config.rslora else rank), layers[name]
        if rank != layer.rank or not math.isclose(scaling, layer.scaling):
            own = f"rank {layer.rank} and scaling {layer.scaling:g} on the model"
            faults.append(f"{name}: rank {rank} and scaling {scaling:g} in the file, {own}")
    return sorted(faults)
