"""Merging and exporting after training over nf4: the values that were trained over, verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora
from lora.adapters.apply import apply_lora, lora_layers, replace_module
from lora.adapters.bases.unpack import unpack_base
from lora.adapters.fingerprint import base_fingerprint
from lora.adapters.merge import merge_lora
from lora.adapters.peft_files import TENSORS_FILE
from lora.adapters.save_load import load_adapter, save_adapter
from lora.cli import main
from lora.config import BaseWeights, LoRAConfig
from lora.data.tokenizers.subword import load_tokenizer
from lora.decoder.decoder import Decoder
from lora.decoder.language_model import LanguageModel
from lora.decoder.quantised.base import quantised_modules
from lora.errors import AdapterError, ConfigError
from lora.export.merged import MergedModel
from lora.inference.loading import checked_ids
from lora.pretrained.hf_weights import load_decoder
from lora.pretrained.load.models import load_language_model
from lora.pretrained.quantised.folder import find_4bit
from lora.runs.disk import read_json

NF4 = BaseWeights(base_dtype="nf4", nf4_block=32)


@pytest.fixture(scope="module")
def adapter(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter over the tiny model in nf4."""
    folder = tmp_path_factory.mktemp("adapters") / "nf4"
    save_adapted(load_decoder(tiny_folder, base=NF4), folder)
    return folder


def save_adapted(model: LanguageModel, folder: Path) -> None:
    apply_lora(model, LoRAConfig(rank=2, init_seed=0, targets=("q_proj", "down_proj")))
    draw = torch.Generator().manual_seed(3)
    for layer in lora_layers(model).values():
        with torch.no_grad():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=draw) * 0.2)
    save_adapter(model, folder)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    out: Tensor = model(ids)
    return out


def adapted(folder: Path, adapter: Path, base: BaseWeights | None = None) -> Decoder:
    model = load_decoder(folder, base=base)
    load_adapter(model, adapter)
    return model.eval()


def change(after: Tensor, before: Tensor) -> float:
    return float((after - before).norm() / before.norm())


@pytest.fixture(scope="module")
def ids(tiny_folder: Path, adapter: Path) -> Tensor:
    return checked_ids(adapted(tiny_folder, adapter, NF4), load_tokenizer(tiny_folder))


def merged(folder: Path, adapter: Path, out: Path, **settings: object) -> MergedModel:
    return lora.merge(adapter, out, model=folder, **settings)  # type: ignore[arg-type]


def test_the_values_trained_over_are_merged(
    tiny_folder: Path, adapter: Path, ids: Tensor, tmp_path: Path
) -> None:
    state = torch.get_rng_state()
    done = merged(tiny_folder, adapter, tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), state)
    assert done.over == "nf4 (blocks of 32, double quantisation)"
    assert done.base_change is None
    expected = logits(adapted(tiny_folder, adapter, NF4), ids)
    torch.testing.assert_close(logits(load_decoder(tmp_path / "out"), ids), expected)
    assert "quantization_config" not in read_json(tmp_path / "out" / "config.json")


