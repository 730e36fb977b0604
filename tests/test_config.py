"""Settings check themselves, all faults at once, with the allowed values in the message."""

from __future__ import annotations

import copy
import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora.config import (
    FULL_LEARNING_RATE,
    LORA_LEARNING_RATE,
    MAX_SEED,
    DataConfig,
    LoRAConfig,
    RunConfig,
    SamplingConfig,
    TrainConfig,
)
from lora.errors import ConfigError, UnknownSettingError

KINDS = (LoRAConfig, TrainConfig, DataConfig, RunConfig)


def test_the_defaults_of_lora() -> None:
    config = LoRAConfig()
    assert (config.rank, config.alpha, config.dropout) == (8, 16.0, 0.0)
    assert config.targets == "all-linear"
    assert math.isclose(LORA_LEARNING_RATE, 10 * FULL_LEARNING_RATE)


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_has_its_default_and_cannot_be_changed(kind: type) -> None:
    config = kind()
    assert len(dataclasses.fields(kind)) <= 14
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(kind)[0].name, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_made_of_its_own_fields_is_the_same(kind: type) -> None:
    assert kind(**dataclasses.asdict(kind())) == kind()


REFUSED: list[tuple[type, str, Any, str]] = [
    *((LoRAConfig, "rank", value, "an int ≥ 1") for value in (0, -1, 1.0, "8", True, None)),
    *((LoRAConfig, "alpha", v, "finite number > 0") for v in (0, -1, math.nan, math.inf, "16")),
    *((LoRAConfig, "dropout", v, "≥ 0 and < 1") for v in (-0.1, 1, 1.0, math.nan, "0", True)),
    *((LoRAConfig, "targets", v, "a regex or at least one name") for v in ("", (), [], None, 3)),
    (LoRAConfig, "targets", "q_proj(", "a regex"),
    (LoRAConfig, "targets", ("q_proj", 3), "a regex or at least one name"),
    (LoRAConfig, "exclude", "q_proj", "a tuple of names"),
    (LoRAConfig, "modules_to_save", "embed_tokens", "a tuple of names"),
    (LoRAConfig, "layers", (0, "1"), "a tuple of ints"),
    (LoRAConfig, "layers", (True,), "a tuple of ints"),
    (LoRAConfig, "layers", 3, "a tuple of ints"),
    (LoRAConfig, "rslora", "no", "true or false"),
    *((TrainConfig, "steps", value, "an int ≥ 1") for value in (0, 1.5, "200", True)),
    (TrainConfig, "batch_size", "8", "an int ≥ 1"),
    (TrainConfig, "gradient_accumulation", 0, "an int ≥ 1"),
    (TrainConfig, "gradient_accumulation", 3, "a divisor of batch_size=8"),
    *((TrainConfig, "learning_rate", v, "> 0") for v in (0, -1e-4, math.nan, "1e-4")),
    *(
        (TrainConfig, "warmup_fraction", value, "from 0 to 1")
        for value in (-0.1, 1.1, math.nan, "0")
    ),
    (TrainConfig, "min_rate_fraction", 2, "from 0 to 1"),
    *((TrainConfig, "weight_decay", value, "≥ 0") for value in (-1, math.nan, math.inf, None)),
    (TrainConfig, "max_grad_norm", -1.0, "≥ 0"),
    *((TrainConfig, "seed", value, "an int from 0") for value in ("1", -1, 1.0, True, 2**63)),
    *((SamplingConfig, "seed", value, "an int from 0") for value in (-1, None, 2**63)),
    *((LoRAConfig, "init_seed", value, "an int from 0") for value in (-1, "1", 2**63)),
    (TrainConfig, "schedule", "cosin", "cosine, linear, constant. Did you mean 'cosine'?"),
    (TrainConfig, "precision", "fp16", "auto, fp32, bf16. Did you mean"),
    *((DataConfig, "max_length", value, "an int ≥ 2") for value in (1, 2.0, "512")),
    (DataConfig, "packing", "false", "true or false"),
    (DataConfig, "learn_on", "user", "assistant, all"),
    (DataConfig, "long_examples", "cut", "truncate, split, drop"),
    *((DataConfig, "eval_fraction", v, "≥ 0 and < 1") for v in (-0.1, 1, math.nan, "0.1")),
    (DataConfig, "max_eval_examples", 0, "an int ≥ 1"),
    (DataConfig, "special_tokens", ("<a>", ""), "non-empty strings"),
    (DataConfig, "special_tokens", ("<a>", "<b>", "<a>"), "distinct, and has ['<a>'] twice"),
    *((DataConfig, "special_tokens", value, "a list of strings") for value in (3, None, (1,))),
    *((RunConfig, n, -1, "an int ≥ 0") for n in ("eval_every_steps", "save_every_steps")),
    (RunConfig, "patience", 1.5, "an int ≥ 0"),
    (RunConfig, "keep_checkpoints", 0, "an int ≥ 1"),
    (RunConfig, "tensorboard", "yes", "true or false"),
    *((RunConfig, "samples", value, "an int ≥ 0") for value in (-1, 1.5, True)),
    (RunConfig, "sample_tokens", 0, "an int ≥ 1"),
]


