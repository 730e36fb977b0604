"""Embedding rows and whole modules beside LoRA: the hand-written step against the plain one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from lora.adapters.apply import apply_lora, disabled_adapter, train_token_rows
from lora.adapters.save_load import load_adapter, save_adapter
from lora.config import LoRAConfig, SamplingConfig, TrainConfig
from lora.data.sequences.batches import Batch
from lora.decoder.decoder import Decoder
from lora.device import DeviceChoice
from lora.fast.llama import buffers
from lora.fast.llama.checkpointing import MODES
from lora.fast.memory.fast_step import FastPlan
from lora.fast.runner import CapturedStepRunner, DeviceStepRunner, FastStepRunner
from lora.fast.step import FastStep
from lora.fast.weights import token_tables
from lora.fast.why_not import why_not_hand_written, why_not_sharded
from lora.inference.generate import generate
from lora.kernels.step.ops import PLAIN
from lora.training.checkpoint import restore_training_tensors, training_tensors
from lora.training.optim import build_optimizer
from tests.fast.conftest import (
    CAPPED,
    GEMMA,
    GRANITE,
    OLMO,
    RATES,
    apply_random_lora,
    check_steps,
    relative,
)
from tests.tiny_llama import VOCABULARY

CPU = DeviceChoice(torch.device("cpu"), torch.bfloat16, "for a test")
SHARE = 0.3
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
MakeModel = Callable[..., Decoder]
MakeBatch = Callable[..., Batch]


@dataclass(frozen=True)
class Case:
    """What trains beside LoRA."""

    tied: bool = True
    rows: Sequence[int] | Mapping[str, Sequence[int]] = ()
    saved: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    targets: tuple[str, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of the decoder's config."""


CASES = {
    "rows of tied tables": Case(rows=(5, 96, VOCABULARY, VOCABULARY + 1)),
    "rows of two tables": Case(tied=False, rows=(40, 5, 17)),
    "other rows of tied tables": Case(rows={EMBEDDING: (5, 6), HEAD: (6, 50, 51)}),
    "rows of a tied head": Case(rows={HEAD: (7,)}),
    "rows of an embedding": Case(tied=False, rows={EMBEDDING: (7, 9)}, layers=(2,)),
    "embedding": Case(saved=("embed_tokens",), layers=(1,)),
    "head": Case(saved=("lm_head",)),
    "both tables": Case(tied=False, saved=("embed_tokens", "lm_head")),
    "copies of tied tables": Case(saved=("embed_tokens", "lm_head", "norm")),
    "head and rows": Case(tied=False, saved=("lm_head",), rows={EMBEDDING: (7, 9)}),
    "norms": Case(saved=("input_layernorm", "model.norm")),
    "a norm above": Case(saved=("model.layers.2.post_attention_layernorm",), layers=(1,)),
    "LoRA on the head": Case(tied=False, targets=("q_proj", "down_proj", "lm_head")),
    "LoRA on a tied head": Case(targets=("o_proj", "lm_head"), changes=CAPPED),
    "LoRA on the head alone": Case(targets=("lm_head",), saved=("norm",), changes=OLMO),
    "rows in Gemma": Case(rows=(5, 6), changes=GEMMA),
    "embedding of Granite": Case(saved=("embed_tokens",), changes=GRANITE),
    "rows under a cap": Case(rows=(5, VOCABULARY), tied=False, changes=CAPPED),
    "norms behind halves": Case(
        saved=("post_feedforward_layernorm",), layers=(1, 2), changes={**GEMMA, **OLMO}
    ),
    "norms of queries": Case(saved=("q_norm",), layers=(1,), changes={"qk_norm": "head"}),
    "a norm below": Case(saved=("model.layers.0.input_layernorm",), layers=(1, 2)),
}


def adapt(model: Decoder, case: Case) -> Decoder:
    targets = {"targets": case.targets} if case.targets else {}
    apply_random_lora(model, layers=case.layers, modules_to_save=case.saved, **targets)
    if case.rows:
        train_token_rows(model, case.rows)
    assert why_not_hand_written(model) is None
    return model


def batches_of(make: MakeBatch, case: Case, number: int, *, packed: bool) -> list[Batch]:
    """Return two micro-batches if packed, else one; trained tokens are in them more than once."""
    made = [make(10 * number + index, packed=packed) for index in range(2 if packed else 1)]
    ids = case.rows.get(EMBEDDING, (5,)) if isinstance(case.rows, Mapping) else case.rows
    for batch in made:
        for place, token in enumerate(ids):
            batch.input_ids[:, place::7] = token
            batch.labels[:, 6 + place :: 7] = token
        batch.labels[batch.document_ids < 0] = -100
    return made


def check(make_model: MakeModel, make_batch: MakeBatch, case: Case, **settings: Any) -> None:
    """Train two copies of a model and compare all that comes of it; packed where LoRA is merged."""
    packed = settings.get("merges", True)
    plain = adapt(make_model(tied=case.tied, **case.changes), case)
    step = FastStep(
        copy.deepcopy(plain),
        PLAIN,
        torch.float64,
        weight_decay=0.1,
        whole_rate_fraction=SHARE,
        **settings,
    )
    batches = [batches_of(make_batch, case, n, packed=packed) for n in range(len(RATES))]
    check_steps(step, plain, build_optimizer(plain, 1.0, 0.1, SHARE), batches)


