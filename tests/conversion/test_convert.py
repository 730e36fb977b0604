"""Files of other tools as our settings: what each key becomes, and that none is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora.cli.flags.yaml_file import read_settings
from lora.cli.settings.convert_config import finetune_settings
from lora.conversion.axolotl import AXOLOTL
from lora.conversion.convert import (
    BASE_SETTINGS,
    Conversion,
    Tool,
    convert_settings,
    flatten,
)
from lora.conversion.converted_file import report_lines, yaml_text
from lora.conversion.llama_factory import LLAMA_FACTORY
from lora.conversion.torchtune import TORCHTUNE, without_interpolation
from lora.errors import ConfigError

AXOLOTL_FILE = """\
base_model: some/llama-1b
load_in_8bit: false
load_in_4bit: true
strict: false
datasets:
  - path: data/tickets.jsonl
    type: chat_template
    field_messages: dialogue
    roles_to_train: [assistant]
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./outputs/tickets
adapter: qlora
lora_model_dir:
sequence_len: 2048
sample_packing: true
pad_to_sequence_len: true
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_linear: true
wandb_project: tickets
wandb_entity:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 3
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-4
train_on_inputs: false
bf16: auto
tf32: false
gradient_checkpointing: true
logging_steps: 1
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
weight_decay: 0.01
special_tokens:
  pad_token: <|end_of_text|>
  eos_token: <|eot_id|>
a_new_key: 3
"""
LLAMA_FACTORY_FILE = """\
### model
model_name_or_path: some/qwen-4b
trust_remote_code: true
### method
stage: sft
do_train: true
finetuning_type: lora
lora_target: q_proj,v_proj
### dataset
dataset: tickets
template: qwen3_nothink
max_samples: 1000
preprocessing_num_workers: 16
### output
output_dir: saves/qwen/sft
save_steps: 500
report_to: wandb
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
max_steps: 300
warmup_steps: 30
learning_rate: 1.0e-4
bf16: true
resume_from_checkpoint: null
"""
TORCHTUNE_FILE = """\
output_dir: out/run1
model:
  _component_: torchtune.models.llama3_1.lora_llama3_1_8b
  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']
  apply_lora_to_mlp: True
  apply_lora_to_output: False
  lora_rank: 8
  lora_alpha: 16
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: models/llama/tokenizer.model
  max_seq_len: 2048
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: models/llama
  output_dir: ${output_dir}
  model_type: LLAMA3
dataset:
  _component_: torchtune.datasets.chat_dataset
  source: json
  data_files: ${output_dir}/chats.json
  packed: True
  new_system_prompt: Be brief.
seed: null
shuffle: True
batch_size: 2
optimizer:
  _component_: torch.optim.AdamW
  fused: True
  lr: 3e-4
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 100
loss:
  _component_: torchtune.modules.loss.LinearCrossEntropyLoss
epochs: 1
gradient_accumulation_steps: 8
metric_logger:
  _component_: torchtune.training.metric_logging.DiskLogger
  log_dir: ${output_dir}/logs
device: cuda
dtype: bf16
enable_activation_checkpointing: True
profiler:
  enabled: False
  cpu: True
"""
FILES = {"axolotl": AXOLOTL_FILE, "LLaMA-Factory": LLAMA_FACTORY_FILE, "torchtune": TORCHTUNE_FILE}


@pytest.fixture(scope="module")
def known() -> tuple[str, ...]:
    """The settings of lora finetune."""
    return finetune_settings()


def convert(text: str, folder: Path, known: tuple[str, ...]) -> tuple[Conversion, dict[str, Any]]:
    """Return the conversion of a file with this text, and the file's keys."""
    path = folder / "other.yaml"
    path.write_text(text)
    keys = {name.replace("-", "_"): value for name, value in read_settings(path).items()}
    keys = without_interpolation(keys)
    return convert_settings(keys, (AXOLOTL, LLAMA_FACTORY, TORCHTUNE), known), keys


def test_the_marks_of_a_tool_are_no_keys_of_another() -> None:
    for tool in (AXOLOTL, LLAMA_FACTORY, TORCHTUNE):
        assert min(map(len, tool.marks)) > 3
    assert not AXOLOTL.marks & LLAMA_FACTORY.marks
    assert not AXOLOTL.marks & TORCHTUNE.marks
    assert not LLAMA_FACTORY.marks & TORCHTUNE.marks


