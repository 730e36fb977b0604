"""A decoder's architecture as frozen dataclasses, read from config.json by `families`.

No torch here. Fields have Hugging Face's names where Hugging Face has one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from lora.errors import ModelError, gather

RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope"]
BlockKind = Literal["pre_norm", "post_norm", "sandwich", "gpt2"]
QkNorm = Literal["head", "width"]

_CONV1D = re.compile(r".*\.(c_attn|c_fc|c_proj)\.weight")
"""GPT-2's linears (Conv1D)."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (arXiv 2104.09864) and how its frequencies are scaled."""

    rope_theta: float
    """Base of the frequencies."""
    rope_type: RopeKind = "default"
    factor: float = 1.0
    """Context length after scaling over that of pre-training."""
    original_max_position_embeddings: int = 0
    """Context length of pre-training, for llama3, yarn and longrope."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths longer than original context / this are stretched by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths shorter than original context / this are unchanged."""
    attention_factor: float = 1.0
    """yarn, longrope: multiplies both cosine and sine."""
    beta_fast: float = 32.0
    """yarn: turns over the original context above which a frequency is unchanged."""
    beta_slow: float = 1.0
    """yarn: turns over the original context below which a frequency is divided by `factor`."""
    truncate: bool = True
    """yarn: round the ramp's ends to whole dimensions."""
    rotary_dim: int | None = None
    """Leading dimensions of a head that are rotated; None: all of them."""
    short_factor: tuple[float, ...] = ()
    """longrope: divides the frequencies of sequences up to the original context, (D/2,)."""
    long_factor: tuple[float, ...] = ()
    """longrope: the same for longer sequences."""


@dataclass(frozen=True)
class LayerConfig:
    """Settings that may differ between blocks."""

    rope: RopeConfig | None
    """None: no rotary embedding in this block (SmolLM3's NoPE blocks, all of GPT-2's)."""
    window_tokens: int | None
    """Sliding window: tokens that a token attends to, itself included; None: all before it."""
    scale: float
    """Multiplies the attention logits."""


def _rope_faults(layers: tuple[LayerConfig, ...], head_dim: int) -> list[str]:
    ropes = {layer.rope for layer in layers if layer.rope is not None}
    if head_dim % 2 and ropes:
        return [f"head_dim={head_dim}: the rotary embedding needs an even one"]
    faults = []
    for rope in ropes:
        width = head_dim if rope.rotary_dim is None else rope.rotary_dim
        if width % 2 or not 0 < width <= head_dim:
            faults.append(
                f"partial_rotary_factor: {width} of {head_dim} dimensions of a head would rotate; "
                f"an even number from 2 to {head_dim} is needed"
            )
        for name, factors in (("short", rope.short_factor), ("long", rope.long_factor)):
            if rope.rope_type == "longrope" and len(factors) != width // 2:
                faults.append(
                    f"{name}_factor has {len(factors)} values: {width // 2} frequencies rotate "
                    f"{width} dimensions of a head"
                )
    return faults


@dataclass(frozen=True)
class AttentionConfig:
    """Shape of the attention, the same in every block."""

    num_attention_heads: int
    """H, query heads."""
    num_key_value_heads: int
    """Key/value heads; divides H."""
    head_dim: int
    """D, width of one head."""
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: QkNorm | None = None
    """RMS norms of queries and keys before the rotary embedding: over the D of each head, or over
    the whole width of all heads together (OLMo 2)."""
    is_fused: bool = False
    """Whether one linear, qkv_proj, makes queries, keys and values (Phi-3)."""
    logit_softcap: float | None = None
    """The attention logits become softcap · tanh(logits / softcap) before the mask (Gemma 2)."""