@pytest.mark.parametrize(("kind", "name", "value", "allowed"), REFUSED)
def test_a_setting_out_of_range_is_refused(kind: type, name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**{name: value})
    message = str(caught.value)
    seen = tuple(value) if isinstance(value, list) else value
    assert message.startswith(f"Cannot use {kind.__name__}:")
    assert f"{name}={seen!r}: must be" in message
    assert allowed in message


def test_all_faults_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        LoRAConfig(rank=0, alpha=-1, rank_pattern={"q_proj": 0}, alpha_pattern={"v_proj": math.nan})
    for words in ("rank=0", "alpha=-1", "rank_pattern['q_proj']=0", "alpha_pattern['v_proj']=nan"):
        assert words in str(caught.value)


def test_lists_become_tuples() -> None:
    config = LoRAConfig(targets=["q_proj"], layers=[0, 1])  # type: ignore[arg-type]
    assert config.targets == ("q_proj",)
    assert config.layers == (0, 1)
    for written in ("<a>, <b>", "<a>,<b>", ["<a>", "<b>"], ("<a>,<b>",)):  # flag, YAML, Python
        data = DataConfig(special_tokens=written)  # type: ignore[arg-type]
        assert data.special_tokens == ("<a>", "<b>")


def test_a_learning_rate_that_is_not_given_is_the_methods() -> None:
    assert TrainConfig().resolved(full=False).peak_learning_rate == 1e-3
    assert TrainConfig().resolved(full=True).peak_learning_rate == 1e-4
    for full in (False, True):
        given = TrainConfig(learning_rate=0.5)
        assert given.resolved(full=full) == given
    with pytest.raises(ConfigError, match=r"learning_rate is None.*resolved\(full=\.\.\.\)"):
        _ = TrainConfig().peak_learning_rate


def test_a_former_name_is_taken_and_read() -> None:
    config = TrainConfig(batch_size=12, micro_batches=3)
    assert (config.gradient_accumulation, config.micro_batches) == (3, 3)
    assert "micro_batches" not in dataclasses.asdict(config)
    assert dataclasses.replace(config, steps=3).gradient_accumulation == 3
    with pytest.raises(ConfigError, match="former name of gradient_accumulation"):
        TrainConfig(micro_batches=2, gradient_accumulation=2)


def test_gradient_accumulation_splits_the_batch() -> None:
    assert TrainConfig(batch_size=12, gradient_accumulation=3).micro_batch_size == 4


@pytest.mark.parametrize(
    ("run", "steps", "intervals"),
    [
        (RunConfig(), 25, (10, 10)),  # at least ten steps apart
        (RunConfig(), 101, (11, 11)),  # at most ten evaluations
        (RunConfig(eval_every_steps=4), 101, (4, 4)),
        (RunConfig(save_every_steps=7), 101, (11, 7)),
        (RunConfig(eval_every_steps=4, save_every_steps=7), 9, (4, 7)),
    ],
)
def test_intervals_follow_from_the_steps_unless_they_are_given(
    run: RunConfig, steps: int, intervals: tuple[int, int]
) -> None:
    assert (run.eval_interval(steps), run.save_interval(steps)) == intervals


