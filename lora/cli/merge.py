"""`lora merge`: merge an adapter into its base model, for transformers and others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lora.cli.flags.from_fields import DEVICE
from lora.cli.flags.shared import Model, Overwrite, input_paths
from lora.inference.loading import checked_ids, load_model
from lora.runs.outputs import OutputPath

MergeDevice = Annotated[str, Parameter(group=DEVICE, help="Device that computes the merge.")]

MODEL_FILES = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "*chat_template*"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "LICENSE*", "NOTICE*"),
)
"""What a merged model's directory may hold for --overwrite to replace it."""


def merge(
    adapter: Path,
    out: Path,
    *,
    model: Model = None,
    device: MergeDevice = "cpu",
    overwrite: Overwrite = False,
) -> int:
    """Merge an adapter into its base model, compare the logits, and save the result.

    For example:

        lora merge runs/orders/adapter merged

    Parameters
    ----------
    adapter
        Adapter directory.
    out
        Directory for the merged model: a new or empty one.
    """
    from lora.adapters.merge import merge_lora
    from lora.pretrained.hf_weights import save_decoder

    inputs = input_paths(model, adapter)
    output = OutputPath(out, inputs, overwrite, is_directory=True, replaceable=MODEL_FILES)
    with output.building() as part:
        loaded = load_model(model, adapter, device)
        report = merge_lora(loaded.model, checked_ids(loaded))
        save_decoder(loaded.model, part)
        loaded.tokenizer.save(part)
    print(
        f"merged {report.layers} layers into {out}; logits differ by "
        f"{report.relative_error:.1e} (allowed {report.tolerance:.0e})"
    )
    return 0