@pytest.mark.parametrize("tool", FILES)
def test_no_key_is_lost(tool: str, tmp_path: Path, known: tuple[str, ...]) -> None:
    found, keys = convert(FILES[tool], tmp_path, known)
    assert found.tool.name == tool
    told = {key for each in found.origins.values() for key in each}
    told |= found.nothing.keys() | set(found.empty)
    lost = [
        key
        for key in (flatten(keys) if found.tool.is_nested else keys)
        if key not in told and not any(part.startswith(key) for part in found.missing)
    ]
    assert not lost
    text = "\n".join(report_lines(found))
    assert not [key for key in keys if key not in text]


def test_axolotl_s_settings_are_ours(tmp_path: Path, known: tuple[str, ...]) -> None:
    found, _ = convert(AXOLOTL_FILE, tmp_path, (*known, "epochs"))
    assert found.settings == {
        "data": "data/tickets.jsonl",
        "columns": {"messages": "dialogue"},
        "model": "some/llama-1b",
        "base_dtype": "nf4",
        "rank": "16",
        "alpha": "32",
        "dropout": "0.05",
        "targets": "all-linear",
        "epochs": "3",
        "batch_size": "8",
        "gradient_accumulation": "4",
        "learning_rate": "2e-4",
        "schedule": "cosine",
        "min_rate_fraction": "0",
        "weight_decay": "0.01",
        "seed": "42",
        "precision": "auto",
        "max_length": "2048",
        "packing": "true",
        "learn_on": "assistant",
        "eval_fraction": "0.1",
        "out": "outputs",
        "name": "tickets",
        "memory": "auto",
    }
    assert found.missing.keys() == {
        *("wandb_project", "warmup_steps", "evals_per_epoch"),
        *("special_tokens.eos_token", "a_new_key"),
    }
    assert "write 10 / the number of steps" in found.missing["warmup_steps"]
    assert found.origins["base_dtype"] == ["load_in_4bit", "adapter"]
    assert found.origins["seed"] == ["seed, axolotl's default 42"]


def test_llama_factory_s_settings_are_ours(tmp_path: Path, known: tuple[str, ...]) -> None:
    found, _ = convert(LLAMA_FACTORY_FILE, tmp_path, known)
    settings = found.settings
    expected = {
        "model": "some/qwen-4b",
        "rank": "8",
        "alpha": "16",
        "targets": ["q_proj", "v_proj"],
        "steps": "300",
        "batch_size": "8",
        "gradient_accumulation": "8",
        "warmup_fraction": "0.1",
        "schedule": "linear",
        "precision": "bf16",
        "packing": "false",
        "max_length": "2048",
        "save_every_steps": "500",
        "out": "saves/qwen",
        "name": "sft",
    }
    assert {name: settings[name] for name in expected} == expected
    assert not {"epochs", "data"} & settings.keys()
    assert "tickets in data/dataset_info.json" in found.missing["dataset"]
    assert {"trust_remote_code", "template", "max_samples"} <= found.missing.keys()
    assert "add data: FILE" in "\n".join(report_lines(found))


