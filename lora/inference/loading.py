"""What the commands that use a model share: find it, load it, put an adapter on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora.runs.outputs import input_paths

if TYPE_CHECKING:
    from torch import Tensor

    from lora.config import BaseDtype, DataConfig, ImplementationName
    from lora.data.tokenizers.subword import TextTokenizer
    from lora.decoder.language_model import LanguageModel
    from lora.device import DeviceChoice
    from lora.pretrained.load.implementation import Implementation
    from lora.pretrained.mapped import MappedModel
    from lora.pretrained.sources import ModelSource
    from lora.runs.record import PromptFormat

CHECKED_TEXT = "A merged model must answer as the adapted one did. 1 + 1 = 2; def f(x): return x"
MAX_CHECKED_ROWS = 64


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to answer."""

    source: ModelSource
    model: LanguageModel
    tokenizer: TextTokenizer
    choice: DeviceChoice
    implementation: Implementation
    prompts: PromptFormat | None = None
    """How it was prompted in training; None if nothing tells."""
    note: str | None = None
    """What should be known of its weights."""


def load_model(
    name: str | None,
    adapter: Path | None,
    device: str = "auto",
    implementation: ImplementationName = "auto",
    base_dtype: BaseDtype = "auto",
) -> LoadedModel:
    """Return the model called `name` with `adapter` on it, and its tokenizer.

    Without a name it is the base that the adapter names, else the default model. An adapter that
    brings a tokenizer (with the chat template it learned) is asked with that one. Each of several
    processes loads the model on its own GPU. `base_dtype`: see `lora.inference.base_weights`.
    """
    from lora.adapters.save_load import load_adapter
    from lora.device import choose_device
    from lora.distributed.devices import own_device
    from lora.errors import AdapterError
    from lora.inference.base_weights import choose_answer_base, load_answer_base
    from lora.inference.checkpoints.find import find_adapter
    from lora.inference.run_settings import find_prompt_format
    from lora.pretrained.quantised.folder import check_answer_dtype

    check_answer_dtype(base_dtype)
    choice = choose_device(own_device(device))
    adapter = None if adapter is None else find_adapter(adapter)
    source = find_model_of(name, adapter)
    chosen = find_implementation_of(source, adapter, implementation)
    tokenizer = load_tokenizer_of(source, adapter)
    prompts = find_prompt_format(adapter, source.folder)
    base = choose_answer_base(
        base_dtype, adapter, source.folder, choice, is_native=chosen.kind == "native"
    )
    model, note = load_answer_base(source.folder, chosen.kind, choice, base)
    if adapter is not None:
        try:
            load_adapter(model, adapter)
        except AdapterError as error:
            raise AdapterError(f"{error}{describe_other_base(name, adapter, source)}") from None
    return LoadedModel(source, model.eval(), tokenizer, choice, chosen, prompts, note)


def find_implementation_of(
    source: ModelSource, adapter: Path | None, asked: ImplementationName = "auto"
) -> Implementation:
    """Return the code that runs a model, as asked, as recorded by its run, or the best there is.

    Raises ModelError for a model that it cannot run, ConfigError for a word that is not allowed.
    """
    from lora.inference.run_settings import find_implementation
    from lora.pretrained.load.models import implementation_of

    name = find_implementation(asked, adapter, source.folder)
    return implementation_of(source.folder, name, is_recorded=name != asked)


def map_adapted(
    source: ModelSource, adapter: Path, implementation: ImplementationName = "auto"
) -> MappedModel:
    """Return the model with `adapter` on it, for merging: its weights stay in their files."""
    from lora.adapters.save_load import load_adapter
    from lora.pretrained.load.models import map_language_model

    mapped = map_language_model(source.folder, implementation)
    load_adapter(mapped.model, adapter, release=mapped.release)
    mapped.model.eval()
    return mapped


def checked_ids(model: LanguageModel, tokenizer: TextTokenizer) -> Tensor:
    """Return tokens, (1, T), on which an adapted model is compared with the merged one.

    A text, and the tokens whose rows trained.
    """
    import torch

    from lora.adapters.apply import applied_lora

    rows = {n for layer in applied_lora(model).trainable_tokens.values() for n in layer.ids}
    tokens = sorted(rows)[:MAX_CHECKED_ROWS] + tokenizer.encode(CHECKED_TEXT)
    return torch.tensor([tokens[: model.config.max_position_embeddings]])


