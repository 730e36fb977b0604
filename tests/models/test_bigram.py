"""The base character model: causal, saved and loaded exactly, strict about what it loads."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from lora.errors import ConfigError, DataError, ModelError
from models.bigram_lm_v2 import (
    BigramLanguageModel,
    BigramSizes,
    bigram_loss,
    load_bigram,
    read_state,
    save_bigram,
)

SIZES = BigramSizes(vocab_size=65, n_embd=64, n_head=4, n_layer=2, block_size=16)


@pytest.fixture
def model() -> BigramLanguageModel:
    torch.manual_seed(0)
    return BigramLanguageModel(65, 64, 4, 2, 16)


def test_logits_and_loss_have_their_shapes(model: BigramLanguageModel) -> None:
    tokens = torch.randint(0, 65, (3, 16))
    logits, loss = model(tokens)
    assert logits.shape == (3, 16, 65)
    assert loss is None
    loss = model(tokens, tokens)[1]
    total, count = bigram_loss(model, (tokens, tokens))
    assert total.shape == count.shape == (1,)
    assert (total / count).item() == pytest.approx(loss.item(), rel=1e-5)


def test_a_later_character_never_changes_an_earlier_prediction(model: BigramLanguageModel) -> None:
    tokens = torch.randint(0, 65, (1, 16))
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 65
    before, after = model(tokens)[0], model(changed)[0]
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9], after[:, 9])


def test_one_character_works_and_more_than_a_block_is_refused(model: BigramLanguageModel) -> None:
    assert model(torch.zeros(2, 1, dtype=torch.int64))[0].shape == (2, 1, 65)
    with pytest.raises(DataError, match=r"17 tokens.*block_size=16"):
        model(torch.zeros(1, 17, dtype=torch.int64))


def test_it_writes_more_than_a_block_and_the_same_for_a_seed(model: BigramLanguageModel) -> None:
    start = torch.zeros(2, 1, dtype=torch.int64)

    def write(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(start, 30, temperature=0.9, top_k=5, generator=generator)

    assert write(1).shape == (2, 31)
    assert torch.equal(write(1), write(1))
    assert not torch.equal(write(1), write(2))
    greedy = model.generate(start, 5, temperature=0)
    assert torch.equal(greedy[:, 1:2], model(start)[0][:, -1].argmax(-1, keepdim=True))
    assert model.training


def test_saved_and_loaded_it_is_the_same_to_the_byte(
    model: BigramLanguageModel, tmp_path: Path
) -> None:
    save_bigram(model, tmp_path / "a")
    save_bigram(load_bigram(tmp_path / "a"), tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_state_dict_saved_by_torch_loads(model: BigramLanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save(model.state_dict(), path)
    loaded = load_bigram(path, SIZES)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert loaded.lm_head.weight.requires_grad
    with pytest.raises(ModelError, match=r"pass sizes=BigramSizes"):
        load_bigram(path)


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this must never be printed",)


def test_a_pickle_that_runs_code_is_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.pt"
    torch.save({"x": Malicious()}, path)
    with pytest.raises(ModelError, match="no plain state dict"):
        load_bigram(path, SIZES)
    assert "never be printed" not in capsys.readouterr().out


def test_a_state_that_does_not_fit_is_refused_with_every_fault(
    model: BigramLanguageModel, tmp_path: Path
) -> None:
    state = model.state_dict()
    state["extra"] = state.pop("ln_f.bias")
    state["lm_head.bias"] = torch.zeros(3)
    path = tmp_path / "old.pt"
    torch.save(state, path)
    expected = (
        r"(?s)lm_head\.bias has shape \(3,\), the model needs \(65,\).*missing: ln_f\.bias.*extra"
    )
    with pytest.raises(ModelError, match=expected):
        load_bigram(path, SIZES)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_random_bytes_are_refused_whatever_they_raise(tmp_path: Path, suffix: str) -> None:
    draw = random.Random(5)
    path = tmp_path / f"junk{suffix}"
    for number in range(200):
        start = (b"", b"\x80\x02", b"PK\x03\x04", b"c", b"(")[number % 5]
        path.write_bytes(start + draw.randbytes(1 + number))
        with pytest.raises(ModelError, match=r"Cannot load .*junk"):
            read_state(path)


@pytest.mark.parametrize(
    "sizes",
    [{"n_embd": 1_000_000}, {"n_layer": 1_000_000}, {"block_size": 10**9}, {"n_layer": 1001}],
)
def test_a_model_beyond_any_memory_is_refused_in_words(sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="Cannot build a model of these sizes"):
        BigramLanguageModel(vocab_size=100, **sizes)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x10\0\0\0\0\0\0\0{"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    for name in ("a.pt", "a.safetensors"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ModelError, match=r"damaged|no plain"):
            load_bigram(path, SIZES)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        load_bigram(tmp_path / "none.pt", SIZES)
    with pytest.raises(ModelError, match="holds no saved character model"):
        load_bigram(tmp_path)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="n_embd=10 is not a multiple of n_head=4"):
        BigramLanguageModel(65, 10, 4)
    with pytest.raises(ConfigError, match=r"(?s)vocab_size=0.*n_layer=-1"):
        BigramLanguageModel(0, 8, 2, -1)