def test_the_original_values_are_merged_on_request_and_the_change_is_said(
    tiny_folder: Path,
    adapter: Path,
    ids: Tensor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--model", str(tiny_folder), "--base-dtype", "original"]
    assert main(["merge", str(adapter), str(tmp_path / "out"), *flags]) == 0
    plain = logits(adapted(tiny_folder, adapter), ids)
    torch.testing.assert_close(logits(load_decoder(tmp_path / "out"), ids), plain)
    far = change(plain, logits(adapted(tiny_folder, adapter, NF4), ids))
    assert f"logits differ by {far:.1e} from those over the base that" in capsys.readouterr().err
    assert main(["merge", str(adapter), str(tmp_path / "again"), *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["base_change"] == pytest.approx(far, rel=1e-3)
    assert 0 <= found["relative_error"] <= found["tolerance"]
    seen = {name: found[name] for name in ("out", "layers", "dtypes", "over")}
    dtypes, n_layers = ["float32"], len(lora_layers(adapted(tiny_folder, adapter)))
    out = str(tmp_path / "again")
    assert seen == {"out": out, "layers": n_layers, "dtypes": dtypes, "over": None}
    with pytest.raises(ConfigError, match=r"base_dtype='nf5'\. Allowed: auto.*mean 'nf4'"):
        merged(tiny_folder, adapter, tmp_path / "other", base_dtype="nf5")


@pytest.mark.parametrize("implementation", ["native", "transformers"])
def test_an_adapter_of_another_tool_is_merged_into_the_kind_that_is_named(
    tiny_folder: Path, ids: Tensor, tmp_path: Path, implementation: str
) -> None:
    base = BaseWeights(base_dtype="nf4")
    save_adapted(load_decoder(tiny_folder, dtype=torch.bfloat16, base=base), tmp_path / "theirs")
    path = tmp_path / "theirs" / TENSORS_FILE
    save_file(load_file(path), path)  # PEFT's file names no base
    settings = {"base_dtype": "nf4", "implementation": implementation}
    done = merged(tiny_folder, tmp_path / "theirs", tmp_path / "out", **settings)
    assert done.base_change is None  # not known
    packed = load_decoder(tiny_folder, dtype=torch.bfloat16, base=base)
    for name, parameter in load_decoder(tiny_folder).named_parameters():
        if name.endswith("norm.weight") or "embed" in name:
            packed.get_parameter(name).data = parameter.data
    unpack_base(packed, torch.float32)
    load_adapter(packed, tmp_path / "theirs")
    expected = logits(packed.eval(), ids)
    seen = logits(load_decoder(tmp_path / "out"), ids)
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)
    save_adapted(load_decoder(tiny_folder, base=BaseWeights("fp8")), tmp_path / "fp8")
    done = merged(tiny_folder, tmp_path / "fp8", tmp_path / "other", **settings)
    assert done.over == "nf4 (blocks of 64, double quantisation)"
    assert done.base_change is not None
    assert 1e-3 < done.base_change < 1


def test_merging_into_4_bits_again_is_refused_with_its_change_or_done_on_request(
    tiny_folder: Path, adapter: Path, ids: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(
        AdapterError, match=r"changes the logits by \d\.\de-0\d.*requantise"
    ) as error:
        merged(tiny_folder, adapter, tmp_path / "out", dtype="nf4")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="requantise with dtype='bfloat16'"):
        merged(tiny_folder, adapter, tmp_path / "out", dtype="bfloat16", requantise=True)
    done = merged(tiny_folder, adapter, tmp_path / "out", dtype="nf4", requantise=True)
    found = find_4bit(tmp_path / "out")
    assert found is not None
    assert found.base == NF4
    after = logits(load_decoder(tmp_path / "out"), ids)
    far = change(after, logits(adapted(tiny_folder, adapter, NF4), ids))
    assert done.relative_error == pytest.approx(far, rel=1e-3)
    assert f"{far:.1e}" in str(error.value)


def test_a_4_bit_folder_is_merged_into_plain_weights(
    tiny_folder: Path, adapter: Path, ids: Tensor, tmp_path: Path
) -> None:
    merged(tiny_folder, adapter, tmp_path / "4bit", dtype="nf4", requantise=True)
    save_adapted(load_decoder(tmp_path / "4bit"), tmp_path / "own")
    done = merged(tmp_path / "4bit", tmp_path / "own", tmp_path / "out")
    assert done.over == "nf4 (blocks of 32, double quantisation)"
    assert "quantization_config" not in read_json(tmp_path / "out" / "config.json")
    expected = logits(adapted(tmp_path / "4bit", tmp_path / "own"), ids)
    torch.testing.assert_close(logits(load_decoder(tmp_path / "out"), ids), expected)
    with pytest.raises(ConfigError, match="in 4 bits, and there are no others"):
        merged(tmp_path / "4bit", tmp_path / "own", tmp_path / "no", base_dtype="original")
    model, _ = lora.load_model(tmp_path / "4bit", adapter=tmp_path / "own", device="cpu")
    assert not quantised_modules(model)
    torch.testing.assert_close(logits(model, ids), expected)


def test_an_adapter_of_a_4_bit_folder_is_used_over_the_model_that_it_was_made_from(
    tiny_folder: Path, ids: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    untrained = apply_lora(load_decoder(tiny_folder), LoRAConfig(rank=2, init_seed=0))
    save_adapter(untrained, tmp_path / "zero")
    merged(tiny_folder, tmp_path / "zero", tmp_path / "4bit", dtype="nf4", requantise=True)
    save_adapted(load_decoder(tmp_path / "4bit"), tmp_path / "own")
    expected = logits(adapted(tmp_path / "4bit", tmp_path / "own"), ids)
    caplog.clear()
    for implementation in ("native", "transformers"):
        out = tmp_path / implementation
        merged(tiny_folder, tmp_path / "own", out, implementation=implementation)
        seen = logits(load_decoder(out), ids)
        torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)
    for name in (tiny_folder, tmp_path / "4bit"):
        model, _ = lora.load_model(name, adapter=tmp_path / "own", device="cpu")
        torch.testing.assert_close(logits(model, ids), expected)
    assert caplog.messages == []


def test_linears_that_a_4_bit_folder_keeps_plain_stay_plain(
    tiny_folder: Path, ids: Tensor, tmp_path: Path
) -> None:
    mixed, kept = load_decoder(tiny_folder, base=NF4), "model.layers.1.mlp.up_proj"
    for module in quantised_modules(mixed).values():
        module.sample = module.sample[:0]  # as from a folder in 4 bits
    replace_module(mixed, kept, load_decoder(tiny_folder).get_submodule(kept))
    save_adapted(mixed, tmp_path / "own")
    expected = logits(mixed.eval(), ids)
    merged(tiny_folder, tmp_path / "own", tmp_path / "out")
    torch.testing.assert_close(logits(load_decoder(tmp_path / "out"), ids), expected)
    model, _ = lora.load_model(tiny_folder, adapter=tmp_path / "own", device="cpu")
    torch.testing.assert_close(logits(model, ids), expected)


def test_a_gguf_file_comes_from_the_values_trained_over(
    tiny_folder: Path, adapter: Path, ids: Tensor, tmp_path: Path
) -> None:
    for word, base in (("auto", NF4), ("original", None)):
        out = tmp_path / f"{word}.gguf"
        lora.export(out, model=tiny_folder, adapter=adapter, dtype="f32", base_dtype=word)  # type: ignore[arg-type]
        model, _ = lora.load_model(out, device="cpu")
        torch.testing.assert_close(
            logits(model, ids), logits(adapted(tiny_folder, adapter, base), ids)
        )
    packed = adapted(tiny_folder, adapter, NF4)
    own = tmp_path / "memory.gguf"
    lora.export(own, model=packed, tokenizer=load_tokenizer(tiny_folder), dtype="f32")
    model, _ = lora.load_model(own, device="cpu")
    torch.testing.assert_close(logits(model, ids), logits(packed, ids))


def test_a_check_for_vllm_says_which_values_it_serves(
    tiny_folder: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--vllm", "--adapter", str(adapter), "--model", str(tiny_folder)]
    assert main(["export", *flags]) == 0
    assert "trained over a base in nf4 (blocks of 32" in capsys.readouterr().err
    assert main(["export", *flags, "--base-dtype", "original"]) != 0
    assert "Cannot combine --vllm with --base-dtype" in capsys.readouterr().err


def test_a_model_in_memory_is_merged_into_plain_layers(
    tiny_folder: Path, adapter: Path, ids: Tensor
) -> None:
    model = adapted(tiny_folder, adapter, NF4)
    before = logits(model, ids)
    report = merge_lora(model, ids)
    assert report.relative_error is not None
    assert report.relative_error < 1e-5
    assert report.rounding_error < 1e-6
    torch.testing.assert_close(logits(model, ids), before)
    assert type(model.blocks()[0].get_submodule("mlp.down_proj")) is nn.Linear
    other = load_decoder(tiny_folder, base=NF4)
    unpack_base(other, torch.float32)
    base = base_fingerprint(other)
    load_adapter(other, adapter)
    merge_lora(other)
    assert base_fingerprint(other) != base  # it is another base now


@pytest.mark.parametrize("implementation", ["native", "transformers"])
def test_tables_in_nf4_are_merged_too(
    tiny_folder: Path, ids: Tensor, tmp_path: Path, implementation: Any
) -> None:
    base = BaseWeights(base_dtype="nf4", nf4_embeddings=True)
    save_adapted(load_decoder(tiny_folder, base=base), tmp_path / "own")
    expected = logits(adapted(tiny_folder, tmp_path / "own", base), ids)
    merged(tiny_folder, tmp_path / "own", tmp_path / "out", implementation=implementation)
    seen = logits(load_decoder(tmp_path / "out"), ids)
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)
    model, _ = lora.load_model(
        tiny_folder, adapter=tmp_path / "own", device="cpu", implementation=implementation
    )
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-5)


def test_a_model_of_transformers_is_merged_over_the_same_values(
    tiny_folder: Path, adapter: Path, ids: Tensor, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    settings = {"implementation": "transformers"}
    merged(tiny_folder, adapter, tmp_path / "out", **settings)
    expected = logits(adapted(tiny_folder, adapter, NF4), ids)
    theirs = load_language_model(tmp_path / "out", implementation="transformers")
    torch.testing.assert_close(logits(theirs, ids), expected, rtol=1e-4, atol=1e-5)
    done = merged(tiny_folder, adapter, tmp_path / "plain", base_dtype="original", **settings)
    assert done.base_change is not None
    assert done.base_change > 1e-3
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
