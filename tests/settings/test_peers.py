"""The table of other tools' settings: every name leads to a setting that there is."""

from __future__ import annotations

import dataclasses
import re

import pytest

from lora.config import (
    DataConfig,
    LoRAConfig,
    MemoryConfig,
    RunConfig,
    SamplingConfig,
    TrainConfig,
)
from lora.errors import UnknownSettingError
from lora.settings.peers import FORMER_NAMES, PEER_SETTINGS, find_peer

CONFIGS = (LoRAConfig, TrainConfig, DataConfig, RunConfig, MemoryConfig, SamplingConfig)
OURS = {each.name for config in CONFIGS for each in dataclasses.fields(config)} | {
    *("model", "data", "eval_data", "from_adapter", "base_dtype", "report", "resume", "full"),
    *("epochs", "devices", "nf4_double_quant"),
}


def test_every_name_leads_to_a_setting_of_ours_and_is_none() -> None:
    assert not PEER_SETTINGS.keys() & OURS
    for name, peer in PEER_SETTINGS.items():
        assert name == name.lower().replace("-", "_")
        assert bool(peer.ours) != bool(peer.because), name
        assert peer.ours is None or peer.ours in OURS, name
        assert set(peer.refused) <= {"*"} or not set(peer.refused) & peer.values.keys(), name
        assert peer.beside in (None, "adapter"), name
        named = set(
            re.findall(r"`(\w+)`", " ".join((peer.because, peer.note, *peer.refused.values())))
        )
        assert named <= OURS | {"fp8"}, name


def test_former_names_are_aliases() -> None:
    for former, name in FORMER_NAMES.items():
        assert PEER_SETTINGS[former].ours == name


@pytest.mark.parametrize(
    ("name", "value", "others", "instead"),
    [
        ("per_device_train_batch_size", "4", {}, {"batch_size": "4"}),
        (
            "micro_batch_size",
            "4",
            {"gradient_accumulation_steps": "8"},
            {"batch_size": "32", "gradient_accumulation": "8"},
        ),
        ("per_device_train_batch_size", "four", {}, {}),
        ("warmup_steps", "10", {"max_steps": "200"}, {"warmup_fraction": "0.05"}),
        ("warmup_steps", "10", {}, {}),
        ("output_dir", "out/my/", {}, {"out": "out", "name": "my"}),
        ("output_dir", "my", {}, {"out": ".", "name": "my"}),
        ("output_dir", "/my", {}, {"out": "/", "name": "my"}),
        (
            "resume_from_checkpoint",
            "runs/x/checkpoint-100",
            {},
            {"resume": "true", "out": "runs", "name": "x"},
        ),
        ("report_to", "tensorboard", {}, {"tensorboard": "true"}),
        ("report_to", "wandb", {}, {}),
        ("gptq", "true", {}, {"base_dtype": "nf4"}),
        ("gptq", "false", {}, {}),
        ("finetuning_type", "full", {}, {"full": "true"}),
        ("finetuning_type", "lora", {}, {}),
    ],
)
def test_what_to_write_instead(
    name: str, value: str, others: dict[str, str], instead: dict[str, str]
) -> None:
    peer = find_peer(name.replace("_", "-"))
    assert peer is not None
    assert peer.instead(value, others) == instead


def test_the_best_model_at_the_end_is_what_is_saved() -> None:
    peer = find_peer("load_best_model_at_end")
    assert peer is not None
    assert (peer.ours, peer.values) == ("save", {"true": "best", "false": "last"})


@pytest.mark.parametrize(
    ("name", "value", "seen"),
    [
        ("quantization_bit", "4", ""),
        ("quantization_bit", "3", "`base_dtype` has 4 bits"),
        ("bnb_4bit_quant_type", "nf4", ""),
        ("bnb_4bit_quant_type", "fp4", "there is no fp4"),
        ("quantization_type", "FP4", "there is no fp4"),
        ("bnb_4bit_compute_dtype", "bfloat16", ""),
        ("bnb_4bit_compute_dtype", "float16", "there is no fp16 training"),
    ],
)
def test_values_of_an_alias_may_be_refused(name: str, value: str, seen: str) -> None:
    peer = find_peer(name)
    assert peer is not None
    assert seen in peer.why_refused(value)
    assert bool(seen) == bool(peer.why_refused(value))


def test_python_is_told_what_quantisation_is_here() -> None:
    with pytest.raises(UnknownSettingError, match="here it is 'precision'"):
        TrainConfig(bnb_4bit_compute_dtype="bfloat16")  # type: ignore[call-arg]
    with pytest.raises(UnknownSettingError, match="there is no fp4: base_dtype nf4"):
        TrainConfig(bnb_4bit_quant_type="fp4")  # type: ignore[call-arg]
