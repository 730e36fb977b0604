"""LoRA on the decoder of each family: gradients, adapters and logits are PEFT's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora.adapters.apply import apply_lora
from lora.adapters.merge import merge_lora
from lora.adapters.save_load import load_adapter, save_adapter
from lora.config import LoRAConfig
from lora.pretrained.hf_weights import load_decoder, save_decoder

T, RANK, ALPHA = 21, 3, 6.0
# transformers computes some norms, and the softmax of its plain attention, in fp32 whatever the
# dtype: gradients in fp64 agree to that.
TOLERANCE = 1e-5


@pytest.fixture
def peft() -> Iterator[Any]:
    module = pytest.importorskip("peft")
    with warnings.catch_warnings():
        for words in (
            "`is_gradient_checkpointing` is deprecated",
            "fan_in_fan_out is set to False but the target module is `Conv1D`",
        ):
            warnings.filterwarnings("ignore", message=words.replace("(", r"\("))
        yield module


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())


def test_gradients_and_adapters_are_those_of_peft(
    pair: Any, make_ids: Callable[..., Tensor], peft: Any, tmp_path: Path, fill_random: Any
) -> None:
    ids = make_ids(2, T)
    ours = load_decoder(pair.folder, dtype=torch.float64)
    apply_lora(ours, LoRAConfig(rank=RANK, alpha=ALPHA))
    fill_random(ours, 3, only_trainable=True, std=0.1)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(
        copy.deepcopy(pair.reference), tmp_path, is_trainable=True
    )
    result = theirs.load_adapter(tmp_path, "again")
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    theirs = theirs.double()
    logits, reference = ours(ids), theirs(ids).logits
    assert ((logits - reference).norm() / reference.norm()).item() < TOLERANCE
    loss_of(logits, ids).backward()
    loss_of(reference, ids).backward()
    wanted = {
        name.replace(".default.weight", "").removeprefix("base_model.model."): p.grad
        for name, p in theirs.named_parameters()
        if p.grad is not None
    }
    found = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert ((gradient - wanted[name]).norm() / wanted[name].norm()).item() < TOLERANCE, name
    again = load_adapter(load_decoder(pair.folder, dtype=torch.float64), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids), logits)


def test_merged_models_are_transformers_models(
    pair: Any, make_ids: Callable[..., Tensor], tmp_path: Path, fill_random: Any
) -> None:
    ids, model = make_ids(2, T), load_decoder(pair.folder)
    apply_lora(model, LoRAConfig(rank=RANK, alpha=ALPHA))
    fill_random(model, 3, only_trainable=True, std=0.1)
    with torch.no_grad():
        wanted = model(ids)
        merge_lora(model)
        save_decoder(model, tmp_path)
        theirs = type(pair.reference).from_pretrained(tmp_path)
        for logits in (load_decoder(tmp_path)(ids), theirs(ids).logits):
            assert ((logits - wanted).norm() / wanted.norm()).item() < TOLERANCE
            assert (logits - pair.ours(ids)).norm() > 0.01 * wanted.norm()
