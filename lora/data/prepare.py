"""Data preparation: from a path to training and validation sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime

from lora.config import DataConfig
from lora.data.chat.choose_template import choose_template
from lora.data.prompting.prompt_format import describe_prompts
from lora.data.prompting.rules import ReadingRules, rules_for
from lora.data.reading.formats import Example
from lora.data.reading.readers import (
    Source,
    has_part,
    read_examples,
    read_with_labels,
)
from lora.data.reading.splitting import settings_of_split, split_examples
from lora.data.sequences.batches import TokenSequences, build_sequences
from lora.data.sequences.embedding_rows import check_ids, choose_pad_id, tokenizer_for
from lora.data.sequences.encode import encode_examples
from lora.data.sequences.encoded import EncodedExamples, check_has_targets
from lora.data.tokenizers.subword import TextTokenizer
from lora.runs.record import PromptFormat


@dataclass(frozen=True)
class PreparedData:
    """Training and validation sequences, with the examples and tokenizer that they come from."""

    train: TokenSequences
    validation: TokenSequences | None
    """None without validation data."""
    train_encoded: EncodedExamples
    validation_encoded: EncodedExamples | None
    train_examples: list[Example]
    validation_examples: list[Example]
    tokenizer: TextTokenizer
    """With the chat template that was used; save it with the model."""
    template_origin: str | None
    """Where the chat template comes from, for messages; None without conversations."""
    now: datetime
    """The date that chat templates printed; pass it again to get the same sequences."""
    rules: ReadingRules
    """How the rows were read; read others of the same task with them."""
    prompts: PromptFormat
    """How the model is prompted in training; save it with the model."""

    @property
    def longest_sequence_tokens(self) -> int:
        """Tokens of the longest sequence that goes through the model, with its padding."""
        parts = (self.train, self.validation)
        return max(part.sequence_length for part in parts if part is not None)


def prepare_data(
    source: Source,
    tokenizer: TextTokenizer,
    config: DataConfig,
    seed: int,
    *,
    validation_source: Source | None = None,
    now: datetime | None = None,
    n_rows: int | None = None,
    trained: PromptFormat | None = None,
    on_message: Callable[[str], None] = lambda message: None,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> PreparedData:
    """Return sequences of `config.max_length` tokens; reproducible from the same arguments.

    Args:
        source: a file, a folder, or rows in memory; see `read_examples`.
        tokenizer: the model's.
        config: how examples become sequences.
        seed: of the validation split and of the packing.
        validation_source: validation data; None splits off a part of `source`.
        now: the date for chat templates that print one (Llama 3's do); None is today.
        n_rows: of the model's embedding; None: the tokenizer's ids are not compared with it.
        trained: how the adapter or run that is continued was prompted.
        on_message: called with what was decided: skipped files, the chat template.
        on_progress: called with the tokenised fraction, if that takes over two seconds.

    Raises:
        DataError: the data are damaged, the template rejects them, or no token is a target.
        DependencyError: a file's format needs a package that is not installed.
    """
    for note in tokenizer.notes:
        on_message(note)
    tokenizer, n_rows = tokenizer_for(tokenizer, config, n_rows)
    pad_id, pad_note = choose_pad_id(tokenizer, n_rows)
    if pad_note:
        on_message(pad_note)
    has_template = tokenizer.chat_template is not None
    rules = rules_for(config, has_template=has_template, trained=trained)
    train, rules = read_with_labels(source, on_message, rules)
    train, validation = _find_validation(
        train, source, validation_source, config, seed, rules, on_message
    )
    origin, now = None, now or datetime.now()
    if any(example.messages is not None for example in train + validation):
        tokenizer, origin = choose_template(tokenizer, config.chat_template)
        on_message(f"conversations are formatted with {origin}")
    encoded = encode_examples(train, tokenizer, config, on_progress, now=now)
    check_has_targets(encoded, config.learn_on)
    check_ids(encoded.documents, train, tokenizer, n_rows)
    validation_encoded = None
    if validation:
        validation_encoded = encode_examples(validation, tokenizer, config, now=now)
        check_ids(validation_encoded.documents, validation, tokenizer, n_rows)
        if not len(validation_encoded.documents):
            on_message("no validation: none of the validation examples has a target token")
            validation_encoded = None
    train_sequences, validation_sequences = _build(encoded, pad_id, config, seed), None
    if validation_encoded is not None:
        validation_sequences = _build(validation_encoded, pad_id, config, seed)
        if config.is_packed:
            train_sequences, validation_sequences = _alike(train_sequences, validation_sequences)
    return PreparedData(
        train=train_sequences,
        validation=validation_sequences,
        train_encoded=encoded,
        validation_encoded=validation_encoded,
        train_examples=train,
        validation_examples=validation,
        tokenizer=tokenizer,
        template_origin=origin,
        now=now,
        rules=rules,
        prompts=describe_prompts(train, rules),
    )


def _find_validation(
    train: list[Example],
    source: Source,
    given: Source | None,
    config: DataConfig,
    seed: int,
    rules: ReadingRules,
    on_message: Callable[[str], None],
) -> tuple[list[Example], list[Example]]:
    """Return the training and the validation examples: given, of `source`, or split off `train`."""
    has_own = given is None and has_part(source, "validation")
    if has_own and config.eval_fraction:
        given = source
        for setting in settings_of_split(config):
            on_message(f"{setting} is not used: the data have validation examples of their own")
    elif has_own:
        on_message("validation data are not used: eval_fraction is 0")
    if given is None:
        return split_examples(train, config.eval_fraction, config.max_eval_examples, seed)
    validation = read_examples(given, on_message, rules=rules, part="validation")
    _report_overlap(train, validation, on_message)
    return train, validation


def _alike(one: TokenSequences, other: TokenSequences) -> tuple[TokenSequences, TokenSequences]:
    """Return both with the longer T: a compiled model takes one shape for steps and evaluations."""
    length = max(one.sequence_length, other.sequence_length)
    return replace(one, sequence_length=length), replace(other, sequence_length=length)


def _report_overlap(
    train: list[Example], validation: list[Example], on_message: Callable[[str], None]
) -> None:
    trained = {example.content_key() for example in train}
    n_shared = sum(example.content_key() in trained for example in validation)
    if n_shared:
        on_message(
            f"note: {n_shared} of {len(validation)} validation examples are also training "
            "examples: their loss does not measure generalisation"
        )


def _build(encoded: EncodedExamples, pad_id: int, config: DataConfig, seed: int) -> TokenSequences:
    return build_sequences(
        encoded.documents, config.max_length, packing=config.is_packed, pad_id=pad_id, seed=seed
    )
