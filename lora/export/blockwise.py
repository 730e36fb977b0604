"""Logits and merged weights of a model with one block in fp32 at a time.

Memory stays at the largest block and a slice of the tables, whatever the model's size.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from lora.adapters.apply import applied_lora, lora_layers
from lora.decoder.config import DecoderConfig
from lora.decoder.decoder import Decoder, LlamaTrunk, build_empty_decoder
from lora.errors import ModelError
from lora.lora_module import LoRALayer
from lora.pretrained.gguf_file import rows_per_block
from lora.pretrained.gguf_weights import GGUFWeights
from lora.pretrained.gguf_writer import file_blocks

ModuleT = TypeVar("ModuleT", bound=nn.Module)
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class BlockSource(Protocol):
    """A model whose parts come in fp32, one after the other."""

    config: DecoderConfig

    def rows(self, name: str) -> Iterator[Tensor]:
        """Yield a parameter outside the blocks in slices of (rows, row length)."""

    def block(self, number: int) -> nn.Module:
        """Return one block."""


class DecoderBlocks:
    """A decoder in memory, mapped or not, plain or with LoRA on layers inside its blocks."""

    def __init__(self, model: Decoder, release: Callable[[], None] = lambda: None) -> None:
        self.model, self.config, self._release = model, model.config, release
        wanted = build_empty_decoder(model.config).named_parameters()
        self.shapes = {name: tuple(parameter.shape) for name, parameter in wanted}
        layers = lora_layers(model)
        own = {f"{name}.{part}" for name in layers for part in ("lora_A", "lora_B")}
        seen = {n: tuple(p.shape) for n, p in model.named_parameters() if n not in own}
        if seen != self.shapes or any(not name.startswith("model.layers.") for name in layers):
            odd = sorted(seen.keys() ^ self.shapes.keys())[:3]
            raise ModelError(
                f"Cannot export the model: a plain {model.config.family!r} model has other tensors "
                f"({', '.join(odd) or 'of other shapes'}). Merge its LoRA first: merge_lora(model)."
            )

    def value(self, name: str) -> Tensor:
        """Return a parameter with LoRA merged into it; plain ones in their own dtype."""
        self._release()
        owner = self.model.get_submodule(name.rpartition(".")[0])
        if not isinstance(owner, LoRALayer) or not name.endswith(".weight"):
            return self.model.get_parameter(name).detach()
        return cast(Tensor, in_fp32(owner).merge().weight).detach()

    def file_blocks(self, name: str) -> Iterator[np.ndarray]:
        """Yield a parameter with LoRA merged into it, as a GGUF file holds it."""
        for block in file_blocks(self.config, name, self.value(name)):
            yield block
            self._release()

    def rows(self, name: str) -> Iterator[Tensor]:
        parameter = self.model.get_parameter(name).detach()
        table = parameter.reshape(-1, parameter.shape[-1])  # (rows, row length)
        for part in table.split(rows_per_block(table.shape[-1])):
            yield _wide(part).cpu()
            self._release()

    def block(self, number: int) -> nn.Module:
        self._release()
        return in_fp32(self.model.trunk.blocks()[number]).cpu().eval()


class GGUFBlocks:
    """The model in a GGUF file."""

    def __init__(self, weights: GGUFWeights) -> None:
        self.config, self._weights = weights.config, weights
        self._empty = build_empty_decoder(weights.config)

    def rows(self, name: str) -> Iterator[Tensor]:
        return self._weights.blocks(name)

    def block(self, number: int) -> nn.Module:
        block = copy.deepcopy(self._empty.trunk.blocks()[number])
        for name, _ in list(block.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            value = self._weights.tensor(f"model.layers.{number}.{name}")
            block.get_submodule(owner).register_parameter(leaf, nn.Parameter(value))
        return block.eval()


def is_simple(model: Decoder) -> bool:
    """Whether all that the adapter on `model` changes are layers inside its blocks."""
    applied = applied_lora(model)
    is_inside = all(name.startswith("model.layers.") for name in lora_layers(model))
    return is_inside and not applied.originals and not applied.trainable_tokens


@torch.no_grad()
def logits_by_block(source: BlockSource, ids: Tensor) -> Tensor:
    """Return the logits (T, V) of `ids` (1, T), computed in fp32 or wider on the CPU."""
    model = build_empty_decoder(source.config).eval()
    trunk = cast(LlamaTrunk, model.trunk)
    wanted, places = ids.unique(return_inverse=True)
    table = _pick(source.rows(EMBEDDING), wanted)  # of the tokens that occur
    trunk.embed_tokens = nn.Embedding(table.shape[0], table.shape[1], _weight=table)
    norm = torch.cat(list(source.rows(NORM))).flatten()
    trunk.norm.register_parameter("weight", nn.Parameter(norm))
    blocks = trunk.blocks()
    for number in range(len(blocks)):
        blocks[number] = _OnDemand(functools.partial(source.block, number))
    hidden = model.hidden_states(places)[0]  # (T, C)
    head = EMBEDDING if source.config.tie_word_embeddings else HEAD
    return torch.cat([hidden @ rows.T for rows in source.rows(head)], dim=-1)  # (T, V)


class _OnDemand(nn.Module):
    """A block that exists while it computes."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self._build = build

    def forward(self, *inputs: object) -> Tensor:
        return cast(Tensor, self._build()(*inputs))


def _pick(blocks: Iterator[Tensor], wanted: Tensor) -> Tensor:
    """Return the rows `wanted` (sorted) of a table that comes in blocks."""
    picked, first = [], 0
    for block in blocks:
        inside = wanted[(wanted >= first) & (wanted < first + len(block))]
        picked.append(block[inside - first].clone())
        first += len(block)
    return torch.cat(picked)


def in_fp32(module: ModuleT) -> ModuleT:
    """Return a copy of `module` whose parameters are fp32, or wider where they are."""
    memo: dict[int, object] = {
        id(p): nn.Parameter(_wide(p.detach()), requires_grad=False) for p in module.parameters()
    }
    return copy.deepcopy(module, memo)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
