"""`lora eval`: loss, perplexity and answers of a model, and of its adapter beside it."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lora.cli.flags.from_fields import DATA, GENERATION, Flat, changed_by, flags_from
from lora.cli.flags.shared import Adapter, Device, Json, Model
from lora.config import DataConfig, SamplingConfig
from lora.inference.loading import LoadedModel, load_model
from lora.runs.typed_json import json_text
from lora.terminal import build_console, print_note

if TYPE_CHECKING:
    from lora.data.reading.formats import Example
    from lora.data.sequences.encoded import EncodedExamples, EncodingCounts
    from lora.data.tokenizers.subword import TextTokenizer
    from lora.inference.evaluation import Scores


@flags_from(DataConfig, without=("eval_fraction", "max_eval_examples"), unset=True)
class EvalDataFlags:
    """Reading and tokenizing of the examples; as in the adapter's run where not given."""


def evaluate(
    data: Annotated[Path, Parameter(group=DATA)],
    *,
    model: Model = None,
    adapter: Adapter = None,
    answers: Annotated[int, Parameter(group=GENERATION)] = 0,
    max_new_tokens: Annotated[int, Parameter(group=GENERATION)] = 128,
    bleu: Annotated[bool, Parameter(group=GENERATION)] = False,
    device: Device = "auto",
    json: Json = False,
    data_config: Annotated[EvalDataFlags | None, Flat] = None,
) -> int:
    """Evaluate a model on examples: loss, perplexity, and scores of its answers.

    For example:

        lora eval test.jsonl --adapter runs/orders/adapter --answers 40

    With --adapter the base model is evaluated too, for comparison, and data
    settings that are not given are those of the adapter's run.

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
    from lora.data.sequences.embedding_rows import check_ids
    from lora.inference.evaluation import encode_for_loss

    _check(answers, bleu)
    sampling = SamplingConfig(max_new_tokens=max_new_tokens)
    config, now = _data_settings(adapter, data_config)
    examples = read_examples(data, _tell)
    loaded = load_model(model, adapter, device)
    if config.chat_template is not None:
        from lora.data.chat.choose_template import choose_template

        chosen = choose_template(loaded.tokenizer, config.chat_template)[0]
        loaded = replace(loaded, tokenizer=chosen)
    if config.keep_control_tokens:
        meant = loaded.tokenizer.with_control_tokens_in_messages()
        loaded = replace(loaded, tokenizer=meant)
    encoded = encode_for_loss(examples, loaded.tokenizer, config, now)
    check_ids(encoded.documents, examples, loaded.tokenizer, loaded.model.config.vocab_size)
    _tell_findings(examples, encoded, loaded.tokenizer, config, now)
    scores = {}
    given = encoded, examples[:answers], config, sampling, bleu, now
    if adapter is not None:
        with disabled_adapter(loaded.model):
            scores["base"] = _measure(loaded, *given)
    scores["adapter" if adapter else "base"] = _measure(loaded, *given)
    n_answers = next(iter(scores.values())).n_answers
    if n_answers < min(answers, len(examples)):
        _tell(f"{n_answers} of {min(answers, len(examples))} examples have a prompt and an answer")
    if json:
        print(json_text({name: asdict(found) for name, found in scores.items()}))
    else:
        _print_table(scores, len(examples))
    return 0


def _tell(message: str) -> None:
    print_note(message)


def _check(answers: int, bleu: bool) -> None:
    """Raise ConfigError for a number of answers below 0, and for BLEU of no answers."""
    from lora.errors import ConfigError

    if answers < 0:
        raise ConfigError(
            f"Cannot answer {answers} examples. Allowed: 0 (none) or more. Try --answers 40."
        )
    if bleu and not answers:
        raise ConfigError(
            "Cannot compute BLEU without answers: --answers is 0. Try --answers 40, or leave "
            "--bleu out."
        )


def _data_settings(
    adapter: Path | None, flags: EvalDataFlags | None
) -> tuple[DataConfig, datetime]:
    """Return the run's data settings, with those that the flags change, and its date."""
    from lora.errors import ConfigError
    from lora.inference.run_settings import RunDataSettings, read_run_data_settings

    settings = RunDataSettings(DataConfig(), None)
    if adapter is not None:
        settings = read_run_data_settings(adapter)
        _tell(str(settings))
    config = changed_by(settings.config, flags)
    if config.special_tokens:
        raise ConfigError(
            "Cannot evaluate with --special-tokens: lora finetune adds them, and an adapter has "
            "its own. Remove the flag."
        )
    return config, settings.now


def _tell_findings(
    examples: list[Example],
    encoded: EncodedExamples,
    tokenizer: TextTokenizer,
    config: DataConfig,
    now: datetime,
) -> None:
    from lora.data.findings import describe_encoding, describe_placeholders

    if "strftime_now" in (tokenizer.chat_template or ""):
        _tell(f"the chat template prints the date: here {now:%d %B %Y}, in each evaluation")
    _tell_cuts(encoded.counts, config)
    warnings, notes = describe_encoding(examples, encoded)
    _, placeholders = describe_placeholders(examples)
    for warning in filter(None, [*warnings, placeholders]):
        _tell(f"warning: {warning}")
    for note in notes:
        _tell(f"note: {note}")


def _tell_cuts(counts: EncodingCounts, config: DataConfig) -> None:
    n_cut = counts.n_truncated + counts.n_dropped
    if n_cut:
        _tell(
            f"{n_cut} of {counts.n_examples} examples are longer than max_length="
            f"{config.max_length}: {counts.n_cut_tokens:,} tokens are not in the loss. Raise "
            "--max-length, or take --long-examples split."
        )
    if counts.n_nothing_to_learn:
        _tell(
            f"{counts.n_nothing_to_learn} of {counts.n_examples} examples have no target token and "
            "are not in the loss"
        )


def _measure(
    loaded: LoadedModel,
    encoded: EncodedExamples,
    chosen: list[Example],
    config: DataConfig,
    sampling: SamplingConfig,
    bleu: bool,
    now: datetime,
) -> Scores:
    from lora.inference.evaluation import answer_examples, loss_of, score

    loss = loss_of(loaded.model, encoded, loaded.tokenizer, config, loaded.choice)
    written = answer_examples(loaded.model, chosen, loaded.tokenizer, sampling, now=now)
    counts = encoded.counts
    return replace(
        score(loss, written, bleu=bleu),
        max_length=config.max_length,
        n_cut_examples=counts.n_truncated + counts.n_dropped,
        n_cut_tokens=counts.n_cut_tokens,
    )


def _print_table(scores: dict[str, Scores], n_examples: int) -> None:
    from rich.table import Table

    table = Table(title=f"{n_examples} examples", title_justify="left")
    table.add_column("")
    for name in scores:
        table.add_column(name, justify="right")
    rows = {name: asdict(found) for name, found in scores.items()}
    for key in next(iter(rows.values())):
        if any(row[key] is not None for row in rows.values()) and key != "n_fields":
            table.add_row(key.replace("_", " "), *(_shown(row, key) for row in rows.values()))
    build_console().print(table)


def _shown(row: dict[str, Any], key: str) -> str:
    value = row[key]
    if value is None:
        return "–"
    if key in ("valid_json", "exact_match"):
        return f"{value}/{row['n_answers']}"
    if key == "fields_right":
        return f"{value}/{row['n_fields']}"
    return str(value) if isinstance(value, int) else f"{value:.4f}"
