"""Model folders and GGUF files of strangers: refused in words, at no cost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from lora.data.tokenizers.subword import load_tokenizer
from lora.decoder.decoder import build_empty_decoder
from lora.decoder.families import FAMILIES, decoder_config
from lora.errors import ModelError
from lora.export.gguf import export_gguf
from lora.pretrained.gguf_file import GGUFFile
from lora.pretrained.gguf_weights import convert_gguf
from lora.pretrained.hf_weights import load_decoder

MORE_FIELDS = (
    *("head_dim", "rope_scaling", "rope_parameters", "sliding_window", "layer_types", "use_cache"),
    *("attention_bias", "mlp_bias", "torch_dtype", "quantization_config", "no_rope_layers"),
    *("query_pre_attn_scalar", "max_window_layers", "n_embd", "n_layer", "n_head", "n_positions"),
)


@pytest.fixture(scope="module")
def gguf_file(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The tiny model as GGUF."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    export_gguf(tiny_folder, path)
    return path.read_bytes()


@pytest.fixture
def copied(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny folder that may be damaged."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def test_any_settings_of_a_model(
    fuzz: Any, make: dict[str, Any], tiny_config: dict[str, Any], copied: Path
) -> None:
    wide = {**dict.fromkeys(MORE_FIELDS), **tiny_config}

    def check(config: dict[str, Any]) -> None:
        (copied / "config.json").write_text(json.dumps(config))
        model = load_decoder(copied)
        assert torch.isfinite(model(torch.arange(9)[None])).all()

    families = st.sampled_from(sorted(FAMILIES))
    objects = make["object"](wide, most=2)
    mixed = st.tuples(objects, families, st.booleans()).map(
        lambda picked: {**picked[0], **({"model_type": picked[1]} if picked[2] else {})}
    )
    fuzz(mixed, check)


def test_huge_sizes_in_a_models_settings(
    fuzz: Any, tiny_config: dict[str, Any], copied: Path
) -> None:
    sizes = [name for name, value in tiny_config.items() if type(value) is int]
    huge = st.sampled_from([2**20, 2**31, 2**40, 2**62, 2**63, 10**30])

    def check(changes: dict[str, int]) -> None:
        (copied / "config.json").write_text(json.dumps({**tiny_config, **changes}))
        load_decoder(copied)

    fuzz(st.dictionaries(st.sampled_from(sizes), huge, min_size=1, max_size=3), check)


def test_any_json_as_a_models_settings(fuzz: Any, make: dict[str, Any], copied: Path) -> None:
    def check(data: bytes) -> None:
        (copied / "config.json").write_bytes(data)
        load_decoder(copied)

    values = make["json"]().map(lambda value: json.dumps(value).encode())
    nested = st.integers(1, 200_000).map(lambda depth: b"[" * depth)
    fuzz(values | st.binary(max_size=40) | nested, check)


def test_damaged_weights_and_headers_that_lie(
    fuzz: Any, make: dict[str, Any], tiny_folder: Path, copied: Path
) -> None:
    data = (tiny_folder / "model.safetensors").read_bytes()

    def check(damaged: bytes) -> None:
        (copied / "model.safetensors").unlink()  # a mapping may still hold the former file
        (copied / "model.safetensors").write_bytes(damaged)
        load_decoder(copied)

    fuzz(make["bytes"](data) | make["header"](data), check)


def test_any_index_of_weights(fuzz: Any, make: dict[str, Any], copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "model-1.safetensors")
    files = st.sampled_from(["model-1.safetensors", "../model-1.safetensors", "/x.safetensors"])
    maps = st.dictionaries(st.text(max_size=9), files | make["json"](), max_size=4)
    indices = st.fixed_dictionaries({"weight_map": maps | make["json"]()}) | make["json"]()

    def check(index: Any) -> None:
        (copied / "model.safetensors.index.json").write_text(json.dumps(index))
        load_decoder(copied)

    fuzz(indices, check)


@pytest.mark.parametrize(
    "name", ["../../x.safetensors", "/x.safetensors", "a/../x.safetensors", "..\\x.safetensors"]
)
def test_an_index_never_leads_out_of_its_folder(name: str, copied: Path) -> None:
    outside = copied.parent.parent / "x.safetensors"
    shutil.copy(copied / "model.safetensors", outside)
    (copied / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": name}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    try:
        with pytest.raises(ModelError, match="Cannot use the files that"):
            load_decoder(copied)
    finally:
        outside.unlink()


def test_any_tokenizer(fuzz: Any, make: dict[str, Any], tiny_folder: Path, copied: Path) -> None:
    data = (tiny_folder / "tokenizer.json").read_bytes()
    described = json.loads((tiny_folder / "tokenizer_config.json").read_text())

    def check(files: tuple[bytes, Any]) -> None:
        (copied / "tokenizer.json").write_bytes(files[0])
        (copied / "tokenizer_config.json").write_text(json.dumps(files[1]))
        load_tokenizer(copied).encode("a note")

    fuzz(
        st.tuples(st.just(data) | make["bytes"](data), make["object"](described) | make["json"]()),
        check,
    )


def test_damaged_gguf_files(
    fuzz: Any, make: dict[str, Any], gguf_file: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "x.gguf"

    def check(damaged: bytes) -> None:
        path.write_bytes(damaged)
        file = GGUFFile(path)
        for name in file.tensors:
            file.values(name)

    fuzz(make["bytes"](gguf_file), check)


def test_damaged_gguf_files_convert_to_nothing_outside(
    fuzz: Any, make: dict[str, Any], gguf_file: bytes, tmp_path: Path
) -> None:
    path, folder = tmp_path / "x.gguf", tmp_path / "out"
    counts = st.integers(24, 3000)
    huge = st.sampled_from([2**20, 2**31 - 1, 2**31, 2**32 - 1])

    def check(damaged: bytes) -> None:
        path.write_bytes(damaged)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        convert_gguf(path, folder)
        assert {p.name for p in tmp_path.iterdir()} == {"x.gguf", "out"}
        assert (
            len(
                build_empty_decoder(
                    decoder_config(json.loads((folder / "config.json").read_text()))
                ).trunk.blocks()
            )
            == 1
        )

    def put(place_and_value: tuple[int, int]) -> bytes:
        place, value = place_and_value
        return gguf_file[:place] + value.to_bytes(4, "little") + gguf_file[place + 4 :]

    fuzz(make["bytes"](gguf_file) | st.tuples(counts, huge).map(put), check)


def test_names_of_tensors_in_a_gguf_file_are_no_paths(gguf_file: bytes, tmp_path: Path) -> None:
    path, folder = tmp_path / "x.gguf", tmp_path / "out"
    folder.mkdir()
    name, evil = b"output_norm.weight", b"../../../xx.weight"
    assert len(name) == len(evil)
    path.write_bytes(gguf_file.replace(name, evil))
    with pytest.raises(ModelError, match="is not a tensor of this architecture"):
        convert_gguf(path, folder)
    assert not list(folder.iterdir())
