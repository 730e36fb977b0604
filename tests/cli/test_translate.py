"""Names of other tools are taken where they mean the same, else refused with what to write."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from lora import cli
from lora.cli import build_app
from lora.cli.flags.translate import translate_settings, translate_words
from lora.errors import ConfigError

KNOWN = cli._known_settings("finetune")


def bound_by(words: list[str]) -> inspect.BoundArguments:
    """Return a finetune's arguments as the command gets them."""
    words = translate_words("lora finetune", words, KNOWN)
    given = ["finetune", "--data", "x", *words]
    _, bound, _ = build_app().parse_args(given, exit_on_error=False, print_error=False)
    return bound


@pytest.mark.parametrize(
    ("words", "section", "name", "value"),
    [
        ("--lr 1e-4", "train", "learning_rate", 1e-4),
        ("--lr=1e-4", "train", "learning_rate", 1e-4),
        ("--learning_rate 1e-4", "train", "learning_rate", 1e-4),
        ("--lora-r 4", "lora", "rank", 4),
        ("--lora_rank 4", "lora", "rank", 4),
        ("--r 4", "lora", "rank", 4),
        ("--lora-alpha 4", "lora", "alpha", 4.0),
        ("--lora-dropout 0.1", "lora", "dropout", 0.1),
        ("--lora-target-modules q_proj,v_proj", "lora", "targets", ("q_proj", "v_proj")),
        ("--lora_target_modules q_proj v_proj", "lora", "targets", ("q_proj", "v_proj")),
        ("--lora-target all", "lora", "targets", "all-linear"),
        ("--lora-target-linear true", "lora", "targets", "all-linear"),
        ("--use-rslora", "lora", "rslora", True),
        ("--gradient-accumulation-steps 4", "train", "gradient_accumulation", 4),
        ("--micro-batches 4", "train", "gradient_accumulation", 4),
        ("--max-steps 9", "train", "steps", 9),
        ("--warmup-ratio 0.1", "train", "warmup_fraction", 0.1),
        ("--lr-scheduler-type linear", "train", "schedule", "linear"),
        ("--bf16", "train", "precision", "bf16"),
        ("--cutoff-len 64", "data_config", "max_length", 64),
        ("--sample-packing false", "data_config", "packing", False),
        ("--no-sample-packing", "data_config", "packing", False),
        ("--train-on-inputs", "data_config", "learn_on", "all"),
        ("--train-on-inputs False", "data_config", "learn_on", "assistant"),
        ("--no-train-on-inputs", "data_config", "learn_on", "assistant"),
        ("--assistant-only-loss=True", "data_config", "learn_on", "assistant"),
        ("--gradient-checkpointing", "memory", "memory", "full"),
        ("--save-total-limit 1", "run", "keep_checkpoints", 1),
        ("--eval-steps 5", "run", "eval_every_steps", 5),
    ],
)
def test_an_alias_is_taken(words: str, section: str, name: str, value: Any) -> None:
    assert vars(bound_by(words.split()).arguments[section])[name] == value


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--load-in-4bit", "--base-dtype=nf4"),
        ("--load_in_4bit True --load_in_8bit False", "--base-dtype=nf4"),
        ("--load-in-8bit false --load-in-4bit", "--base-dtype=nf4"),
        ("--load-in-4bit orders.jsonl", "--base-dtype=nf4 orders.jsonl"),
        ("--load-in-4bit --bnb_4bit_quant_type nf4", "--base-dtype=nf4"),
        ("--load-in-4bit=false --bnb-4bit-quant-type nf4", ""),
        ("--load-in-8bit --bnb-4bit-quant-type nf4", "--base-dtype=int8"),
        (
            "--bnb-4bit-quant-type nf4 --load-in-8bit=false --load-in-4bit=true",
            "--base-dtype=nf4",
        ),
        ("--load-in-16bit=false", "--base-dtype=auto"),
        ("--no-load-in-4bit", "--base-dtype=auto"),
        ("--load-in-4bit=false --load-in-8bit=false", "--base-dtype=auto"),
        ("--base-dtype fp8 --load-in-4bit false", "--base-dtype fp8"),
        ("--quantization_bit 8", "--base-dtype int8"),
        ("--use-bnb-nested-quant", "--nf4-double-quant=true"),
        ("--bnb-4bit-use-double-quant=False", "--nf4-double-quant=false"),
        ("--bf16 --bnb-4bit-compute-dtype bfloat16", "--precision=bf16"),
    ],
)
def test_names_of_quantisation_are_one_setting(words: str, expected: str) -> None:
    known = (*KNOWN, "nf4_double_quant")
    assert translate_words("x", words.split(), known) == expected.split()
    file = {}
    for word in words.split():
        name, _, value = word.partition("=")
        if word.startswith("--") and not name.startswith("--no-"):
            file[name.removeprefix("--")] = value or "true"
        elif file:
            file[list(file)[-1]] = word
    if "orders" not in words and file:
        found = translate_settings("f.yaml", file, known)
        wanted = [expected.replace(" ", "=")] if expected else []
        assert [f"--{k}={v}" for k, v in found.items()] == wanted


