"""What the commands that use a model share: find it, load it, put an adapter on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora.data.tokenizers import TextTokenizer
    from lora.decoder.decoder import Decoder
    from lora.decoder.sources import ModelSource
    from lora.device import DeviceChoice


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to answer."""

    source: ModelSource
    model: Decoder
    tokenizer: TextTokenizer
    choice: DeviceChoice


def load_model(name: str | None, adapter: Path | None, device: str = "auto") -> LoadedModel:
    """Return the model called `name` with `adapter` on it, and its tokenizer.

    An adapter that brings a tokenizer (with the chat template it learned) is asked with that one.
    """
    from lora.adapter_io import load_adapter
    from lora.decoder.hf_weights import load_decoder
    from lora.decoder.sources import find_model
    from lora.device import choose_device

    choice = choose_device(device)
    source = find_model(name)
    tokenizer = load_tokenizer_of(source, adapter)
    model = load_decoder(source.folder, device=choice.device)
    if adapter is not None:
        load_adapter(model, adapter)
    return LoadedModel(source, model.eval(), tokenizer, choice)


def load_tokenizer_of(source: ModelSource, adapter: Path | None) -> TextTokenizer:
    """Return the tokenizer that `adapter` brings, else the model's, with a chat template."""
    from lora.data.templates import choose_template
    from lora.data.tokenizers import load_tokenizer

    is_own = adapter is not None and (adapter / "tokenizer.json").is_file()
    folder = adapter if adapter is not None and is_own else source.folder
    return choose_template(load_tokenizer(folder), None)[0]
