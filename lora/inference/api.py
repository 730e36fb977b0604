"""What `import lora` offers for answers: load a model, ask it, evaluate it.

model, tokenizer = lora.load_model("./llama", adapter="runs/orders/adapter")
lora.generate(model, tokenizer, "Please send 3 lamps to Anna in Rome.")
lora.evaluate(model, tokenizer, "test.jsonl", answers=40)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

from lora.config import BaseDtype, DataConfig, ImplementationName, SamplingConfig
from lora.data.chat.choose_template import choose_template
from lora.data.chat.prompts import chat_prompt
from lora.data.prompting.ask import Asker
from lora.data.prompting.rules import rules_for
from lora.data.reading.messages import Message
from lora.data.reading.readers import Source, read_examples
from lora.data.sequences.embedding_rows import check_ids
from lora.data.tokenizers.subword import TextTokenizer
from lora.decoder.language_model import LanguageModel
from lora.device import choose_device
from lora.errors import ConfigError, DataError, ModelError
from lora.inference import loading
from lora.inference.eval_config import EvalConfig
from lora.inference.evaluation import Evaluation, OnProgress, prepare_evaluation
from lora.inference.generate import generate as generate_tokens
from lora.inference.run_settings import (
    RunDataSettings,
    find_prompt_format,
    find_rules,
    read_run_data_settings,
)
from lora.inference.shared import generate_shared, sharing
from lora.runs.record import PromptFormat
from lora.terminal import escaping_log

log = escaping_log(__name__)

Chat = Sequence[Message]
"""The messages of a conversation, each with `role` and `content`; the last is the question."""


def load_model(
    name: str | Path | None = None,
    adapter: str | Path | None = None,
    *,
    device: str = "auto",
    implementation: ImplementationName = "auto",
    base_dtype: BaseDtype = "auto",
) -> tuple[LanguageModel, TextTokenizer]:
    """Return a model ready to answer, with an adapter on it if one is given, and its tokenizer.

    Args:
        name: a directory, a .gguf file or a hub's owner/name; None: the base that the adapter
            names, else SmolLM2-135M-Instruct, from 4-bit weights.
        adapter: directory of an adapter; its tokenizer, if it has one, is the one returned.
        device: auto, cpu, cuda, cuda:1 ...
        implementation: native, transformers for any causal language model, or auto: what the
            adapter's run recorded, else native if it can.
        base_dtype: auto, the values of the base that the adapter was trained over (of nf4 or fp8
            unpacked, where memory has room); nf4, int8 or fp8: packed; original: not quantised.

    Raises ModelError for a model that cannot be loaded, AdapterError for an adapter that does not
    belong to it, DataError for a damaged tokenizer.
    """
    folder = None if adapter is None else Path(adapter)
    given = None if name is None else str(name)
    loaded = loading.load_model(given, folder, device, implementation, base_dtype)
    if loaded.note is not None:
        log.warning(loaded.note)
    # Where what a whole model learned on is recorded, and what adapters of it name as their base.
    loaded.model.model_folder = loaded.source.folder  # type: ignore[assignment]
    loaded.model.model_reference = loaded.source.reference  # type: ignore[assignment]
    return loaded.model, loaded.tokenizer


@overload
def generate(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    prompts: str,
    *,
    system: str | None = None,
    raw: bool | None = None,
    sampling: SamplingConfig | None = None,
    **settings: Any,
) -> str: ...
@overload
def generate(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    prompts: Sequence[str | Chat],
    *,
    system: str | None = None,
    raw: bool | None = None,
    sampling: SamplingConfig | None = None,
    **settings: Any,
) -> list[str]: ...
def generate(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    prompts: str | Sequence[str | Chat],
    *,
    system: str | None = None,
    raw: bool | None = None,
    sampling: SamplingConfig | None = None,
    **settings: Any,
) -> str | list[str]:
    """Return the model's answers to `prompts`, or its answer if `prompts` is one string.

    Prompts share batches, as many as memory has room for; answers are greedy unless
    `temperature` is given. Under torchrun all processes call it with the same list of prompts, each
    answers a part of them, and all get all answers; in a callback one process answers by itself.

    Args:
        model: as `load_model` returns it.
        tokenizer: the model's.
        prompts: texts, or conversations as lists of messages ({"role": …, "content": …}).
        system: system prompt before each text; None: as in training, "": none.
        raw: continue each text as it is, without the chat template; None: as in training.
        sampling: how tokens are chosen.
        settings: fields of SamplingConfig, by their names: `max_new_tokens`, `temperature`,
            `top_k`, `top_p`, `seed`.

    Raises DataError for an empty or unusable prompt, ConfigError for settings out of range.
    """
    _check_model(model, tokenizer)
    config = SamplingConfig(**settings) if sampling is None else replace(sampling, **settings)
    tokenizer = choose_template(tokenizer, None)[0]
    many: Sequence[str | Chat] = [prompts] if isinstance(prompts, str) else prompts
    adapter, folder = loading.folders_of(model)
    trained = find_prompt_format(adapter, folder) or PromptFormat()
    asker = Asker(trained, raw, system)
    ids = [_prompt_ids(prompt, tokenizer, asker) for prompt in many]
    if isinstance(prompts, str):  # nothing to share, and one process may ask it alone
        (answer,) = generate_tokens(model, ids, config, stop_ids=tokenizer.stop_ids)
        return tokenizer.decode(answer)
    with sharing(next(model.parameters()).device) as world:
        answers = generate_shared(model, ids, config, world, stop_ids=tokenizer.stop_ids)
    return [tokenizer.decode(tokens) for tokens in answers]


def evaluate(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    data: Source,
    *,
    answers: int | Literal["all"] | None = None,
    metrics: Sequence[str] | str = ("auto",),
    sampling: SamplingConfig | None = None,
    data_config: DataConfig | None = None,
    on_progress: OnProgress = lambda stage, done, total: None,
    **settings: Any,
) -> Evaluation:
    """Return the model's loss and perplexity on examples, its answers, and their scores.

    With `disabled_adapter(model)` around it, the base is evaluated. Under torchrun all processes
    call it with the same arguments, each evaluates a part of the examples, and all get the whole;
    in a callback one process evaluates by itself.

    Args:
        model: as `load_model` returns it.
        tokenizer: the model's.
        data: a file or directory of examples, or a list of dicts.
        answers: number of examples to answer and score, or "all"; None: all if metrics are named,
            else none.
        metrics: scores of the answers: exact-match, json-fields, classification, rouge-l, bleu;
            auto takes those of the first three that fit.
        sampling: how tokens of answers are chosen.
        data_config: how examples are read; None: as in the run that trained the adapter, if its
            record lies beside it, else DataConfig's defaults.
        on_progress: called with (stage, done, total) after each batch.
        settings: fields of DataConfig that differ from those, by their names: `max_length` …

    Raises DataError for damaged data, ConfigError for settings out of range.
    """
    _check_model(model, tokenizer)
    chosen = EvalConfig(answers=answers, metrics=metrics)  # type: ignore[arg-type]
    adapter, folder = loading.folders_of(model)
    defaults = RunDataSettings(DataConfig(), None)
    of_run = defaults if adapter is None else read_run_data_settings(adapter)
    config = replace(data_config or of_run.config, **settings)
    if config.special_tokens:
        raise ConfigError(
            "Cannot evaluate with special_tokens: fine-tuning adds them, and an adapter has its "
            "own. Leave them out."
        )
    if folder is not None:
        rules = find_rules(config, adapter, folder)
    else:
        rules = rules_for(config, has_template=tokenizer.chat_template is not None)
    tokenizer = loading.tokenizer_for(config, tokenizer)
    examples = read_examples(data, rules=rules, part="test")
    ready = prepare_evaluation(
        examples,
        tokenizer,
        config,
        chosen.n_to_answer(len(examples)),
        chosen.metrics,
        now=of_run.now,
    )
    check_ids(ready.encoded.documents, examples, tokenizer, model.config.vocab_size)
    choice = choose_device(str(next(model.parameters()).device))
    with sharing(choice.device) as world:
        asked = sampling or SamplingConfig()
        return ready.evaluate(model, tokenizer, choice, asked, on_progress, world)


def _prompt_ids(prompt: str | Chat, tokenizer: TextTokenizer, asker: Asker) -> list[int]:
    if isinstance(prompt, str):
        return asker.prompt(prompt, tokenizer).ids
    is_chat = isinstance(prompt, Sequence) and all(isinstance(turn, Mapping) for turn in prompt)
    if not is_chat or not prompt:
        raise DataError(
            f"Cannot generate from a prompt of type {type(prompt).__name__}: {str(prompt)[:60]!r}. "
            'Allowed: a string, or a list of messages such as {"role": "user", "content": "Hi"}.'
        )
    if asker.raw or asker.system is not None:
        word = "raw=True" if asker.raw else "system"
        raise ConfigError(
            f"Cannot use {word} with a conversation: its messages are formatted by the chat "
            "template, system message included. Give strings as prompts, or leave it out."
        )
    return chat_prompt(prompt, tokenizer).ids


def _check_model(model: object, tokenizer: object) -> None:
    if not isinstance(model, LanguageModel):
        raise ModelError(
            f"Cannot use a {type(model).__name__} here. Allowed: a model that lora.load_model "
            "returned. One of transformers answers through its own generate()."
        )
    if not isinstance(tokenizer, TextTokenizer):
        raise ModelError(
            f"Cannot use a {type(tokenizer).__name__} as tokenizer. Allowed: the tokenizer that "
            "lora.load_model returned with the model."
        )
