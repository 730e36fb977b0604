"""transformers' models saved as Hugging Face folders: config.json and safetensors."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from lora.decoder.quantised.base import refuse_quantised
from lora.errors import CheckpointError, ModelError
from lora.layers.trainable_tokens import TrainableTokensLayer
from lora.lora_module import LoRALayer
from lora.pretrained.hf_files import INDEX, SINGLE
from lora.pretrained.load.shards import MAX_SHARD_BYTES
from lora.pretrained.transformers_models.model import TransformersModel
from lora.pretrained.transformers_models.quiet import quiet
from lora.runs.disk import disk_error

CONFIG = "config.json"


def save_transformers_model(model: TransformersModel, folder: Path) -> None:
    """Write `model` into `folder` under the names of its files, as transformers does.

    The files are written beside and then renamed, so that the folder can be the one that it was
    read from. Raises ModelError for LoRA that was not merged, CheckpointError if writing fails.
    """
    adapted = [
        n for n, m in model.named_modules() if isinstance(m, LoRALayer | TrainableTokensLayer)
    ]
    if adapted:
        raise ModelError(
            f"Cannot save the model as a plain {model.config.family!r} model: {adapted[0]} is "
            "adapted. Merge its LoRA first: merge_lora(model)."
        )
    refuse_quantised(model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".model.", dir=folder) as part:
            with quiet(), _plain_generation(model.theirs):
                model.theirs.save_pretrained(part, max_shard_size=MAX_SHARD_BYTES)
            _replace(Path(part), folder)
    except OSError as error:
        raise disk_error(folder, error) from error
    except SafetensorError as error:  # a disk that is full, for one
        raise CheckpointError(f"Cannot write {folder}: {error}. Check that disk.") from error


def cast_parameters(model: nn.Module, kind_of: Callable[[str], torch.dtype]) -> None:
    """Changes `model` in place: each parameter gets the dtype that `kind_of` returns for its name.

    A tensor with two names stays one.
    """
    changed: dict[int, nn.Parameter] = {}
    former = []  # held, so that no new tensor gets the id of one that was let go
    for name, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in changed:
                kind = kind_of(f"{name}.{key}" if name else key)
                former.append(parameter)
                changed[id(parameter)] = nn.Parameter(
                    parameter.detach().to(kind), requires_grad=parameter.requires_grad
                )
            setattr(module, key, changed[id(parameter)])


@contextmanager
def _plain_generation(theirs: Any) -> Iterator[None]:
    """Inside the context `theirs` has no generation settings: the base's file has them.

    transformers refuses to write some that it has read.
    """
    from transformers import GenerationConfig

    own = theirs.generation_config
    theirs.generation_config = GenerationConfig()
    try:
        yield
    finally:
        theirs.generation_config = own


def _replace(part: Path, folder: Path) -> None:
    """Move config.json and the weights into `folder`, and remove files of an earlier save."""
    written = {path.name for path in part.iterdir()} & {CONFIG, INDEX} | {
        path.name for path in part.glob("*.safetensors")
    }
    for name in sorted(written, key=lambda name: name == CONFIG):
        os.replace(part / name, folder / name)
    if INDEX in written:
        (folder / SINGLE).unlink(missing_ok=True)
    else:
        (folder / INDEX).unlink(missing_ok=True)
