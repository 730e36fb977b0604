"""The captured step without a graph: the plain step's figures, for our decoders and others'."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora.adapters.apply import apply_lora, lora_layers, train_token_rows
from lora.config import BaseDtype, BaseWeights, LoRAConfig, TrainConfig
from lora.data.sequences.batches import Batch, needs_mask
from lora.decoder.decoder import Decoder
from lora.device import Share, choose_device
from lora.distributed.dropout import SharedDropouts
from lora.fast.captured import CapturedStep, PlainForward, compiled_blocks, summed_loss
from lora.fast.choose import choose_steps
from lora.fast.runner import CapturedStepRunner
from lora.fast.why_not import why_not_captured
from lora.kernels.step.ops import PLAIN
from lora.pretrained.transformers_models.load import as_language_model
from lora.pretrained.transformers_models.quantiser import quantise_linears
from lora.training.losses import loss_for
from lora.training.optim import build_optimizer, set_learning_rate
from lora.training.plain_step import PlainStepRunner, train_step
from tests.fast.conftest import relative
from tests.fast.test_unpacked import packed
from tests.pretrained.tiny_models import tiny_transformers

CPU = choose_device("cpu")
RATES = (1e-2, 3e-2, 1e-2)


def adapt(model: nn.Module, **settings: Any) -> nn.Module:
    apply_lora(model, LoRAConfig(rank=4, init_seed=0, **settings))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.copy_(0.2 * torch.randn(layer.lora_B.shape, generator=draw))
    return model


def captured(model: nn.Module) -> CapturedStepRunner:
    return CapturedStepRunner(model, CPU, TrainConfig(weight_decay=0.1), compiles=False)


def draw_weights(model: nn.Module) -> nn.Module:
    """Changes `model` in place: every tensor is drawn, the same in each process."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 1.0 if parameter.dim() == 1 else 0.0  # norms vary around one
            parameter.copy_(scale + 0.1 * torch.randn(parameter.shape, generator=draw))
    return model


