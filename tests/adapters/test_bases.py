"""Adapters name how their base was quantised; other values are said and measured, or refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora.adapters.apply import apply_lora, lora_layers
from lora.adapters.bases.linears import rounded
from lora.adapters.bases.quantisation import quantisation_of
from lora.adapters.bases.rules import QUANTISATION_KEY
from lora.adapters.bases.unpack import unpack_base
from lora.adapters.fingerprint import base_fingerprint, code_fingerprint
from lora.adapters.peft_files import TENSORS_FILE, read_metadata
from lora.adapters.save_load import load_adapter, save_adapter
from lora.config import BaseWeights, LoRAConfig
from lora.decoder.decoder import Decoder, build_decoder
from lora.decoder.families import decoder_config
from lora.decoder.language_model import LanguageModel
from lora.decoder.quantised.base import quantised_modules
from lora.decoder.quantised.record import BaseQuantisation
from lora.errors import AdapterError
from lora.pretrained.hf_weights import load_decoder, save_decoder
from lora.pretrained.load.models import load_language_model

IDS = torch.randint(0, 50, (1, 32), generator=torch.Generator().manual_seed(0))
PLAIN, FP8, NF4 = BaseWeights(), BaseWeights(base_dtype="fp8"), BaseWeights(base_dtype="nf4")
SMALL = BaseWeights(base_dtype="nf4", nf4_block=32, nf4_double_quant=False)
INT8, TABLES = BaseWeights(base_dtype="int8"), BaseWeights(base_dtype="nf4", nf4_embeddings=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama in bf16; its rows end inside blocks of 64."""
    config = {
        "model_type": "llama",
        "vocab_size": 50,
        "hidden_size": 40,
        "intermediate_size": 54,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    path = tmp_path_factory.mktemp("base")
    save_decoder(build_decoder(decoder_config(config), seed=2, dtype=torch.bfloat16), path)
    return path


def adapted(model: LanguageModel) -> LanguageModel:
    apply_lora(model, LoRAConfig(rank=2, init_seed=0))
    draw = torch.Generator().manual_seed(3)
    for layer in lora_layers(model).values():
        with torch.no_grad():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=draw) * 0.2)
    return model


def in_4bit(model: Decoder) -> Decoder:
    """Changes `model` in place: as from a folder that is in 4 bits, without values from before."""
    for module in quantised_modules(model).values():
        module.sample = module.sample[:0]
    return model


