"""`lora eval`: loss, perplexity and answers of a model, and of its adapter beside it."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lora.cli.flags.from_fields import (
    DATA,
    GENERATION,
    OUTPUT,
    Flat,
    changed_by,
    config_from,
    flags_from,
)
from lora.cli.flags.shared import (
    Adapter,
    AnswerBase,
    Device,
    Devices,
    Implementation,
    Json,
    Model,
    Overwrite,
    check_overwrite,
)
from lora.config import DataConfig, SamplingConfig
from lora.distributed.launch import Processes, processes_to_start
from lora.errors import ConfigError
from lora.inference.eval_config import EvalConfig
from lora.inference.loading import LoadedModel, load_model, tokenizer_for
from lora.runs.outputs import OutputPath, input_paths
from lora.runs.progress import StageProgress
from lora.runs.typed_json import json_text
from lora.terminal import build_console, print_note

if TYPE_CHECKING:
    from lora.data.reading.formats import Example
    from lora.data.sequences.encoded import EncodedExamples, EncodingCounts
    from lora.data.tokenizers.subword import TextTokenizer
    from lora.distributed.world import World
    from lora.inference.evaluation import Evaluation, EvaluationData


@flags_from(DataConfig, without=("eval_fraction", "max_eval_examples"), unset=True)
class EvalDataFlags:
    """Reading and tokenizing of the examples; as in the adapter's run where not given."""


@flags_from(EvalConfig)
class EvalFlags:
    """What is answered, and how it is scored."""


def evaluate(
    data: Annotated[Path, Parameter(group=DATA)],
    *,
    model: Model = None,
    implementation: Implementation = "auto",
    adapter: Adapter = None,
    predictions: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    max_new_tokens: Annotated[int, Parameter(group=GENERATION)] = 128,
    bleu: Annotated[bool, Parameter(group=GENERATION)] = False,
    base_dtype: AnswerBase = "auto",
    device: Device = "auto",
    devices: Devices = None,
    overwrite: Overwrite = False,
    json: Json = False,
    data_config: Annotated[EvalDataFlags | None, Flat] = None,
    eval_config: Annotated[EvalFlags | None, Flat] = None,
) -> int | Processes:
    """Evaluate a model on examples: loss, perplexity, and scores of its answers.

    For example:

        lora eval test.jsonl --adapter runs/orders/adapter --answers all
        lora eval test.csv --adapter runs/tickets/adapter --predictions out.jsonl
        lora eval test.jsonl --metrics rouge-l,bleu
        lora eval test.jsonl --answers all --devices 4

    With --adapter the base model is evaluated too, for comparison, and data
    settings that are not given are those of the adapter's run. In a
    conversation every assistant turn is generated. Several devices share the
    examples.

    Parameters
    ----------
    data
        File or directory of test examples, or owner/name[:split] of a data set on the Hub.
    predictions
        JSONL file to write: each prompt, expected answer, answer and its scores.
    max_new_tokens
        Maximum number of new tokens per answer.
    bleu
        Also compute BLEU of the answers; the same as bleu in --metrics.
    """
    from lora.data.reading.readers import read_examples
    from lora.data.sequences.embedding_rows import check_ids
    from lora.distributed.start import joined
    from lora.inference.evaluation import prepare_evaluation
    from lora.inference.loading import find_implementation_of, find_model_of, model_inputs
    from lora.inference.run_settings import find_rules

    chosen = config_from(EvalConfig, eval_config or EvalFlags())
    if bleu:
        chosen = replace(chosen, metrics=(*chosen.metrics, "bleu"))
    if adapter is None and not chosen.base:
        raise ConfigError(
            "Cannot use --no-base without --adapter: the base is all that would be evaluated. Name "
            "an adapter, or leave the flag out."
        )
    sampling = SamplingConfig(max_new_tokens=max_new_tokens)
    if processes := processes_to_start(devices, device):
        return processes
    config, now = _data_settings(adapter, data_config)
    inputs = (*input_paths(data, config.chat_template), *model_inputs(model, adapter))
    output = _output(predictions, chosen, overwrite, inputs)
    source = find_model_of(model, adapter)
    folder = source.folder
    # An architecture that nothing runs is refused before the data are read.
    chosen_code = find_implementation_of(source, adapter, implementation)
    chosen_code.tell_unless_native(_tell)
    rules = find_rules(config, adapter, folder)
    examples = read_examples(data, _tell, rules=rules, part="test")
    loaded = load_model(model, adapter, device, chosen_code.kind, base_dtype)
    if loaded.note:
        _tell(f"note: {loaded.note}")
    if adapter is not None and chosen.base:
        _tell_base(loaded)
    loaded = replace(loaded, tokenizer=tokenizer_for(config, loaded.tokenizer))
    if model is None:
        _tell(f"model: {loaded.source.description}")
    n_answered = chosen.n_to_answer(len(examples), is_default_all=output is not None)
    ready = prepare_evaluation(
        examples, loaded.tokenizer, config, n_answered, chosen.metrics, now=now
    )
    encoded = ready.encoded
    check_ids(encoded.documents, examples, loaded.tokenizer, loaded.model.config.vocab_size)
    _tell_findings(examples, encoded, loaded.tokenizer, config, now)
    _tell_prompts(ready, n_answered, loaded, sampling)
    with joined(loaded.choice.device) as world:
        found = _evaluate(ready, loaded, sampling, adapter is not None, chosen.base, world)
        _tell_results(found, ready, sampling)
        if output is not None:
            world.on_main(lambda: _write(output, found), "the predictions file")
            _tell(f"predictions: {output.path}")
    if json:
        print(json_text({name: asdict(each.scores) for name, each in found.items()}))
    else:
        from lora.inference.eval_tables import print_evaluations

        print_evaluations(build_console(), found, len(examples))
    return 0


