"""Tiny decoders, adapters and batches for tests of the hand-written step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora.adapters.apply import apply_lora, lora_layers
from lora.config import LoRAConfig
from lora.data.sequences.batches import Batch
from lora.decoder.config import AttentionConfig, FeedForwardConfig, LayerConfig, RopeConfig
from lora.decoder.decoder import Decoder
from lora.fast.step import FastStep
from lora.stacked.apply import StackedAdapters, apply_stacked
from lora.training.losses import loss_for
from lora.training.optim import set_learning_rate
from lora.training.plain_step import train_step
from tests.tiny_llama import ROPE, VOCABULARY, changed, llama_config, random_decoder

ROWS, TOKENS = 2, 16
RATES = (1e-2, 2e-2, 5e-3)
"""Of the steps that are compared with the plain ones."""
GEMMA: dict[str, Any] = {
    "block": "sandwich",
    "qk_norm": "head",
    "embedding_scale": 48**0.5,
    "feed_forward": FeedForwardConfig(56, "gelu_pytorch_tanh"),
}
"""Settings of Gemma 3."""
GRANITE: dict[str, Any] = {"residual_multiplier": 0.22, "logit_scale": 0.25, "embedding_scale": 3.0}
CAPPED: dict[str, Any] = {
    "logit_scale": 0.5,
    "logit_softcap": 5.0,
    "attention": AttentionConfig(4, 2, 12, logit_softcap=2.0),
}
OLMO: dict[str, Any] = {"block": "post_norm", "qk_norm": "width"}
LONGROPE = RopeConfig(
    1e4,
    "longrope",
    original_max_position_embeddings=6,
    attention_factor=1.2,
    rotary_dim=4,
    short_factor=(1.0, 2.0),
    long_factor=(3.0, 5.0),
)
"""Documents of more than six tokens are long; half of each head is rotated."""
PHI: dict[str, Any] = {
    "layers": (LayerConfig(LONGROPE, None, 8**-0.5), LayerConfig(LONGROPE, 4, 8**-0.5)) * 2,
    "attention": AttentionConfig(6, 2, 8, qkv_bias=True, is_fused=True),
    "feed_forward": FeedForwardConfig(56, "silu", is_fused=True),
}


def apply_random_lora(model: Decoder, dtype: torch.dtype | None = None, **settings: Any) -> Decoder:
    """Changes `model` in place and returns it: LoRA of rank 3 with a random B, in `dtype`."""
    apply_lora(model, LoRAConfig(**{"rank": 3, "alpha": 6.0, "init_seed": 0, **settings}))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            if dtype is not None:
                layer.lora_A.data = layer.lora_A.to(dtype)
                layer.lora_B.data = layer.lora_B.to(dtype)
            layer.lora_B.copy_(0.3 * torch.randn(layer.lora_B.shape, generator=draw))
    return model


def apply_random_stacked(model: Decoder, adapters: Sequence[LoRAConfig]) -> StackedAdapters:
    """Changes `model` in place: these adapters are stacked on it, B random too."""
    stacked = apply_stacked(model, adapters, range(len(adapters)))
    for k in range(len(adapters)):
        draw = torch.Generator().manual_seed(30 + k)
        values = {
            name: 0.3 * torch.randn(t.shape, generator=draw) if name.endswith("lora_B") else t
            for name, t in stacked.values(k).items()
        }
        stacked.fill(k, values)
    return stacked


def relative(one: Tensor, other: Tensor) -> float:
    """Return how far `one` is from `other`, over the norm of `other`."""
    return float((one - other).detach().norm() / other.detach().norm().clamp(min=1e-9))


def check_steps(
    step: FastStep, plain: Decoder, optimizer: torch.optim.Optimizer, batches: list[list[Batch]]
) -> None:
    """Train `step`'s model and `plain`, which is equal to it, and compare all that comes of it.

    `batches`: of each step, as many as there are `RATES`.
    """
    frozen = {n: p.detach().clone() for n, p in plain.named_parameters() if not p.requires_grad}
    for number, (rate, micro) in enumerate(zip(RATES, batches, strict=True), 1):
        set_learning_rate(optimizer, rate)
        expected = train_step(plain, micro, loss_for(plain), optimizer)
        step.launch(micro, rate, number)
        loss, tokens, norm, taken = step.report.tolist()
        assert loss == pytest.approx(expected.loss.item(), rel=1e-6)
        assert norm == pytest.approx(expected.gradient_norm.item(), rel=1e-5)
        assert (tokens, taken) == (expected.n_tokens.item(), 1.0)
    others, moments = dict(plain.named_parameters()), step.optimizer_state()
    assert {name for name, _ in step.model.named_parameters()} == others.keys()
    for name, parameter in step.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
            continue
        assert relative(parameter, others[name]) < 1e-5, name
        state, own = optimizer.state[others[name]], moments[name]
        assert relative(own["exp_avg"], state["exp_avg"]) < 1e-4, name
        assert relative(own["exp_avg_sq"], state["exp_avg_sq"]) < 1e-4, name
        assert float(own["step"]) == float(state["step"]) == len(RATES), name
    for name, buffer in step.model.named_buffers():
        assert torch.equal(buffer, plain.get_buffer(name)), name


@pytest.fixture
def tiny_decoder() -> Callable[..., Decoder]:
    """Make a random Llama with all tensors drawn; its second block has no rotary embedding.

    Other fields of its config are given by name; `qk_norm` is one of its attention's.
    """

    def make(
        *,
        tied: bool = True,
        bias: bool = False,
        window: int | None = None,
        dtype: torch.dtype = torch.float64,
        **changes: Any,
    ) -> Decoder:
        ropes = (ROPE, None, ROPE)
        layers = tuple(LayerConfig(rope, window, 8**-0.5) for rope in ropes)
        config = replace(llama_config(tied=tied, bias=bias), layers=layers)
        return random_decoder(changed(config, **changes), dtype)

    return make


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """Make a batch of random tokens: one document a sequence, or packed ones with padding."""

    def make(seed: int, *, packed: bool) -> Batch:
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=draw)
        labels = ids.roll(-1, 1)
        labels[:, ::5] = -100
        documents = torch.zeros_like(ids)
        positions = torch.arange(TOKENS).expand(ROWS, -1).clone()
        if packed:
            documents[0, 5:12], documents[0, 12:], documents[1, 13:] = 1, 2, -1
            positions[0, 5:12], positions[0, 12:] = torch.arange(7), torch.arange(4)
            labels[1, 13:] = -100
        return Batch(ids, labels, positions, documents)

    return make