@pytest.fixture
def llama() -> nn.Module:
    """Make one of transformers' tiny Llamas with every tensor drawn."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=97,
        max_position_embeddings=64,
    )
    return as_language_model(draw_weights(transformers.AutoModelForCausalLM.from_config(config)))


def padded(batch: Batch) -> Batch:
    """Return the batch with padding at the end of its second row."""
    labels, documents = batch.labels.clone(), batch.document_ids.clone()
    labels[1, 11:], documents[1, 11:] = -100, -1
    positions = batch.position_ids.clone()
    positions[1, 11:] = 0
    return Batch(batch.input_ids, labels, positions, documents)


def check(model: nn.Module, batches: list[list[Batch]]) -> None:
    """Train copies of `model` both ways on the same steps and compare all that comes of it.

    Over several steps in fp64: AdamW divides gradients by their size, and so makes in fp32 steps of
    the rounding errors of those that are nearly zero. In fp32 the first step's gradients are held,
    its weights within what that does to them.
    """
    compare(copy.deepcopy(model), batches[:1], gradients=1e-5, weights=1e-3)
    compare(copy.deepcopy(model).double(), batches, gradients=2e-5, weights=1e-5)


def compare(
    plain: nn.Module, batches: list[list[Batch]], *, gradients: float, weights: float
) -> None:
    """Changes `plain` in place: it is trained on `batches`. The bounds are relative."""
    own = copy.deepcopy(plain)
    steps = captured(own)
    optimizer = build_optimizer(plain, 1.0, 0.1, TrainConfig().whole_rate_fraction)
    for number, (rate, micro) in enumerate(zip(RATES, batches, strict=False), 1):
        set_learning_rate(optimizer, rate)
        expected = train_step(plain, micro, loss_for(plain), optimizer)
        steps.launch(number, micro, [rate])
        (done,) = steps.finished(wait=True)
        assert done.losses == [pytest.approx(expected.loss.item(), rel=1e-6)]
        assert done.gradient_norms == [pytest.approx(expected.gradient_norm.item(), rel=1e-5)]
        assert (done.n_tokens, done.not_finite) == (expected.n_tokens.item(), {})
    others, state = dict(plain.named_parameters()), steps.step.optimizer_state()
    for name, parameter in own.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, others[name]), name
            continue
        # The gradients' running mean: after one step, a tenth of them.
        mean = optimizer.state[others[name]]["exp_avg"]
        assert relative(state[name]["exp_avg"], mean) <= gradients, name
        assert relative(parameter, others[name]) <= weights, name


@pytest.mark.parametrize("n_micro", [1, 2])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("packed", [True, False])
def test_decoders_step_as_the_plain_step(
    tiny_decoder: Callable[..., Decoder],
    make_batch: Callable[..., Batch],
    packed: bool,
    kind: str,
    n_micro: int,
) -> None:
    model = tiny_decoder(window=5, dtype=torch.float32)
    prepared = adapt(model) if kind == "lora" else model.requires_grad_(True)
    numbers = [range(10 * n, 10 * n + n_micro) for n in range(len(RATES))]
    check(prepared, [[make_batch(n, packed=packed) for n in step] for step in numbers])


@pytest.mark.parametrize("saved", [("embed_tokens",), ("lm_head", "mlp"), ("norm",), ()])
def test_what_trains_beside_lora_has_a_rate_of_its_own(
    tiny_decoder: Callable[..., Decoder],
    make_batch: Callable[..., Batch],
    saved: tuple[str, ...],
) -> None:
    targets = ("q_proj", "v_proj")
    model = adapt(tiny_decoder(dtype=torch.float32), targets=targets, modules_to_save=saved)
    if not saved:
        train_token_rows(model, (5, 96, 97))
    check(model, [[make_batch(n, packed=True)] for n in range(len(RATES))])


def test_transformers_models_step_as_the_plain_step(
    llama: nn.Module, make_batch: Callable[..., Batch]
) -> None:
    whole, short = make_batch(0, packed=False), padded(make_batch(1, packed=False))
    check(adapt(llama), [[whole], [short], [whole, short]])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_steps_as_the_plain_step(
    kind: BaseDtype, llama: nn.Module, make_batch: Callable[..., Batch]
) -> None:
    quantise_linears(llama.theirs, BaseWeights(base_dtype=kind))
    check(adapt(llama), [[make_batch(n, packed=n == 1)] for n in range(len(RATES))])


@pytest.mark.parametrize("targets", [("q_proj",), ("q_proj", "lm_head")])
def test_tables_in_nf4_step_as_in_the_plain_step(
    targets: tuple[str, ...],
    tiny_decoder: Callable[..., Decoder],
    make_batch: Callable[..., Batch],
) -> None:
    model = packed(tiny_decoder(dtype=torch.float32), base=BaseWeights("nf4", nf4_embeddings=True))
    check(adapt(model, targets=targets), [[make_batch(n, packed=n == 1)] for n in range(3)])


def test_windows_are_kept(llama: nn.Module, make_batch: Callable[..., Batch]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MistralConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, vocab_size=97, sliding_window=5,
    )  # fmt: skip
    theirs = draw_weights(transformers.AutoModelForCausalLM.from_config(config))
    model = adapt(as_language_model(theirs))
    told = captured(copy.deepcopy(model)).describe()
    assert "attention goes by documents, because its attention has a window" in told
    assert "because" not in captured(llama).describe()
    check(model, [[make_batch(n, packed=n == 1)] for n in range(len(RATES))])


@pytest.mark.parametrize("name", ["gemma2", "phi", "bloom"])
def test_masks_biases_and_caps(name: str, make_batch: Callable[..., Batch]) -> None:
    model = adapt(as_language_model(tiny_transformers(name, vocab_size=97)))
    steps = captured(copy.deepcopy(model))
    assert ("attention takes masks" in steps.describe()) == (name != "phi")
    check(model, [[make_batch(n, packed=n != 1)] for n in range(len(RATES))])


def test_attention_is_theirs_again_after_a_step(
    llama: nn.Module, make_batch: Callable[..., Batch]
) -> None:
    captured(adapt(llama)).launch(1, [make_batch(0, packed=False)], [1e-2])
    assert llama.config.text._attn_implementation == "sdpa"  # type: ignore[union-attr]


def test_packed_rows_of_transformers_models(
    llama: nn.Module, make_batch: Callable[..., Batch]
) -> None:
    check(adapt(llama), [[make_batch(n, packed=n != 1)] for n in range(len(RATES))])


def test_a_mask_is_needed_where_order_does_not_keep_tokens_apart(
    make_batch: Callable[..., Batch],
) -> None:
    whole = make_batch(0, packed=False)
    assert not needs_mask(whole)
    assert not needs_mask(padded(whole))
    assert needs_mask(make_batch(0, packed=True))
    before = whole.document_ids.clone()
    before[0, :3] = -1
    assert needs_mask(Batch(whole.input_ids, whole.labels, whole.position_ids, before))


def test_the_step_leaves_the_callers_batch_alone(
    tiny_decoder: Callable[..., Decoder], make_batch: Callable[..., Batch]
) -> None:
    steps = captured(adapt(tiny_decoder(dtype=torch.float32)))
    first, second = make_batch(0, packed=False), make_batch(1, packed=False)
    kept = first.input_ids.clone()
    for number, batch in enumerate((first, second), 1):
        steps.launch(number, [batch], [1e-2])
    assert torch.equal(first.input_ids, kept)


class Expert(nn.Module):
    """Drops from tokens, which are not sequences; keeps what was left of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.dropout = nn.Embedding(97, 8), nn.Dropout(0.5)
        self.kept: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.dropout(self.table(ids).flatten(0, 1))  # (B·T, C)
        self.kept.append(x.detach() != 0)
        return x.unflatten(0, ids.shape)


