"""Where the halves of blocks meet on the residual stream, and which norms are there.

A half is a block's attention or its feed-forward: branch = f(norm(residual)). At a junction what
the half before has computed is added to the residual, and the half behind reads the sum. Three
kinds of block differ in where they have norms:

            before the addition   before the next half
pre_norm    -                     norm                    Llama, Qwen, Mistral
post_norm   norm                  -                       OLMo 2
sandwich    norm                  norm                    Gemma

Junction 0 is the embedding's, 2l + 1 the one in the middle of block l, 2l + 2 the one behind it;
the last one, 2L, has the final norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lora.decoder.config import DecoderConfig

NORM_NAMES = {
    "pre_norm": ("input_layernorm", None, "post_attention_layernorm", None),
    "post_norm": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "sandwich": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
"""By kind of block, Hugging Face's names: before attention and after it, before the feed-forward
and after it; None: no norm there."""


@dataclass(frozen=True)
class Branches:
    """What a half's output goes through before it is added to the residual."""

    has_norm: bool
    """One of its own."""
    factor: float
    has_norm_before: bool
    """Whether a half's input is a norm's output; if not, it is a copy of the residual."""
    offset: bool
    """Whether norms multiply by 1 + weight."""

    @property
    def is_changed(self) -> bool:
        """Whether a branch's gradient is another than the residual's, in a buffer of its own."""
        return self.has_norm or self.factor != 1


@dataclass(frozen=True)
class Junction:
    """Numbers of its norms among the network's; None: there is none."""

    after: int | None
    """Of the norm that the branch before goes through."""
    before: int | None
    """Of the norm whose output the half behind reads."""


def branches_of(config: DecoderConfig) -> Branches:
    """Return how a decoder's blocks add what they compute."""
    return Branches(
        has_norm=config.block in ("post_norm", "sandwich"),
        factor=config.residual_multiplier,
        has_norm_before=config.block in ("pre_norm", "sandwich"),
        offset=config.block == "sandwich",
    )


def list_norms(
    config: DecoderConfig, blocks: Sequence[nn.Module], final: nn.Module
) -> tuple[list[nn.Module], list[Junction]]:
    """Return all norms in the order of a forward pass, and the 2L + 1 junctions."""
    norms: list[nn.Module] = []

    def number(block: nn.Module, name: str | None) -> int | None:
        if name is None:
            return None
        norms.append(block.get_submodule(name))
        return len(norms) - 1

    before_attention, after_attention, before_feed, after_feed = NORM_NAMES[config.block]
    junctions, after = [], None
    for block in blocks:
        junctions.append(Junction(after, number(block, before_attention)))
        after = number(block, after_attention)
        junctions.append(Junction(after, number(block, before_feed)))
        after = number(block, after_feed)
    norms.append(final)
    junctions.append(Junction(after, len(norms) - 1))
    return norms, junctions
