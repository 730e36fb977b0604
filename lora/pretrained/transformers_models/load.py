"""transformers' causal models loaded, or taken as they are, as language models of this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora.decoder.language_model import LanguageModel
from lora.errors import DependencyError, ModelError, gather
from lora.pretrained.transformers_models.model import TransformersModel
from lora.pretrained.transformers_models.probe import REFUSALS, probe
from lora.pretrained.transformers_models.quiet import quiet
from lora.settings.install import install_extra


def as_language_model(model: nn.Module) -> LanguageModel:
    """Return `model` itself if it is a LanguageModel, or one of transformers' models as one.

    The wrapper shares the model's parts: both are adapted and trained together. Raises ModelError
    for any other module.
    """
    if isinstance(model, LanguageModel):
        return model
    if not is_transformers(model):
        raise ModelError(
            f"Cannot use a {type(model).__name__} as a language model. Allowed: lora's Decoder, "
            "transformers' causal models."
        )
    theirs: Any = model
    return TransformersModel(theirs, probe(theirs.config))


def is_transformers(model: object) -> bool:
    """Whether `model` is of a class of transformers; never imports transformers."""
    return any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__)


def load_transformers_model(
    folder: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TransformersModel:
    """Return the causal language model in `folder`, with parameters of `dtype` on `device`.

    transformers builds it and reads its safetensors files; code in the folder is never run.

    Raises DependencyError if transformers is not installed, ModelError for an architecture that it
    does not know, files that it cannot read, and tensors that are missing or of another shape.
    """
    with _read_by_transformers(folder) as transformers:
        theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        traits = probe(theirs.config)
    faults = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    faults += [f"{name} has another shape" for name, *_ in sorted(report["mismatched_keys"])]
    if faults:
        heading = f"Cannot load {folder}: its tensors do not match config.json:"
        advice = "Check that config.json and the weights belong together; download both again."
        raise ModelError(gather(faults, heading, advice))
    return TransformersModel(theirs.to(device).eval(), traits)


def empty_transformers_model(
    folder: Path | str, dtype: torch.dtype = torch.float32
) -> TransformersModel:
    """Return the model in `folder` without values: all its parameters are on the meta device.

    Raises as `load_transformers_model`; no weights are read.
    """
    with _read_by_transformers(folder) as transformers:
        config = transformers.AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        return TransformersModel(theirs.eval(), probe(theirs.config))


@contextmanager
def _read_by_transformers(folder: Path | str) -> Iterator[Any]:
    """Yield the package; what it refuses inside the context is a ModelError."""
    try:
        import transformers
    except ImportError as error:
        raise DependencyError(
            f"Cannot load {folder}: its architecture needs transformers, which is not installed. "
            f"Install it: {install_extra('hf')}"
        ) from error
    try:
        with quiet():  # what it reports of the weights is raised here
            yield transformers
    except REFUSALS as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"Cannot load {folder} with transformers: {str(error).strip() or type(error).__name__}"
        ) from error
