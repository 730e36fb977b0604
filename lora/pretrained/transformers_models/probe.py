"""What an architecture of transformers does with documents, heads and caches, found out by trying.

No list of architectures: a small random copy of the configuration is run on the CPU, packed and
alone, and the logits are compared. Found once for each configuration in a process.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora.data.sequences.batches import find_bounds
from lora.pretrained.transformers_models.bounded import attention_within
from lora.pretrained.transformers_models.config import POSITIONS, Traits, setting
from lora.pretrained.transformers_models.masks import MASKED_ATTENTIONS
from lora.pretrained.transformers_models.model import TransformersModel
from lora.pretrained.transformers_models.quiet import quiet
from lora.pretrained.transformers_models.small_copy import VOCAB, HeadedCopy, refusals, small_copy

TOLERANCE = 1e-4
"""Of the largest logit, in fp32: what is more is no rounding."""
CACHE_TOLERANCE = 2e-3
"""The same of steps from a cache: recurrent blocks compute them otherwise than a whole prompt."""
LONG_TOKENS = 40
"""Of the first document."""
BIASED_TOKENS = 1000
"""The same where attention has biases by position: those after it no longer fit into bf16."""
MAX_NOISE = 3.0
"""By how much more than an example alone one in a packed sequence may be off, in bf16."""
CARRYING = ("linear", "recurrent", "mamba", "conv", "rwkv", "kda", "delta", "ssm", "hybrid")
"""Words in the names of kinds of blocks that are recurrent."""
_ROUNDED = "its biases by position are rounded, the more the deeper in a packed sequence"
_found: dict[str, Traits] = {}


def probe(config: Any) -> Traits:
    """Return what is true of the architecture of `config`, transformers' configuration."""
    key = json.dumps([config.to_dict(), config._attn_implementation], default=str, sort_keys=True)
    if key not in _found:
        with quiet():
            _found[key] = _probe(config)
    return _found[key]


@torch.no_grad()
def _probe(config: Any) -> Traits:
    try:
        model = small_copy(config)
        traits = replace(_head_of(model), is_head_assumed=isinstance(model, HeadedCopy))
    except refusals() as error:
        why = f"a small copy of it, to try this on, could not be run ({_first_line(error)})"
        return Traits(
            needs_all_logits=True, why_not_packed=why, why_not_packed_narrow=why, has_cache=False
        )
    own = TransformersModel(model, replace(traits, is_head_assumed=False))
    packed = _Packed(model.config, LONG_TOKENS)
    why_not = _why_carried(model) or _why_not_packed(own, packed)
    attention = config.get_text_config()._attn_implementation
    if attention not in MASKED_ATTENTIONS:
        why_not = f"its attention is {attention}: load it with sdpa or eager"
    why_not_narrow = why_not
    if why_not is None and _is_biased(model):
        deep = _Packed(model.config, BIASED_TOKENS)
        why_not = _ROUNDED if _why_not_packed(own, deep) else None
        why_not_narrow = _ROUNDED if why_not or _is_rounded(own, deep) else None
    return replace(
        traits,
        why_not_packed=why_not,
        why_not_packed_narrow=why_not_narrow,
        is_causal=_is_causal(own),
        attends_by_bounds=why_not is None and _attends_by_bounds(own, packed),
        has_cache=_has_cache(TransformersModel(model, own.traits)),
    )


def _is_biased(model: Any) -> bool:
    """Whether positions are biases of attention (alibi), and no input or not the only one."""
    takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters
    return not takes_positions or bool(setting(model.config, "alibi"))


def _head_of(model: Any) -> Traits:
    """Return how the logits follow from the last hidden state: scale and cap are tried."""
    ids = _tokens(9)[None]
    wanted = model(input_ids=ids).logits
    for traits in _heads(model.config):
        own = TransformersModel(model, traits)
        hidden = own.hidden_states(ids)
        if model.get_output_embeddings() is not None and _is_close(own.logits_of(hidden), wanted):
            return traits
    return Traits(needs_all_logits=True)


def _heads(config: Any) -> Iterator[Traits]:
    """Yield the scales and caps that the settings of architectures stand for."""
    factors = [
        setting(config, "logit_scale", "lm_head_multiplier"),
        setting(config, "logits_scaling"),
    ]
    scales = [1.0, *(f for f in factors if f), *(1 / f for f in factors if f)]
    cap = setting(config, "final_logit_softcapping", "logits_soft_cap")
    for softcap in [cap, None] if cap else [None]:
        for scale in scales:
            yield Traits(logit_scale=float(scale), logit_softcap=softcap)


