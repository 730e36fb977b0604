"""Frequencies agree with transformers; the fast rotation agrees with its plain twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora.decoder.families import decoder_config
from lora.decoder.rope import Rope, inverse_frequencies, rotate, rotate_plain, skip_rotation

SIZES: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 10,
    "hidden_size": 256,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 32_768,
}


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 10_000.0},
        {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0},
        {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 0.7,
            "mscale_all_dim": 1.2,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "truncate": False,
        },
        {"rope_type": "yarn", "factor": 0.5, "original_max_position_embeddings": 4096},
    ],
)
def test_frequencies_agree_with_transformers(parameters: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.LlamaConfig(**SIZES, rope_parameters=dict(parameters))
    module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(reference)
    rope = decoder_config({**SIZES, "rope_parameters": parameters}).layers[0].rope
    assert rope is not None
    frequencies = inverse_frequencies(rope, 64)
    difference = (frequencies - module.inv_freq).norm() / module.inv_freq.norm()
    assert difference.item() < 1e-6
    assert rope.attention_factor == pytest.approx(module.attention_scaling)


def make_inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    config = decoder_config(SIZES).layers[0].rope
    assert config is not None
    positions = torch.randint(0, 500, (rows, 5), generator=generator)
    cos, sin = Rope(config, 8).tables(positions, torch.float64)
    assert cos.shape == sin.shape == (rows, 5, 1, 8)
    return torch.randn(2, 5, 3, 8, generator=generator, dtype=torch.float64), cos, sin


@pytest.mark.parametrize("rows", [1, 2])
def test_the_fast_rotation_agrees_with_its_twin(rows: int) -> None:
    x, cos, sin = make_inputs(rows)
    x.requires_grad_(True)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    fast, _ = rotate(x, x, (cos, sin))
    plain = rotate_plain(x, cos, sin)
    assert torch.allclose(fast, plain, rtol=0, atol=1e-12)
    (fast_gradient,) = torch.autograd.grad(fast, x, upstream)
    (gradient,) = torch.autograd.grad(plain, x, upstream)
    assert ((fast_gradient - gradient).norm() / gradient.norm()).item() < 1e-12


def test_a_rotation_keeps_lengths_and_turns_by_the_angle() -> None:
    x, cos, sin = make_inputs(1)
    turned = rotate_plain(x, cos, sin)
    # Tables are exact to fp32.
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    config = decoder_config(SIZES).layers[0].rope
    assert config is not None
    cos, sin = Rope(config, 2).tables(torch.tensor([[1]]), torch.float32)
    y = rotate_plain(torch.tensor([[[[1.0, 0.0]]]]), cos, sin).flatten()
    assert torch.allclose(y, torch.tensor([0.5403023, 0.8414710]))


def test_blocks_without_a_rope_leave_queries_and_keys() -> None:
    q, k = torch.ones(1), torch.zeros(1)
    assert skip_rotation(q, k, None) == (q, k)
