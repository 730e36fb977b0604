"""Files of other tools that quantise the base: converted, they train over the same base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora.cli import main

AXOLOTL = """\
base_model: {model}
datasets: [{{path: {data}, type: chat_template}}]
adapter: qlora
load_in_4bit: true
bnb_config_kwargs: {{bnb_4bit_use_double_quant: false}}
lora_r: 2
lora_target_linear: true
sequence_len: 128
micro_batch_size: 2
max_steps: 1
output_dir: {out}/converted
"""
LLAMA_FACTORY = """\
model_name_or_path: {model}
stage: sft
finetuning_type: lora
quantization_bit: 4
quantization_method: bnb
double_quantization: true
lora_rank: 2
dataset_dir: {out}
dataset: orders
cutoff_len: 128
per_device_train_batch_size: 2
max_steps: 1
output_dir: {out}/converted
"""


@pytest.mark.parametrize(
    ("text", "is_double"),
    [(AXOLOTL, False), (LLAMA_FACTORY, True)],
    ids=["axolotl", "LLaMA-Factory"],
)
def test_a_converted_file_trains_over_nf4(
    text: str,
    is_double: bool,
    tiny_folder: Path,
    orders_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other, file = tmp_path / "other.yml", tmp_path / "run.yaml"
    other.write_text(text.format(model=tiny_folder, data=orders_file, out=tmp_path))
    info = {"orders": {"file_name": str(orders_file), "formatting": "openai"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    assert main(["convert-config", str(other), "--out", str(file)]) == 0
    assert main(["finetune", str(file), "--no-report", "--samples", "0"]) == 0, capsys.readouterr()
    record = json.loads((tmp_path / "converted" / "run.json").read_text(encoding="utf-8"))
    assert record["base_dtype"] == "nf4"
    assert record["nf4"]["nf4_double_quant"] is is_double
    assert (tmp_path / "converted" / "adapter" / "adapter_model.safetensors").is_file()
