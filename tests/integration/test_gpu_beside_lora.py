"""Embedding rows and whole modules beside LoRA on a GPU: the plain step's figures, a whole run."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora.adapters.apply import train_token_rows
from lora.config import DataConfig, LoRAConfig, RunConfig, SamplingConfig, TrainConfig
from lora.data.reading.orders import make_orders
from lora.decoder.decoder import Decoder
from lora.device import choose_device
from lora.fast.llama.checkpointing import MODES
from lora.fast.runner import CapturedStepRunner, FastStepRunner
from lora.finetune import FinetuneJob, finetune
from lora.inference.generate import generate
from lora.kernels.step.jit import HAS_TRITON
from lora.layers.wide import keep_outputs_narrow
from lora.runs.disk import read_rows
from lora.training.losses import loss_for
from lora.training.optim import build_optimizer
from lora.training.plain_step import train_step
from tests.integration.test_gpu_fast import Lines, adapt, batch, build, check_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and HAS_TRITON), reason="needs a CUDA device and Triton"
    ),
]
ROWS = (5, 999, 1000, 1001)
"""Two tokens of the base and two new ones: a vocabulary of odd rows for cuBLAS."""
SAVED = ("embed_tokens", "lm_head", "norm", "input_layernorm")


def with_rows(*, tied: bool) -> Decoder:
    model = adapt(build(tie_word_embeddings=tied))
    train_token_rows(model, ROWS)
    return model  # type: ignore[no-any-return]


def with_tokens(*, packed: bool) -> Any:
    """Return a batch that has the tokens of ROWS in it."""
    made = batch(packed=packed)
    for place, token in enumerate(ROWS):
        made.input_ids[:, place::11] = token
        made.labels[:, 6 + place :: 11] = token
    made.labels[made.document_ids < 0] = -100
    return made


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["merged", "split"])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_rows_are_the_plain_ones(tied: bool, kind: str, packed: bool) -> None:
    check_gradients(with_rows(tied=tied), kind, with_tokens(packed=packed))


@pytest.mark.parametrize("mode", ["none", "full"])
def test_gradients_of_whole_modules_are_the_plain_ones(mode: str) -> None:
    model = adapt(build(), modules_to_save=SAVED)
    check_gradients(model, "split", batch(packed=True), checkpointing=MODES[mode])


@pytest.mark.parametrize("kind", ["fast", "captured"])
def test_whole_modules_of_a_bf16_model_learn_as_in_the_plain_step(kind: str) -> None:
    model = adapt(build().bfloat16(), modules_to_save=SAVED).cuda()
    plain = copy.deepcopy(model)
    keep_outputs_narrow(plain)
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad and "lora" not in name:
            parameter.data = parameter.data.float()  # as both steps train them
    choice, config = choose_device("cuda"), TrainConfig(steps=6, whole_rate_fraction=0.5)
    steps = (
        FastStepRunner(model, choice, config)
        if kind == "fast"
        else CapturedStepRunner(model, choice, config, compiles=False)
    )
    optimizer = build_optimizer(plain, 1e-4, 0.0, 0.5)
    for number in range(1, 7):
        micro = [batch(packed=number % 2 > 0), batch(packed=False)]
        steps.launch(number, micro, [1e-4])
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 * group["learning_rate_share"]
        on_gpu = [x.to("cuda") for x in micro]
        expected = train_step(plain, on_gpu, loss_for(plain), optimizer, autocast=choice.autocast)
        done = steps.finished(wait=True)[-1]
        assert done.losses[0] == pytest.approx(expected.loss.item(), rel=4e-3)
        assert done.gradient_norms[0] == pytest.approx(expected.gradient_norm.item(), rel=0.05)
    # Outside autocast the model is one of bf16, though a part of it is fp32 now.
    assert len(generate(model, [[1, 2, 3], [4]], SamplingConfig(max_new_tokens=3))[0]) == 3


def test_a_run_with_added_tokens_takes_the_fast_step(tiny_folder: Path, tmp_path: Path) -> None:
    said = Lines()
    job = FinetuneJob(
        data=make_orders("train", 48),
        model=str(tiny_folder),
        lora=LoRAConfig(rank=4),
        train=TrainConfig(steps=12, batch_size=8, gradient_accumulation=2, learning_rate=5e-3),
        data_config=DataConfig(max_length=128, special_tokens=("<|tool|>", "Table")),
        run=RunConfig(out=tmp_path, name="fast", device="cuda", eval_every_steps=6),
    )
    fast = finetune(job, said)  # type: ignore[arg-type]
    plain = finetune(replace(job, run=replace(job.run, name="plain", fast=False)))
    assert any(line.startswith("fast step: one CUDA graph") for line in said.lines)
    losses = [
        [row["loss"] for row in read_rows(done.folder / "metrics.jsonl") if "loss" in row]
        for done in (fast, plain)
    ]
    for one, other in zip(*losses, strict=True):
        assert one == pytest.approx(other, rel=0.02)
