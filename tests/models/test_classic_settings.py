"""The environment variables: each is read, each slip is named."""

from __future__ import annotations

import pytest

from lora.errors import ConfigError
from models.classic_settings import TEST_SIZES, ClassicSettings, notes, read_settings


def test_nothing_set_gives_the_defaults() -> None:
    assert read_settings({"PATH": "/bin", "HOME": "/home/x", "SEEDS": "1"}) == ClassicSettings()


def test_the_original_variables_work() -> None:
    settings = read_settings(
        {"USE_LORA": "True", "LORA_RANK": "16", "LORA_ALPHA": "32.0", "LORA_DROPOUT": "0.1"}
    )
    assert settings.use_lora
    assert (settings.lora_rank, settings.lora_alpha, settings.lora_dropout) == (16, 32.0, 0.1)


@pytest.mark.parametrize("word", ["true", "1", "yes", "ON"])
def test_words_for_true(word: str) -> None:
    assert read_settings({"USE_LORA": word}).use_lora
    assert not read_settings({"USE_LORA": {"ON": "off", "1": "0"}.get(word, "no")}).use_lora


@pytest.mark.parametrize(
    ("variable", "value", "seen"),
    [
        ("LORA_RNAK", "8", "Did you mean 'LORA_RANK'"),
        ("USE_LROA", "True", "Did you mean 'USE_LORA'"),
        ("LORA_SOMETHING_ELSE", "1", "LORA_SOMETHING_ELSE: training.py has no such variable"),
        ("USE_LORA", "maybe", "must be True or False"),
        ("LORA_RANK", "abc", "must be an integer"),
        ("LORA_RANK", "8.5", "must be an integer"),
        ("LORA_RANK", "0", "rank=0"),
        ("LORA_ALPHA", "-1", "alpha=-1.0"),
        ("LORA_ALPHA", "nan", "finite"),
        ("LORA_DROPOUT", "1.0", "dropout=1.0"),
        ("MAX_STEPS", "0", "MAX_STEPS=0"),
        ("LEARNING_RATE", "fast", "must be a number"),
        ("MICRO_BATCHES", "3", "a divisor of batch_size=8"),
    ],
)
def test_a_slip_is_named(variable: str, value: str, seen: str) -> None:
    with pytest.raises(ConfigError, match=seen):
        read_settings({variable: value})


def test_all_slips_come_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)LORA_RNAK.*USE_LORA='maybe'.*LORA_RANK='abc'"):
        read_settings({"LORA_RNAK": "1", "USE_LORA": "maybe", "LORA_RANK": "abc"})


def test_variables_of_other_programs_are_ignored() -> None:
    read_settings({"LORA_BENCH_DATA": "x", "LORALM_CACHE": "y", "LOG_LEVEL": "debug"})


def test_test_mode_makes_small_what_is_not_set() -> None:
    settings = read_settings({"TEST_MODE": "True", "N_EMBD": "32"})
    assert settings.n_embd == 32
    assert settings.max_steps == TEST_SIZES["max_steps"]


def test_an_unusual_rank_is_allowed_with_a_note() -> None:
    assert "LORA_RANK=64" in notes(read_settings({"USE_LORA": "1", "LORA_RANK": "64"}))[0]
    assert notes(read_settings({"USE_LORA": "1", "LORA_RANK": "32"})) == []


def test_each_method_has_its_own_rate_and_steps() -> None:
    full = read_settings({"BASE_CHECKPOINT": "auto", "MAX_STEPS": "7", "BASE_STEPS": "9"})
    lora = read_settings({"USE_LORA": "True"})
    base = read_settings({"BASE_STEPS": "9"})
    assert full.steps == 7
    assert base.steps == 9
    assert full.rate < lora.rate
    assert read_settings({"LEARNING_RATE": "0.5"}).rate == 0.5


def test_the_automatic_base_has_another_name_when_its_settings_differ() -> None:
    names = {
        read_settings(changed).auto_base_name
        for changed in ({}, {"N_EMBD": "64"}, {"SEED": "1"}, {"BASE_STEPS": "2"})
    }
    assert len(names) == 4
    assert ClassicSettings(use_lora=True).for_base().adapts is False


def test_a_former_variable_still_sets_what_it_did() -> None:
    assert read_settings({"MICRO_BATCHES": "4"}).gradient_accumulation == 4
    with pytest.raises(ConfigError, match="MICRO_BATCHES together with GRADIENT_ACCUMULATION"):
        read_settings({"MICRO_BATCHES": "4", "GRADIENT_ACCUMULATION": "4"})