def _evaluate(
    ready: EvaluationData,
    loaded: LoadedModel,
    sampling: SamplingConfig,
    has_adapter: bool,
    has_base: bool,
    world: World,
) -> dict[str, Evaluation]:
    """Return the evaluations of "base" (unless there is an adapter and no base) and "adapter"."""
    from lora.adapters.apply import disabled_adapter

    found = {}
    with StageProgress() as progress:

        def evaluate_as(name: str) -> Evaluation:
            def tell(stage: str, done: int, total: int) -> None:
                progress.update(f"{name}: {stage}", done, total)

            return ready.evaluate(
                loaded.model, loaded.tokenizer, loaded.choice, sampling, tell, world
            )

        if has_adapter and has_base:
            with disabled_adapter(loaded.model):
                found["base"] = evaluate_as("base")
        name = "adapter" if has_adapter else "base"
        found[name] = evaluate_as(name)
    return found


def _write(output: OutputPath, found: dict[str, Evaluation]) -> None:
    from lora.inference.predictions import write_predictions

    with output.building() as part:
        *base, last = found.values()
        write_predictions(part, last, *base)


def _output(
    predictions: Path | None, config: EvalConfig, overwrite: bool, inputs: tuple[Path, ...]
) -> OutputPath | None:
    """Return the predictions file, checked. Raises ConfigError if nothing is answered."""
    check_overwrite(overwrite, predictions, "--predictions")
    if predictions is None:
        return None
    if config.answers == 0:
        raise ConfigError(
            "Cannot write predictions: --answers is 0. Leave it out to answer every example."
        )
    output = OutputPath(predictions, inputs, overwrite)
    output.check()
    return output


def _tell_base(loaded: LoadedModel) -> None:
    """Say that the base beside an adapter has the rounded values that this was trained over."""
    from lora.adapters.bases.quantisation import quantisation_of

    kind = quantisation_of(loaded.model)
    if kind is not None:
        _tell(f"the base has the values of {kind}, with the adapter and without")


def _tell(message: str) -> None:
    print_note(message)


def _data_settings(
    adapter: Path | None, flags: EvalDataFlags | None
) -> tuple[DataConfig, datetime]:
    """Return the run's data settings, with those that the flags change, and its date."""
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
    from lora.data.findings import describe_columns, describe_encoding, describe_placeholders

    if "strftime_now" in (tokenizer.chat_template or ""):
        _tell(f"the chat template prints the date: here {now:%d %B %Y}, in each evaluation")
    _tell_cuts(encoded.counts, config)
    warnings, notes = describe_encoding(examples, encoded)
    _, placeholders = describe_placeholders(examples)
    for warning in filter(None, [*warnings, placeholders]):
        _tell(f"warning: {warning}")
    for note in [*describe_columns(examples)[1], *notes]:
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


def _tell_prompts(
    ready: EvaluationData, n_answered: int, loaded: LoadedModel, sampling: SamplingConfig
) -> None:
    from lora.pretrained.positions import describe_excess

    n_with = len({prompt.source for prompt in ready.prompts})
    if n_with < n_answered:
        _tell(f"{n_with} of {n_answered} examples have a prompt and an answer")
    if ready.prompts:
        n_tokens = max(len(prompt.ids) for prompt in ready.prompts) + sampling.max_new_tokens
        excess = describe_excess(n_tokens, loaded.model.config.max_position_embeddings)
        if excess:
            _tell(f"note: with its answer {excess}")


def _tell_results(
    found: dict[str, Evaluation], ready: EvaluationData, sampling: SamplingConfig
) -> None:
    for name, each in found.items():
        if n_cut := each.scores.n_cut_answers:
            _tell(
                f"{name}: {n_cut} of {each.scores.n_answers} answers reached --max-new-tokens "
                f"{sampling.max_new_tokens} and are cut"
            )
    if not ready.prompts:
        _tell("Only the loss was measured. --answers 40, or all, also scores generated answers.")