def test_the_largest_seed_is_one_that_generators_take() -> None:
    config = TrainConfig(seed=MAX_SEED)
    assert LoRAConfig(init_seed=config.seed).init_seed == 2**63 - 1
    torch.Generator().manual_seed(config.seed)
    np.random.default_rng([config.seed, 3])


def test_settings_load_no_torch() -> None:
    code = "import sys, lora.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        (LoRAConfig, "r", "there is no setting 'r': here it is 'rank'"),
        (LoRAConfig, "lora_alpha", "here it is 'alpha'"),
        (LoRAConfig, "lora_dropout", "here it is 'dropout'"),
        (LoRAConfig, "target_modules", "here it is 'targets'"),
        (LoRAConfig, "use_rslora", "here it is 'rslora'"),
        (LoRAConfig, "lr", "it is 'learning_rate', a setting of TrainConfig"),
        (LoRAConfig, "steps", "it is a setting of TrainConfig"),
        (LoRAConfig, "rnak", "Did you mean 'rank'"),
        (TrainConfig, "max_steps", "here it is 'steps'"),
        (DataConfig, "cutoff_len", "here it is 'max_length'"),
        (DataConfig, "train_on_inputs", "here it is 'learn_on'"),
        (RunConfig, "output_dir", "out is the directory for all runs and name that of this one"),
        (TrainConfig, "per_device_train_batch_size", "Write batch_size=4."),
        (LoRAConfig, "use_dora", "there is no DoRA here"),
    ],
)
def test_a_peers_name_of_a_setting_is_answered_with_ours(kind: type, name: str, words: str) -> None:
    with pytest.raises(UnknownSettingError) as caught:
        kind(**{name: 4})
    assert isinstance(caught.value, ConfigError)
    assert isinstance(caught.value, TypeError)
    assert words in str(caught.value)
    assert "Allowed: " in str(caught.value)


def test_settings_can_be_copied() -> None:
    config = LoRAConfig(rank=4)
    assert copy.deepcopy(config) == copy.copy(config) == config
    assert dataclasses.replace(config, rank=5).rank == 5


def test_a_path_may_be_a_string() -> None:
    assert RunConfig(out="here").out == Path("here")  # type: ignore[arg-type]
    assert DataConfig(chat_template="a.jinja").chat_template == Path("a.jinja")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="out=3: must be a path"):
        RunConfig(out=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "n_sequences", "expected"),
    [
        ({"steps": 7}, 1000, 7),
        ({"epochs": 3}, 16, 6),
        ({"epochs": 3}, 17, 7),  # 51 sequences are six steps of 8, and one more
        ({"epochs": 0.1}, 80, 1),
        ({"epochs": 0.3, "batch_size": 1}, 10, 3),  # 0.3 * 10 is 3.0000000000000004 in floats
        ({"epochs": 1}, 1, 1),
        ({"epochs": 10}, 40_000, 50_000),
        ({}, 10, 100),  # three epochs would be four steps
        ({}, 400, 150),
        ({}, 100_000, 2_000),
        ({"batch_size": 4}, 400, 300),
    ],
)
def test_the_length_is_in_steps_in_epochs_or_three_epochs_within_bounds(
    settings: dict[str, Any], n_sequences: int, expected: int
) -> None:
    config = TrainConfig(**settings)
    found = config.with_steps(n_sequences)
    assert (found.n_steps, found.epochs) == (expected, None)
    assert found.with_steps(1) == found
    assert config.with_steps(n_sequences, recorded=42).n_steps == (expected if settings.keys() & {
        "steps", "epochs"} else 42)  # fmt: skip


def test_a_length_that_is_given_twice_or_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="epochs=3 together with steps=500: must be only one"):
        TrainConfig(steps=500, epochs=3)
    for epochs in (0, -1, math.nan, math.inf, "3", True, 1e9):
        with pytest.raises(ConfigError, match="epochs="):
            TrainConfig(epochs=epochs)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"steps is None.*with_steps\(n_sequences\)"):
        _ = TrainConfig().n_steps