@pytest.mark.parametrize("merges", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_it_trains_as_the_plain_step_does(
    tiny_decoder: MakeModel,
    make_batch: MakeBatch,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    merges: bool,
) -> None:
    monkeypatch.setattr(buffers, "MAX_LOGITS_ELEMENTS", 97 * 20)  # the head in two parts
    monkeypatch.setattr(token_tables, "MAX_ONE_HOT_ELEMENTS", 4 * 20)
    check(tiny_decoder, make_batch, CASES[name], merges=merges, own_attention=merges)


@pytest.mark.parametrize("mode", ["cheap", "full", "full+offload"])
@pytest.mark.parametrize("name", ["rows of tied tables", "a norm below"])
def test_it_trains_with_activation_checkpointing(
    tiny_decoder: MakeModel, make_batch: MakeBatch, name: str, mode: str
) -> None:
    check(tiny_decoder, make_batch, CASES[name], merges=False, checkpointing=MODES[mode])


@pytest.mark.parametrize("name", ["rows of tied tables", "copies of tied tables"])
def test_a_saved_state_is_restored(
    tiny_decoder: MakeModel, make_batch: MakeBatch, name: str
) -> None:
    case, steps = CASES[name], []
    batches = [batches_of(make_batch, case, number, packed=True) for number in range(4)]
    for model in (adapt(tiny_decoder(tied=case.tied), case) for _ in range(3)):
        steps.append(FastStep(model, PLAIN, torch.float64, whole_rate_fraction=SHARE))
    whole, first, second = steps
    for number, batch in enumerate(batches):
        whole.launch(batch, 1e-2, number + 1)
    for number in (0, 1):
        first.launch(batches[number], 1e-2, number + 1)
    saved = copy.deepcopy(training_tensors(first.model, first.optimizer_state()))
    second.load_optimizer_state(restore_training_tensors(second.model, saved))
    for number in (2, 3):
        second.launch(batches[number], 1e-2, number + 1)
    assert torch.equal(second.flat.values, whole.flat.values)
    assert torch.equal(second.flat.square, whole.flat.square)


@pytest.mark.parametrize("name", ["rows of tied tables", "copies of tied tables"])
def test_a_plan_counts_what_trains_beside_lora(tiny_decoder: MakeModel, name: str) -> None:
    case = CASES[name]
    step = FastStep(adapt(tiny_decoder(), case), PLAIN, torch.bfloat16)
    plan = FastPlan(adapt(tiny_decoder(), case), 2, 16)
    held = plan.memory(MODES["none"])
    assert held.gradients == 4 * step.flat.values.numel()
    assert plan.step.flat.segments(0.1) == step.flat.segments(0.1)


def test_what_it_cannot_train_is_refused_by_name(tiny_decoder: MakeModel) -> None:
    model = tiny_decoder()
    config = LoRAConfig(rank=3, targets=("q_proj",), modules_to_save=("down_proj",))
    apply_lora(model, config)
    assert why_not_hand_written(model) == "model.layers.0.mlp.down_proj.weight trains beside LoRA"
    model = tiny_decoder()
    apply_lora(model, LoRAConfig(rank=3, targets=("q_proj", "lm_head"), dropout=0.1))
    assert "LoRA with dropout is on the head" in (why_not_hand_written(model) or "")


@pytest.mark.parametrize(("name", "why"), [("rows of tied tables", None), ("head", HEAD)])
def test_whole_tables_are_not_sharded_by_the_step(
    tiny_decoder: MakeModel, name: str, why: str | None
) -> None:
    case = CASES[name]
    said = why_not_sharded(adapt(tiny_decoder(tied=case.tied), case))
    assert said is None if why is None else said is not None and said.startswith(why)


@pytest.mark.parametrize("kind", ["fast", "captured"])
def test_modules_that_train_in_fp32_fit_a_bf16_model(
    tiny_decoder: MakeModel, make_batch: MakeBatch, tmp_path: Path, kind: str
) -> None:
    case = Case(saved=("embed_tokens", "lm_head", "input_layernorm"))
    model = adapt(tiny_decoder(dtype=torch.bfloat16), case)
    before = model(make_batch(0, packed=True).input_ids)
    config = TrainConfig(max_grad_norm=0.0)
    step: DeviceStepRunner = (
        FastStepRunner(model, CPU, config)
        if kind == "fast"
        else CapturedStepRunner(model, CPU, config, compiles=False)
    )
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert {kinds[n] for n in kinds if n.endswith("q_proj.weight")} == {torch.bfloat16}
    assert kinds[f"{EMBEDDING}.weight"] == kinds[f"{HEAD}.weight"] == torch.float32
    for number in range(4):
        step.launch(number + 1, [make_batch(number, packed=True)], [1e-4])
    assert len(step.finished(wait=True)) == 4
    after = model(make_batch(0, packed=True).input_ids)
    assert after.dtype is before.dtype is torch.bfloat16
    assert 0 < relative(after.float(), before.float()) < 0.2
    prompts = [[1, 2, 3], [4]]
    answers = generate(model, prompts, SamplingConfig(max_new_tokens=3))
    with disabled_adapter(model):  # a tied head keeps the dtype that the base has
        assert model(make_batch(0, packed=True).input_ids).dtype is torch.bfloat16
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(tiny_decoder(dtype=torch.bfloat16), tmp_path / "adapter")
    assert generate(loaded, prompts, SamplingConfig(max_new_tokens=3)) == answers