class _Packed:
    """A packed sequence, and one that is padded on the left."""

    def __init__(self, config: Any, long_tokens: int) -> None:
        first = min(long_tokens, int(setting(config, *POSITIONS) or long_tokens) - 31)
        lengths = [max(first, 2), 11, 1, 17]
        documents = torch.repeat_interleave(torch.tensor(lengths))
        self.documents = torch.full((2, sum(lengths) + 2), -1)
        self.documents[0, : len(documents)] = documents
        self.documents[1, -11:] = 0
        self.ids = _tokens(self.documents.numel()).view(self.documents.shape)
        self.places = [(0, self.documents[0] == n) for n in range(len(lengths))]
        self.places.append((1, self.documents[1] == 0))
        self.positions = torch.zeros_like(self.ids)
        for row, places in self.places:
            self.positions[row, places] = torch.arange(int(places.sum()))

    def is_apart(self, logits: Tensor, model: Any) -> bool:
        """Whether each document has the logits (2, T, V) that `model` gives it alone."""
        return all(
            _is_close(logits[row, places], model(input_ids=self.ids[row, places][None]).logits[0])
            for row, places in self.places
        )


def _why_not_packed(own: TransformersModel, packed: _Packed) -> str | None:
    """Return why documents in one sequence have other logits than alone; None if they do not."""
    try:
        hidden = own.run_masked(packed.ids, packed.positions, packed.documents)
    except refusals() as error:
        return f"its masks cannot be told what belongs together ({_first_line(error)})"
    is_apart = packed.is_apart(own.logits_of(hidden), own.theirs)
    return None if is_apart else "an example in a packed sequence has other logits than alone"


def _is_rounded(own: TransformersModel, packed: _Packed) -> bool:
    """Whether a document in bf16 is further from its own logits than one that is alone."""
    row, places = packed.places[-2]  # deep in the packed sequence
    ids = packed.ids[row, places][None]
    wanted = own.theirs(input_ids=ids).logits[0]
    narrow = TransformersModel(copy.deepcopy(own.theirs).to(torch.bfloat16), own.traits)
    hidden = narrow.run_masked(packed.ids, packed.positions, packed.documents)
    found = narrow.logits_of(hidden)[row, places]
    alone = narrow.theirs(input_ids=ids).logits[0]
    return bool((found - wanted).abs().max() > MAX_NOISE * (alone - wanted).abs().max())


def _is_causal(own: TransformersModel) -> bool:
    """Whether the first tokens have the logits that they have without those after them."""
    ids = _tokens(12)[None]
    try:
        whole = own.theirs(input_ids=ids).logits[0, :8]
        return _is_close(own.theirs(input_ids=ids[:, :8]).logits[0], whole)
    except refusals():  # a length that the architecture does not take
        return True


def _attends_by_bounds(own: TransformersModel, packed: _Packed) -> bool:
    bounds = find_bounds(packed.documents)
    try:
        with attention_within(own.theirs, bounds, packed.ids.shape[1]):
            logits = own.logits_of(own.run(packed.ids, packed.positions))
    except refusals():
        return False
    return packed.is_apart(logits, own.theirs)


def _why_carried(model: Any) -> str | None:
    """Return which blocks carry what they saw from one example into the next; None: none is known.

    Their configuration tells, so that their slow code need not be tried.
    """
    if not any("attention" in type(module).__name__.lower() for module in model.modules()):
        return "its blocks are recurrent: what they carry goes on from one example into the next"
    config = model.config
    kinds = {str(kind) for kind in setting(config, "layer_types", "layers_block_type") or ()}
    if not kinds and any(name.startswith(("mamba_", "ssm_")) for name in config.to_dict()):
        return "some of its blocks (state-space mixers) carry what they saw into the next example"
    carrying = sorted(kind for kind in kinds if any(word in kind for word in CARRYING))
    if not carrying:
        return None
    return f"some of its blocks ({', '.join(carrying)}) carry what they saw into the next example"


def _has_cache(own: TransformersModel) -> bool:
    """Whether a cache continues two prompts, of which one is padded, as if each were alone."""
    lengths, n_new = (5, 9), 3
    ids = _tokens(2 * (9 + n_new)).view(2, -1)
    documents = torch.zeros(2, 9, dtype=torch.int64)
    documents[0, : 9 - lengths[0]] = -1
    try:
        cache = own.new_cache(2, 9 + n_new)
        logits = [own(ids[:, :9], document_ids=documents, cache=cache)[:, -1]]
        logits.append(own(ids[:, 9:10], cache=cache)[:, -1])
        cache.select_sequences(torch.tensor([0]))
        logits.append(own(ids[:1, 10:11], cache=cache)[:, -1])
        for row, length, n_steps in ((0, lengths[0], 3), (1, lengths[1], 2)):
            whole = own.theirs(input_ids=ids[row : row + 1, 9 - length :]).logits[0, length - 1 :]
            found = torch.stack([logits[step][row] for step in range(n_steps)])
            if not _is_close(found, whole[:n_steps], CACHE_TOLERANCE):
                return False
    except refusals():
        return False
    return True


def _tokens(n: int) -> Tensor:
    return torch.randint(1, VOCAB, (n,), generator=torch.Generator().manual_seed(1))


def _is_close(found: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> bool:
    if found.shape != wanted.shape:
        return False
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
