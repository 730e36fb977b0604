"""Folders quantised by other methods: each is refused by its name, with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora.errors import ModelError
from lora.pretrained.load.implementation import choose_implementation
from lora.pretrained.quantised.methods import (
    FP4,
    LLM_INT8,
    METHODS,
    is_4bit,
    refuse_tensors,
    without_settings,
)
from tests.pretrained.load.test_implementation import LLAMA, NEOX

BNB = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "quant_method": "bitsandbytes"}


@pytest.mark.parametrize(
    ("settings", "name", "like"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ", "nf4"),
        ({"quant_method": "gptq", "bits": 8}, "GPTQ", "int8"),
        ({"bits": 4, "group_size": 128, "desc_act": False}, "GPTQ", "nf4"),
        ({"quant_method": "AWQ", "bits": 4}, "AWQ", "nf4"),
        ({"quant_method": "aqlm"}, "AQLM", "nf4"),
        ({"quant_method": "hqq"}, "HQQ", "nf4"),
        ({"quant_method": "mxfp4"}, "MXFP4", "nf4"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8 in blocks", "fp8"),
        ({"quant_method": "fbgemm_fp8"}, "FBGEMM FP8", "fp8"),
        (
            {"quant_method": "compressed-tensors", "format": "float-quantized"},
            "compressed-tensors",
            "fp8",
        ),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "compressed-tensors",
            "nf4",
        ),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "ModelOpt", "fp8"),
        ({"bits": 4, "group_size": 64}, "mlx-lm", "nf4"),
        ({**BNB, "load_in_8bit": True, "load_in_4bit": False}, "LLM.int8()", "int8"),
        ({"_load_in_8bit": True, "llm_int8_threshold": 6.0}, "LLM.int8()", "int8"),
        ({**BNB, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes in fp4", "nf4"),
        ({"quant_method": "brand_new"}, "brand_new", "nf4"),
        ({}, "no quant_method", "nf4"),
    ],
)
def test_each_method_is_refused_by_its_name_with_what_to_do(
    settings: dict[str, Any], name: str, like: str
) -> None:
    for config in (LLAMA, NEOX):
        for asked in ("auto", "transformers"):
            with pytest.raises(ModelError) as raised:
                choose_implementation({**config, "quantization_config": settings}, asked)
            words = ("unquantised model", f"--base-dtype {like}", "GGUF", "bnb-4bit")
            for word in (name, str(config["model_type"]), *words):
                assert word in str(raised.value), word


def test_settings_under_other_keys_count_too() -> None:
    with pytest.raises(ModelError, match="compressed-tensors"):
        is_4bit({"compression_config": {"quant_method": "sparseml"}}, "model")
    with pytest.raises(ModelError, match="mlx-lm"):
        is_4bit({"quantization": {"bits": 4, "group_size": 64}}, "model")
    with pytest.raises(ModelError, match="AWQ"):
        is_4bit({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "model")
    with pytest.raises(ModelError, match="is a str, and a JSON object is needed"):
        is_4bit({"quantization_config": "nf4"}, "model")


def test_nf4_of_bitsandbytes_under_every_spelling_is_not_refused() -> None:
    for settings in (
        BNB,
        {"load_in_4bit": True},  # of 2023
        {"_load_in_4bit": True, "_load_in_8bit": False, "quant_method": "bitsandbytes"},
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    ):
        assert is_4bit({**LLAMA, "quantization_config": settings}, "model")
    assert not is_4bit({**LLAMA, "quantization_config": None}, "model")
    kept = without_settings(
        {"a": 1, "quantization_config": BNB, "text_config": {"quantization": 1}}
    )
    assert kept == {"a": 1, "text_config": {}}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("layers.0.q_proj.qweight", "GPTQ or AWQ"),
        ("layers.0.q_proj.SCB", "LLM.int8()"),
        ("layers.0.q_proj.weight.quant_state.bitsandbytes__fp4", "fp4"),
        ("layers.0.q_proj.weight_scale_inv", "FP8 in blocks"),
        ("layers.0.q_proj.weight_packed", "compressed-tensors"),
        ("layers.0.mlp.experts.gate_up_proj_blocks", "MXFP4"),
        ("layers.0.q_proj.codebooks", "AQLM"),
        ("layers.0.q_proj.W_q", "HQQ"),
        ("layers.0.q_proj.biases", "mlx-lm"),
        ("layers.0.q_proj.weight_scale", "FP8 with one scale"),
    ],
)
def test_what_config_json_does_not_say_the_tensors_tell(name: str, method: str) -> None:
    with pytest.raises(ModelError) as raised:
        refuse_tensors(["layers.0.norm.weight", name], str(Path("folder")))
    for word in ("quantised by", method, name, "unquantised model"):
        assert word in str(raised.value)


def test_tensors_of_plain_and_of_4bit_models_are_not_refused() -> None:
    endings = ("", ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4")
    names = [
        "layers.0.q_proj.bias",
        "norm.weight",
        *(f"layers.0.q_proj.weight{e}" for e in endings),
    ]
    refuse_tensors(names, "folder")


def test_the_page_on_models_names_every_method() -> None:
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text(encoding="utf-8")
    assert [m.name for m in (*METHODS.values(), FP4, LLM_INT8) if m.name not in page] == []


def test_every_known_method_has_a_base_dtype_like_it() -> None:
    assert {method.like for method in METHODS.values()} <= {"nf4", "int8", "fp8"}
