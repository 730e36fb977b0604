"""`lora export`: write a model as GGUF, or check an adapter for vLLM."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from lora.cli.flags.shared import Adapter, Model, Overwrite, input_paths
from lora.inference.loading import checked_ids, load_model
from lora.runs.outputs import OutputPath


def export(
    out: Path | None = None,
    *,
    model: Model = None,
    adapter: Adapter = None,
    dtype: Literal["f16", "q8_0", "f32"] = "f16",
    vllm: bool = False,
    overwrite: Overwrite = False,
) -> int:
    """Write a model as a GGUF file, with the adapter merged if one is given.

    For example:

        lora export orders.gguf --adapter runs/orders/adapter --dtype q8_0
        lora export --vllm --adapter runs/orders/adapter

    The file is read back and compared with the model: every tensor, and the
    logits. With --vllm nothing is written: the adapter is checked against vLLM's
    rules and its base, and the command that serves it is printed.

    Parameters
    ----------
    out
        GGUF file to write.
    dtype
        Storage type of the weight matrices; norms are always f32.
    vllm
        Check the adapter for vLLM instead of writing a file.
    """
    from lora.adapters.merge import merge_lora
    from lora.errors import ConfigError
    from lora.export.gguf import export_gguf

    if vllm:
        return _check_for_vllm(adapter, model)
    if out is None:
        raise ConfigError(
            "Cannot export: no file is named. Name it, as in lora export orders.gguf."
        )
    inputs = input_paths(model, adapter)
    OutputPath(out, inputs, overwrite).check()
    loaded = load_model(model, adapter, "cpu")
    if adapter is not None:
        merge_lora(loaded.model, checked_ids(loaded))
    report = export_gguf(
        loaded.model,
        out,
        dtype,
        tokenizer=loaded.tokenizer,
        name=loaded.source.name,
        overwrite=overwrite,
        inputs=(*inputs, loaded.source.folder),
    )
    name, error = report.worst
    answers = "not enough memory for a second model, so logits were not compared"
    if report.logits_error is not None:
        allowed = f"allowed {report.logits_tolerance:.0e}"
        answers = f"logits differ by {report.logits_error:.1e} ({allowed})"
    print(
        f"{report.path}: {report.size_bytes / 1e6:,.0f} MB; read back and compared: "
        f"largest error {error:.1e} in {name} (allowed {report.tolerance:.0e}); {answers}"
    )
    return 0


def _check_for_vllm(adapter: Path | None, model: str | None) -> int:
    from lora.errors import AdapterError, ConfigError, gather
    from lora.export.vllm import check_adapter_for_vllm, find_base, vllm_command
    from lora.pretrained.sources import find_model

    if adapter is None:
        raise ConfigError(
            "Cannot check for vLLM: no adapter is named. Name its directory with --adapter."
        )
    base = find_base(adapter) if model is None else find_model(model).folder
    faults = check_adapter_for_vllm(adapter, base)
    if faults:
        raise AdapterError(
            gather(
                faults, f"vLLM cannot serve {adapter}:", "Train the adapter with other settings."
            )
        )
    if base is None:
        note = "note: the adapter's layers were not compared with its base; name it with --model"
        print(note, file=sys.stderr)
    print(vllm_command(adapter, model or (str(base) if base else "path/to/base")))
    return 0
