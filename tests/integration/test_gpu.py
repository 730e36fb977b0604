"""The same jobs on a GPU: bf16 products by themselves, the plain path's loss within rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora.config import DataConfig, LoRAConfig, RunConfig, SamplingConfig, TrainConfig
from lora.data.reading.orders import make_orders
from lora.data.tokenizers.subword import load_tokenizer
from lora.finetune import FinetuneJob, finetune
from lora.inference.generate import generate
from lora.pretrained.hf_weights import load_decoder
from lora.runs.disk import read_json, read_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def job(tiny_folder: Path, tmp_path: Path) -> FinetuneJob:
    return FinetuneJob(
        data=make_orders("train", 24),
        model=str(tiny_folder),
        lora=LoRAConfig(rank=4),
        train=TrainConfig(steps=20, batch_size=4, learning_rate=2e-2),
        data_config=DataConfig(max_length=128),
        run=RunConfig(out=tmp_path, name="cuda", device="cuda", eval_every_steps=10),
    )


def test_bf16_and_fp32_on_the_gpu_learn_like_the_cpu(job: FinetuneJob) -> None:
    bf16 = finetune(job)
    assert "bf16" in read_json(bf16.folder / "run.json")["device"]
    fp32_train = replace(job.train, precision="fp32")
    fp32 = finetune(replace(job, train=fp32_train, run=replace(job.run, name="fp32")))
    cpu = finetune(replace(job, run=replace(job.run, name="cpu", device="cpu")))
    first = read_rows(cpu.folder / "metrics.jsonl")[0]["eval_loss"]
    gained = first - cpu.result.eval_loss
    assert gained > 0.1
    assert abs(fp32.result.eval_loss - cpu.result.eval_loss) < 0.02 * gained
    assert abs(bf16.result.eval_loss - cpu.result.eval_loss) < 0.2 * gained


def test_a_run_on_the_gpu_can_be_resumed(job: FinetuneJob) -> None:
    whole = finetune(job)
    again = finetune(replace(job, resume=True))
    assert again.result.steps == whole.result.steps
    assert again.result.n_tokens == whole.result.n_tokens


def test_generation_on_the_gpu_is_the_cpus(tiny_folder: Path) -> None:
    tokenizer = load_tokenizer(tiny_folder)
    prompts = [tokenizer.encode(text) for text in ("Please send", "New order for Zoe in Oslo")]
    sampling = SamplingConfig(max_new_tokens=8)
    cpu = generate(load_decoder(tiny_folder), prompts, sampling)
    gpu = generate(load_decoder(tiny_folder, device="cuda"), prompts, sampling)
    assert cpu == gpu
