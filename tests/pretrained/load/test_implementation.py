"""Which code runs a config.json: native, transformers, or none, and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lora.config import ImplementationName
from lora.errors import ConfigError, DependencyError, LoraError, ModelError, UnsupportedModelError
from lora.finetune.job import FinetuneJob
from lora.pretrained.load.implementation import choose_implementation
from lora.pretrained.load.models import model_config
from lora.pretrained.load.task import settled_task

pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
LLAMA: dict[str, Any] = {"model_type": "llama", **SIZES}
NEOX: dict[str, Any] = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], **SIZES}


def test_a_native_decoder_comes_first() -> None:
    chosen = choose_implementation(LLAMA)
    assert chosen.kind == "native"
    assert chosen.describe() == "implementation: native decoder (it runs 'llama')"
    assert choose_implementation(LLAMA, "native").describe().endswith("(as asked)")


def test_transformers_runs_what_no_native_decoder_reads() -> None:
    chosen = choose_implementation(NEOX)
    version = importlib.metadata.version("transformers")
    assert chosen.kind == "transformers"
    reason = "no native decoder for 'gpt_neox'"
    assert chosen.describe() == f"implementation: transformers {version} ({reason})"
    assert choose_implementation(LLAMA, "transformers").kind == "transformers"


def test_a_family_of_ours_with_a_field_that_it_does_not_have() -> None:
    chosen = choose_implementation({**LLAMA, "hidden_act": "mish"})
    assert chosen.kind == "transformers"
    assert "the native decoder of 'llama' does not have hidden_act='mish'" in chosen.reason
    with pytest.raises(UnsupportedModelError, match="hidden_act='mish'"):
        choose_implementation({**LLAMA, "hidden_act": "mish"}, "native")


def test_a_damaged_config_is_no_reason_for_transformers_which_fills_in_defaults() -> None:
    with pytest.raises(ModelError, match="vocab_size is missing") as raised:
        choose_implementation({**LLAMA, "vocab_size": None})
    assert not isinstance(raised.value, UnsupportedModelError)


def test_the_text_part_of_a_multimodal_model_is_used_and_said() -> None:
    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    chosen = choose_implementation(config)
    assert chosen.architecture is not None
    assert chosen.architecture.is_multimodal
    assert "of this multimodal model the text part is used" in chosen.describe()


def named(model_type: str, architecture: str, **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, "architectures": [architecture], **SIZES, **more}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (named("t5", "T5ForConditionalGeneration"), ["encoder-decoder", "…ForCausalLM"]),
        ({"model_type": "t5"}, ["encoder-decoder"]),
        (named("bart", "BartForConditionalGeneration"), ["encoder-decoder"]),
        (named("bert", "BertForMaskedLM"), ["masked language model", "Allowed: BertLMHeadModel"]),
        ({"model_type": "bert"}, ["masked language model", "is_decoder"]),
        (
            named("llama", "LlamaForSequenceClassification"),
            ["classification head", "Allowed: LlamaForCausalLM"],
        ),
        (named("gpt_neox", "GPTNeoXForTokenClassification"), ["labels tokens"]),
        (named("gpt_neox", "GPTNeoXModel"), ["no output head", "Allowed: GPTNeoXForCausalLM"]),
        (named("vit", "ViTForImageClassification"), ["no causal language model", "vit"]),
        (named("gpt_neo_x", "X"), ["gpt_neo_x", "Did you mean 'gpt_neox'?", "-U transformers"]),
        (named("own", "OwnLM", auto_map={"AutoModel": "own.OwnLM"}), ["auto_map", "never run"]),
        ({**NEOX, "quantization_config": {"quant_method": "gptq"}}, ["quantised by GPTQ", "GGUF"]),
        ({**LLAMA, "quantization_config": {"quant_method": "awq"}}, ["quantised by AWQ"]),
        ({}, ["architectures=None"]),
    ],
    ids=lambda each: each[0] if isinstance(each, list) else "",
)
def test_what_is_no_causal_language_model_is_refused_by_name(
    config: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ModelError) as raised:
        choose_implementation(config)
    for word in words:
        assert word in str(raised.value)


def test_native_where_there_is_none_says_what_is_native() -> None:
    with pytest.raises(UnsupportedModelError) as raised:
        choose_implementation(NEOX, "native")
    for word in ("gpt_neox", "GPTNeoXForCausalLM", "Native here: ", "llama, mistral"):
        assert word in str(raised.value)


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"implementation='nativ'.*Did you mean 'native'?"):
        choose_implementation(LLAMA, "nativ")  # type: ignore[arg-type]


@pytest.mark.parametrize(("version", "words"), [(None, "not installed"), ("5.3.0", "5.3.0")])
def test_without_transformers_the_error_has_the_install_line(
    monkeypatch: pytest.MonkeyPatch, version: str | None, words: str
) -> None:
    found = "lora.pretrained.load.architectures.transformers_version"
    monkeypatch.setattr(found, lambda: version)
    with pytest.raises(DependencyError) as raised:
        choose_implementation(NEOX)
    for word in (words, "GPTNeoXForCausalLM", "5.4 or newer", "llama, mistral", "[hf]"):
        assert word in str(raised.value)
    with pytest.raises(DependencyError, match=r"set or recorded.*Or set implementation=native"):
        choose_implementation(LLAMA, "transformers")
    assert choose_implementation(LLAMA).kind == "native"
    with pytest.raises(LoraError, match=r"hidden_act='mish'[\s\S]*\[hf\]"):
        choose_implementation({**LLAMA, "hidden_act": "mish"})


def test_a_transformers_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.models.auto.modeling_auto", None)
    for asked in ("auto", "transformers"):
        with pytest.raises(DependencyError, match=r"cannot be imported: import of .*\[hf\]"):
            choose_implementation(NEOX, asked)  # type: ignore[arg-type]
    assert choose_implementation(LLAMA).kind == "native"


@pytest.mark.parametrize(
    ("recorded", "reason"), [("transformers", "as in its run"), (None, "as asked")]
)
def test_a_resumed_run_takes_the_implementation_of_its_record(
    tmp_path: Path, recorded: ImplementationName | None, reason: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    job = FinetuneJob(data="x.jsonl", implementation="transformers")  # the record's, as a flag
    said: list[str] = []
    settled = settled_task(job, tmp_path, recorded, said.append)
    assert settled.implementation == "transformers"
    assert said[0].endswith(f"({reason})")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "swishy"}, "transformers: it does not know hidden_act='swishy'. Check"),
        (
            {"rope_scaling": {"rope_type": "foo"}},
            "transformers: it does not know rope_scaling.rope_type='foo'. Check",
        ),
        ({"hidden_size": "64"}, "transformers: Field 'hidden_size' expected int, got str"),
    ],
)
def test_a_setting_that_transformers_refuses_is_named(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**NEOX, **changes}))
    with pytest.raises(ModelError, match=r"Check config\.json, or download it again") as raised:
        model_config(tmp_path)
    assert words in str(raised.value)
