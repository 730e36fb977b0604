"""What comes after training over nf4 on a GPU: the same loss, the same base on a CPU, a merge."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import lora
from lora.adapters.bases.quantisation import quantisation_of
from lora.adapters.bases.rules import read_trained_base
from lora.adapters.peft_files import read_metadata
from lora.config import BaseWeights
from lora.decoder.quantised.base import base_kind
from lora.finetune import FinetuneResult
from lora.pretrained.hf_weights import load_decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def done(tiny_folder: Path, orders_file: Path, tmp_path_factory: Any) -> FinetuneResult:
    settings: dict[str, Any] = {"steps": 4, "batch_size": 2, "rank": 4, "max_length": 128}
    return lora.finetune(
        str(orders_file),
        model=str(tiny_folder),
        out=str(tmp_path_factory.mktemp("runs")),
        name="nf4",
        eval_data=str(orders_file),
        base_dtype="nf4",
        save="last",
        device="cuda",
        **settings,
    )


@pytest.mark.parametrize("word", ["auto", "nf4"])
def test_evaluation_gives_the_validation_loss_of_training(
    done: FinetuneResult, orders_file: Path, word: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        model, tokenizer = lora.load_model(adapter=done.saved, device="cuda", base_dtype=word)
    assert caplog.messages == []
    assert base_kind(model) == (None if word == "auto" else "nf4")
    assert next(model.parameters()).dtype is torch.bfloat16
    loss = lora.evaluate(model, tokenizer, orders_file).scores.loss
    assert loss == pytest.approx(done.result.eval_loss, rel=2e-3)
    assert isinstance(lora.generate(model, tokenizer, "3 lamps", max_new_tokens=4), str)


def test_a_cpu_finds_the_same_base(
    done: FinetuneResult, tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = read_trained_base(read_metadata(done.saved)).quantisation
    assert trained is not None
    assert trained.compute_dtype == "bfloat16"
    base = BaseWeights(base_dtype="nf4")
    for device in ("cpu", "cuda"):
        own = quantisation_of(
            load_decoder(tiny_folder, base=base, dtype=torch.bfloat16, device=device)
        )
        assert own == trained
    with caplog.at_level(logging.WARNING):
        lora.load_model(adapter=done.saved, device="cpu")
    assert caplog.messages == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_values_trained_over_are_merged(
    done: FinetuneResult, orders_file: Path, tmp_path: Path, device: str
) -> None:
    report = lora.merge(done.saved, tmp_path / "out", device=device)
    assert report.over == "nf4 (blocks of 64, double quantisation)"
    model, tokenizer = lora.load_model(tmp_path / "out", device="cuda")
    loss = lora.evaluate(model, tokenizer, orders_file, max_length=128).scores.loss
    assert loss == pytest.approx(done.result.eval_loss, rel=2e-3)
