"""Merged a part at a time: what merging in memory gives, for every kind of adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks import export_memory
from lora.adapters.apply import apply_lora, train_token_rows
from lora.adapters.merge import merge_lora
from lora.adapters.save_load import load_adapter, save_adapter
from lora.config import LoRAConfig
from lora.decoder.decoder import Decoder
from lora.errors import AdapterError
from lora.export import merged as merged_module
from lora.export.gguf import export_gguf
from lora.export.merged import write_merged
from lora.inference.loading import map_adapted
from lora.pretrained.gguf_weights import convert_gguf
from lora.pretrained.hf_weights import load_decoder
from lora.pretrained.sources import find_model
from tests.export.test_gguf import build_tokenizer

Fill = Callable[..., nn.Module]
VOCAB = 300
IDS = torch.tensor([[1, 7, 3, 5, 9, 200, 299]])
HEAD_ALONE = {"lm_head": [3, 200]}
CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    f"{model}: {what}": (model, options, rows)
    for models, what, options, rows in [
        (("llama-tied", "llama-untied", "gpt2-tied"), "all linear", {}, []),
        (("llama-tied", "gpt2-untied"), "head", {"targets": r".*(lm_head|mlp\..*)"}, []),
        (("llama-untied",), "a rank above a side", {"rank": 40}, []),
        (("llama-tied", "llama-untied"), "rows", {}, [3, 200]),
        (("llama-tied", "llama-untied"), "rows of the head", {}, HEAD_ALONE),
        (("llama-tied", "llama-untied"), "new rows", {}, [3, VOCAB, VOCAB + 1]),
        (("llama-tied",), "embedding", {"modules_to_save": ("embed_tokens", "norm")}, []),
        (
            ("llama-untied",),
            "both tables",
            {"modules_to_save": ("embed_tokens", "lm_head")},
            [],
        ),
        (
            ("gpt2-tied",),
            "wpe and conv1d",
            {"targets": "c_fc", "modules_to_save": ("wpe", "attn.c_proj", "ln_f")},
            [],
        ),
    ]
    for model in models
}


@pytest.fixture
def make(tmp_path: Path, fill_random: Fill) -> Callable[..., tuple[Path, Path]]:
    """Return a function: case, dtype of the base -> the base and an adapter for it."""
    transformers = pytest.importorskip("transformers")

    def make(case: str, dtype: torch.dtype) -> tuple[Path, Path]:
        name, options, rows = CASES[case]
        kind, common = name.split("-")[0], {"vocab_size": VOCAB, "bos_token_id": 1}
        common |= {"tie_word_embeddings": name.endswith("-tied"), "eos_token_id": 2}
        if kind == "llama":
            config: Any = transformers.LlamaConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=64, **common,
            )  # fmt: skip
            model: nn.Module = transformers.LlamaForCausalLM(config)
        else:
            config = transformers.GPT2Config(
                n_embd=32, n_layer=2, n_head=4, n_positions=64, **common
            )
            model = transformers.GPT2LMHeadModel(config)
        fill_random(model, 0).to(dtype).save_pretrained(tmp_path / "base")  # type: ignore[operator]
        build_tokenizer().save(tmp_path / "base")
        adapted = apply_lora(load_decoder(tmp_path / "base"), LoRAConfig(**{"rank": 4} | options))
        if rows:
            train_token_rows(adapted, rows)
        fill_random(adapted, 5, only_trainable=True, std=0.3)
        save_adapter(adapted, tmp_path / "adapter")
        return tmp_path / "base", tmp_path / "adapter"

    return make


def in_memory(base: Path, adapter: Path) -> Decoder:
    """Return the model merged in fp32 in memory, the plain twin."""
    model = load_decoder(base)
    load_adapter(model, adapter)
    merge_lora(model, IDS)
    return model


def write(base: Path, adapter: Path, out: Path, dtype: Any = None) -> Any:
    mapped = map_adapted(find_model(str(base)), adapter)
    return write_merged(
        mapped, IDS, base=base, tokenizer=build_tokenizer(), folder=out, dtype=dtype
    )


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("case", CASES)
def test_a_merged_model_is_the_one_merged_in_memory(
    case: str, dtype: torch.dtype, make: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    base, adapter = make(case, dtype)
    twin, report = in_memory(base, adapter), write(base, adapter, tmp_path / "out")
    assert report.relative_error <= report.tolerance
    written = load_decoder(tmp_path / "out")
    assert written.config.tie_word_embeddings == twin.config.tie_word_embeddings
    assert written.config.vocab_size == twin.config.vocab_size
    seen, wanted = (dict(m.named_parameters()) for m in (written, twin))
    assert seen.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(seen[name], value.to(dtype).float()), name
    stored = {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert stored == {dtype}


def test_what_trained_in_full_is_not_rounded_to_the_base_s_dtype(
    make: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    base, adapter = make("llama-untied: both tables", torch.bfloat16)
    write(base, adapter, tmp_path / "out", "float32")
    exact = load_file(adapter / "adapter_model.safetensors")
    seen = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(seen, exact["base_model.model.lm_head.weight"])


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("llama")])
def test_a_gguf_file_is_the_model_merged_in_memory(
    case: str, make: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    base, adapter = make(case, torch.bfloat16)
    mapped = map_adapted(find_model(str(base)), adapter)
    report = export_gguf(mapped, tmp_path / "out.gguf", "f32", tokenizer=build_tokenizer())
    assert report.logits_error <= 1e-5
    (tmp_path / "again").mkdir()
    convert_gguf(tmp_path / "out.gguf", tmp_path / "again")
    assert torch.equal(logits(load_decoder(tmp_path / "again")), logits(in_memory(base, adapter)))


def test_logits_that_differ_are_refused(
    make: Callable[..., tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = make("llama-tied: rows", torch.bfloat16)
    monkeypatch.setattr(merged_module, "TOLERANCES", dict.fromkeys((torch.bfloat16,), 1e-5))
    with pytest.raises(AdapterError, match=r"the logits differ by .*, allowed is 1e-05"):
        write(base, adapter, tmp_path / "out")


def test_values_beyond_the_dtype_are_refused(
    make: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    base, adapter = make("llama-untied: both tables", torch.float32)
    model = load_adapter(load_decoder(base), adapter)
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[5, 5] = 1e6
    save_adapter(model, adapter)
    with pytest.raises(AdapterError, match=r"lm_head\.weight has values beyond torch\.float16"):
        write(base, adapter, tmp_path / "out", "float16")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "adapter"),
    [("merge", "linears"), ("merge", "embedding"), ("export", "new tokens")],
)
def test_it_takes_no_more_memory_than_its_file(command: str, adapter: str) -> None:
    taken = export_memory.measure(command, adapter, "f16", hidden=768, layers=12, vocab=64_000)
    assert taken["peak_per_file"] < 1.3
