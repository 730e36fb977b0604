"""The embedding and the output head in nf4: loaded, tied, computed with, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora.adapters.apply import apply_lora, train_token_rows
from lora.adapters.bases.quantisation import quantisation_of
from lora.adapters.bases.unpack import unpack_base
from lora.adapters.fingerprint import base_fingerprint
from lora.config import BaseWeights, LoRAConfig
from lora.data.sequences.batches import Batch
from lora.decoder.decoder import Decoder, build_decoder
from lora.decoder.families import decoder_config
from lora.decoder.quantised.base import dtype_of, quantised_modules
from lora.decoder.quantised.tables import Nf4Embedding
from lora.errors import ConfigError, ModelError, TargetError
from lora.layers.quantised_model import use_quantised_linears
from lora.lora_module import count_lora_parameters
from lora.pretrained.hf_weights import load_decoder, save_decoder
from lora.pretrained.load.task import check_native_only
from lora.stacked.apply import apply_stacked
from lora.stacked.losses import StackedDecoderLoss
from lora.training.losses import loss_for

TABLES = BaseWeights("nf4", nf4_embeddings=True)
IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    config = decoder_config({**CONFIG, "tie_word_embeddings": request.param})
    save_decoder(build_decoder(config, seed=2), tmp_path / "tiny")
    return tmp_path / "tiny"


def batch() -> Batch:
    positions = torch.arange(9).expand(2, -1)
    return Batch(IDS, IDS.roll(-1, 1), positions, torch.zeros_like(IDS))


def loss_of(model: Decoder) -> torch.Tensor:
    return loss_for(model)(model, batch())[0]


def test_tables_have_codes_and_compute_with_their_values(folder: Path) -> None:
    model = load_decoder(folder, base=TABLES)
    embedding, head = model.get_input_embeddings(), model.output_head()
    assert isinstance(embedding, Nf4Embedding)
    assert embedding.weight.dtype is head.weight.dtype is torch.uint8
    is_tied = model.config.tie_word_embeddings
    assert (head.weight is embedding.weight) == is_tied
    assert (head.weight_scales is embedding.weight_scales) == is_tied
    assert count_lora_parameters(model).total == count_lora_parameters(load_decoder(folder)).total
    assert dtype_of(model) is torch.float32
    assert embedding(IDS).equal(embedding.unpacked()[IDS])
    logits, loss = model(IDS), loss_of(model)
    error = (embedding.unpacked() - load_decoder(folder).get_input_embeddings().weight).norm()
    assert 0.05 < error / embedding.unpacked().norm() < 0.2
    found = quantisation_of(model)
    assert found is not None
    assert found.embeddings
    assert base_fingerprint(model) == base_fingerprint(load_decoder(folder))

    unpack_base(model, torch.float32)
    assert not quantised_modules(model)
    assert model(IDS).equal(logits)
    assert loss_of(model).equal(loss)
    assert (model.output_head().weight is model.get_input_embeddings().weight) == is_tied


@pytest.mark.parametrize("targets", [("q_proj",), ("q_proj", "lm_head")])
def test_lora_trains_over_them(folder: Path, targets: tuple[str, ...]) -> None:
    packed, plain = load_decoder(folder, base=TABLES), load_decoder(folder, base=TABLES)
    unpack_base(plain, torch.float32)
    grads = []
    for model in (packed, plain):
        apply_lora(model, LoRAConfig(rank=2, targets=targets, init_seed=0))
        loss_of(model).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert any("lm_head" in name for name in grads[0]) == ("lm_head" in targets)
    for name, gradient in grads[0].items():
        torch.testing.assert_close(gradient, grads[1][name])
    packed.bfloat16()
    assert packed(IDS).dtype is torch.bfloat16
    assert packed.get_input_embeddings().weight.dtype is torch.uint8


def test_stacked_adapters_read_the_head_once(folder: Path) -> None:
    packed, plain = load_decoder(folder, base=TABLES), load_decoder(folder, base=TABLES)
    unpack_base(plain, torch.float32)
    found = []
    for model in (packed, plain):
        loras = [LoRAConfig(rank=2, init_seed=seed) for seed in (0, 1)]
        stacked = apply_stacked(model, loras, range(2))
        found.append(StackedDecoderLoss(stacked)(model, batch())[0])
    torch.testing.assert_close(*found)


def test_a_tied_head_in_the_file_is_compared_with_the_embedding(tmp_path: Path) -> None:
    config = decoder_config({**CONFIG, "tie_word_embeddings": True})
    save_decoder(build_decoder(config, seed=2), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, {"format": "pt"})
    load_decoder(tmp_path, base=TABLES)
    tensors["lm_head.weight"][3] += 1
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match="differs from the embedding"):
        load_decoder(tmp_path, base=TABLES)


def test_what_cannot_train_is_refused_by_name(folder: Path) -> None:
    model = load_decoder(folder, base=TABLES)
    saved = LoRAConfig(rank=2, modules_to_save=("lm_head",))
    with pytest.raises(TargetError, match=r"'lm_head' fully.*stored in nf4, which cannot train"):
        apply_lora(model, saved)
    with pytest.raises(TargetError, match=r"no linear|embed_tokens"):
        apply_lora(model, LoRAConfig(rank=2, targets=("embed_tokens",)))
    apply_lora(model, LoRAConfig(rank=2))
    assert not any("embed_tokens" in name or "lm_head" in name for name in trained(model))
    with pytest.raises(TargetError, match=r"stored in nf4.*Leave nf4_embeddings out"):
        train_token_rows(model, (3,))


def trained(model: Decoder) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def test_sharded_models_are_refused() -> None:
    config = decoder_config(CONFIG)
    with pytest.raises(ConfigError, match=r"nf4_embeddings with parallel='fsdp'.*Leave"):
        check_native_only(config, base=TABLES, fsdp=True)
    check_native_only(config, base=TABLES, fsdp=False)


def test_gpt2_has_them_too() -> None:
    config = decoder_config(
        {
            "model_type": "gpt2",
            "vocab_size": 50,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 32,
        }
    )
    model = build_decoder(config, seed=2)
    weight = model.lm_head.weight.detach()
    use_quantised_linears(model, TABLES)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, Nf4Embedding)
    assert embedding is model.get_submodule("transformer.wte")
    embedding.load(weight, "transformer.wte")
    model.tie_head()
    assert model.lm_head.weight is embedding.weight
