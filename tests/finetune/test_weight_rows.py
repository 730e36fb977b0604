"""Rows of a model's files are those of the model that is loaded whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora.errors import ModelError
from lora.finetune.weight_rows import WeightRows
from lora.pretrained.hf_weights import load_decoder
from tests.finetune.tiny_models import FAMILIES, save_tiny

WEIGHTS = "model.safetensors"


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_those_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    rows, model = WeightRows(save_tiny(tmp_path, family)), load_decoder(tmp_path)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for part in (slice(None), slice(3, 7), slice(len(parameter), None)):
            read = rows(name, part)
            assert torch.equal(read, parameter[part]), name
            assert read.is_contiguous()
    read = rows("lm_head.weight", slice(2))
    read.zero_()  # the caller's own
    assert torch.equal(rows("lm_head.weight", slice(2)), model.lm_head.weight[:2])


def test_files_without_the_trunks_name(tmp_path: Path) -> None:
    model = load_decoder(save_tiny(tmp_path, "gpt2"))
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    name = "transformer.h.1.mlp.c_fc.weight"
    assert torch.equal(WeightRows(tmp_path)(name, slice(1, 9)), model.get_parameter(name)[1:9])


def test_faults_are_those_of_loading(tmp_path: Path) -> None:
    save_tiny(tmp_path, "tied")
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["model.norm.weight"] = torch.ones(3)
    tensors["lm_head.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / WEIGHTS)
    said = []
    for load in (WeightRows, load_decoder):
        with pytest.raises(ModelError) as error:
            load(tmp_path)
        said.append(str(error.value))
    assert said[0] == said[1]
    assert "up_proj.weight" in said[0]
    assert "model.norm.weight is (3,)" in said[0]


def test_a_head_that_differs_from_the_tied_embedding(tmp_path: Path) -> None:
    tensors = load_file(save_tiny(tmp_path, "tied") / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match="tie_word_embeddings=true"):
        WeightRows(tmp_path)


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    rows = WeightRows(save_tiny(tmp_path, "llama"))
    path = tmp_path / WEIGHTS
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 64)
    with pytest.raises(ModelError, match="Another program is writing it"):
        rows("model.norm.weight", slice(None))
