"""`lora merge`: merge an adapter into its base model, for transformers and others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from lora.cli.flags.from_fields import DEVICE, MODEL, OUTPUT
from lora.cli.flags.shared import Implementation, Model, Overwrite, open_adapter
from lora.terminal import print_line

Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    Parameter(
        group=OUTPUT, help="Dtype of the written weights. Default: each tensor's in the base."
    ),
]
MergeDevice = Annotated[str, Parameter(group=DEVICE, help="Device that computes the merge.")]


def merge(
    adapter: Annotated[Path, Parameter(group=MODEL, converter=open_adapter)],
    out: Annotated[Path, Parameter(group=OUTPUT)],
    *,
    model: Model = None,
    implementation: Implementation = "auto",
    dtype: Dtype = None,
    device: MergeDevice = "cpu",
    overwrite: Overwrite = False,
) -> int:
    """Merge an adapter into its base model, compare the logits, and save the result.

    For example:

        lora merge runs/orders/adapter merged

    The base's generation settings, tokenizer settings and chat templates are kept.

    Parameters
    ----------
    adapter
        Adapter: its directory, a run (runs/x), or a checkpoint (runs/x@500, @best, @last).
    out
        Directory for the merged model: a new or empty one.
    """
    from lora.export.run import merge as write

    merged = write(
        adapter,
        out,
        model=model,
        dtype=dtype,
        device=device,
        implementation=implementation,
        overwrite=overwrite,
    )
    print_line(
        f"merged {merged.layers} layers into {out} ({', '.join(merged.dtypes)}); logits "
        f"differ by {merged.relative_error:.1e} (allowed {merged.tolerance:.0e})"
    )
    return 0
