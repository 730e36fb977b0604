"""Make an adapter, or after full fine-tuning a whole model, of one checkpoint of a run.

A checkpoint holds what trained under the model's own names. How PEFT names it, the adapter's
settings, tokenizer and prompt format come from the adapter that the run saved before its first step
(`checkpoints/start/`), or in older run directories from the one that it saved at its end.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import Tensor

from lora.adapters.peft_files import (
    CONFIG_FILE,
    TENSORS_FILE,
    AdapterFiles,
    read_adapter_files,
    write_adapter_files,
)
from lora.adapters.peft_tensors import PREFIX
from lora.adapters.peft_tokens import ENDING
from lora.data.prompting.prompt_format import save_prompt_format
from lora.errors import AdapterError, CheckpointError, gather
from lora.inference.checkpoints.listing import CHECKPOINTS, START, CheckpointEntry
from lora.runs.disk import disk_error
from lora.runs.read_record import read_run_record
from lora.training.checkpoint import read_trained_tensors


def extract_adapter(run: Path, entry: CheckpointEntry, folder: Path) -> None:
    """Write the adapter of a checkpoint of the run directory `run` into `folder`.

    Raises CheckpointError if the checkpoint cannot be used, or the disk refuses; AdapterError if
    the adapter that it is made after is damaged.
    """
    template = _find_template(run)
    files = read_adapter_files(template)
    if files.faults:
        raise AdapterError(
            gather(files.faults, f"Cannot use the adapter {template}:", "Resume the run once.")
        )
    tensors = _named_as_in_file(run, files, read_trained_tensors(entry.path), entry)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(template.iterdir()):
            if file.is_file() and file.name not in (CONFIG_FILE, TENSORS_FILE):
                shutil.copyfile(file, folder / file.name)
    except OSError as error:
        raise disk_error(folder, error) from error
    write_adapter_files(folder, files.described, tensors, files.metadata)  # last: it is whole then


def extract_model(run: Path, entry: CheckpointEntry, folder: Path) -> None:
    """Write the whole model of a checkpoint of full fine-tuning into `folder`.

    Raises CheckpointError if the checkpoint cannot be used, or the disk refuses; ModelError if the
    run's base cannot be loaded.
    """
    from lora.adapters.added_tokens import add_tokens_to_all
    from lora.data.chat.choose_template import choose_template
    from lora.data.tokenizers.subword import load_tokenizer
    from lora.inference.run_settings import recorded_implementation
    from lora.pretrained.load.models import load_language_model, save_language_model
    from lora.pretrained.model_files import save_tokenizer_files
    from lora.pretrained.sources import find_model
    from lora.training.checkpoint import load_trained_tensors

    record = read_run_record(run)
    source = find_model(record.model_source)
    kind = recorded_implementation(record) or "native"
    model = load_language_model(source.folder, implementation=kind).requires_grad_(True)
    settings = record.data_config or {}
    tokens, template = tuple(settings.get("special_tokens") or ()), settings.get("chat_template")
    saved = run / "model"
    tokenizer = load_tokenizer(saved if saved.is_dir() else source.folder)
    if tokens and not saved.is_dir():
        tokenizer = tokenizer.with_tokens(tokens)
    if template is not None and not saved.is_dir():
        tokenizer = choose_template(tokenizer, Path(template))[0]
    add_tokens_to_all(model, tokenizer, tokens)
    load_trained_tensors(model, entry.path)
    save_language_model(model, folder)
    save_tokenizer_files(tokenizer, source.folder, folder)
    if record.data.prompt_format is not None:
        save_prompt_format(record.data.prompt_format, folder)


def _find_template(run: Path) -> Path:
    for folder in (run / CHECKPOINTS / START, run / "adapter"):
        if (folder / CONFIG_FILE).is_file():
            return folder
    raise CheckpointError(
        f"Cannot make an adapter of a checkpoint of {run}: an older version of lora began this "
        "run, and it has saved no adapter yet. Resume it once with --resume."
    )


def _named_as_in_file(
    run: Path, files: AdapterFiles, trained: dict[str, Tensor], entry: CheckpointEntry
) -> dict[str, Tensor]:
    """Return the trained tensors by PEFT's names, with what the file holds besides.

    Raises CheckpointError if the file has no place for one of them.
    """
    tensors, used = {}, set()
    for key, before in files.tensors.items():
        name = _name_in_checkpoint(key)
        if name not in trained:  # a copy of a token table, which does not train
            tensors[key] = before
            continue
        used.add(name)
        tensor = trained[name]
        is_of_module = name == key.removeprefix(PREFIX)
        if is_of_module and tensor.ndim == 2 and _is_transposed(run, name):
            tensor = tensor.T
        tensors[key] = tensor.contiguous()
    faults = [f"not in the adapter's file: {name}" for name in sorted(trained.keys() - used)]
    faults += [
        f"{key}: {tuple(tensor.shape)}, and {tuple(files.tensors[key].shape)} in the file"
        for key, tensor in tensors.items()
        if tensor.shape != files.tensors[key].shape
    ]
    if faults:
        what = f"Cannot make an adapter of {entry.path} after {files.folder}:"
        raise CheckpointError(gather(faults, what, "They are not of the same run."))
    return tensors


def _name_in_checkpoint(key: str) -> str:
    """Return the model's own name of a tensor that PEFT's file calls `key`."""
    name = key.removeprefix(PREFIX)
    if name.endswith((".lora_A.weight", ".lora_B.weight")):
        return name.removesuffix(".weight")
    if name.endswith(ENDING):
        return name.removesuffix(ENDING) + ".token_rows"
    return name


def _is_transposed(run: Path, name: str) -> bool:
    """Whether the files of the run's base have this parameter as (I, O): GPT-2's linears."""
    from lora.inference.run_settings import recorded_implementation
    from lora.pretrained.load.models import model_config
    from lora.pretrained.sources import find_model

    record = read_run_record(run)
    config = model_config(
        find_model(record.model_source).folder, recorded_implementation(record) or "native"
    )
    return config.is_transposed_in_files(name)
