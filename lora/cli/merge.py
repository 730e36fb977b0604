"""`lora merge`: a base and its adapter become one model that transformers loads."""

from __future__ import annotations

import shutil
from pathlib import Path

from lora.inference.loading import checked_ids, load_model


def merge(adapter: Path, out: Path, *, model: str | None = None, device: str = "cpu") -> int:
    """Merge an adapter into its base, compare the logits, and save the model.

    Examples:

        lora merge runs/orders/adapter merged

    Parameters
    ----------
    adapter
        The adapter's folder.
    out
        Folder of the merged model; it must not exist or be empty.
    model
        The base, as in lora finetune; left out, SmolLM2-135M-Instruct.
    device
        Where the merging is computed.
    """
    from lora.adapters.merge import merge_lora
    from lora.errors import ConfigError
    from lora.pretrained.hf_weights import save_decoder

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty: name a new folder for the merged model.")
    loaded = load_model(model, adapter, device)
    report = merge_lora(loaded.model, checked_ids(loaded))
    building = out.with_name(f".{out.name}.building")  # it has its name when it is whole
    shutil.rmtree(building, ignore_errors=True)
    try:
        save_decoder(loaded.model, building)
        loaded.tokenizer.save(building)
        building.replace(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    print(
        f"merged {report.layers} layers into {out}; the logits differ by "
        f"{report.relative_error:.1e} (allowed {report.tolerance:.0e})"
    )
    return 0