@pytest.fixture
def adapters(folder: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Return a function: what an adapter was trained over -> its directory."""
    bases: dict[str, Callable[[], Decoder]] = {
        "plain": lambda: load_decoder(folder),
        "fp8": lambda: load_decoder(folder, base=FP8),
        "nf4": lambda: load_decoder(folder, base=NF4),
        "small": lambda: load_decoder(folder, base=SMALL),
        "int8": lambda: load_decoder(folder, base=INT8),
        "tables": lambda: load_decoder(folder, base=TABLES),
        "4-bit folder": lambda: in_4bit(load_decoder(folder, base=NF4)),
    }

    def save(name: str) -> Path:
        save_adapter(adapted(bases[name]()), tmp_path / name)
        return tmp_path / name

    return save


def warnings(model: LanguageModel, adapter: Path, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_adapter(model, adapter)
    return " ".join(caplog.messages)


@torch.no_grad()
def logits(model: LanguageModel) -> Tensor:
    out: Tensor = model(IDS)
    return out


def test_the_file_names_the_base_and_how_it_is_quantised(
    adapters: Callable[[str], Path], folder: Path
) -> None:
    saved = adapters("nf4")
    kind = BaseQuantisation.from_json(read_metadata(saved)[QUANTISATION_KEY])
    assert (kind.dtype, kind.block, kind.double_quant, kind.embeddings) == ("nf4", 64, True, False)
    assert kind.compute_dtype == "float32"
    assert QUANTISATION_KEY not in read_metadata(adapters("plain"))
    # adapter_config.json stays PEFT's, which names no quantisation.
    texts = [(adapters(name) / "adapter_config.json").read_bytes() for name in ("plain", "nf4")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("base", [NF4, SMALL, FP8, INT8, TABLES])
def test_the_fingerprint_of_codes_follows_from_the_plain_base(
    folder: Path, base: BaseWeights
) -> None:
    coded, plain = load_decoder(folder, base=base), load_decoder(folder)
    kind = quantisation_of(coded)
    assert kind is not None
    assert kind.fingerprint == code_fingerprint(plain, kind)
    assert base_fingerprint(coded) == base_fingerprint(plain) != kind.fingerprint
    for name, module in quantised_modules(coded).items():
        weight = plain.get_parameter(f"{name}.weight")
        assert torch.equal(rounded(weight, kind, name), module.unpacked())


@pytest.mark.parametrize(
    ("name", "base"), [("plain", PLAIN), ("int8", INT8), ("nf4", NF4), ("tables", TABLES)]
)
def test_nothing_is_said_where_the_values_are_the_same(
    adapters: Callable[[str], Path],
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    base: BaseWeights,
) -> None:
    assert warnings(load_decoder(folder, base=base), adapters(name), caplog) == ""


@pytest.mark.parametrize(
    ("name", "over", "here"),
    [
        ("nf4", NF4, PLAIN),
        ("plain", PLAIN, NF4),
        ("fp8", FP8, PLAIN),
        ("small", SMALL, NF4),
        ("nf4", NF4, FP8),
        ("int8", INT8, PLAIN),
        ("tables", TABLES, PLAIN),
        ("nf4", NF4, TABLES),
    ],
)
def test_other_values_are_said_with_the_change_of_logits(
    adapters: Callable[[str], Path],
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    over: BaseWeights,
    here: BaseWeights,
) -> None:
    saved = adapters(name)
    model, trained = (load_language_model(folder, base=base) for base in (here, over))
    said = warnings(model, saved, caplog)
    load_adapter(trained, saved)
    wanted = logits(trained)
    change = float((logits(model) - wanted).norm() / wanted.norm())
    assert f"logits differ by {change:.1e}" in said
    for kind in (quantisation_of(trained), quantisation_of(model)):
        assert ("not quantised" if kind is None else f"in {kind}") in said
    assert all(not module._forward_hooks for module in model.modules())


def test_without_the_values_from_before_the_change_is_not_measured(
    adapters: Callable[[str], Path], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = warnings(load_decoder(folder, base=NF4), adapters("plain"), caplog)
    assert "is not measured" in said


@pytest.mark.parametrize("name", ["small", "tables"])
def test_the_way_back_names_settings_that_are_not_the_usual_ones(
    adapters: Callable[[str], Path], folder: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    trained = quantisation_of(load_decoder(folder, base={"small": SMALL, "tables": TABLES}[name]))
    for base in (BaseWeights(), INT8):
        said = warnings(load_decoder(folder, base=base), adapters(name), caplog)
        assert f"Load the base in {trained} to have" in said


def test_an_adapter_of_a_4_bit_folder_finds_the_base_that_it_was_made_from(
    adapters: Callable[[str], Path], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = adapters("4-bit folder")
    assert "lora_lm_base_fingerprint" not in read_metadata(saved)
    assert warnings(in_4bit(load_decoder(folder, base=NF4)), saved, caplog) == ""
    assert warnings(load_decoder(folder, base=NF4), saved, caplog) == ""
    said = warnings(load_decoder(folder), saved, caplog)
    assert "was trained over a base in nf4" in said
    assert "Load the base with base_dtype='nf4' to" in said
    with pytest.raises(AdapterError, match=r"blocks of 64.*this base is in nf4 \(blocks of 32"):
        load_adapter(load_decoder(folder, base=SMALL), saved)


def test_a_4_bit_folder_under_another_adapter_is_compared_as_far_as_it_can_be(
    adapters: Callable[[str], Path], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    coded = in_4bit(load_decoder(folder, base=NF4))
    assert warnings(coded, adapters("nf4"), caplog) == ""
    coded = in_4bit(load_decoder(folder, base=NF4))
    assert "could not be checked" in warnings(coded, adapters("plain"), caplog)


@pytest.mark.parametrize("name", ["nf4", "4-bit folder"])
@pytest.mark.parametrize("base", [PLAIN, NF4])
def test_another_base_is_refused_with_both_fingerprints(
    adapters: Callable[[str], Path], folder: Path, name: str, base: BaseWeights, tmp_path: Path
) -> None:
    other = load_decoder(folder)
    with torch.no_grad():
        for block in other.blocks():
            block.get_parameter("mlp.up_proj.weight").mul_(-1)
    save_decoder(other, tmp_path / "other")
    with pytest.raises(AdapterError, match=r"with fingerprint [0-9a-f]{32}, this one has [0-9a-f]"):
        load_adapter(load_decoder(tmp_path / "other", base=base), adapters(name))


def test_an_unpacked_base_computes_and_names_the_same(
    adapters: Callable[[str], Path], folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    packed, plain = (load_decoder(folder, base=NF4) for _ in range(2))
    unpack_base(plain, torch.float32)
    assert not quantised_modules(plain)
    assert torch.equal(logits(plain), logits(packed))
    saved = adapters("nf4")
    assert warnings(plain, saved, caplog) == ""
    save_adapter(plain, tmp_path / "again")
    assert (tmp_path / "again" / TENSORS_FILE).read_bytes() == (saved / TENSORS_FILE).read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        pytest.param("[" * 100_000, id="nested"),
        '{"dtype": 4}',
        '{"dtype": "gptq"}',
        '{"dtype": "nf4"}',
        '{"dtype": "nf4", "block": 64, "double_quant": true, "kept": 3}',
        '{"dtype": "nf4", "block": "64", "double_quant": true}',
        '{"dtype": "nf4", "block": 64.0, "double_quant": true}',
        '{"dtype": "nf4", "block": 64, "double_quant": "false"}',
        '{"dtype": "int8", "compute_dtype": []}',
    ],
)
def test_a_damaged_description_is_refused(
    adapters: Callable[[str], Path], folder: Path, text: str
) -> None:
    saved = adapters("nf4")
    with safe_open(saved / TENSORS_FILE, framework="pt") as file:
        metadata = {**file.metadata(), QUANTISATION_KEY: text}
    save_file(load_file(saved / TENSORS_FILE), saved / TENSORS_FILE, metadata)
    with pytest.raises(AdapterError, match="base's quantisation is damaged"):
        load_adapter(load_decoder(folder), saved)