def test_data_sets_are_found_by_their_descriptions(
    tmp_path: Path, known: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    info = {"tickets": {"file_name": "tickets.json"}, "hub": {"hf_hub_url": "some/tickets"}}
    Path("data").mkdir()
    Path("data", "dataset_info.json").write_text(json.dumps(info))
    text = "model_name_or_path: a\nstage: sft\ndataset: "
    for name, path in (("tickets", "data/tickets.json"), ("hub", "some/tickets")):
        found, _ = convert(f"{text}{name}\n", tmp_path, known)
        assert found.settings["data"] == path
    for names in ("other", "tickets,hub"):
        found, _ = convert(f"{text}{names}\n", tmp_path, known)
        assert "data" not in found.settings
        assert "dataset" in found.missing


def test_what_a_description_says_of_a_data_set_of_the_hub_is_kept(
    tmp_path: Path, known: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    entry = {
        **{"hf_hub_url": "some/tickets", "subset": "small", "split": "dev", "num_samples": 9},
        "columns": {"prompt": "ask", "response": "output", "spam": "eggs"},
    }
    Path("data").mkdir()
    Path("data", "dataset_info.json").write_text(json.dumps({"hub": entry}))
    found, _ = convert("model_name_or_path: a\nstage: sft\ndataset: hub\n", tmp_path, known)
    assert found.settings["data"] == "some/tickets:small:dev"
    assert found.settings["columns"] == {"instruction": "ask"}
    assert {key for key in found.missing if key.startswith("dataset")} == {
        "dataset: num_samples in dataset_info.json",
        "dataset: columns.spam in dataset_info.json",
    }


@pytest.mark.parametrize(
    ("entry", "data", "columns"),
    [
        ("{path: some/set, split: test, type: alpaca}", "some/set:test", None),
        ("{path: some/set, name: small, split: test, type: alpaca}", "some/set:small:test", None),
        (
            "{path: some/set, split: train, field: body, type: completion}",
            "some/set",
            {"text": "body"},
        ),
        (
            "{path: json, data_files: [a.jsonl], type: {field_output: b}}",
            "a.jsonl",
            {"output": "b"},
        ),
        ("a.jsonl", "a.jsonl", None),
        ("{path: some/set, name: small, type: alpaca}", "some/set:small:train", None),
        ("{path: some/set, name: small, split: train}", "some/set:small:train", None),
        ("{path: ./rows, data_files: a.jsonl}", "./rows/a.jsonl", None),
    ],
)
def test_data_sets_of_axolotl_keep_their_columns_and_splits(
    entry: str, data: str, columns: dict[str, str] | None, tmp_path: Path, known: tuple[str, ...]
) -> None:
    text = f"base_model: some/llama\nadapter: lora\ndatasets:\n  - {entry}\n"
    found, _ = convert(text, tmp_path, known)
    assert (found.settings["data"], found.settings.get("columns")) == (data, columns)
    assert not found.missing.keys() - {"num_epochs, axolotl's default 1"}


@pytest.mark.parametrize(
    ("entry", "data", "lost"),
    [
        ("{path: json, data_files: [a.jsonl, b.jsonl]}", None, "[0].data_files"),
        ("{path: some/set, data_files: a.jsonl}", None, "[0].data_files"),
        ("{path: a.jsonl, split: dev}", "a.jsonl", "[0].split"),
        ("{path: a.jsonl, name: small}", "a.jsonl", "[0].name"),
        ("{path: some/set, split: 'train[:9]'}", "some/set", "[0].split"),
    ],
)
def test_what_of_a_data_set_of_axolotl_is_not_read_is_told(
    entry: str, data: str | None, lost: str, tmp_path: Path, known: tuple[str, ...]
) -> None:
    text = f"base_model: some/llama\nadapter: lora\ndatasets: [{entry}]\n"
    found, _ = convert(text, tmp_path, known)
    assert found.settings.get("data") == data
    assert f"datasets{lost}" in found.missing


def test_validation_data_of_axolotl_are_those_that_it_names(
    tmp_path: Path, known: tuple[str, ...]
) -> None:
    train = "base_model: some/llama\nadapter: lora\ndatasets: [{path: a.jsonl, field: body}]\n"
    text = f"{train}test_datasets: [{{path: some/set, split: train}}]\n"
    found, _ = convert(text, tmp_path, known)
    assert found.settings["eval_data"] == "some/set:train"  # not its validation split
    assert "rename those of one" in found.missing["test_datasets[0].field"]
    found, _ = convert(f"{train}test_datasets: [{{path: b.jsonl, field: body}}]\n", tmp_path, known)
    assert not [key for key in found.missing if key.startswith("test_datasets")]


def test_torchtune_s_settings_are_ours(tmp_path: Path, known: tuple[str, ...]) -> None:
    found, _ = convert(TORCHTUNE_FILE, tmp_path, known)
    expected = {
        "data": "out/run1/chats.json",
        "model": "models/llama",
        "targets": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "batch_size": "16",
        "gradient_accumulation": "8",
        "learning_rate": "3e-4",
        "weight_decay": "0.01",
        "max_grad_norm": "0",
        "max_length": "2048",
        "packing": "True",
        "out": "out",
        "name": "run1",
    }
    assert {name: found.settings[name] for name in expected} == expected
    assert "column system" in found.missing["dataset.new_system_prompt"]
    assert found.nothing["profiler.cpu"] == "off"


def test_full_fine_tuning_has_no_adapter_s_settings(tmp_path: Path, known: tuple[str, ...]) -> None:
    text = "base_model: some/llama\nlora_r: 8\nsequence_len: 64\ndatasets: [{path: a.jsonl}]\n"
    found, _ = convert(text, tmp_path, known)
    assert found.settings["full"] == "true"
    assert not {"rank", "dropout"} & found.settings.keys()
    assert "all weights train" in found.nothing["lora_r"]
    continued = "base_model: some/llama\nadapter: lora\nlora_r: 8\nlora_model_dir: old/adapter\n"
    found, _ = convert(continued, tmp_path, known)
    assert found.settings["from_adapter"] == "old/adapter"
    assert "has its own" in found.nothing["lora_r"]


AXOLOTL_BASE = "base_model: some/llama\nadapter: "
LLAMA_FACTORY_BASE = "model_name_or_path: some/llama\nstage: sft\nfinetuning_type: lora\n"
TORCHTUNE_BASE = "checkpointer: {checkpoint_dir: a}\nmodel: {_component_: torchtune.models."
NF4, INT8 = {"base_dtype": "nf4"}, {"base_dtype": "int8"}
SINGLE = {"base_dtype": "nf4", "nf4_double_quant": "false"}


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        # axolotl's and LLaMA-Factory's default is double quantisation, as here.
        (f"{AXOLOTL_BASE}qlora\nload_in_4bit: true", NF4),
        (f"{AXOLOTL_BASE}qlora\nload_in_4bit: true\nload_in_8bit: false", NF4),
        (
            f"{AXOLOTL_BASE}qlora\nload_in_4bit: true\n"
            "bnb_config_kwargs: {bnb_4bit_use_double_quant: false}",
            SINGLE,
        ),
        (
            f"{AXOLOTL_BASE}qlora\nload_in_4bit: true\n"
            "bnb_config_kwargs: {bnb_4bit_use_double_quant: true, bnb_4bit_quant_type: nf4}",
            NF4,
        ),
        (f"{AXOLOTL_BASE}lora\nload_in_8bit: true", INT8),
        (f"{AXOLOTL_BASE}lora\nload_in_8bit: false\nload_in_4bit: false", {}),
        (
            f"{AXOLOTL_BASE}lora\nbnb_config_kwargs: {{bnb_4bit_use_double_quant: false}}",
            {},
        ),
        (
            f"{AXOLOTL_BASE}qlora\npeft: {{backend: torchao, weight_dtype: nf4, group_size: 128}}",
            {**NF4, "nf4_block": "128"},
        ),
        (f"{AXOLOTL_BASE}lora\npeft: {{backend: bnb, weight_dtype: int8}}", INT8),
        ("base_model: u/llama-bnb-4bit\nadapter: qlora\nload_in_4bit: true", {}),
        ("base_model: some/llama\nsequence_len: 64\nload_in_4bit: true", {}),  # all weights
        (f"{LLAMA_FACTORY_BASE}quantization_bit: 4", NF4),
        (f"{LLAMA_FACTORY_BASE}quantization_bit: 4\nquantization_method: bnb", NF4),
        (f"{LLAMA_FACTORY_BASE}quantization_bit: 4\ndouble_quantization: false", SINGLE),
        (f"{LLAMA_FACTORY_BASE}quantization_bit: 8\ndouble_quantization: false", INT8),
        (f"{LLAMA_FACTORY_BASE}double_quantization: false\nquantization_type: fp4", {}),
        (
            f"{LLAMA_FACTORY_BASE}quantization_bit: 4\nadapter_name_or_path: old/adapter",
            NF4,
        ),
        (f"{TORCHTUNE_BASE}llama3.qlora_llama3_8b}}", NF4),
        (f"{TORCHTUNE_BASE}llama3.lora_llama3_8b, quantize_base: True}}", NF4),
        (f"{TORCHTUNE_BASE}llama3.lora_llama3_8b, quantize_base: False}}", {}),
    ],
)
def test_the_base_is_quantised_as_the_other_tool_would_have_done(
    text: str, settings: dict[str, str], tmp_path: Path, known: tuple[str, ...]
) -> None:
    found, _ = convert(f"{text}\n", tmp_path, known)
    assert {name: found.settings[name] for name in BASE_SETTINGS if name in found.settings} == (
        settings
    )
    assert not [key for key in found.missing if "s default" not in key]


