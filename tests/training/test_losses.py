"""The loss functions against the plainest sum over full logits, and against each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora.adapters.apply import apply_lora, train_token_rows
from lora.config import LoRAConfig
from lora.data.sequences.batches import IGNORE, Batch
from lora.decoder.decoder import Decoder, build_decoder
from lora.decoder.families import decoder_config
from lora.errors import ModelError
from lora.pretrained.transformers_models.config import Traits
from lora.pretrained.transformers_models.load import as_language_model
from lora.pretrained.transformers_models.model import TransformersModel
from lora.training.losses import (
    any_head_loss,
    linear_head_loss,
    loss_for,
    trainable_tokens_loss,
)
from tests.pretrained.tiny_models import tiny_transformers

VOCAB = 64
FillRandom = Callable[..., nn.Module]
ModelBuilder = Callable[[str], nn.Module]
_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def build(fill_random: FillRandom, *, tied: bool = False) -> Decoder:
    model = build_decoder(
        decoder_config({**_CONFIG, "tie_word_embeddings": tied}), dtype=torch.float64
    )
    fill_random(model, 2)
    return model


def documents(*lengths: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, labels and positions of one row; the last token of each learns nothing."""
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens = torch.randint(0, VOCAB, (sum(lengths),), generator=generator)
    labels = torch.roll(tokens, -1)
    labels[torch.tensor(lengths).cumsum(0) - 1] = IGNORE
    labels[0] = IGNORE  # a prompt
    return tokens, labels, torch.cat([torch.arange(n) for n in lengths])


def batch_of(*rows: tuple[int, ...], width: int = 12) -> Batch:
    """Return rows of documents of these lengths, padded on the right."""
    made = [documents(*lengths) for lengths in rows]
    fill = {"input_ids": 0, "labels": IGNORE, "position_ids": 0}
    parts = {
        name: torch.stack([_pad(row[i], width, filler) for row in made])
        for i, (name, filler) in enumerate(fill.items())
    }
    numbers = [torch.repeat_interleave(torch.tensor(lengths)) for lengths in rows]
    return Batch(**parts, document_ids=torch.stack([_pad(n, width, -1) for n in numbers]))


def _pad(values: Tensor, width: int, filler: int) -> Tensor:
    return torch.cat([values, values.new_full((width - len(values),), filler)])


