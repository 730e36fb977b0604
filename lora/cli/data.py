"""`lora data`: what a model would learn from a file, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lora.config import DataConfig


def data(
    path: Path,
    *,
    model: str | None = None,
    json: bool = False,
    data_config: Annotated[DataConfig | None, Parameter(name="*")] = None,
) -> int:
    """Show what was understood of examples, their lengths, and what of them is learned.

    Examples:

        lora data orders.jsonl
        lora data chats.parquet --model ./llama --max-length 2048 --json

    Exits with 2 if the data have faults, and names the lines. No weights are loaded.

    Parameters
    ----------
    path
        File or folder of examples.
    model
        The model whose tokenizer and chat template are used; left out, SmolLM2-135M-Instruct.
    json
        Print the report as JSON.
    """
    from rich.console import Console

    from lora.data.inspection import inspect_data
    from lora.data.inspection_view import print_report
    from lora.data.tokenizers.subword import load_tokenizer
    from lora.pretrained.sources import find_model

    tokenizer = load_tokenizer(find_model(model).folder)
    report = inspect_data(path, tokenizer, data_config or DataConfig())
    if json:
        print(report.to_json())
    else:
        print_report(report, Console())
    return 2 if report.errors else 0
