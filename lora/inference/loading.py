"""What the commands that use a model share: find it, load it, put an adapter on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from lora.data.tokenizers.subword import TextTokenizer
    from lora.decoder.decoder import Decoder
    from lora.device import DeviceChoice
    from lora.pretrained.sources import ModelSource
    from lora.runs.record import PromptFormat

CHECKED_TEXT = "A merged model must answer as the adapted one did. 1 + 1 = 2; def f(x): return x"
MAX_CHECKED_ROWS = 64


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to answer."""

    source: ModelSource
    model: Decoder
    tokenizer: TextTokenizer
    choice: DeviceChoice
    prompts: PromptFormat | None = None
    """How it was prompted in training; None if nothing tells."""


def load_model(name: str | None, adapter: Path | None, device: str = "auto") -> LoadedModel:
    """Return the model called `name` with `adapter` on it, and its tokenizer.

    An adapter that brings a tokenizer (with the chat template it learned) is asked with that one.
    """
    from lora.adapters.save_load import load_adapter
    from lora.device import choose_device
    from lora.inference.run_settings import find_prompt_format
    from lora.pretrained.hf_weights import load_decoder
    from lora.pretrained.sources import find_model

    choice = choose_device(device)
    source = find_model(name)
    tokenizer = load_tokenizer_of(source, adapter)
    prompts = find_prompt_format(adapter, source.folder)
    model = load_decoder(source.folder, device=choice.device)
    if adapter is not None:
        load_adapter(model, adapter)
    return LoadedModel(source, model.eval(), tokenizer, choice, prompts)


def checked_ids(loaded: LoadedModel) -> Tensor:
    """Return tokens, (1, T), on which an adapted model is compared with the merged one.

    A text, and the tokens whose rows trained.
    """
    import torch

    from lora.adapters.apply import applied_lora

    rows = {n for layer in applied_lora(loaded.model).trainable_tokens.values() for n in layer.ids}
    tokens = loaded.tokenizer.encode(CHECKED_TEXT) + sorted(rows)[:MAX_CHECKED_ROWS]
    return torch.tensor([tokens], device=loaded.choice.device)


def load_tokenizer_of(source: ModelSource, adapter: Path | None) -> TextTokenizer:
    """Return the tokenizer that `adapter` brings, else the model's, with a chat template."""
    from lora.data.chat.choose_template import choose_template
    from lora.data.tokenizers.subword import load_tokenizer

    is_own = adapter is not None and (adapter / "tokenizer.json").is_file()
    folder = adapter if adapter is not None and is_own else source.folder
    return choose_template(load_tokenizer(folder), None)[0]