def plain_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Return the sum over learned tokens, each document put through the model alone."""
    total, n_tokens = torch.zeros((), dtype=torch.float64), 0
    for row in range(len(batch.input_ids)):
        for number in range(int(batch.document_ids[row].max()) + 1):
            places = batch.document_ids[row] == number
            output: Any = model(batch.input_ids[row, places][None])
            logits = output if isinstance(output, Tensor) else output.logits
            for logit, label in zip(logits[0], batch.labels[row, places].tolist(), strict=True):
                if label != IGNORE:
                    total = total - logit.double().log_softmax(-1)[label]
                    n_tokens += 1
    return total, n_tokens


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def assert_same(model: nn.Module, loss: Any, batch: Batch, tolerance: float) -> None:
    """Hold value, count and gradients of `loss` against `plain_loss`."""
    total, n_tokens = loss(model, batch)
    wanted, wanted_tokens = plain_loss(model, batch)
    assert total.shape == n_tokens.shape == (1,)
    assert n_tokens.dtype == torch.int64
    assert n_tokens.item() == wanted_tokens > 0
    torch.testing.assert_close(total.sum().double(), wanted, rtol=tolerance, atol=0)
    reference = gradients(model, wanted)
    for name, seen in gradients(model, total.sum()).items():
        distance = (seen - reference[name]).norm() / reference[name].norm()
        assert distance < tolerance, name


@pytest.mark.parametrize("tied", [True, False])
def test_the_decoders_loss_is_the_plain_one(fill_random: FillRandom, tied: bool) -> None:
    model = build(fill_random, tied=tied)
    assert loss_for(model) is linear_head_loss
    assert_same(model, linear_head_loss, batch_of((5, 4), (12,), (3, 3, 3)), 1e-10)


GEMMA2 = {"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 2.0}


@pytest.mark.parametrize("adapted", [False, True])
def test_capped_logits_are_those_of_the_loss(fill_random: FillRandom, adapted: bool) -> None:
    config = decoder_config({**_CONFIG, **GEMMA2, "tie_word_embeddings": not adapted})
    model = build_decoder(config, dtype=torch.float64)
    fill_random(model, 2)
    if adapted:
        apply_lora(model, LoRAConfig(rank=3, targets=("q_proj", "lm_head")))
        fill_random(model, 8, only_trainable=True)
    assert_same(model, loss_for(model), batch_of((5, 4), (12,)), 1e-10)


def test_a_head_with_lora(fill_random: FillRandom) -> None:
    model = build(fill_random)
    apply_lora(model, LoRAConfig(rank=3, targets=("q_proj", "lm_head")))
    fill_random(model, 8, only_trainable=True)
    assert loss_for(model) is any_head_loss
    assert_same(model, any_head_loss, batch_of((5, 4), (12,)), 1e-10)


def test_lora_elsewhere_and_a_head_trained_whole(fill_random: FillRandom) -> None:
    model = build(fill_random, tied=True)
    apply_lora(model, LoRAConfig(rank=3, modules_to_save=("lm_head", "embed_tokens")))
    fill_random(model, 8, only_trainable=True)
    assert loss_for(model) is linear_head_loss
    assert_same(model, linear_head_loss, batch_of((5, 4), (12,)), 1e-10)


EXACT, ROUNDED = 1e-8, 1e-6
"""Tolerances in fp64: of models that compute in their dtype, and of those below."""
THEIRS = {
    **dict.fromkeys(("llama", "gpt2-untied", "phi", "granite"), EXACT),
    **dict.fromkeys(("gptj", "cohere2", "gemma2"), ROUNDED),  # norms or heads always in fp32
}


@pytest.mark.parametrize("name", THEIRS)
def test_transformers_models_packed_and_padded(name: str) -> None:
    model = as_language_model(tiny_transformers(name)).double()
    assert loss_for(model) is linear_head_loss
    assert_same(model, linear_head_loss, batch_of((5, 1, 4), (12,), (8,)), THEIRS[name])


@pytest.mark.parametrize("name", ["cohere2", "phi"])
def test_transformers_heads_with_lora_or_trained_whole(name: str, fill_random: FillRandom) -> None:
    for settings, wanted in (
        ({"targets": ("lm_head",)}, any_head_loss),
        ({"modules_to_save": ("lm_head",)}, linear_head_loss),
    ):
        model = as_language_model(tiny_transformers(name, tie_word_embeddings=False)).double()
        apply_lora(model, LoRAConfig(rank=3, **settings))  # type: ignore[arg-type]
        fill_random(model, 8, only_trainable=True)
        assert loss_for(model) is wanted
        assert_same(model, wanted, batch_of((5, 4), (12,)), EXACT)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_heads_with_trained_rows(tied: bool, fill_random: FillRandom) -> None:
    model = as_language_model(tiny_transformers("cohere2", tie_word_embeddings=tied)).double()
    apply_lora(model, LoRAConfig(rank=3, targets=("q_proj",)))
    train_token_rows(model, [3, 9])
    fill_random(model, 8, only_trainable=True)
    assert loss_for(model) is trainable_tokens_loss
    assert_same(model, trainable_tokens_loss, batch_of((5, 4), (12,)), EXACT)


def test_a_model_that_needs_all_logits() -> None:
    theirs = tiny_transformers("cohere2").double()
    model = TransformersModel(theirs, Traits(needs_all_logits=True))
    assert loss_for(model) is any_head_loss
    assert_same(model, any_head_loss, batch_of((5, 4), (12,)), ROUNDED)


def test_transformers_rows_padded_on_the_left(tiny_model: ModelBuilder) -> None:
    model = as_language_model(tiny_model("llama-untied")).double()
    right = batch_of((5,), (8,), width=8)
    fields = right.input_ids, right.labels, right.position_ids, right.document_ids
    left = Batch(*(_rolled(tensor) for tensor in fields))
    assert_same(model, linear_head_loss, left, 1e-8)


def _rolled(values: Tensor) -> Tensor:
    return torch.stack([values[0].roll(3), values[1]])


def test_both_kinds_of_model_have_the_same_loss(
    tiny_model: ModelBuilder, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from lora.pretrained.hf_weights import load_decoder

    theirs = tiny_model("llama-tied")
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)  # type: ignore[operator]
    batch = batch_of((5,), (12,))
    ours = linear_head_loss(load_decoder(folder), batch)
    torch.testing.assert_close(
        ours, linear_head_loss(as_language_model(theirs), batch), rtol=1e-5, atol=1e-5
    )


def test_a_batch_without_learned_tokens_has_no_loss_and_no_gradient(
    fill_random: FillRandom, tiny_model: ModelBuilder
) -> None:
    batch = batch_of((5,), (12,))
    batch.labels.fill_(IGNORE)
    adapted = apply_lora(build(fill_random), LoRAConfig(rank=3, targets=("lm_head",)))
    for model in (build(fill_random), adapted, as_language_model(tiny_model("llama"))):
        total, n_tokens = loss_for(model)(model, batch)
        assert total.item() == 0.0
        assert n_tokens.item() == 0
        for gradient in gradients(model, total.sum()).values():
            assert not gradient.any()


def test_parts_of_a_batch_add_up(fill_random: FillRandom) -> None:
    model = build(fill_random)
    whole = linear_head_loss(model, batch_of((5, 4), (12,), (2, 9)))
    parts = [linear_head_loss(model, batch_of(row)) for row in ((5, 4), (12,), (2, 9))]
    torch.testing.assert_close(whole[0], sum(part[0] for part in parts))
    assert whole[1].item() == sum(part[1].item() for part in parts)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_narrow_models_sum_in_fp32(
    fill_random: FillRandom, tiny_model: ModelBuilder, kind: torch.dtype
) -> None:
    batch = batch_of((5,), (12,))
    adapted = apply_lora(build(fill_random), LoRAConfig(rank=3, targets=("lm_head",)))
    for model in (build(fill_random), adapted, as_language_model(tiny_model("llama"))):
        loss = loss_for(model)
        wide, _ = loss(model.double(), batch)
        narrow, _ = loss(model.to(kind), batch)
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow.double(), wide.double(), rtol=0.05, atol=0)


def test_other_models_are_refused() -> None:
    with pytest.raises(ModelError, match=r"a loss for Linear.*lora's Decoder.*of your own"):
        loss_for(nn.Linear(2, 2))
