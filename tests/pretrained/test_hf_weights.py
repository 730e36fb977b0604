"""Folders are read whole or not at all, mapped rather than copied, and written for transformers."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora.config import BaseWeights
from lora.decoder.decoder import Decoder, build_decoder
from lora.decoder.families import decoder_config
from lora.decoder.quantised.int8 import Int8Linear
from lora.errors import CheckpointError, ModelError
from lora.pretrained.hf_files import read_config
from lora.pretrained.hf_weights import load_decoder, save_decoder

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def build_tiny(**overrides: Any) -> Decoder:
    config = {
        "model_type": "llama",
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **overrides,
    }
    return build_decoder(decoder_config(config), seed=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tiny untied Llama."""
    save_decoder(build_tiny(), tmp_path / "tiny")
    return tmp_path / "tiny"


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def failure(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        load_decoder(folder)
    return str(error.value)


def assert_same(first: nn.Module, second: nn.Module) -> None:
    theirs = dict(second.named_parameters())
    assert dict(first.named_parameters()).keys() == theirs.keys()
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


@pytest.mark.parametrize("is_tied", [True, False])
def test_saved_and_loaded_again_is_the_same(tmp_path: Path, is_tied: bool) -> None:
    model = build_tiny(tie_word_embeddings=is_tied)
    save_decoder(model, tmp_path)
    loaded = load_decoder(tmp_path)
    assert_same(loaded, model)
    assert loaded.config == model.config
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == is_tied
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert ("lm_head.weight" in file.keys()) != is_tied  # noqa: SIM118 - no mapping
    assert not list(tmp_path.glob(".*"))  # no half-written files are left


def test_transformers_loads_what_was_saved(pair: Any, tmp_path: Path) -> None:
    save_decoder(pair.ours, tmp_path)
    kind = type(pair.reference)
    model, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_same(model, pair.reference)
    assert model.dtype == torch.float32


def mapped_ranges(path: Path) -> list[range]:
    """Return where this process has mapped `path`, as ranges of addresses."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [parts[0].split("-") for parts in lines if parts[-1] == str(path)]
    return [range(int(low, 16), int(high, 16)) for low, high in spans]


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="asks Linux for the mappings")
def test_an_fp32_file_is_mapped_and_not_copied(folder: Path) -> None:
    model = load_decoder(folder)
    ranges = mapped_ranges(folder / WEIGHTS)
    for name, parameter in model.named_parameters():
        assert any(parameter.data_ptr() in span for span in ranges), name


def test_training_never_writes_into_the_file(folder: Path) -> None:
    before = (folder / WEIGHTS).read_bytes()
    model = load_decoder(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert (folder / WEIGHTS).read_bytes() == before
    assert_same(load_decoder(folder), build_tiny())


def test_a_folder_may_be_written_over_while_it_is_mapped(folder: Path) -> None:
    model = load_decoder(folder)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    save_decoder(build_tiny(hidden_size=16), folder)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    save_decoder(model, folder)
    assert_same(load_decoder(folder), model)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_types_are_converted(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    model = build_tiny().to(stored)
    save_decoder(model, tmp_path)
    assert read_config(tmp_path)["torch_dtype"] == str(stored).removeprefix("torch.")
    loaded = load_decoder(tmp_path, dtype=wanted)
    for parameter, original in zip(loaded.parameters(), model.parameters(), strict=True):
        assert parameter.dtype == wanted
        assert torch.equal(parameter, original.to(wanted))


def test_shards_are_written_and_read(tmp_path: Path) -> None:
    model = build_tiny(tie_word_embeddings=True)
    save_decoder(model, tmp_path)  # what lies there already must not be read instead
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    save_decoder(model, tmp_path, max_shard_bytes=10_000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert_same(load_decoder(tmp_path), model)
    transformers = pytest.importorskip("transformers")
    assert_same(transformers.LlamaForCausalLM.from_pretrained(tmp_path), model)
    save_decoder(build_tiny(), tmp_path)  # and back to one file
    assert_same(load_decoder(tmp_path), build_tiny())


def test_shards_of_transformers_are_read(build_pair: Callable[..., Any], tmp_path: Path) -> None:
    pair = build_pair("qwen3")
    pair.reference.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / INDEX).is_file()
    assert_same(load_decoder(tmp_path), pair.ours)


def test_names_without_the_trunks_prefix_are_read(
    build_pair: Callable[..., Any], tmp_path: Path
) -> None:
    pair = build_pair("gpt2")
    shutil.copytree(pair.folder, tmp_path / "gpt2")

    def strip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()  # the mask that GPT-2 carries
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)

    edit_weights(tmp_path / "gpt2", strip)
    assert_same(load_decoder(tmp_path / "gpt2"), pair.ours)


def test_computed_tables_in_a_file_are_left_out(folder: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    edit_weights(folder, add)
    assert_same(load_decoder(folder), build_tiny())


def test_all_faults_of_the_tensors_are_raised_together(folder: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        down = tensors.pop("model.layers.0.mlp.down_proj.weight")
        tensors["model.layers.0.mlp.down_prj.weight"] = down
        tensors["model.norm.weight"] = torch.ones(33)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(48, 32, dtype=torch.int8)

    edit_weights(folder, damage)
    message = failure(folder)
    for words in (
        "model.layers.0.mlp.down_proj.weight (32, 48) is missing."
        " Did you mean 'model.layers.0.mlp.down_prj.weight'?",
        "model.norm.weight is (33,) in the file: config.json implies (32,)",
        "model.layers.1.mlp.up_proj.weight has dtype I8 (allowed: BF16, F16, F32, F64)",
        "model.layers.0.mlp.down_prj.weight (32, 48) is not a tensor of this architecture",
    ):
        assert words in message


def test_an_untied_head_must_be_there(folder: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        del tensors["lm_head.weight"]

    edit_weights(folder, drop)
    assert "lm_head.weight (50, 32) is missing" in failure(folder)


def test_a_tied_head_in_the_file_must_be_the_embedding(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    message = failure(folder)
    assert "tie_word_embeddings=true" in message
    assert "differs from the embedding" in message

    def tie(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_weights(folder, tie)
    model = load_decoder(folder)
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("length", [0, 4, 100, -7])
def test_a_truncated_file_is_refused(folder: Path, length: int) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:length])
    message = failure(folder)
    assert WEIGHTS in message
    assert "download it again" in message


def test_garbage_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 3)
    assert "as safetensors" in failure(folder)


def test_pickles_are_refused_with_the_way_out(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    message = failure(folder)
    for words in ("pytorch_model.bin", "run any code", "save_pretrained"):
        assert words in message


def test_code_in_a_folder_is_never_run(folder: Path, tmp_path: Path) -> None:
    """There is no trust_remote_code: a folder that asks for its own code is read as data or not."""
    ran = tmp_path / "ran"
    (folder / "modeling_own.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Own: ...\n")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    load_decoder(folder)
    edit_config(folder, model_type="own", architectures=["Own"])
    assert "own" in failure(folder)
    assert not ran.exists()


def test_a_full_disk_leaves_no_part_of_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointError, match=r"full.*No space left on device\. Free some space"):
        save_decoder(build_tiny(), tmp_path / "full")
    assert not list((tmp_path / "full").iterdir())


def test_missing_parts_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert "model*.safetensors is needed, and the folder has config.json" in failure(folder)
    (folder / "config.json").unlink()
    assert "config.json is needed, and the folder has none" in failure(folder)
    assert "no such folder" in failure(tmp_path / "nowhere")


@pytest.mark.parametrize("contents", ["{", "[1]", "\xff"])
def test_a_damaged_config_is_refused(folder: Path, contents: str) -> None:
    (folder / "config.json").write_bytes(contents.encode("latin-1"))
    assert "config.json" in failure(folder)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", "..\\x", ""]
)
def test_an_index_cannot_lead_out_of_the_folder(folder: Path, name: str) -> None:
    (folder / WEIGHTS).rename(folder.parent / "outside.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    message = failure(folder)
    assert repr(name) in message
    assert "a .safetensors file in the folder" in message


def test_an_index_names_files_that_are_missing(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert "model-1.safetensors is missing" in failure(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {}}))
    assert "no weight_map" in failure(folder)


def test_linked_files_are_read(folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in folder.iterdir():  # as Hugging Face's cache lays a model out
        (linked / path.name).symlink_to(path)
    assert_same(load_decoder(linked), build_tiny())


def test_a_model_with_other_tensors_is_not_saved(tmp_path: Path) -> None:
    model = build_tiny()
    model.trunk.blocks()[0].mlp.up_proj.register_parameter("lora_A", nn.Parameter(torch.ones(1)))
    with pytest.raises(ModelError) as error:
        save_decoder(model, tmp_path / "out")
    assert "model.layers.0.mlp.up_proj.lora_A is not a tensor of the format" in str(error.value)
    assert "Merge" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_untied_copy_of_a_tied_head_is_not_saved(tmp_path: Path) -> None:
    model = build_tiny(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ModelError, match=r"lm_head.weight is not a tensor"):
        save_decoder(model, tmp_path)


def shard(folder: Path) -> list[Path]:
    """Save the model of `folder` again in at least two shards; return them."""
    model = load_decoder(folder)
    save_decoder(model, folder, max_shard_bytes=20_000)
    return sorted(folder.glob("*-of-*.safetensors"))


def test_shards_without_an_index_are_loaded(folder: Path) -> None:
    expected = build_tiny()
    assert len(shard(folder)) > 1
    (folder / INDEX).unlink()
    assert_same(load_decoder(folder), expected)


def test_a_missing_shard_is_named_without_an_index(folder: Path) -> None:
    shards = shard(folder)
    (folder / INDEX).unlink()
    shards[1].unlink()
    told = failure(folder)
    assert f"no {INDEX}" in told
    assert f"{shards[1].name} is missing" in told


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    first, second = shard(folder)[:2]
    twice = {"model.norm.weight": torch.ones(32)}
    for path in (first, second):
        save_file({**load_file(path), **twice}, path)
    told = failure(folder)
    assert f"model.norm.weight is in {first.name} and in {second.name}" in told


def test_a_file_that_is_cut_while_it_is_read_is_an_error_and_no_crash(folder: Path) -> None:
    from contextlib import ExitStack

    from lora.pretrained.hf_files import open_tensors

    with ExitStack() as files:
        tensors = open_tensors(folder, files)
        path = folder / WEIGHTS
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(ModelError, match=r"bytes when it was opened and has .* now"):
            tensors["model.norm.weight"].tensor()


def test_a_file_that_is_cut_while_it_is_quantised_is_an_error_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, load = folder / WEIGHTS, Int8Linear.load

    def load_and_cut(self: Int8Linear, weight: Tensor, name: str) -> None:
        load(self, weight, name)
        os.truncate(path, path.stat().st_size - 1)

    monkeypatch.setattr(Int8Linear, "load", load_and_cut)
    with pytest.raises(ModelError, match=r"bytes when it was opened and has .* now"):
        load_decoder(folder, base=BaseWeights("int8"))
