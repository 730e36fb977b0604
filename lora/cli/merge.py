"""`lora merge`: merge an adapter into its base model, for transformers and others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lora.cli.flags.from_fields import DEVICE
from lora.cli.flags.shared import Model
from lora.inference.loading import checked_ids, load_model

MergeDevice = Annotated[str, Parameter(group=DEVICE, help="Device that computes the merge.")]


def merge(adapter: Path, out: Path, *, model: Model = None, device: MergeDevice = "cpu") -> int:
    """Merge an adapter into its base model, compare the logits, and save the result.

    For example:

        lora merge runs/orders/adapter merged

    Parameters
    ----------
    adapter
        Adapter directory.
    out
        Directory for the merged model; must be empty or not exist.
    """
    from lora.adapters.merge import merge_lora
    from lora.errors import ConfigError
    from lora.pretrained.hf_weights import save_decoder

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"Cannot write the merged model to {out}: it exists and is not empty. Name another "
            "directory."
        )
    loaded = load_model(model, adapter, device)
    report = merge_lora(loaded.model, checked_ids(loaded))
    building = out.with_name(f".{out.name}.building")  # renamed when complete
    shutil.rmtree(building, ignore_errors=True)
    try:
        save_decoder(loaded.model, building)
        loaded.tokenizer.save(building)
        building.replace(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    print(
        f"merged {report.layers} layers into {out}; logits differ by "
        f"{report.relative_error:.1e} (allowed {report.tolerance:.0e})"
    )
    return 0
