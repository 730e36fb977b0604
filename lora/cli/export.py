"""`lora export`: write a model as GGUF, or check an adapter for vLLM."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from lora.cli.flags.from_fields import OUTPUT
from lora.cli.flags.shared import Adapter, Implementation, Json, MergedBase, Model, Overwrite
from lora.runs.typed_json import json_text
from lora.terminal import print_line, print_note


def export(
    out: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    *,
    model: Model = None,
    implementation: Implementation = "auto",
    adapter: Adapter = None,
    dtype: Annotated[Literal["f16", "q8_0", "f32"], Parameter(group=OUTPUT)] = "f16",
    base_dtype: MergedBase = "auto",
    vllm: Annotated[bool, Parameter(group=OUTPUT)] = False,
    overwrite: Overwrite = False,
    json: Json = False,
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
    from lora.errors import ConfigError
    from lora.export.run import export as write

    if vllm:
        _check_writes_nothing(out, dtype, base_dtype, overwrite=overwrite, json=json)
        return _check_for_vllm(adapter, model)
    if out is None:
        raise ConfigError(
            "Cannot export: no file is named. Name it, as in lora export orders.gguf."
        )
    report = write(
        out,
        model=model,
        adapter=adapter,
        dtype=dtype,
        base_dtype=base_dtype,
        implementation=implementation,
        overwrite=overwrite,
    )
    if json:
        print(json_text(asdict(report), default=str))
        return 0
    name, error = report.worst
    allowed = f"allowed {report.logits_tolerance:.0e}"
    answers = f"logits differ by {report.logits_error:.1e} ({allowed})"
    print_line(
        f"{report.path}: {report.size_bytes / 1e6:,.0f} MB; read back and compared: "
        f"largest error {error:.1e} in {name} (allowed {report.tolerance:.0e}); {answers}"
    )
    return 0


def _check_writes_nothing(
    out: Path | None, dtype: str, base_dtype: str, *, overwrite: bool, json: bool
) -> None:
    from lora.errors import ConfigError

    given = {"a file to write": out is not None, "--dtype": dtype != "f16"}
    given |= {"--base-dtype": base_dtype != "auto", "--overwrite": overwrite, "--json": json}
    unused = [name for name, is_given in given.items() if is_given]
    if unused:
        raise ConfigError(
            f"Cannot combine --vllm with {', '.join(unused)}: it checks an adapter and writes "
            "nothing. Leave one or the other out."
        )


def _check_for_vllm(adapter: Path | None, model: str | None) -> int:
    from lora.adapters.bases.rules import trained_base_of
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
        print_note(note)
    trained = trained_base_of(adapter)
    has_own_values = model is None and trained.is_4bit_folder
    if trained.quantisation is not None and not has_own_values:
        print_note(
            f"note: it was trained over a base in {trained.quantisation}, and vLLM serves it over "
            "the base's own weights. lora merge writes a model with the values that it was "
            "trained over"
        )
    print_line(vllm_command(adapter, model or (str(base) if base else "path/to/base")))
    return 0
