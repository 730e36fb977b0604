"""`lora eval`: loss, perplexity and answers of a model, and of its adapter beside it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from lora.cli.flags.from_fields import Flat, config_from
from lora.cli.flags.shared import Adapter, DataFlags, Device, Json, Model
from lora.config import DataConfig, SamplingConfig
from lora.inference.loading import LoadedModel, load_model
from lora.runs.typed_json import json_text

if TYPE_CHECKING:
    from lora.data.reading.formats import Example
    from lora.inference.evaluation import Scores


def evaluate(
    data: Path,
    *,
    model: Model = None,
    adapter: Adapter = None,
    answers: int = 0,
    max_new_tokens: int = 128,
    bleu: bool = False,
    device: Device = "auto",
    json: Json = False,
    data_config: Annotated[DataFlags | None, Flat] = None,
) -> int:
    """Evaluate a model on examples: loss, perplexity, and scores of its answers.

    For example:

        lora eval test.jsonl --adapter runs/orders/adapter --answers 40

    With --adapter the base model is evaluated too, for comparison.

    Parameters
    ----------
    data
        File or directory of test examples.
    answers
        Number of examples to answer and score: exact match, valid JSON, correct JSON fields.
    max_new_tokens
        Maximum number of new tokens per answer.
    bleu
        Also compute BLEU of the answers (needs sacrebleu).
    """
    from lora.adapters.apply import disabled_adapter
    from lora.data.reading.readers import read_examples
    from lora.errors import ConfigError

    examples = read_examples(data)
    config = config_from(DataConfig, data_config or DataFlags())
    if config.special_tokens:
        raise ConfigError(
            "Cannot evaluate with --special-tokens: lora finetune adds them, and an adapter has "
            "its own. Remove the flag."
        )
    loaded = load_model(model, adapter, device)
    scores = {}
    sizes = answers, max_new_tokens, bleu
    if adapter is not None:
        with disabled_adapter(loaded.model):
            scores["base"] = _measure(loaded, examples, config, *sizes)
    scores["adapter" if adapter else "base"] = _measure(loaded, examples, config, *sizes)
    if json:
        print(json_text({name: asdict(found) for name, found in scores.items()}))
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
