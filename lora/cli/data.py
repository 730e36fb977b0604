"""`lora data`: check training data and show what the model would learn from them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lora.cli.flags.from_fields import DATA, Flat, config_from, flags_from
from lora.cli.flags.shared import Json, Model
from lora.config import DataConfig
from lora.terminal import build_console


@flags_from(DataConfig, without=("eval_fraction", "max_eval_examples"))
class InspectedData:
    """Reading, tokenizing and packing of the examples; all are inspected, none is split off."""


def data(
    path: Annotated[Path, Parameter(group=DATA)],
    *,
    model: Model = None,
    json: Json = False,
    data_config: Annotated[InspectedData | None, Flat] = None,
) -> int:
    """Check training data: formats, lengths, and which tokens get a loss.

    For example:

        lora data orders.jsonl
        lora data chats.parquet --model ./llama --max-length 2048 --json

    Of --model only the tokenizer and the chat template are used. Faulty examples
    are listed with their lines, and the exit code is then 2.

    Parameters
    ----------
    path
        File or directory of examples, or owner/name[:split] of a data set on the Hub.
    """
    config = config_from(DataConfig, data_config or InspectedData())

    from lora.data.inspection import inspect_data
    from lora.data.inspection_view import print_report
    from lora.data.tokenizers.subword import load_tokenizer
    from lora.pretrained.positions import why_beyond_positions
    from lora.pretrained.sources import find_model

    folder = find_model(model).folder
    report = inspect_data(path, load_tokenizer(folder), config, n_rows=_embedding_rows(folder))
    excess = why_beyond_positions(folder, report.longest_tokens)
    report.warnings += [excess] if excess else []
    if json:
        print(report.to_json())
    else:
        print_report(report, build_console())
    return 2 if report.errors else 0


def _embedding_rows(folder: Path) -> int | None:
    """Return the rows of the model's embedding; None without a configuration that says so."""
    from lora.decoder.families import decoder_config
    from lora.errors import ModelError
    from lora.pretrained.hf_files import read_config

    try:
        return decoder_config(read_config(folder)).vocab_size
    except ModelError:  # a tokenizer alone, or a model that cannot be trained: its data can be seen
        return None
