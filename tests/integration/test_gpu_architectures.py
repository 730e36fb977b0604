"""Every tiny architecture on a GPU: the step that is chosen gives the plain step's losses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from lora.config import TrainConfig
from lora.data.sequences.batches import Batch
from lora.decoder.language_model import LanguageModel
from lora.device import choose_device
from lora.fast.choose import choose_steps
from lora.kernels.step.jit import HAS_TRITON
from lora.pretrained.load.models import load_language_model
from lora.training.losses import loss_for
from lora.training.optim import build_optimizer
from lora.training.plain_step import train_step
from tests.integration.test_gpu_fast import Lines, adapt
from tests.pretrained.tiny_models import ARCHITECTURES, VOCAB, save_tiny_transformers

pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),
    pytest.mark.skipif(
        not (torch.cuda.is_available() and HAS_TRITON), reason="needs a CUDA device and Triton"
    ),
]
TOKENS, N_STEPS, RATE = 48, 4, 1e-3


def batch(*, packed: bool) -> Batch:
    ids = torch.randint(1, VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    labels, documents = ids.roll(-1, 1), torch.zeros_like(ids)
    positions = torch.arange(TOKENS).expand(2, -1).clone()
    labels[:, -1] = -100
    if packed:
        documents[0, 20:], labels[0, 19] = 1, -100
        positions[0, 20:] = torch.arange(TOKENS - 20)
        documents[1, 40:], labels[1, 39:] = -1, -100
    return Batch(ids, labels, positions, documents)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_chosen_step_learns_as_the_plain_one(name: str, tmp_path: Path) -> None:
    save_tiny_transformers(name, tmp_path)
    model: LanguageModel = adapt(
        load_language_model(tmp_path, dtype=torch.bfloat16, device="cuda")
    ).cuda()
    plain: Any = copy.deepcopy(model)
    choice, said = choose_device("cuda"), Lines()
    config = TrainConfig(steps=N_STEPS, weight_decay=0.0)
    steps = choose_steps(model, choice, config, on_message=said.message)
    optimizer = build_optimizer(plain, RATE, 0.0)
    is_packed, losses = model.why_not_packed is None, []
    for number in range(1, N_STEPS + 1):
        rows = batch(packed=is_packed and number % 2 == 0)
        steps.launch(number, [rows], [RATE])
        wanted = train_step(
            plain, [rows.to("cuda")], loss_for(plain), optimizer, autocast=choice.autocast
        )
        losses.append(steps.finished(wait=True)[-1].losses[0])
        assert losses[-1] == pytest.approx(wanted.loss.item(), rel=1e-2), said.lines
    assert losses[2] < losses[0]
    print(f"{name}: {said.lines[0]}")  # with -s: which step
