"""`lora eval`: a model, and its adapter beside it, measured on examples."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lora.config import DataConfig, SamplingConfig
from lora.inference.loading import LoadedModel, load_model

if TYPE_CHECKING:
    from lora.data.reading.formats import Example
    from lora.inference.evaluation import Scores


def evaluate(
    data: Path,
    *,
    model: str | None = None,
    adapter: Path | None = None,
    answers: int = 0,
    max_new_tokens: int = 128,
    bleu: bool = False,
    device: str = "auto",
    json: bool = False,
    data_config: Annotated[DataConfig | None, Parameter(name="*")] = None,
) -> int:
    """Measure loss and perplexity, and with --answers what the model writes.

    Examples:

        lora eval test.jsonl --adapter runs/orders/adapter --answers 40

    With an adapter, the base is measured beside it.

    Parameters
    ----------
    data
        File or folder of examples.
    model
        As in lora finetune; left out, SmolLM2-135M-Instruct.
    adapter
        An adapter's folder.
    answers
        Let the model answer so many of the examples: exact match, valid JSON, right fields.
    max_new_tokens
        Most tokens of an answer.
    bleu
        Also BLEU, through sacrebleu.
    device
        auto, cpu, cuda …
    json
        Print one JSON object.
    """
    from lora.adapters.apply import disabled_adapter
    from lora.data.reading.readers import read_examples
    from lora.errors import ConfigError

    examples = read_examples(data)
    config = data_config or DataConfig()
    if config.special_tokens:
        raise ConfigError(
            "lora eval was given --special-tokens: they are added when a model learns them (lora "
            "finetune), and an adapter brings its own. Leave them out."
        )
    loaded = load_model(model, adapter, device)
    scores = {}
    sizes = answers, max_new_tokens, bleu
    if adapter is not None:
        with disabled_adapter(loaded.model):
            scores["base"] = _measure(loaded, examples, config, *sizes)
    scores["adapter" if adapter else "base"] = _measure(loaded, examples, config, *sizes)
    if json:
        print(json_format.dumps({name: asdict(found) for name, found in scores.items()}))
    else:
        _print_table(scores, len(examples))
    return 0


def _measure(
    loaded: LoadedModel,
    examples: list[Example],
    config: DataConfig,
    n_answers: int,
    max_new_tokens: int,
    bleu: bool,
) -> Scores:
    from lora.inference.evaluation import answer_examples, measure_loss, score

    loss = measure_loss(loaded.model, examples, loaded.tokenizer, config, loaded.choice)
    sampling = SamplingConfig(max_new_tokens=max_new_tokens)
    chosen = examples[:n_answers]
    written = answer_examples(loaded.model, chosen, loaded.tokenizer, sampling)
    return score(loss, written, bleu=bleu)


def _print_table(scores: dict[str, Scores], n_examples: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{n_examples} examples", title_justify="left")
    table.add_column("")
    for name in scores:
        table.add_column(name, justify="right")
    rows = {name: asdict(found) for name, found in scores.items()}
    for key in next(iter(rows.values())):
        if any(row[key] is not None for row in rows.values()) and key != "n_fields":
            table.add_row(key.replace("_", " "), *(_shown(row, key) for row in rows.values()))
    Console().print(table)


def _shown(row: dict[str, Any], key: str) -> str:
    value = row[key]
    if value is None:
        return "–"
    if key in ("valid_json", "exact_match"):
        return f"{value}/{row['n_answers']}"
    if key == "fields_right":
        return f"{value}/{row['n_fields']}"
    return str(value) if isinstance(value, int) else f"{value:.4f}"
