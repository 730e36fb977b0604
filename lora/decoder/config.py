"""What a decoder is, as frozen dataclasses. Read from config.json by `lora.decoder.families`.

No torch here. Fields carry Hugging Face's names where Hugging Face has one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lora.errors import ModelError, gather

RopeKind = Literal["default", "linear", "llama3", "yarn"]
BlockKind = Literal["pre_norm", "sandwich", "gpt2"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (arXiv 2104.09864) and how its frequencies are stretched."""

    rope_theta: float
    """Base of the wavelengths."""
    rope_type: RopeKind = "default"
    factor: float = 1.0
    """How many times longer than in pre-training the context may be."""
    original_max_position_embeddings: int = 0
    """Positions of pre-training, for llama3 and yarn."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths longer than original positions / this are stretched by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths shorter than original positions / this stay."""
    attention_factor: float = 1.0
    """yarn: factor of both cosine and sine."""
    beta_fast: float = 32.0
    """yarn: turns over the original positions above which a frequency stays."""
    beta_slow: float = 1.0
    """yarn: turns over the original positions below which a frequency is divided by `factor`."""
    truncate: bool = True
    """yarn: round the borders of the ramp to whole dimensions."""


@dataclass(frozen=True)
class LayerConfig:
    """What may differ from block to block."""

    rope: RopeConfig | None
    """None: no rotary positions in this block (SmolLM3's NoPE blocks, all of GPT-2's)."""
    window_tokens: int | None
    """A token attends to so many tokens, itself included; None: to all before it."""
    scale: float
    """Factor of the attention logits."""


@dataclass(frozen=True)
class AttentionConfig:
    """Shape of the attention, the same in every block."""

    num_attention_heads: int
    """H, heads of the queries."""
    num_key_value_heads: int
    """Heads of keys and values; divides H."""
    head_dim: int
    """D, width of one head."""
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    """Norms over D of queries and keys, before the rotation."""


@dataclass(frozen=True)
class FeedForwardConfig:
    """Shape of the feed-forward part, the same in every block."""

    intermediate_size: int
    """F."""
    activation: str
    """Name in transformers' terms: silu, gelu, gelu_new, gelu_pytorch_tanh, relu."""
    bias: bool = False


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder of one of the supported families. Raises ModelError if its sizes do not fit."""

    family: str
    """model_type in config.json."""
    vocab_size: int
    """V."""
    hidden_size: int
    """C."""
    max_position_embeddings: int
    """Positions the model was made for; a hard limit only where positions are learned (GPT-2)."""
    norm_eps: float
    block: BlockKind
    """pre_norm: two RMS norms; sandwich: four, scaled by 1 + weight; gpt2: two layer norms,
    learned positions, one linear for queries, keys and values, no gate."""
    embedding_scale: float
    """Factor of the embeddings (Gemma: √C)."""
    tie_word_embeddings: bool
    """Whether the output head's weight is the embedding's."""
    attention: AttentionConfig
    feed_forward: FeedForwardConfig
    layers: tuple[LayerConfig, ...]
    source: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """config.json as it was read; `save_decoder` writes it back."""

    def __post_init__(self) -> None:
        faults = []
        heads = self.attention
        if heads.num_attention_heads % heads.num_key_value_heads:
            faults.append(
                f"num_key_value_heads={heads.num_key_value_heads} does not divide "
                f"num_attention_heads={heads.num_attention_heads}"
            )
        if heads.head_dim % 2 and any(layer.rope for layer in self.layers):
            faults.append(f"head_dim={heads.head_dim}: rotary positions need an even one")
        whole = heads.num_attention_heads * heads.head_dim
        if self.block == "gpt2" and whole != self.hidden_size:
            faults.append(f"hidden size {self.hidden_size} is not heads · head width = {whole}")
        if self.block == "gpt2" and heads.num_key_value_heads != heads.num_attention_heads:
            faults.append(f"num_key_value_heads={heads.num_key_value_heads}: GPT-2 shares no heads")
        if not self.layers:
            faults.append("no layers")
        if faults:
            raise ModelError(
                gather(faults, "The decoder's sizes do not fit together:", "Correct config.json.")
            )

    @property
    def num_hidden_layers(self) -> int:
        """How many blocks there are."""
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
        """Heads of keys and values."""
        return self.attention.num_key_value_heads

    @property
    def head_dim(self) -> int:
        """D."""
        return self.attention.head_dim
