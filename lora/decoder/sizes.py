"""How much a block's activations take."""

from __future__ import annotations

from lora.decoder.config import DecoderConfig


def stored_bytes(config: DecoderConfig, n_tokens: int) -> int:
    """Return what a block stores for its backward pass, in bf16.

    The inputs of matmuls and of norms, rotated queries and keys, values, and the parts of SwiGLU.
    Measured with an 8B shape on two H200: 1.385 GB for 8,192 tokens; this returns 1.376.
    """
    heads = config.attention
    of_heads = (2 * heads.num_attention_heads + 2 * heads.num_key_value_heads) * heads.head_dim
    widths = 4 * config.hidden_size + of_heads + 4 * config.feed_forward.intermediate_size
    return 2 * n_tokens * widths