def load_tokenizer_of(source: ModelSource, adapter: Path | None) -> TextTokenizer:
    """Return the tokenizer that `adapter` brings, else the model's, with a chat template."""
    from lora.data.chat.choose_template import choose_template
    from lora.data.tokenizers.subword import load_tokenizer

    is_own = adapter is not None and (adapter / "tokenizer.json").is_file()
    folder = adapter if adapter is not None and is_own else source.folder
    return choose_template(load_tokenizer(folder), None)[0]


def tokenizer_for(config: DataConfig, tokenizer: TextTokenizer) -> TextTokenizer:
    """Return `tokenizer` with the chat template and control tokens of an evaluation's settings."""
    from lora.data.chat.choose_template import choose_template

    chosen = choose_template(tokenizer, config.chat_template)[0]
    return chosen.with_control_tokens_in_messages() if config.keep_control_tokens else chosen


def folders_of(model: LanguageModel) -> tuple[Path | None, Path | None]:
    """Return the directories that the adapter on `model`, and `model`, were loaded from."""
    from lora.adapters.apply import AppliedLoRA

    applied, folder = vars(model).get("applied_lora"), vars(model).get("model_folder")
    adapter = applied.folder if isinstance(applied, AppliedLoRA) else None
    return adapter, folder if isinstance(folder, Path) else None


def find_model_of(name: str | None, adapter: Path | None) -> ModelSource:
    """Return the model called `name`; without a name the base of `adapter`, else the default model.

    Raises ModelError, also for a base that is named and not found.
    """
    from lora.errors import ModelError, ModelNotFoundError
    from lora.pretrained.sources import find_model

    base = None if name is not None or adapter is None else find_base_name(adapter)
    if base is None:
        return find_model(name)
    try:
        return find_model(base)
    except ModelError as error:
        kind = ModelNotFoundError if isinstance(error, ModelNotFoundError) else ModelError
        raise kind(
            f"Cannot load the base of the adapter {adapter}: it names {base!r}. {error} If the "
            "base is elsewhere now, give it with --model."
        ) from None


def find_base_name(adapter: Path) -> str | None:
    """Return the base that an adapter names; None for the default model, or if it names none."""
    from lora.errors import LoraError
    from lora.pretrained.sources import DEFAULT_HUB_NAME, base_named_by
    from lora.runs.disk import read_json
    from lora.runs.record import RUN_FILE

    base = base_named_by(adapter)
    if base != DEFAULT_HUB_NAME:
        return base
    # The hub's weights and the default model's, which come from 4 bits, have the same name.
    for directory in (adapter, adapter.resolve().parent):
        if (directory / RUN_FILE).is_file():
            try:
                record = read_json(directory / RUN_FILE)
            except LoraError:
                return None
            given = record.get("model_source") if isinstance(record, dict) else None
            return given if isinstance(given, str) else None
    return None


def model_inputs(model: str | None, adapter: Path | str | None) -> tuple[Path, ...]:
    """Return what is read of a model and an adapter: the adapter's base too, where none is named.

    No output may replace them. A checkpoint's name (`runs/x@500`) stands for its run directory.
    """
    from lora.inference.checkpoints.find import find_adapter, split_name

    if adapter is None:
        return input_paths(model)
    found = find_adapter(adapter)
    base = find_base_name(found) if model is None else model
    return input_paths(base, found, split_name(Path(adapter))[0])


def describe_other_base(name: str | None, adapter: Path, source: ModelSource) -> str:
    """Return which --model to give, if `source` is not what the adapter names as its base."""
    from lora.pretrained.sources import ADAPTER_CONFIG, base_named_by

    if not (adapter / ADAPTER_CONFIG).is_file():
        return ""  # there is no adapter to name one
    base = base_named_by(adapter)
    if base is None:
        return " The adapter does not name its base: give that with --model."
    if base == source.reference:
        return ""
    way = "leave --model out, or give" if name is not None else "give"
    return f" The adapter names {base!r} as its base: {way} --model {base}."
