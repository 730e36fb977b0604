"""Tiny models of transformers and of our own, every tensor random, norms and biases too."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

ModelBuilder = Callable[[str], nn.Module]
VOCAB = 64
MIN_NEW_MODULES = 200
"""torch._dynamo and transformers bring more, with hundreds of thousands of objects."""
_frozen_modules = 0


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave what imports have brought out of the garbage collector's rounds.

    Each run calls gc.collect, which took a third of the time of tests that train: it went through
    the objects of every module that any test had imported.
    """
    global _frozen_modules
    if len(sys.modules) - _frozen_modules >= MIN_NEW_MODULES:
        gc.collect()
        gc.freeze()
        _frozen_modules = len(sys.modules)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests that need a GPU in one worker, so that they do not share its memory."""
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.xdist_group("gpu"))


@pytest.fixture(scope="session")
def fill_random() -> Callable[..., nn.Module]:
    """Changes a model in place: all parameters, or all trainable ones, become random."""

    def fill(
        model: nn.Module, seed: int, *, only_trainable: bool = False, std: float = 0.2
    ) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad or not only_trainable:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        return model

    return fill


@pytest.fixture(scope="session")
def tiny_model(fill_random: Callable[..., nn.Module]) -> ModelBuilder:
    """Return a function: name → a transformers model of two blocks, the same each time."""
    transformers = pytest.importorskip("transformers")

    def build(name: str) -> nn.Module:
        tied = name.endswith("tied") and not name.endswith("untied")
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        if name.startswith("llama"):
            config = transformers.LlamaConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=VOCAB,
                max_position_embeddings=32,
                attention_bias=True,
                tie_word_embeddings=tied,
                **ids,
            )
            model = transformers.LlamaForCausalLM(config)
        else:
            config = transformers.GPT2Config(
                n_embd=32,
                n_layer=2,
                n_head=4,
                vocab_size=VOCAB,
                n_positions=32,
                tie_word_embeddings=tied,
                **ids,
            )
            model = transformers.GPT2LMHeadModel(config)
        return fill_random(model, 0).eval()

    return build


@pytest.fixture(scope="session")
def token_ids() -> torch.Tensor:
    """Some tokens, (B, T) = (2, 9)."""
    return torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
