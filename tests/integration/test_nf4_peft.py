"""LoRA over our nf4 base is PEFT's over bitsandbytes' (QLoRA), logits and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora.adapters.apply import apply_lora
from lora.config import BaseWeights, LoRAConfig
from lora.decoder.decoder import build_decoder
from lora.decoder.families import decoder_config
from lora.pretrained.hf_weights import load_decoder, save_decoder

CONFIG = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def theirs(folder: Path) -> Any:
    """Return transformers' model in bitsandbytes' nf4, with PEFT's LoRA."""
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    stored = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=stored, dtype=torch.float32, device_map="cpu"
    )
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    # In inference bitsandbytes rounds scales and inputs to bf16 on some CPUs.
    return peft.get_peft_model(model, settings).train()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT's call into transformers
def test_logits_and_gradients_are_those_of_qlora(tmp_path: Path) -> None:
    save_decoder(build_decoder(decoder_config(CONFIG), seed=2), tmp_path)
    other = theirs(tmp_path)
    model: nn.Module = load_decoder(tmp_path, base=BaseWeights("nf4"))
    apply_lora(model, LoRAConfig(rank=4, alpha=8))
    own, draw = dict(model.named_parameters()), torch.Generator().manual_seed(0)
    pairs = {}
    for name, parameter in other.named_parameters():
        if parameter.requires_grad:
            short = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            with torch.no_grad():
                own[short].copy_(parameter.normal_(generator=draw).mul_(0.1))
            pairs[short] = parameter
    assert len(pairs) == 2 * 7 * 2
    ids = torch.randint(0, 50, (2, 9), generator=draw)
    expected, found = other(input_ids=ids).logits, model(ids)
    for logits in (expected, found):
        logits.logsumexp(-1).sum().backward()
    assert (found - expected).norm() < 1e-5 * expected.norm()
    for name, parameter in pairs.items():
        ours, gradient = own[name].grad, parameter.grad
        assert ours is not None
        assert (ours - gradient).norm() < 1e-5 * gradient.norm(), name