def test_two_ways_to_quantise_are_refused() -> None:
    with pytest.raises(ConfigError, match="--load-in-4bit is --base-dtype, as --load-in-8bit"):
        translate_words("x", ["--load-in-8bit", "--load-in-4bit"], KNOWN)
    with pytest.raises(ConfigError, match="load_in_4bit is load_in_8bit: both are given"):
        translate_settings("f", {"load-in-8bit": "true", "load-in-4bit": "true"}, KNOWN)
    with pytest.raises(ConfigError, match="bnb_4bit_quant_type: fp4: there is no fp4"):
        translate_settings("f", {"bnb-4bit-quant-type": "fp4"}, KNOWN)


def test_what_8_bits_are_here_is_told() -> None:
    notes: list[str] = []
    translate_words("x", ["--load-in-8bit", "--load-in-4bit=false"], KNOWN, notes.append)
    assert "outlier columns" in " ".join(notes)
    assert len(notes) == 1


@pytest.mark.parametrize(
    "scales", ["--no-nf4-double-quant", "--bnb-4bit-use-double-quant=false", "--nf4-double-quant"]
)
def test_the_default_of_double_quantisation_is_told_unless_it_is_given(scales: str) -> None:
    notes: list[str] = []
    translate_words("x", ["--load-in-4bit", scales], KNOWN, notes.append)
    settings = {"load_in_4bit": "true", "bnb_4bit_use_double_quant": "false"}
    translate_settings("a.yaml", settings, KNOWN, notes.append)
    assert notes == []
    translate_words("x", ["--load-in-4bit"], KNOWN, notes.append)
    answering = set(KNOWN) - {"nf4_double_quant"}
    translate_words("x", ["--load-in-4bit"], answering, notes.append)
    assert len(notes) == 1  # nothing of a flag that a command does not have
    advice = notes[0].partition("default: ")[2].split()[0]  # what it says to write is a flag
    assert bound_by(["--load-in-4bit", advice]).arguments["base"].nf4_double_quant is False


def test_a_list_of_words_ends_at_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "orders").mkdir()
    words = ["--target-modules", "q_proj", "v_proj", "orders", "--layers-to-transform", "0", "1"]
    expected = ["--targets", "q_proj,v_proj", "orders", "--layers", "0,1"]
    assert translate_words("x", words, KNOWN) == expected
    assert translate_words("x", ["--r", "4", "orders.jsonl"], KNOWN) == [
        "--rank",
        "4",
        "orders.jsonl",
    ]


