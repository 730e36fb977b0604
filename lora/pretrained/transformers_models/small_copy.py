"""A small random copy of an architecture: what is found out about it holds for the large model.

The kinds of blocks, windows, caps, multipliers and the width of a head stay; the number of blocks,
of heads and of words is small.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lora.pretrained.transformers_models.config import setting, settings_by_block
from lora.pretrained.transformers_models.masks import MASKED_ATTENTIONS

VOCAB = 64
WINDOW_TOKENS = 7
"""Smaller than the documents that are tried, so that a window counts."""
N_HEADS = 4
MAX_PARAMETERS = 100_000_000
"""Of the copy: drawing and running more would take seconds."""
MAX_WIDTH = 2048
"""Of the hidden states, where they cannot be made narrower."""
MAX_BLOCKS = 12
"""Blocks that are kept at most so that each kind is there."""
_WIDTHS = {
    "intermediate_size": 64,
    "intermediate_size_mlp": 64,
    "ffn_dim": 64,
    "n_inner": 64,
    "ffn_hidden_size": 64,
}
_EXPERTS = {
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
_RECURRENT = {"linear_num_heads": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
"""Of linear attention, whose code without kernels is slow."""
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")


REFUSALS = (
    *(RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError),
    *(ImportError, AssertionError, OSError),
)
"""What an architecture may raise for sizes or masks that it does not expect."""


def refusals() -> tuple[type[BaseException], ...]:
    """Return REFUSALS, and what settings raise that are checked when they are set."""
    from huggingface_hub.errors import StrictDataclassError

    return (*REFUSALS, StrictDataclassError)


class HeadedCopy(nn.Module):
    """The text part of a multimodal model, which has no class of its own with a head, and a head.

    What the head of the whole model does with logits is not known of it.
    """

    def __init__(self, body: Any, vocab_size: int) -> None:
        super().__init__()
        self.base_model, self.config = body, body.config
        self.lm_head = nn.Linear(body.config.hidden_size, vocab_size, bias=False)

    def forward(self, input_ids: Tensor) -> Any:
        """Return the logits as an attribute, as transformers' models do."""
        return SimpleNamespace(logits=self.lm_head(self.base_model(input_ids=input_ids)[0]))

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def set_attn_implementation(self, name: str) -> None:
        """Change the body's attention."""
        self.base_model.set_attn_implementation(name)


def small_copy(config: Any) -> Any:
    """Return a model of the language part of `config` in fp32, in eval mode, all of it random.

    Raises one of REFUSALS, which depends on the architecture, if none can be built and run.
    """
    text = config.get_text_config()
    attention = text._attn_implementation
    try:
        return _build(_small_config(text), attention)
    except refusals():
        pass
    try:
        # The first blocks may lack a kind that the network asks for, as attention in Jamba.
        return _build(_small_config(text, n_blocks=int(text.num_hidden_layers)), attention)
    except refusals():
        # Sizes may depend on each other in other ways: then those of a small model stay.
        if text.hidden_size > MAX_WIDTH:
            raise
    return _build(_small_config(text, is_narrow=False), attention)


@torch.no_grad()
def _build(config: Any, attention: str) -> Any:
    import transformers

    known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    kind = transformers.AutoModelForCausalLM if known else transformers.AutoModel
    asked = attention if attention in MASKED_ATTENTIONS else None
    with torch.device("meta"):
        empty = kind.from_config(config, dtype=torch.float32, attn_implementation=asked)
    n_parameters = sum(parameter.numel() for parameter in empty.parameters())
    if n_parameters > MAX_PARAMETERS:
        raise ValueError(f"it would still have {n_parameters:,} parameters")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model = kind.from_config(config, dtype=torch.float32, attn_implementation=asked)
        if not known:
            model = HeadedCopy(model, VOCAB)
    _draw(model)
    model.eval().requires_grad_(False)
    model(input_ids=torch.tensor([[1, 2, 3]]))
    return model


def _small_config(text: Any, *, n_blocks: int | None = None, is_narrow: bool = True) -> Any:
    small = copy.deepcopy(text)
    heads = setting(text, "num_attention_heads") or 1
    width = int(text.hidden_size)
    head_dim = setting(text, "head_dim") or width // heads
    shared = setting(text, "num_key_value_heads", "num_kv_heads") or heads
    for name in ("vocab_size", "vocab_size_per_layer_input"):
        _change(small, name, VOCAB)
    for number, name in enumerate(("pad_token_id", "bos_token_id", "eos_token_id")):
        _change(small, name, number)
    _change(small, "num_kv_shared_layers", 0)
    # The width is that of all heads together, or a setting beside theirs.
    is_free = width == heads * head_dim or setting(text, "head_dim") is not None
    sizes = dict(_WIDTHS)
    if heads > N_HEADS and is_free and is_narrow:
        sizes |= dict.fromkeys(("hidden_size", "word_embed_proj_dim"), N_HEADS * head_dim)
        n_shared = N_HEADS if shared == heads else min(shared, 2)
        sizes |= dict.fromkeys(("num_key_value_heads", "num_kv_heads"), n_shared)
        sizes["num_attention_heads"] = N_HEADS
    for name, value in sizes.items():
        _change(small, name, value)
    for name, value in (_EXPERTS | _RECURRENT).items():
        _change(small, name, min(value, setting(text, name) or value))
    for name in _WINDOWS:
        _change(small, name, WINDOW_TOKENS)
    _change_blocks(small, int(text.num_hidden_layers), n_blocks)
    return small


def _change_blocks(small: Any, n_blocks: int, wanted: int | None) -> None:
    """Changes `small` in place: few blocks, and of each kind at least one where that is few.

    It has `n_blocks`; with `wanted` it gets so many.
    """
    lists = settings_by_block(small, n_blocks)
    kept = min(2, n_blocks)
    for values in lists.values():
        kinds = [repr(value) for value in values]
        needed = max(kinds.index(kind) for kind in set(kinds)) + 1
        if needed <= MAX_BLOCKS:
            kept = max(kept, needed)
    kept = kept if wanted is None else wanted
    _change(small, "num_hidden_layers", kept)
    for name, values in lists.items():
        setattr(small, name, values[:kept])


def _change(config: Any, name: str, value: Any) -> None:
    """Changes `config` in place where it has a setting of this name, under its own name for it."""
    contents, own = config.to_dict(), config.attribute_map.get(name, name)
    former = contents.get(own, contents.get(name))
    if former is not None:
        setattr(config, name, [value] * len(former) if isinstance(former, list) else value)


@torch.no_grad()
def _draw(model: nn.Module) -> None:
    """Changes `model` in place: matrices are drawn, vectors move away from where they start."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(0.1 * noise)