@dataclass(frozen=True)
class FeedForwardConfig:
    """Shape of the feed-forward layer, the same in every block."""

    intermediate_size: int
    """F."""
    activation: str
    """Transformers' name: silu, swish, gelu, gelu_new, gelu_pytorch_tanh or relu."""
    bias: bool = False
    is_fused: bool = False
    """Whether one linear, gate_up_proj, makes gate and up (Phi-3)."""


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder of a supported family. Raises ModelError if its sizes are inconsistent."""

    family: str
    """model_type in config.json."""
    vocab_size: int
    """V."""
    hidden_size: int
    """C."""
    max_position_embeddings: int
    """Context length; a hard limit only with learned position embeddings (GPT-2)."""
    norm_eps: float
    block: BlockKind
    """pre_norm: two RMS norms; post_norm: two, after each half instead of before; sandwich: four,
    scaled by 1 + weight; gpt2: two layer norms, learned positions, one fused linear for queries,
    keys and values, no gate."""
    embedding_scale: float
    """Multiplies the embeddings (Gemma: √C; Granite's embedding_multiplier)."""
    tie_word_embeddings: bool
    """Whether the output head shares the embedding's weight."""
    attention: AttentionConfig
    feed_forward: FeedForwardConfig
    layers: tuple[LayerConfig, ...]
    residual_multiplier: float = 1.0
    """Multiplies what each half of a block adds to the residual stream (Granite)."""
    logit_scale: float = 1.0
    """Multiplies the output head's logits (Granite: 1 / logits_scaling)."""
    logit_softcap: float | None = None
    """The scaled logits become softcap · tanh(logits / softcap) (Gemma 2)."""
    source: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """config.json as read; `save_decoder` writes it back."""

    def __post_init__(self) -> None:
        faults = []
        heads = self.attention
        if heads.num_attention_heads % heads.num_key_value_heads:
            faults.append(
                f"num_key_value_heads={heads.num_key_value_heads} does not divide "
                f"num_attention_heads={heads.num_attention_heads}"
            )
        faults += _rope_faults(self.layers, heads.head_dim)
        if self.block == "gpt2":
            faults += self._gpt2_faults()
        if not self.layers:
            faults.append("no layers")
        if faults:
            raise ModelError(
                gather(
                    faults, "Cannot build the decoder: its sizes conflict:", "Correct config.json."
                )
            )

    def _gpt2_faults(self) -> list[str]:
        """Return what GPT-2's modules, which are its own, do not compute."""
        heads, faults = self.attention, []
        whole = heads.num_attention_heads * heads.head_dim
        if whole != self.hidden_size:
            faults.append(f"hidden size {self.hidden_size} is not heads · head width = {whole}")
        if heads.num_key_value_heads != heads.num_attention_heads:
            faults.append(
                f"num_key_value_heads={heads.num_key_value_heads}: GPT-2 has no grouped-query heads"
            )
        others = {
            "a rotary embedding": any(layer.rope is not None for layer in self.layers),
            "norms of queries and keys": heads.qk_norm is not None,
            "a cap of the attention logits": heads.logit_softcap is not None,
            "a factor of the embeddings": self.embedding_scale != 1,
            "a factor of the residual branches": self.residual_multiplier != 1,
        }
        return faults + [f"{name}: GPT-2 has none" for name, given in others.items() if given]

    @property
    def longrope_tokens(self) -> int | None:
        """Length above which a document's keys rotate by longrope's other factors, if they do."""
        ropes = {layer.rope for layer in self.layers if layer.rope is not None}
        limits = {
            rope.original_max_position_embeddings
            for rope in ropes
            if rope.rope_type == "longrope" and rope.long_factor != rope.short_factor
        }
        return min(limits, default=None)

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks."""
        return len(self.layers)

    @property
    def intermediate_size(self) -> int:
        """F."""
        return self.feed_forward.intermediate_size

    @property
    def num_attention_heads(self) -> int:
        """H."""
        return self.attention.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Key/value heads."""
        return self.attention.num_key_value_heads

    @property
    def head_dim(self) -> int:
        """D."""
        return self.attention.head_dim

    def is_transposed_in_files(self, name: str) -> bool:
        """Whether files hold the parameter `name` as (I, O): GPT-2's linears, here (O, I)."""
        return self.block == "gpt2" and _CONV1D.fullmatch(name) is not None
