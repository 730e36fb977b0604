"""The sizes of one of transformers' causal models, under the names that all jobs know."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

NARROW = (torch.bfloat16, torch.float16)
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
"""Names of the context length in configurations; some architectures have none."""


@dataclass(frozen=True)
class Traits:
    """What was found out about an architecture by trying a small random copy of it."""

    logit_scale: float = 1.0
    logit_softcap: float | None = None
    needs_all_logits: bool = False
    """Whether its logits are more than a linear of the last hidden state, scaled and capped."""
    why_not_packed: str | None = None
    """Why the examples of a packed sequence would not have the logits that they have alone."""
    why_not_packed_narrow: str | None = None
    """The same in bf16 and fp16."""
    attends_by_bounds: bool = False
    """Whether its attention can be replaced by one that takes where documents begin."""
    is_head_assumed: bool = False
    """Whether the head could not be tried on the small copy, and the model itself has to tell."""
    is_causal: bool = True
    """Whether no token sees those after it; also where that could not be tried."""
    has_cache: bool = True
    """Whether a cache of keys and values continues padded sequences."""

    def why_not_packed_in(self, dtype: torch.dtype) -> str | None:
        """Return why not in `dtype`; None if examples in one sequence do not see each other."""
        return self.why_not_packed_narrow if dtype in NARROW else self.why_not_packed


class TransformersConfig:
    """A `lora.decoder.language_model.ModelConfig` that reads transformers' configuration.

    Read each time: a vocabulary that grows is seen here at once.
    """

    def __init__(self, config: Any, traits: Traits) -> None:
        self.theirs, self.traits = config, traits

    @property
    def text(self) -> Any:
        """The configuration of the language model, also where it has a vision part beside it."""
        return self.theirs.get_text_config()

    @property
    def family(self) -> str:
        """model_type in config.json."""
        return str(self.theirs.model_type)

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.text.vocab_size)

    @property
    def hidden_size(self) -> int:
        """C."""
        return int(self.text.hidden_size)

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks."""
        return int(self.text.num_hidden_layers)

    @property
    def max_position_embeddings(self) -> int:
        """Context length in tokens; the largest number for an architecture without one."""
        found = setting(self.text, *POSITIONS)
        return int(found) if found else sys.maxsize

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the output head shares the embedding's weight."""
        return bool(self.theirs.tie_word_embeddings)

    @property
    def source(self) -> dict[str, Any]:
        """The contents of config.json."""
        contents: dict[str, Any] = self.theirs.to_dict()
        return contents

    @property
    def logit_scale(self) -> float:
        """Multiplies the output head's logits."""
        return self.traits.logit_scale

    @property
    def logit_softcap(self) -> float | None:
        """The scaled logits become softcap · tanh(logits / softcap); None: they stay."""
        return self.traits.logit_softcap

    def is_transposed_in_files(self, name: str) -> bool:
        """Whether files hold `name` transposed: never, GPT-2's Conv1D is the module here too."""
        return False


def rotary_limit(config: Any) -> int:
    """Return the tokens beyond which rotary frequencies are chosen by the longest of a batch.

    The largest number where they are the same for all lengths.
    """
    contents: Mapping[str, Any] = config.to_dict()
    rope = contents.get("rope_parameters") or {}
    parts = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    name = "original_max_position_embeddings"
    limits = [
        part.get(name) or contents.get(name) or contents.get("max_position_embeddings")
        for part in parts
        if part.get("rope_type") in ("longrope", "dynamic")
    ]
    return min((int(limit) for limit in limits if limit), default=sys.maxsize)


def settings_by_block(config: Any, n_blocks: int) -> dict[str, list[Any]]:
    """Return the settings of `config` that have a value for each block, such as layer_types."""
    contents: Mapping[str, Any] = config.to_dict()
    return {n: v for n, v in contents.items() if isinstance(v, list) and len(v) == n_blocks}


def setting(config: Any, *names: str) -> Any:
    """Return the first of `names` that `config` has a value for, under its own name for it."""
    contents: Mapping[str, Any] = config.to_dict()
    own: Mapping[str, str] = config.attribute_map
    found = (contents.get(own.get(name, name), contents.get(name)) for name in names)
    return next((value for value in found if value is not None), None)
