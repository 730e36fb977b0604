"""`lora export`: a model as GGUF, or an adapter checked for vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lora.inference.loading import checked_ids, load_model


def export(
    out: Path | None = None,
    *,
    model: str | None = None,
    adapter: Path | None = None,
    dtype: Literal["f16", "q8_0", "f32"] = "f16",
    vllm: bool = False,
) -> int:
    """Write a model, with an adapter merged in if one is given, as a GGUF file.

    Examples:

        lora export orders.gguf --adapter runs/orders/adapter --dtype q8_0
        lora export --vllm --adapter runs/orders/adapter

    What was written is read back and compared, tensor by tensor and by its logits; so is the
    merged adapter. With --vllm nothing is written:
    the adapter is checked against vLLM's rules, and the command that serves it is printed.

    Parameters
    ----------
    out
        The GGUF file.
    model
        As in lora finetune; left out, SmolLM2-135M-Instruct.
    adapter
        An adapter's folder.
    dtype
        Type of the large tensors; norms stay f32.
    vllm
        Check the adapter for vLLM instead.
    """
    from lora.adapters.merge import merge_lora
    from lora.errors import ConfigError
    from lora.export.gguf import export_gguf

    if vllm:
        return _check_for_vllm(adapter, model)
    if out is None:
        raise ConfigError("lora export was given no file to write: name one, as in orders.gguf.")
    loaded = load_model(model, adapter, "cpu")
    if adapter is not None:
        merge_lora(loaded.model, checked_ids(loaded))
    report = export_gguf(
        loaded.model, out, dtype, tokenizer=loaded.tokenizer, name=loaded.source.name
    )
    name, error = report.worst
    answers = "memory holds no second model, so the logits were not compared"
    if report.logits_error is not None:
        allowed = f"allowed {report.logits_tolerance:.0e}"
        answers = f"the logits differ by {report.logits_error:.1e} ({allowed})"
    print(
        f"{report.path}: {report.size_bytes / 1e6:,.0f} MB; read back, the worst tensor is "
        f"{name}, off by {error:.1e} (allowed {report.tolerance:.0e}); {answers}"
    )
    return 0


def _check_for_vllm(adapter: Path | None, model: str | None) -> int:
    from lora.errors import AdapterError, ConfigError, gather
    from lora.export.vllm import check_adapter_for_vllm, vllm_command

    if adapter is None:
        raise ConfigError("--vllm checks an adapter: name its folder with --adapter.")
    faults = check_adapter_for_vllm(adapter)
    if faults:
        raise AdapterError(gather(faults, f"vLLM will not serve {adapter}:", "Train it otherwise."))
    print(vllm_command(adapter, model or "path/of/the/base"))
    return 0