@pytest.mark.parametrize(
    ("text", "settings", "seen"),
    [
        (
            f"{AXOLOTL_BASE}qlora\nload_in_4bit: true\nbnb_config_kwargs: "
            "{bnb_4bit_quant_type: fp4}",
            NF4,
            "there is no fp4: base_dtype nf4",
        ),
        (f"{AXOLOTL_BASE}qlora\nload_in_8bit: true", NF4, "quantised once"),
        (f"{AXOLOTL_BASE}lora\ngptq: true", {}, "base_dtype nf4 quantises the unquantised model"),
        (f"{AXOLOTL_BASE}lora\npeft: {{weight_dtype: int4}}", {}, "there is no int4"),
        (
            f"{AXOLOTL_BASE}qlora\npeft: {{weight_dtype: nf4, group_size: 100}}",
            NF4,
            "nf4_block is one of 32, 64,",
        ),
        (
            f"{AXOLOTL_BASE}lora\npeft: {{weight_dtype: int8, group_size: 32}}",
            INT8,
            "has no equivalent here",
        ),
        (
            f"{AXOLOTL_BASE}qlora\nload_in_4bit: true\nbnb_config_kwargs: "
            "{llm_int8_skip_modules: [o_proj]}",
            NF4,
            "all linears of the blocks are quantised",
        ),
        (f"{LLAMA_FACTORY_BASE}quantization_bit: 3", {}, "4 bits (nf4) and 8 (int8, fp8)"),
        (
            f"{LLAMA_FACTORY_BASE}quantization_bit: 4\nquantization_type: fp4",
            NF4,
            "there is no fp4",
        ),
        (
            f"{LLAMA_FACTORY_BASE}quantization_bit: 4\nquantization_method: hqq",
            NF4,
            "there is no hqq",
        ),
    ],
)
def test_quantisation_that_is_not_here_is_named(
    text: str, settings: dict[str, str], seen: str, tmp_path: Path, known: tuple[str, ...]
) -> None:
    found, _ = convert(f"{text}\n", tmp_path, known)
    assert seen in " ".join(found.missing.values())
    assert {name: found.settings[name] for name in BASE_SETTINGS if name in found.settings} == (
        settings
    )


