"""K adapters on one model: each is initialised, computed and saved as it would be alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora.adapters.apply import apply_lora
from lora.adapters.save_load import save_adapter
from lora.config import LoRAConfig
from lora.errors import ConfigError
from lora.pretrained.transformers_models.load import as_language_model
from lora.stacked.apply import apply_stacked, remove_stacked, single_adapter
from models.bigram_lm_v2 import BigramLanguageModel
from models.bigram_lm_v2_lora import EMBEDDINGS
from tests.pretrained.tiny_models import VOCAB, tiny_transformers

CONFIGS = [
    LoRAConfig(rank=2, alpha=3.0, modules_to_save=EMBEDDINGS, init_seed=1),
    LoRAConfig(rank=5, alpha=16.0, modules_to_save=EMBEDDINGS, init_seed=2),
]


def char_model(dropout: float = 0.0) -> BigramLanguageModel:
    torch.manual_seed(0)
    return BigramLanguageModel(11, n_embd=8, n_head=2, n_layer=2, block_size=6, dropout=dropout)


def test_each_adapter_begins_and_is_saved_as_alone(tmp_path: Path) -> None:
    model = char_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    stacked = apply_stacked(model, CONFIGS, (1, 2))
    ids = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(5))
    for k in range(2):
        values = stacked.values(k)
        values = {n: torch.randn(t.shape, generator=torch.Generator().manual_seed(len(n))) * 0.2
                  if n.endswith("lora_B") else t for n, t in values.items()}  # fmt: skip
        stacked.fill(k, values)
    stacked.stack.batch_size = 2
    logits, kept = model(ids)[0], [stacked.values(k) for k in range(2)]
    remove_stacked(model, stacked)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    for k, config in enumerate(CONFIGS):
        alone = apply_lora(char_model(), config)
        for name, parameter in alone.named_parameters():
            if parameter.requires_grad and not name.endswith("lora_B"):
                assert torch.equal(parameter, kept[k][name])
            elif parameter.requires_grad:
                parameter.data.copy_(kept[k][name])
        part = alone(ids.chunk(2)[k])[0]
        torch.testing.assert_close(logits.chunk(2)[k], part, rtol=1e-5, atol=1e-6)
        save_adapter(alone, tmp_path / f"alone-{k}")
        with single_adapter(model, config, kept[k]):
            save_adapter(model, tmp_path / f"stacked-{k}")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            saved = [
                (tmp_path / f"{kind}-{k}" / name).read_bytes() for kind in ("alone", "stacked")
            ]
            assert saved[0] == saved[1]


def test_what_cannot_be_stacked_is_refused() -> None:
    with pytest.raises(ConfigError, match="on a base with dropout"):
        apply_stacked(char_model(dropout=0.1), CONFIGS, (1, 2))
    model = char_model()
    with pytest.raises(ConfigError, match="only one of them trains"):
        apply_stacked(model, [CONFIGS[0], LoRAConfig(init_seed=1, rank=2)], (1, 2))
    assert apply_lora(model, CONFIGS[0]) is model


@pytest.mark.parametrize(
    "name", ["gptj", "falcon-alibi", "bloom", "phi3", "mixtral", "llama4_text", "gpt_oss", "mamba"]
)
def test_candidates_on_transformers_models_compute_as_alone(name: str) -> None:
    pytest.importorskip("transformers")
    model = as_language_model(tiny_transformers(name))
    configs = [LoRAConfig(rank=rank, alpha=9.0, init_seed=rank) for rank in (2, 3)]
    ids = torch.randint(1, VOCAB, (4, 9), generator=torch.Generator().manual_seed(5))
    stacked = apply_stacked(model, configs, (1, 2))
    draw = torch.Generator().manual_seed(6)
    for k in range(2):
        values = stacked.values(k)
        stacked.fill(k, {n: torch.randn(t.shape, generator=draw) * 0.1 for n, t in values.items()})
    kept = [stacked.values(k) for k in range(2)]
    with torch.no_grad():
        logits = model(ids).chunk(2)
        remove_stacked(model, stacked)
        for k, config in enumerate(configs):
            with single_adapter(model, config, kept[k]):
                torch.testing.assert_close(logits[k], model(ids.chunk(2)[k]), rtol=1e-4, atol=1e-5)


def test_a_base_that_drops_without_a_dropout_module_is_refused() -> None:
    pytest.importorskip("transformers")
    model = as_language_model(tiny_transformers("opt"))  # F.dropout by a number in its blocks
    with pytest.raises(ConfigError, match=r"base with dropout \('model.decoder.dropout': 0.1\)"):
        apply_stacked(model, [LoRAConfig(rank=2, init_seed=1)], (1,))
