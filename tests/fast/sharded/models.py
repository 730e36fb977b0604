"""Tiny models for the sharded step: whole, and as it takes them, with a base on the meta device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora.adapters.apply import applied_lora, train_token_rows
from lora.config import BaseWeights
from lora.data.sequences.batches import Batch
from lora.decoder.config import DecoderConfig, FeedForwardConfig
from lora.decoder.decoder import Decoder, build_decoder, build_empty_decoder
from lora.decoder.quantised.base import QuantisedWeight, quantised_modules
from lora.distributed.shards import Rows
from lora.layers.quantised_model import use_quantised_linears
from tests.fast.conftest import GEMMA, GRANITE, OLMO, apply_random_lora
from tests.tiny_llama import changed, llama_config

VOCABULARY, TOKENS = 101, 12


@dataclass(frozen=True)
class Case:
    """A model and how it is adapted."""

    tied: bool = True
    bias: bool = False
    n_layers: int = 3
    base: BaseWeights = field(default_factory=BaseWeights)
    comes_packed: bool = False
    """Its codes and scales are in the files."""
    lora: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    heads: tuple[int, int, int] = (5, 1, 8)
    """Query heads, key/value heads, width."""
    feed_forward: int = 56
    vocabulary: int = VOCABULARY
    std: float = 0.2
    changes: dict[str, Any] = field(default_factory=dict)
    """Other fields of the decoder's config."""
    rows: tuple[int, ...] = ()
    """Tokens whose rows train."""


CASES = {
    "tied": Case(lora={"rank_pattern": {"k_proj": 2}}),
    "untied, biases, four blocks": Case(tied=False, bias=True, n_layers=4),
    "tied, four blocks": Case(n_layers=4),
    "last block": Case(lora={"layers": (2,)}),
    "middle block": Case(tied=False, lora={"layers": (1,)}),
    "two targets": Case(lora={"targets": ("q_proj", "down_proj")}),
    "dropout": Case(lora={"dropout": 0.3}),
    "Gemma": Case(changes=GEMMA),
    "Granite": Case(changes=GRANITE),
    "OLMo": Case(changes=OLMO),
    "fused": Case(changes={"feed_forward": FeedForwardConfig(56, "silu", is_fused=True)}),
    "rows of tied tables, norms": Case(
        rows=(5, 6, 100), lora={"modules_to_save": ("input_layernorm", "norm")}
    ),
    "rows of two tables": Case(rows=(5, 6), tied=False, lora={"layers": (1,)}),
    "LoRA on the head": Case(tied=False, lora={"targets": ("q_proj", "lm_head")}),
    "fp8": Case(base=BaseWeights("fp8"), tied=False),
    "fp8, biases, two targets, dropout": Case(
        base=BaseWeights("fp8"),
        bias=True,
        lora={"targets": ("k_proj", "up_proj"), "dropout": 0.3},
    ),
    "nf4": Case(base=BaseWeights("nf4"), lora={"rank_pattern": {"k_proj": 2}}),
    "nf4, four blocks, two targets": Case(
        base=BaseWeights("nf4", nf4_block=32, nf4_double_quant=False),
        tied=False,
        n_layers=4,
        lora={"targets": ("k_proj", "up_proj"), "layers": (1, 2)},
    ),
    "nf4, biases, dropout": Case(base=BaseWeights("nf4"), bias=True, lora={"dropout": 0.3}),
    "nf4, rows of tied tables, norms": Case(
        base=BaseWeights("nf4"),
        rows=(5, 6, 100),
        lora={"modules_to_save": ("input_layernorm", "norm")},
    ),
    "nf4 in the files": Case(base=BaseWeights("nf4"), comes_packed=True, tied=False),
    "int8": Case(base=BaseWeights("int8"), tied=False, bias=True),
}


def config_of(case: Case) -> DecoderConfig:
    """Return a config; by default its sizes divide by neither two nor three processes."""
    config = llama_config(
        vocab_size=case.vocabulary,
        hidden_size=case.heads[0] * case.heads[2],
        heads=case.heads,
        feed_forward=case.feed_forward,
        n_layers=case.n_layers,
        tied=case.tied,
        bias=case.bias,
    )
    return changed(config, **case.changes)


def base_values(case: Case) -> dict[str, Tensor]:
    """Return the base's parameters, all random."""
    model = build_decoder(config_of(case), 1, dtype=case.dtype)
    draw = torch.Generator().manual_seed(2)
    return {
        name: p.detach() + case.std * torch.randn(p.shape, generator=draw, dtype=p.dtype)
        for name, p in model.named_parameters()
    }


def whole_model(case: Case, device: torch.device | str = "cpu") -> Decoder:
    """Return the model as one process loads it."""
    model, values = build_empty_decoder(config_of(case)), base_values(case)
    use_quantised_linears(model, case.base)
    for name, value in values.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, QuantisedWeight) and leaf == "weight":
            module.load(value.to(device), name)
        else:
            setattr(module, leaf, nn.Parameter(value.to(device, copy=True)))
    model.tie_head()
    return _adapted(model, case)


def empty_model(case: Case) -> Decoder:
    """Return the model as the sharded step takes it: LoRA is real, the base on the meta device."""
    model = build_empty_decoder(config_of(case)).to(case.dtype)
    use_quantised_linears(model, case.base)
    for module in quantised_modules(model).values():
        module.comes_packed = case.comes_packed
    adapted = _adapted(model, case)
    other = whole_model(case)
    whole = dict(other.named_parameters(remove_duplicate=False))
    trained = (p for p in whole.values() if p.requires_grad)
    copied = {id(p): nn.Parameter(p.detach().clone()) for p in trained}
    for name, parameter in list(adapted.named_parameters(remove_duplicate=False)):
        if parameter.requires_grad:
            owner, _, leaf = name.rpartition(".")
            setattr(adapted.get_submodule(owner), leaf, copied[id(whole[name])])
    for name in applied_lora(adapted).trainable_tokens:
        for leaf, buffer in other.get_submodule(name).named_buffers():
            setattr(adapted.get_submodule(name), leaf, buffer)
    return adapted


def _adapted(model: Decoder, case: Case) -> Decoder:
    apply_random_lora(model, case.dtype, **case.lora)
    return train_token_rows(model, case.rows) if case.rows else model  # type: ignore[return-value]


def rows_of(case: Case) -> Rows:
    """Return what reads rows of the base, and never all of a large one at once."""
    values = base_values(case)
    if case.comes_packed:
        for owner, module in quantised_modules(whole_model(case)).items():
            tensors = {"weight": module.weight.detach(), **dict(module.named_buffers())}
            values |= {f"{owner}.{key}": tensor for key, tensor in tensors.items()}
    return lambda name, rows: values[name][rows] if values[name].dim() else values[name]


def batch_of(seed: int, n_sequences: int, *, packed: bool, tokens: int = TOKENS) -> Batch:
    """Return random tokens: one document a sequence, or several."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (n_sequences, tokens), generator=draw)
    labels = ids.roll(-1, 1)
    labels[:, ::5] = -100
    documents = torch.zeros_like(ids)
    positions = torch.arange(tokens).expand(n_sequences, -1).clone()
    if packed:
        documents[0, 5:], positions[0, 5:] = 1, torch.arange(tokens - 5)
    return Batch(ids, labels, positions, documents)
