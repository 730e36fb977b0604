"""`lora merge`: merge an adapter into its base model, for transformers and others."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from lora.cli.flags.from_fields import DEVICE, MODEL, OUTPUT
from lora.cli.flags.shared import (
    Implementation,
    Json,
    MergedBase,
    Model,
    Overwrite,
    open_adapter,
)
from lora.runs.typed_json import json_text
from lora.terminal import print_line, print_note

if TYPE_CHECKING:
    from lora.export.merged import MergedModel

Dtype = Annotated[
    Literal["float32", "bfloat16", "float16", "nf4"] | None,
    Parameter(
        group=OUTPUT, help="Dtype of the written weights. Default: each tensor's in the base."
    ),
]
Requantise = Annotated[
    bool,
    Parameter(
        group=OUTPUT,
        help="With --dtype nf4: accept rounding to 4 bits again; how far it moves the logits is "
        "printed.",
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
    requantise: Requantise = False,
    base_dtype: MergedBase = "auto",
    device: MergeDevice = "cpu",
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Merge an adapter into its base model, compare the logits, and save the result.

    For example:

        lora merge runs/orders/adapter merged
        lora merge runs/orders/adapter merged --dtype bfloat16 --json

    The base's generation settings, tokenizer settings and chat templates are kept.
    After training over nf4, int8 or fp8, the adapter is merged into the values of
    that base; --base-dtype original merges into the unquantised ones, and prints by
    how much the logits differ. --base-dtype nf4 is for QLoRA adapters of other
    tools, whose files do not say that their base was in nf4.

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
        base_dtype=base_dtype,
        requantise=requantise,
        implementation=implementation,
        overwrite=overwrite,
    )
    if json:
        print(json_text({"out": str(out), **asdict(merged)}))
    else:
        _print(merged, out)
    return 0


def _print(merged: MergedModel, out: Path) -> None:
    over = "" if merged.over is None else f", over the values of {merged.over}"
    allowed = "" if merged.tolerance is None else f" (allowed {merged.tolerance:.0e})"
    print_line(
        f"merged {merged.layers} layers into {out} ({', '.join(merged.dtypes)}){over}; logits "
        f"differ by {merged.relative_error:.1e}{allowed}"
    )
    if merged.base_change is not None:
        print_note(
            f"note: the logits differ by {merged.base_change:.1e} from those over the base that "
            "the adapter was trained over, which has other values"
        )
