"""Logits and merged weights of a model with one block in fp32 at a time.

Memory stays at the largest block and a slice of the tables, whatever the model's size.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from lora.adapters.apply import replace_module
from lora.adapters.merge import has_tied_head, untied_config
from lora.decoder.config import DecoderConfig
from lora.decoder.decoder import Decoder, LlamaTrunk, build_empty_decoder
from lora.decoder.language_model import transform_logits
from lora.decoder.quantised.record import BaseQuantisation
from lora.errors import ModelError
from lora.export.values import BaseValues
from lora.layers.trainable_tokens import TrainableTokensEmbedding, TrainableTokensLinear
from lora.lora_module import LoRALayer
from lora.pretrained.gguf_file import rows_per_block
from lora.pretrained.gguf_weights import GGUFWeights
from lora.pretrained.gguf_writer import file_blocks

ModuleT = TypeVar("ModuleT", bound=nn.Module)
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
CPU = torch.device("cpu")


class BlockSource(Protocol):
    """A model whose parts come in fp32, one after the other."""

    config: DecoderConfig

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embedding's rows (N, C) of `ids` (N,), sorted and each once."""

    def outside(self) -> dict[str, nn.Module]:
        """Return the trunk's other modules outside the blocks, by name."""

    def block(self, number: int) -> nn.Module:
        """Return one block."""

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits (T, V) of hidden states (T, C)."""


class DecoderBlocks:
    """A decoder in memory, mapped or not, with an adapter or without.

    Its logits are those of the adapted model, its values those of the merged one. Quantised weights
    are unpacked; with `kind`, plain ones count as they are in a base that is quantised so.
    """

    def __init__(
        self,
        model: Decoder,
        release: Callable[[], None] = lambda: None,
        device: torch.device = CPU,
        kind: BaseQuantisation | None = None,
    ) -> None:
        self.model, self._release, self._device = model, release, device
        self._base = BaseValues(model, kind, device)
        is_tied = model.config.tie_word_embeddings and has_tied_head(model)
        self.config = model.config if is_tied else untied_config(model.config)
        wanted = build_empty_decoder(self.config).named_parameters()
        self.shapes = {name: tuple(parameter.shape) for name, parameter in wanted}
        self._embedding, self._head = model.get_input_embeddings(), model.get_output_embeddings()
        own = ("lora_A", "lora_B", "token_rows")
        adapted = {n for n, m in model.named_modules() if isinstance(m, _ADAPTED)}
        seen = {
            name: self._base.shape(name, parameter)
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if not (name.endswith(own) and name.rpartition(".")[0] in adapted)
        }
        if is_tied:
            seen.pop(HEAD, None)  # it is the embedding's
        if seen != self.shapes:
            odd = sorted(seen.keys() ^ self.shapes.keys())[:3]
            raise ModelError(
                f"Cannot export the model: a plain {model.config.family!r} model has other tensors "
                f"({', '.join(odd) or 'of other shapes'}). Merge its LoRA first: merge_lora(model)."
            )

    def trained_ids(self) -> list[int]:
        """Return the tokens whose embedding rows an adapter trained."""
        tables = [m for m in (self._embedding, self._head) if isinstance(m, _TOKEN_TABLES)]
        return sorted({number for table in tables for number in table.ids})

    def parts(self, name: str) -> Iterator[Tensor]:
        """Yield the rows of a parameter of the merged model; plain ones in their own dtype."""
        owner = self.model.get_submodule(name.rpartition(".")[0])
        if owner in (self._embedding, self._head):
            for first, rows in self._slices(owner):
                if isinstance(owner, LoRALayer):
                    b, a = (x.detach().to(rows) for x in (owner.lora_B, owner.lora_A))
                    rows = rows + (b[first : first + len(rows)] @ a) * owner.scaling
                yield rows.cpu()
        else:
            yield self.value(name)

    def value(self, name: str) -> Tensor:
        """Return a parameter with LoRA merged into it; plain ones in their own dtype."""
        self._release()
        owner = self.model.get_submodule(name.rpartition(".")[0])
        if not name.endswith(".weight") or not isinstance(owner, LoRALayer):
            is_changed = name.endswith(".weight") and self._base.changes(owner)
            found = self._base.of(owner) if is_changed else self.model.get_parameter(name)
            return found.detach().cpu()
        adapted = self._base.plain(owner) if self._base.changes(owner) else in_fp32(owner)
        merged = cast(LoRALayer, adapted).to(self._device).merge()
        return cast(Tensor, merged.weight).detach().cpu()

    def file_blocks(self, name: str) -> Iterator[np.ndarray]:
        """Yield a parameter with the adapter merged into it, as a GGUF file holds it."""
        for part in self.parts(name):
            for block in file_blocks(self.config, name, part):
                yield block
                self._release()

    def embed(self, ids: Tensor) -> Tensor:
        rows = _wide(self._base.picked_rows(self._embedding, ids))
        return _with_token_rows(rows, self._embedding, ids.tolist()).to(self._device)

    def outside(self) -> dict[str, nn.Module]:
        trunk, own = self.model.trunk, (self._embedding, self.model.trunk.blocks())
        plain = {name: child for name, child in trunk.named_children() if child not in own}
        return {name: in_fp32(child).to(self._device).eval() for name, child in plain.items()}

    def block(self, number: int) -> nn.Module:
        self._release()
        block = self.model.trunk.blocks()[number]
        plain = {id(m): self._base.plain(m) for m in block.modules() if self._base.changes(m)}
        return in_fp32(block, plain).to(self._device).eval()

    def head(self, hidden: Tensor) -> Tensor:
        head = self._head
        low = None
        if isinstance(head, LoRALayer):  # as its forward computes it, not as it is merged
            low = (hidden @ head.lora_A.detach().to(hidden).T) * head.scaling  # (T, R)
        # Parts kept one by one would lie between freed slices, and the heap would grow by each.
        logits = hidden.new_empty(len(hidden), self.config.vocab_size)  # (T, V)
        for first, rows in self._slices(head):
            part = logits[:, first : first + len(rows)]
            part.copy_(hidden @ rows.to(hidden).T)  # (T, rows)
            if low is not None and isinstance(head, LoRALayer):
                part += low @ head.lora_B.detach()[first : first + len(rows)].to(hidden).T
        return logits

    def _slices(self, table: nn.Module) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of the first row and some rows; what an adapter changed is fp32."""
        n_rows, width = self._base.shape_of(table)
        for first in range(0, n_rows, rows_per_block(width)):
            self._release()
            last = min(first + rows_per_block(width), n_rows)
            rows = self._base.rows(table, first, last).to(self._device)
            if isinstance(table, _ADAPTED):
                rows = _with_token_rows(_wide(rows), table, range(first, first + len(rows)))
            yield first, rows