def test_experts_of_several_processes_drop_others_in_each_micro_batch(
    make_batch: Callable[..., Batch],
) -> None:
    model = Expert()
    dropouts = SharedDropouts(
        model, Share(0, 2), 2 * len(make_batch(0, packed=False).input_ids), seed=1
    )

    def logits(batch: Batch, packed: bool) -> Tensor:
        return model(batch.input_ids).repeat_interleave(16, 2)  # type: ignore[no-any-return]

    forward = PlainForward(logits)
    step = CapturedStep(model, forward, PLAIN, CPU, loss=summed_loss, dropouts=dropouts)
    for number in (1, 2, 3):
        step.launch([make_batch(0, packed=False)] * 2, 0.0, number)
    masks = {mask.numpy().tobytes() for mask in model.kept}
    assert len(masks) == len(model.kept) == 6


def test_what_is_not_finite_is_not_taken_and_named(
    tiny_decoder: Callable[..., Decoder], make_batch: Callable[..., Batch]
) -> None:
    model = adapt(tiny_decoder(dtype=torch.float32))
    steps = captured(model)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[2] = float("nan")
    before = steps.step.flat.values.clone()
    steps.launch(1, [make_batch(0, packed=False)], [1e-2])
    (done,) = steps.finished(wait=True)
    assert "model.layers.1.mlp.up_proj.weight" in done.not_finite[0]
    assert torch.equal(steps.step.flat.values, before)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own
def test_blocks_are_compiled_inside_and_themselves_after(
    tiny_decoder: Callable[..., Decoder],
) -> None:
    model = tiny_decoder()
    blocks = model.trunk.blocks()
    plain = list(blocks)
    with compiled_blocks(blocks):
        assert not any(one is other for one, other in zip(blocks, plain, strict=True))
    assert all(one is other for one, other in zip(blocks, plain, strict=True))


def test_reasons_against_it(tiny_decoder: Callable[..., Decoder]) -> None:
    assert why_not_captured(adapt(tiny_decoder())) is None
    assert "loss of its own" in (why_not_captured(adapt(nn.Sequential(nn.Linear(8, 8)))) or "")
    assert isinstance(choose_steps(adapt(tiny_decoder()), CPU, TrainConfig()), PlainStepRunner)