def test_what_differs_from_8_bits_of_bitsandbytes_is_told(
    tmp_path: Path, known: tuple[str, ...]
) -> None:
    found, _ = convert(f"{AXOLOTL_BASE}lora\nload_in_8bit: true\n", tmp_path, known)
    assert "outlier columns" in found.notes["load_in_8bit"]


@pytest.mark.parametrize("line", ["deepspeed: zero3.json", "fsdp: [full_shard, auto_wrap]"])
def test_sharding_needs_no_setting(line: str, tmp_path: Path, known: tuple[str, ...]) -> None:
    found, _ = convert(f"base_model: some/llama\nadapter: lora\n{line}\n", tmp_path, known)
    assert "parallel: auto shards the weights" in found.nothing[line.partition(":")[0]]


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ("datasets: [{path: a.jsonl}, {path: b.jsonl}]", "one file or directory"),
        ("datasets: [{path: a, type: {format: '[INST] {instruction}'}}]", "give template: with"),
        ("datasets: [{path: a, type: pygmalion}]", "the format pygmalion"),
        ("datasets: [{path: a, message_field_role: speaker}]", "turns have role and content"),
        ("optimizer: lion_8bit", "the optimizer is AdamW"),
        ("lr_scheduler: one_cycle", "there is no schedule one_cycle"),
        ("val_set_size: 500", "write 500 / the number of examples"),
        ("tensor_parallel_size: 4", "several GPUs divide the batch and the weights"),
        ("plugins: [axolotl.integrations.spectrum.SpectrumPlugin]", "there are no plugins"),
        ("chat_template: llama3", "look with lora data whether it is llama3"),
        ("peft_use_dora: true", "there is no DoRA here"),
    ],
)
def test_what_has_no_equal_says_what_to_do(
    line: str, seen: str, tmp_path: Path, known: tuple[str, ...]
) -> None:
    found, _ = convert(f"base_model: some/llama\nadapter: lora\n{line}\n", tmp_path, known)
    assert seen in " ".join(found.missing.values())
    assert f"#   {next(iter(found.missing))}: " in yaml_text(found, "a.yml")


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("base_model: a\nrl: dpo\n", "preference training"),
        ("stage: rm\nmodel_name_or_path: a\n", "no supervised fine-tuning"),
        ("loss: {_component_: torchtune.rlhf.loss.DPOLoss}\n", "its loss is not that of"),
        ("spam: 1\neggs: 2\n", "those of no known tool. Allowed: a YAML file of axolotl, LLaMA-"),
    ],
)
def test_another_training_and_another_tool_are_refused(
    text: str, seen: str, tmp_path: Path, known: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError, match="Cannot convert these settings") as caught:
        convert(text, tmp_path, known)
    assert seen in str(caught.value)


@pytest.mark.parametrize("tool", [AXOLOTL, LLAMA_FACTORY, TORCHTUNE], ids=lambda tool: tool.name)
def test_values_of_any_kind_are_converted_or_listed(tool: Tool, known: tuple[str, ...]) -> None:
    mark = next(iter(sorted(tool.marks)))
    values = ("x: y", "-1", "1e999", "/", [{"a": "b"}], {"a": "b"}, [["a"]])
    for key in (*tool.rules, *tool.prefixes):
        for value in values:
            keys = {mark: "x", key: value}
            try:
                found = convert_settings(keys, (AXOLOTL, LLAMA_FACTORY, TORCHTUNE), known)
            except ConfigError:
                continue  # another kind of training
            assert yaml.safe_load(yaml_text(found, "x")) is not None
            assert list(report_lines(found))