_TOKEN_TABLES = (TrainableTokensEmbedding, TrainableTokensLinear)
_ADAPTED = (LoRALayer, *_TOKEN_TABLES)


def _with_token_rows(rows: Tensor, table: nn.Module, ids: list[int] | range) -> Tensor:
    """Return `rows` of the tokens `ids` in `table`, trained ones in their place."""
    if not isinstance(table, _TOKEN_TABLES):
        return rows
    index = {number: position for position, number in enumerate(table.ids)}
    found = [(row, index[number]) for row, number in enumerate(ids) if number in index]
    if not found:
        return rows
    into, of = (torch.tensor(numbers, device=rows.device) for numbers in zip(*found, strict=True))
    trained = table.token_rows.detach()[of.to(table.token_rows.device)]
    return rows.index_copy(0, into, trained.to(rows))


class GGUFBlocks:
    """The model in a GGUF file."""

    def __init__(self, weights: GGUFWeights) -> None:
        self.config, self._weights = weights.config, weights
        self._empty = build_empty_decoder(weights.config)

    def embed(self, ids: Tensor) -> Tensor:
        return _pick(self._weights.blocks(EMBEDDING), ids)

    def outside(self) -> dict[str, nn.Module]:
        norm = copy.deepcopy(cast(LlamaTrunk, self._empty.trunk).norm)
        weight = torch.cat(list(self._weights.blocks(NORM))).flatten()
        norm.register_parameter("weight", nn.Parameter(weight))
        return {"norm": norm}

    def block(self, number: int) -> nn.Module:
        block = copy.deepcopy(self._empty.trunk.blocks()[number])
        for name, _ in list(block.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            value = self._weights.tensor(f"model.layers.{number}.{name}")
            block.get_submodule(owner).register_parameter(leaf, nn.Parameter(value))
        return block.eval()

    def head(self, hidden: Tensor) -> Tensor:
        name, first = EMBEDDING if self.config.tie_word_embeddings else HEAD, 0
        logits = hidden.new_empty(len(hidden), self.config.vocab_size)  # (T, V)
        for rows in self._weights.blocks(name):
            logits[:, first : first + len(rows)] = hidden @ rows.T
            first += len(rows)
        return logits


@torch.no_grad()
def logits_by_block(source: BlockSource, ids: Tensor) -> Tensor:
    """Return the logits (T, V) of `ids` (1, T), computed in fp32 or wider."""
    model = build_empty_decoder(source.config).eval()
    trunk = model.trunk
    wanted, indices = ids.unique(return_inverse=True)
    table = source.embed(wanted)  # of the tokens that occur
    embedding = next(n for n, m in trunk.named_children() if m is trunk.embedding())
    replace_module(trunk, embedding, nn.Embedding(len(table), table.shape[1], _weight=table))
    for name, module in source.outside().items():
        replace_module(trunk, name, module)
    blocks = trunk.blocks()
    for number in range(len(blocks)):
        blocks[number] = _OnDemand(functools.partial(source.block, number))
    hidden = model.hidden_states(indices.to(table.device))[0]  # (T, C)
    return transform_logits(source.head(hidden).cpu(), source.config)


def logits_error(after: Tensor, before: Tensor) -> float:
    """Return ‖after - before‖ / ‖before‖ of logits (T, V), summed in fp64 a token at a time."""
    difference = scale = 0.0  # squared norms
    for new, old in zip(after, before, strict=True):
        difference += float((new.double() - old.double()).norm()) ** 2
        scale += float(old.double().norm()) ** 2
    return math.sqrt(difference / scale) if scale else math.sqrt(difference)


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


def in_fp32(module: ModuleT, others: Mapping[int, nn.Module] | None = None) -> ModuleT:
    """Return a copy of `module` whose parameters are fp32, or wider where they are.

    `others` stand in it for the modules with these ids.
    """
    memo: dict[int, object] = {**(others or {})}
    for child in module.modules():
        if id(child) not in memo:
            for p in child.parameters(recurse=False):
                memo[id(p)] = nn.Parameter(_wide(p.detach()), requires_grad=False)
    return copy.deepcopy(module, memo)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
