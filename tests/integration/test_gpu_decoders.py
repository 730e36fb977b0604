"""The plain decoders of the newer families on a GPU: logits, gradients and cache as on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lora.data.sequences.batches import IGNORE, Batch
from lora.decoder.decoder import Decoder
from lora.decoder.families import decoder_config
from lora.training.losses import loss_for
from tests.tiny_llama import random_decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VOCABULARY, T = 97, 40
TOLERANCE = 1e-4  # in fp32, relative
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.2, 1.5, 2.0],
    "long_factor": [2.0, 3.0, 5.0, 9.0],
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 20,
        "sliding_window": 9,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
    },
    "phi3": {
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 20,
        "rope_scaling": LONGROPE,
    },
    "granite": {"embedding_multiplier": 6.0, "residual_multiplier": 0.3, "logits_scaling": 4.0},
    "olmo2": {},
    "olmo3": {"sliding_window": 9},
}
DOCUMENTS = torch.tensor([[0] * 25 + [1] * 12 + [-1] * 3, [-1] * 7 + [0] * 33])


def build(family: str) -> Decoder:
    config = decoder_config({"model_type": family, **SIZES, **FAMILIES[family]})
    return random_decoder(config, torch.float32)


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value.cpu() - reference).norm() / reference.norm())


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_gpu_computes_what_a_cpu_does(family: str) -> None:
    ids = torch.randint(0, VOCABULARY, (2, T), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[*range(25), *range(12), *range(3)], [*range(7), *range(33)]])
    labels = torch.where(DOCUMENTS >= 0, ids, IGNORE)
    found = []
    for device in ("cpu", "cuda"):
        model = build(family).to(device)
        batch = Batch(
            input_ids=ids.to(device),
            labels=labels.to(device),
            position_ids=positions.to(device),
            document_ids=DOCUMENTS.to(device),
        )
        total, _ = loss_for(model)(model, batch)
        total.sum().backward()
        with torch.no_grad():
            logits = model(batch.input_ids, document_ids=batch.document_ids)
            cache = model.new_cache(2, T)
            parts = [model(batch.input_ids[:, :18], cache=cache)]
            parts += [model(batch.input_ids[:, i : i + 1], cache=cache) for i in range(18, 30)]
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"logits": logits, "cached": torch.cat(parts, 1), **gradients})
    wanted, seen = found
    assert wanted.keys() == seen.keys()
    for name, value in seen.items():
        assert relative(value, wanted[name]) < TOLERANCE, name
