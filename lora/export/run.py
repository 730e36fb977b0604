"""An adapter or a model as files for other programs: a GGUF file, or a merged model's directory.

lora.export("orders.gguf", adapter="runs/orders/adapter", dtype="q8_0")
lora.merge("runs/orders/adapter", "merged")
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from lora.config import BaseDtype, ImplementationName
from lora.data.prompting.prompt_format import save_prompt_format
from lora.data.tokenizers.subword import TextTokenizer, load_tokenizer
from lora.decoder.language_model import LanguageModel
from lora.device import choose_device
from lora.errors import AdapterError, ConfigError
from lora.export.chosen import choose_values
from lora.export.gguf import GGUFReport, check_gguf, export_gguf
from lora.export.merged import MergedDtype, MergedModel, write_merged
from lora.inference.checkpoints.find import find_adapter
from lora.inference.loading import (
    checked_ids,
    describe_other_base,
    find_implementation_of,
    find_model_of,
    folders_of,
    load_tokenizer_of,
    map_adapted,
    model_inputs,
)
from lora.inference.run_settings import find_prompt_format
from lora.pretrained.gguf_writer import GGUFType
from lora.pretrained.hf_files import read_config
from lora.pretrained.load.models import implementation_of, map_language_model
from lora.pretrained.mapped import MappedModel
from lora.pretrained.model_files import MODEL_FILES
from lora.pretrained.sources import ModelSource
from lora.runs.outputs import OutputPath, input_paths


def export(
    out: str | Path,
    *,
    model: str | Path | LanguageModel | None = None,
    tokenizer: TextTokenizer | None = None,
    adapter: str | Path | None = None,
    dtype: GGUFType = "f16",
    implementation: ImplementationName = "auto",
    base_dtype: BaseDtype = "auto",
    overwrite: bool = False,
) -> GGUFReport:
    """Write a model as the GGUF file `out`, with the adapter merged, and verify what was written.

    Every tensor and the logits of the file are compared with the model; nothing is left behind if
    they differ by more than rounding allows.

    Args:
        out: the file to write.
        model: a directory, a .gguf file or a hub's owner/name; None: the base that the adapter
            names, else SmolLM2-135M-Instruct. Or a model in memory, as `lora.load_model` returns
            it, whose LoRA is merged in the file.
        tokenizer: of a model in memory.
        adapter: directory of an adapter for a model that is not in memory.
        dtype: storage type of the weight matrices: f16, q8_0 or f32.
        implementation: only a native decoder writes GGUF files: auto or native.
        base_dtype: auto merges into the values of the base that the adapter was trained over (of
            nf4 or fp8 unpacked), original into those that are not quantised; nf4, int8 or fp8 into
            the values of that kind, for adapters of other tools, which do not name theirs.
        overwrite: replace a file that exists.
    """
    path = Path(out)
    if isinstance(model, LanguageModel):
        if base_dtype != "auto":
            raise ConfigError(
                "Cannot export a model in memory with base_dtype=…: it has the values that it was "
                "loaded with. Leave it out, or give the model's name."
            )
        if adapter is not None:
            raise ConfigError(
                "Cannot export a model in memory with adapter=…: it has the adapter that is on it. "
                "Call load_adapter(model, folder) first, or give the model's name."
            )
        read = input_paths(vars(model).get("model_reference"), *folders_of(model))
        return export_gguf(
            model, path, dtype, tokenizer=tokenizer, overwrite=overwrite, inputs=read
        )
    if tokenizer is not None:
        raise ConfigError(
            "Cannot export with tokenizer=…: the files of the model or of the adapter have one. "
            "Give it with a model in memory, or leave it out."
        )
    name, folder = _as_given(model, adapter)
    inputs = model_inputs(name, folder)
    OutputPath(path, inputs, overwrite).check()
    source = find_model_of(name, folder)
    # An adapter fits the native decoder too, whichever code has trained it.
    check_gguf(implementation_of(source.folder, implementation), read_config(source.folder))
    values = choose_values(base_dtype, folder, source.folder)
    return export_gguf(
        _open(source, name, folder, "native"),
        path,
        dtype,
        rounded_as=values.rounded_as,
        tokenizer=load_tokenizer_of(source, folder),
        name=source.name,
        overwrite=overwrite,
        inputs=(*inputs, source.folder),
    )


def merge(
    adapter: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    dtype: MergedDtype | None = None,
    device: str = "cpu",
    implementation: ImplementationName = "auto",
    base_dtype: BaseDtype = "auto",
    requantise: bool = False,
    overwrite: bool = False,
) -> MergedModel:
    """Merge an adapter into its base, compare the logits, and write the model as a directory.

    transformers loads it. The base's generation settings, tokenizer settings and chat templates are
    kept.

    Args:
        adapter: directory of the adapter.
        out: directory to write: a new or empty one.
        model: the base; see `export`.
        dtype: of the weights: float32, bfloat16 or float16; None: each tensor's in the base. Or
            nf4, which is refused with what it costs unless `requantise` is given.
        device: where the merge is computed.
        implementation: native, transformers, or auto: what the adapter's run recorded.
        base_dtype: see `export`.
        requantise: write 4 bits (dtype nf4) although rounding them again loses accuracy.
        overwrite: replace a merged model that exists.
    """
    if requantise and dtype != "nf4":
        raise ConfigError(
            f"Cannot use requantise with dtype={dtype!r}: it is for merging into nf4. Add "
            "dtype=nf4, or leave it out."
        )
    name, folder = _as_given(model, adapter)
    folder = cast(Path, folder)
    output = OutputPath(
        Path(out),
        model_inputs(name, folder),
        overwrite,
        is_directory=True,
        replaceable=MODEL_FILES,
    )
    with output.building() as part:
        choice, source = choose_device(device), find_model_of(name, folder)
        kind = find_implementation_of(source, folder, implementation).kind
        values = choose_values(base_dtype, folder, source.folder)
        mapped, base = _open(source, name, folder, kind), source.folder
        has_tokenizer = (folder / "tokenizer.json").is_file()
        merged = write_merged(
            mapped,
            checked_ids(mapped.model, load_tokenizer_of(source, folder)),
            base=base,
            tokenizer=load_tokenizer(folder if has_tokenizer else base),
            folder=part,
            dtype=dtype,
            device=choice.device,
            values=values,
            requantise=requantise,
        )
        prompts = find_prompt_format(folder, base)
        if prompts is not None:
            save_prompt_format(prompts, part)
    return merged


def _as_given(
    model: str | Path | None, adapter: str | Path | None
) -> tuple[str | None, Path | None]:
    folder = None if adapter is None else find_adapter(adapter)
    return None if model is None else str(model), folder


def _open(
    source: ModelSource, model: str | None, adapter: Path | None, kind: ImplementationName
) -> MappedModel:
    """Return the model, mapped from its files in their dtypes, with the adapter on it."""
    if adapter is None:
        return map_language_model(source.folder, kind)
    try:
        return map_adapted(source, adapter, kind)
    except AdapterError as error:
        raise AdapterError(f"{error}{describe_other_base(model, adapter, source)}") from None
