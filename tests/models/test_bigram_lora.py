"""The adapted character model: equal to the base at first, trains only LoRA, merges."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lora.adapters.apply import lora_layers
from lora.adapters.save_load import load_adapter, save_adapter
from lora.errors import ConfigError, ModelError
from lora.lora_module import count_lora_parameters
from models.bigram_lm_v2 import BigramLanguageModel, save_bigram
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA

TOKENS = torch.randint(0, 65, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def base() -> BigramLanguageModel:
    torch.manual_seed(0)
    model = BigramLanguageModel(65, 64, 4, 2, 16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


def adapted(base: BigramLanguageModel, **settings: object) -> BigramLanguageModelLoRA:
    """An adapted copy with every trainable tensor random, so that LoRA does something."""
    model = BigramLanguageModelLoRA.from_base(base, **settings)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.2)
    return model.eval()


def test_at_first_it_computes_what_the_base_computes(base: BigramLanguageModel) -> None:
    model = BigramLanguageModelLoRA.from_base(base, lora_rank=4, lora_dropout=0.3).eval()
    assert torch.equal(model(TOKENS)[0], base(TOKENS)[0])


def test_every_linear_is_adapted_and_no_norm(base: BigramLanguageModel) -> None:
    model = BigramLanguageModelLoRA.from_base(base)
    inside = ("sa.key", "sa.query", "sa.value", "sa.proj", "ffwd.net.0", "ffwd.net.2")
    wanted = {f"blocks.{n}.{name}" for n in range(2) for name in inside} | {"lm_head"}
    assert set(lora_layers(model)) == wanted
    assert not any(p.requires_grad for m in model.modules() if isinstance(m, nn.LayerNorm)
                   for p in m.parameters())  # fmt: skip


def test_embeddings_train_are_counted_apart_and_can_be_frozen(base: BigramLanguageModel) -> None:
    counts = count_lora_parameters(BigramLanguageModelLoRA.from_base(base, lora_rank=8))
    linears = 2 * (4 * (64 + 64) + 2 * (64 + 256)) + (64 + 65)
    assert counts.lora == 8 * linears
    assert counts.other_trainable == (65 + 16) * 64
    assert counts.total == counts.lora + sum(p.numel() for p in base.parameters())
    frozen = count_lora_parameters(BigramLanguageModelLoRA.from_base(base, train_embeddings=False))
    assert frozen.other_trainable == 0


def test_merged_it_is_a_plain_model_that_answers_the_same(base: BigramLanguageModel) -> None:
    model = adapted(base)
    expected = model(TOKENS)[0]
    merged = model.merge()
    assert type(merged) is BigramLanguageModel
    assert not lora_layers(merged)
    torch.testing.assert_close(merged(TOKENS)[0], expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(model(TOKENS)[0], expected)  # it stays adapted
    assert (merged(TOKENS)[0] - base(TOKENS)[0]).abs().max() > 0.1


def test_base_weights_come_from_a_model_a_folder_or_a_pt_file(
    base: BigramLanguageModel, tmp_path: Path
) -> None:
    save_bigram(base, tmp_path / "base")
    torch.save(base.state_dict(), tmp_path / "base.pt")
    for source in (base, tmp_path / "base", str(tmp_path / "base.pt")):
        model = BigramLanguageModelLoRA(65, 64, 4, 2, 16, base=source).eval()
        assert torch.equal(model(TOKENS)[0], base(TOKENS)[0])
    with pytest.raises(ModelError, match="all but dropout must be equal"):
        BigramLanguageModelLoRA(65, 64, 4, 3, 16, base=base)


def test_a_rank_below_one_is_refused(base: BigramLanguageModel) -> None:
    with pytest.raises(ConfigError, match=r"rank=0"):
        BigramLanguageModelLoRA.from_base(base, lora_rank=0)


@pytest.mark.parametrize("train_embeddings", [True, False])
def test_its_adapter_goes_onto_a_plain_base(
    base: BigramLanguageModel, tmp_path: Path, train_embeddings: bool
) -> None:
    model = adapted(base, train_embeddings=train_embeddings, lora_rank=4)
    save_adapter(model, tmp_path)
    plain = BigramLanguageModel(65, 64, 4, 2, 16)
    plain.load_state_dict(base.state_dict())
    loaded = load_adapter(plain, tmp_path).eval()
    assert torch.equal(loaded(TOKENS)[0], model(TOKENS)[0])
    assert not any(p.requires_grad for p in loaded.parameters())


def test_the_adapter_of_a_wide_model_is_under_a_tenth_of_it(tmp_path: Path) -> None:
    base = BigramLanguageModel(98, 256, 8, 6, 128)
    save_bigram(base, tmp_path / "base")
    save_adapter(BigramLanguageModelLoRA.from_base(base), tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    adapter = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert adapter < (tmp_path / "base" / "model.safetensors").stat().st_size / 10