def test_an_adapter_to_answer_with_is_one_to_train_on_elsewhere() -> None:
    known = cli._known_settings("generate")
    for name in ("--adapter-path", "--adapter_name_or_path"):
        assert translate_words("x", [name, "a"], known) == ["--adapter", "a"]
    words = translate_words("x", ["--adapter-name-or-path", "a"], KNOWN)
    assert words == ["--from-adapter", "a"]


def test_the_word_after_a_switch_stays_where_it_is_no_value_of_it() -> None:
    assert translate_words("x", ["--train-on-inputs", "out"], KNOWN) == ["--learn-on=all", "out"]


def test_what_means_something_else_is_refused_together_with_what_to_write(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = "--per-device-train-batch-size 4 --gradient-accumulation-steps 8 --output-dir out/my"
    more = "--quantization_bit 3 --report-to wandb --no-fp16 --optim adamw --use-dora"
    assert cli.main(["finetune", "--data", "x", *words.split(), *more.split()]) == 2
    seen = capsys.readouterr().err
    assert "note: --gradient-accumulation-steps is --gradient-accumulation" in seen
    assert "Cannot use lora finetune" in seen
    assert "--per-device-train-batch-size 4: --batch-size is the effective batch size" in seen
    assert "Write --batch-size 32 --gradient-accumulation 8" in seen
    assert "--output-dir out/my: " in seen
    assert "Write --out out --name my" in seen
    assert "--quantization_bit 3: --base-dtype has 4 bits (nf4) and 8 (int8, fp8)" in seen
    assert "--report-to wandb: TensorBoard is the only tracker" in seen
    assert "--optim adamw: the optimizer is AdamW" in seen
    assert "--use-dora: there is no DoRA" in seen


def test_a_command_is_not_told_of_what_it_has_nothing_to_do_with(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["generate", "x", "--lora-r", "4"]) == 2
    assert "Unknown option: --lora-r" in capsys.readouterr().err
    assert cli.main(["merge", "a", "b", "--output-dir", "c"]) == 2
    assert "Unknown option: --output-dir" in capsys.readouterr().err


def test_keys_of_a_file_are_translated_as_flags_are() -> None:
    given = {"lora-r": "4", "train-on-inputs": "true", "lora-target": ["q_proj"], "steps": "9"}
    assert translate_settings("f.yaml", given, KNOWN) == {
        "rank": "4",
        "learn-on": "all",
        "targets": ["q_proj"],
        "steps": "9",
    }
    with pytest.raises(
        ConfigError, match=r"Cannot use f\.yaml.*\n.*micro_batch_size: 2: batch_size"
    ):
        translate_settings("f.yaml", {"micro-batch-size": "2"}, KNOWN)
    with pytest.raises(ConfigError, match="lr is learning_rate: both are given"):
        translate_settings("f.yaml", {"learning-rate": "1", "lr": "2"}, KNOWN)


def test_a_file_and_the_environment_may_use_other_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: gone.jsonl\nlora_r: many\n")
    assert cli.main(["finetune", "--config", str(file)]) == 2
    assert 'unable to convert "many" into int' in capsys.readouterr().err
    file.write_text("data: gone.jsonl\nmicro_batches: 3\n")
    assert cli.main(["finetune", "--config", str(file)]) == 2
    assert "gradient_accumulation=3: must be a divisor" in capsys.readouterr().err
    file.write_text("data: gone.jsonl\nper_device_train_batch_size: 3\n")
    assert cli.main(["finetune", "--config", str(file)]) == 2
    assert "Write batch_size: 3" in capsys.readouterr().err
    monkeypatch.setenv("LORALM_FINETUNE_MICRO_BATCHES", "3")
    assert cli.main(["finetune", "--data", "gone.jsonl"]) == 2
    assert "gradient_accumulation=3: must be a divisor" in capsys.readouterr().err
    monkeypatch.setenv("LORALM_FINETUNE_GRADIENT_ACCUMULATION", "4")
    assert cli.main(["finetune", "--data", "gone.jsonl"]) == 2
    assert "both are given" in capsys.readouterr().err
