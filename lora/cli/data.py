"""`lora data`: check training data and show what the model would learn from them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lora.cli.flags.from_fields import DATA, Flat, config_from, flags_from
from lora.cli.flags.shared import Implementation, Json, Model
from lora.config import DataConfig, ImplementationName
from lora.terminal import build_console, print_note

if TYPE_CHECKING:
    from lora.decoder.language_model import ModelConfig


@flags_from(DataConfig, without=("eval_fraction", "max_eval_examples"))
class InspectedData:
    """Reading, tokenizing and packing of the examples; all are inspected, none is split off."""


def data(
    path: Annotated[Path, Parameter(group=DATA)],
    *,
    model: Model = None,
    implementation: Implementation = "auto",
    json: Json = False,
    data_config: Annotated[InspectedData | None, Flat] = None,
) -> int:
    """Check training data: formats, lengths, and which tokens get a loss.

    For example:

        lora data orders.jsonl
        lora data chats.parquet --model ./llama --max-length 2048 --json

    Of --model only the tokenizer, the chat template and config.json are used.
    Faulty examples are listed with their lines, and the exit code is then 2.

    Parameters
    ----------
    path
        File or directory of examples, or owner/name[:split] of a data set on the Hub.
    """
    config = config_from(DataConfig, data_config or InspectedData())

    from lora.data.inspection import inspect_data
    from lora.data.inspection_view import print_report
    from lora.data.tokenizers.subword import load_tokenizer
    from lora.pretrained.load.task import settled_packing
    from lora.pretrained.positions import describe_excess
    from lora.pretrained.sources import find_model

    folder = find_model(model).folder
    sizes = _sizes(folder, implementation)
    if sizes is not None:
        config = settled_packing(config, sizes, print_note)
    n_rows = None if sizes is None else sizes.vocab_size
    report = inspect_data(path, load_tokenizer(folder), config, n_rows=n_rows)
    limit = sys.maxsize if sizes is None else sizes.max_position_embeddings
    excess = describe_excess(report.longest_tokens, limit)
    report.warnings += [excess] if excess else []
    if json:
        print(report.to_json())
    else:
        print_report(report, build_console())
    return 2 if report.errors else 0


def _sizes(folder: Path, implementation: ImplementationName) -> ModelConfig | None:
    """Return the sizes of the model; None without a configuration that says them."""
    from lora.errors import DependencyError, ModelError
    from lora.pretrained.load.models import model_config

    try:
        return model_config(folder, implementation)
    except (ModelError, DependencyError):
        if implementation != "auto":
            raise
        # A tokenizer alone, or a model that cannot be trained: its data can be seen.
        return None
