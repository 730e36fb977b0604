"""Every field of `adapter_config.json` is honoured or refused; PEFT's own fields are all known."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lora.adapters import peft_fields
from lora.adapters.peft_fields import check_fields


def described(**fields: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | fields


def test_the_least_that_is_needed() -> None:
    assert check_fields(described()) == []


def test_a_config_as_peft_writes_it_is_accepted() -> None:
    peft = pytest.importorskip("peft")
    content = peft.LoraConfig(target_modules=["q_proj"]).to_dict()
    content |= {"target_modules": ["q_proj"], "peft_type": "LORA"}
    assert check_fields(content) == []


def test_every_field_of_pefts_is_in_one_of_our_tables_or_refused_when_switched_on() -> None:
    peft = pytest.importorskip("peft")
    known = peft_fields._HONOURED | peft_fields._WITHOUT_EFFECT
    for name in peft.LoraConfig(target_modules=["q_proj"]).to_dict():
        if name not in known:
            faults = check_fields(described(**{name: "switched on"}))
            assert [fault.partition("=")[0] for fault in faults] == [name]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA': allowed is 'LORA'"),
        ({"peft_type": None}, "peft_type=None: allowed is 'LORA'"),
        ({"use_dora": True}, "DoRA scales each column"),
        ({"bias": "all"}, "bias='all': the base's biases were trained too"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "B has a bias of its own"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"alora_invocation_tokens": [1, 2]}, "only after certain tokens"),
        ({"trainable_token_indices": [5, 5]}, "a list of ids ≥ 0, each once"),
        ({"trainable_token_indices": {"lm_head": [-1]}}, "a list of ids ≥ 0, each once"),
        ({"layer_replication": [[0, 4], [2, 6]]}, "blocks of the base are repeated"),
        ({"target_parameters": ["mlp.experts.down"]}, "parameters outside linear layers"),
        ({"megatron_config": {"tp": 2}}, "Megatron"),
        *(
            ({"init_lora_weights": start}, "this initialization changes the base's weights")
            for start in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga")
        ),
        ({"use_bdlora": {"nblocks": 2}}, "this field is unknown"),
        ({"something_new": 1}, "something_new=1: this field is unknown"),
        ({"r": 0}, "r=0: allowed is an int from 1 to 65536"),
        ({"r": True}, "an int from 1"),
        ({"r": "8"}, "an int from 1"),
        ({"lora_alpha": math.nan}, "a number > 0, at most 1e+09"),
        ({"lora_alpha": None}, "a number > 0, at most 1e+09"),
        ({"lora_dropout": 1.0}, "0 ≤ dropout < 1"),
        ({"lora_dropout": "no"}, "0 ≤ dropout < 1"),
        ({"use_rslora": "yes"}, "true or false"),
        ({"target_modules": []}, "a pattern or a list of names"),
        ({"target_modules": None}, "a pattern or a list of names"),
        ({"target_modules": "q_proj("}, "it is no regular expression"),
        ({"target_modules": {"q_proj": 1}}, "a pattern or a list of names"),
        ({"exclude_modules": [3]}, "a pattern or a list of names"),
        ({"modules_to_save": "embed_tokens"}, "a list of names"),
        ({"modules_to_save": ["embed("]}, "it is no regular expression"),
        ({"layers_to_transform": "3"}, "an int or a list of ints"),
        ({"layers_to_transform": [0, True]}, "an int or a list of ints"),
        ({"layers_pattern": 3}, "a name or a list of names"),
        ({"r": 4.5}, "an int from 1"),
        ({"r": 10**400}, "an int from 1"),
        ({"lora_alpha": 1e308}, "at most 1e+09"),
        ({"lora_alpha": 10**400}, "at most 1e+09"),
        ({"lora_dropout": 10**400}, "0 ≤ dropout < 1"),
        ({"rank_pattern": {"q_proj": 10**400}}, "names with ints from 1"),
        ({"alpha_pattern": {"q_proj": 1e308}}, "at most 1e+09"),
        ({"alpha_pattern": {"(?i)q_proj": 1}}, "global flags not at the start"),
        ({"target_modules": "q_proj{e<=3}"}, "a { that begins no repeat"),
        ({"target_modules": "[[:alpha:]]+"}, "a [ in a character class"),
        ({"exclude_modules": "a" * 300_000}, "300,000 characters"),
        ({"rank_pattern": {"q_proj": 0}}, "names with ints from 1"),
        ({"rank_pattern": ["q_proj"]}, "names with ints from 1"),
        ({"alpha_pattern": {"q_proj": -1}}, "names with numbers > 0"),
        ({"alpha_pattern": {"q_proj(": 1}}, "it is no regular expression"),
    ],
)
def test_what_cannot_be_honoured_is_refused(fields: dict[str, Any], why: str) -> None:
    faults = check_fields(described(**fields))
    assert len(faults) == 1
    assert why in faults[0]
    assert next(iter(fields)) in faults[0]


@pytest.mark.parametrize(
    "fields",
    [
        *({"init_lora_weights": start} for start in (True, False, None, "gaussian", "eva")),
        {"eva_config": {"rho": 2.0}, "corda_config": {"verbose": True}},
        {"task_type": "SEQ_CLS", "inference_mode": True, "revision": "main"},
        {"fan_in_fan_out": True, "peft_version": "9.9", "auto_mapping": {"a": "b"}},
        {"something_new": None, "another": False, "third": [], "fourth": 0, "fifth": ""},
        {"layers_to_transform": 0, "rank_pattern": None, "lora_dropout": 0},
        {"r": 4.0, "rank_pattern": {"q_proj": 8.0}},
        {"target_modules": r"(?:model\.)*(?:[a-z_]+\.)*layers\.(\d+\.)+(?:(?:q|v)_proj)+"},
    ],
)
def test_what_changes_nothing_is_accepted(fields: dict[str, Any]) -> None:
    assert check_fields(described(**fields)) == []


def test_all_faults_come_together() -> None:
    faults = check_fields(described(r=0, use_dora=True, bias="all", something_new=1))
    assert len(faults) == 4


def test_an_empty_description_lacks_the_four_fields_that_are_needed() -> None:
    faults = check_fields({})
    assert [fault.partition("=")[0] for fault in faults] == [
        "peft_type",
        "r",
        "lora_alpha",
        "target_modules",
    ]
