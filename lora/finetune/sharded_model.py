"""The model of a finetune job that is sharded: frozen weights come later, each process its rows.

What trains beside LoRA's frozen base is whole in every process, with the values that one process
alone would have drawn. Until LoRA and tokens are in their places, every other weight is stood in
for by one zero that is seen as the whole tensor: the code that prepares a loaded model prepares
this one too, and no weight is read before its shard is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lora.adapters.apply import AppliedLoRA, applied_lora
from lora.adapters.bases.quantisation import quantisation_from
from lora.adapters.fingerprint import base_fingerprint
from lora.data.tokenizers.subword import TextTokenizer
from lora.decoder.decoder import Decoder, build_empty_decoder
from lora.decoder.quantised.base import QuantisedWeight, quantised_modules
from lora.device import DeviceChoice
from lora.distributed.shards import ALL_ROWS, Rows
from lora.finetune.job import FinetuneJob
from lora.finetune.model import prepare_model, tell_storage
from lora.finetune.weight_rows import WeightRows
from lora.layers.quantised_model import use_quantised_linears
from lora.layers.token_tables import find_token_tables
from lora.pretrained.load.task import check_native_only
from lora.pretrained.quantised.linears import use_packed_linears
from lora.pretrained.sources import ModelSource
from lora.runs.progress import Progress


@dataclass(frozen=True)
class ShardedModel:
    """A model whose shards are not loaded yet."""

    model: Decoder
    """What is to be sharded is on the meta device, in the dtype it gets: frozen weights, or all of
    them in full fine-tuning. Quantised linears have neither codes nor scales."""
    rows: Rows
    """The values of what is on the meta device, by the parameters' names in `model`."""
    fingerprint: str
    """Of the base, as one process computes it."""


@torch.no_grad()
def build_sharded_model(
    job: FinetuneJob,
    source: ModelSource,
    choice: DeviceChoice,
    tokenizer: TextTokenizer,
    progress: Progress,
) -> ShardedModel:
    """Return the model of `job` ready to be sharded. Sets torch's seed.

    Raises ModelError and AdapterError as loading it whole does, ConfigError for tables in nf4.
    """
    files = WeightRows(source.folder)
    check_native_only(files.model.config, base=job.base_weights, fsdp=True)  # where it was chosen
    fingerprint = base_fingerprint(files.model, files.release)
    model = build_empty_decoder(files.model.config)
    # In full fine-tuning what is stored stays in fp32; the base of LoRA has the compute dtype.
    wide = torch.promote_types(choice.compute_dtype, torch.float32)
    model.to(wide if job.is_full else choice.compute_dtype)
    if quantised_modules(files.model):
        use_packed_linears(model, files.model)
    else:
        use_quantised_linears(model, job.base_weights)
    _each_tensor(model, lambda tensor: _stand_in(tensor, choice.device))
    model.known_fingerprint = fingerprint
    model.known_quantisation = quantisation_from(model, files.model, files.release)
    tell_storage(model, progress)
    has_tables = bool(job.data_config.special_tokens) or job.from_adapter is not None
    if has_tables:
        _load_token_tables(model, files)
    prepare_model(job, model, tokenizer, progress)
    if job.from_adapter is None and not job.is_full:
        _load_saved_modules(model, files)
    changed = _changed_tables(model, files, tokenizer) if has_tables else {}
    drop_values(model, keep_trained=not job.is_full)
    return ShardedModel(model, _with_changed(files, changed), fingerprint)


def drop_values(model: Decoder, *, keep_trained: bool) -> None:
    """Changes `model` in place: its tensors move to the meta device, or all that do not train."""
    _each_tensor(model, lambda t: t if t.requires_grad and keep_trained else _on_meta(t))


def _each_tensor(model: Decoder, change: Callable[[Tensor], Tensor]) -> None:
    """Changes `model` in place: every parameter and scale becomes what `change` returns.

    A tensor with two names stays one.
    """
    applied = vars(model).get("applied_lora")
    originals = applied.originals.values() if isinstance(applied, AppliedLoRA) else ()
    changed: dict[int, nn.Parameter] = {}
    former = []  # held, so that no new tensor gets the id of one that was let go
    for module in [*model.modules(), *(m for part in originals for m in part.modules())]:
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in changed:
                former.append(parameter)
                new = nn.Parameter(change(parameter), requires_grad=parameter.requires_grad)
                changed[id(parameter)] = changed[id(new)] = new
                former.append(new)
            setattr(module, key, changed[id(parameter)])
        if isinstance(module, QuantisedWeight):
            for key in module.packed_names:
                setattr(module, key, change(module.get_buffer(key)))


def _stand_in(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape)


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _load_token_tables(model: Decoder, files: WeightRows) -> None:
    """Changes `model` in place: embedding and head get their values, for rows that are added."""
    tables = find_token_tables(model)
    for name, table in tables.by_name.items():
        if not (tables.is_tied and name == tables.head_name):
            like = cast(Tensor, table.weight)
            table.weight = nn.Parameter(files(f"{name}.weight", ALL_ROWS).to(like))
    model.tie_head()


def _load_saved_modules(model: Decoder, files: WeightRows) -> None:
    """Changes `model` in place: fully trained modules get the base's values."""
    for name in applied_lora(model).originals:
        for key, parameter in model.get_submodule(name).named_parameters():
            parameter.copy_(files(f"{name}.{key}", ALL_ROWS))


def _changed_tables(
    model: Decoder, files: WeightRows, tokenizer: TextTokenizer
) -> dict[str, tuple[int, Tensor]]:
    """Return, by name, from which row on a token table is not as in the files, and these rows."""
    first = files.model.config.vocab_size
    first = first if tokenizer.n_known is None else min(first, tokenizer.n_known)
    tables = find_token_tables(model).by_name
    weights = {f"{name}.weight": cast(Tensor, table.weight) for name, table in tables.items()}
    return {name: (first, weight.detach()[first:].cpu()) for name, weight in weights.items()}


def _with_changed(files: WeightRows, changed: dict[str, tuple[int, Tensor]]) -> Rows:
    """Return `files` with the rows that are `changed` in place of its own."""

    def read(name: str, rows: slice) -> Tensor:
        if name not in changed:
            return files(name, rows)
        first, values = changed[name]
        start, stop, _ = rows.indices(first + len(values))
        parts = [values[max(0, start - first) : max(0, stop - first)]]
        if start < first:
            parts = [files(name, slice(start, min(stop, first))), *parts]
        return torch.cat(parts)

    return read
