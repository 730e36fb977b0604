"""Trainable tokens: their rows train, the rest of the tables keeps its bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora.adapters.apply import apply_lora, disabled_adapter, remove_lora, train_token_rows
from lora.adapters.fingerprint import base_fingerprint
from lora.config import LoRAConfig, TrainConfig
from lora.data.sequences.batches import Batch
from lora.decoder.config import (
    AttentionConfig,
    DecoderConfig,
    FeedForwardConfig,
    LayerConfig,
    RopeConfig,
)
from lora.decoder.decoder import Decoder, build_decoder
from lora.device import choose_device
from lora.errors import ConfigError, ModelError, TargetError
from lora.layers.token_tables import find_token_tables
from lora.layers.vocabulary import resize_vocabulary
from lora.lora_module import count_lora_parameters
from lora.training.losses import linear_head_loss, loss_for, trainable_tokens_loss
from lora.training.optim import build_optimizer, parameter_groups
from lora.training.plain_step import train_step

Fill = Callable[..., nn.Module]
VOCAB, WIDTH = 40, 16
IDS = (3, VOCAB, VOCAB + 1)
TOKENS = torch.tensor([[3, 1, VOCAB, 5, VOCAB + 1, 3], [9, 8, VOCAB + 1, 6, 5, 4]])


def tiny(fill_random: Fill, *, tied: bool, scale: float = 1.0) -> Decoder:
    layer = LayerConfig(RopeConfig(10_000.0), None, 8**-0.5)
    config = DecoderConfig(
        family="llama",
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        max_position_embeddings=32,
        norm_eps=1e-5,
        block="pre_norm",
        embedding_scale=scale,
        tie_word_embeddings=tied,
        attention=AttentionConfig(2, 1, 8),
        feed_forward=FeedForwardConfig(24, "silu"),
        layers=(layer, layer),
        source={"vocab_size": VOCAB, "tie_word_embeddings": tied},
    )
    model = build_decoder(config)
    fill_random(model, 1, std=0.3)
    return model


def with_rows(fill_random: Fill, *, tied: bool, n_known: int | None = None) -> Decoder:
    model = tiny(fill_random, tied=tied)
    apply_lora(model, LoRAConfig(rank=2, init_seed=0))
    train_token_rows(model, IDS, n_known=n_known)
    return model


def batch() -> Batch:
    labels = torch.cat([TOKENS[:, 1:], torch.full((2, 1), -100)], 1)
    places = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    return Batch(TOKENS, labels, places, torch.zeros_like(TOKENS))


both = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@both
def test_new_rows_start_at_the_mean_and_known_ones_as_they_are(
    fill_random: Fill, tied: bool
) -> None:
    base = tiny(fill_random, tied=tied)
    model = with_rows(fill_random, tied=tied)
    tables = find_token_tables(model)
    assert tables.is_tied is tied
    for name, table in tables.by_name.items():
        old = base.get_submodule(name).weight
        rows = table.token_rows
        assert torch.equal(rows[0], old[3])
        torch.testing.assert_close(rows[1], old.mean(0), rtol=0, atol=1e-6)
        assert torch.equal(rows[1], rows[2])
        assert torch.equal(table.weight[:VOCAB], old)
    assert model.config.vocab_size == model.config.source["vocab_size"] == VOCAB + 2
    assert tables.by_name["lm_head"].out_features == VOCAB + 2


def test_of_padded_rows_those_that_the_tokenizer_knew_make_the_mean(fill_random: Fill) -> None:
    model = tiny(fill_random, tied=True)
    old = model.lm_head.weight.detach().clone()
    apply_lora(model, LoRAConfig(rank=2))
    train_token_rows(model, [30, 31], n_known=30)  # the tables have 40 rows
    assert model.config.vocab_size == VOCAB
    rows = find_token_tables(model).embedding.token_rows
    torch.testing.assert_close(rows[0], old[:30].mean(0), rtol=0, atol=1e-6)


@both
def test_at_the_start_the_old_tokens_get_the_base_s_logits(fill_random: Fill, tied: bool) -> None:
    base, model = tiny(fill_random, tied=tied), with_rows(fill_random, tied=tied)
    old = TOKENS % VOCAB
    with torch.no_grad():
        torch.testing.assert_close(model(old)[..., :VOCAB], base(old), rtol=0, atol=1e-6)
        assert model(old).shape[-1] == VOCAB + 2


@both
def test_outputs_and_gradients_are_those_of_a_plain_model_with_the_rows_written_in(
    fill_random: Fill, tied: bool
) -> None:
    model = with_rows(fill_random, tied=tied).double()
    fill_random(model, 2, only_trainable=True, std=0.3)
    plain = tiny(fill_random, tied=tied)
    resize_vocabulary(plain, VOCAB + 2)
    plain = apply_lora(plain, LoRAConfig(rank=2)).double()
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(own[name])
        for name, table in find_token_tables(model).by_name.items():
            plain.get_submodule(name).weight[list(IDS)] = table.token_rows
    for table in find_token_tables(plain).by_name.values():
        table.weight.requires_grad_(True)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), plain(TOKENS), rtol=1e-10, atol=1e-10)
    assert loss_for(model) is trainable_tokens_loss
    for one, loss_fn in ((model, trainable_tokens_loss), (plain, linear_head_loss)):
        loss, count = loss_fn(one, batch())
        assert count.item() == 10
        loss.sum().backward()
        one.seen = loss.detach()
    torch.testing.assert_close(model.seen, plain.seen, rtol=1e-10, atol=0)
    for name, table in find_token_tables(model).by_name.items():
        wanted = plain.get_submodule(name).weight.grad[list(IDS)]
        assert table.weight.grad is None
        torch.testing.assert_close(table.token_rows.grad, wanted, rtol=1e-8, atol=1e-10)
    for name, parameter in plain.named_parameters():
        if name.endswith(("lora_A", "lora_B")):
            torch.testing.assert_close(own[name].grad, parameter.grad, rtol=1e-8, atol=1e-10)


@both
def test_a_step_moves_the_rows_and_leaves_the_frozen_bytes(fill_random: Fill, tied: bool) -> None:
    model = with_rows(fill_random, tied=tied)
    fill_random(model, 2, only_trainable=True, std=0.1)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = find_token_tables(model).embedding.token_rows.detach().clone()
    optimizer = build_optimizer(model, 1e-2, 0.1, TrainConfig().whole_rate_fraction)
    choice = choose_device("cpu")
    for _ in range(3):
        train_step(
            model,
            [batch()],
            loss_for(model),
            optimizer,
            max_grad_norm=1.0,
            autocast=choice.autocast,
        )
    after = find_token_tables(model).embedding.token_rows
    assert bool((after != before).any(1).all())
    for name, value in frozen.items():
        assert torch.equal(model.get_parameter(name), value), name


@both
def test_rows_are_counted_and_grouped_as_embeddings(fill_random: Fill, tied: bool) -> None:
    model = with_rows(fill_random, tied=tied)
    counts = count_lora_parameters(model)
    assert counts.other_trainable == len(IDS) * WIDTH * (1 if tied else 2)
    groups = parameter_groups(model, 0.1, 0.3)
    rows = [group for group in groups if group["learning_rate_share"] == 0.3]
    assert [group["weight_decay"] for group in rows] == [0.0]
    assert len(rows[0]["params"]) == (1 if tied else 2)


@both
def test_disabled_it_is_the_base_with_the_mean_for_new_tokens(
    fill_random: Fill, tied: bool
) -> None:
    base, model = tiny(fill_random, tied=tied), with_rows(fill_random, tied=tied)
    fill_random(model, 2, only_trainable=True, std=0.5)
    adapted = find_token_tables(model).embedding
    old = TOKENS % VOCAB
    with torch.no_grad(), disabled_adapter(model):
        assert torch.equal(model(old)[..., :VOCAB], base(old))
        seen = model.get_submodule("model.embed_tokens")(torch.tensor([VOCAB, 3]))
        assert base_fingerprint(model) == base_fingerprint(base)
    weight = base.get_submodule("model.embed_tokens").weight
    torch.testing.assert_close(seen, torch.stack([weight.mean(0), weight[3]]), rtol=0, atol=1e-6)
    assert find_token_tables(model).embedding is adapted


@both
def test_removed_it_is_the_base_again(fill_random: Fill, tied: bool) -> None:
    base, model = tiny(fill_random, tied=tied), with_rows(fill_random, tied=tied)
    remove_lora(model)
    assert model.config == base.config
    assert model.config.source == base.config.source
    assert find_token_tables(model).is_tied is tied
    wanted = dict(base.named_parameters())
    seen = dict(model.named_parameters())
    assert list(seen) == list(wanted)
    assert all(torch.equal(seen[name], wanted[name]) for name in wanted)


def test_transformers_models_grow_too(tiny_model: Callable[[str], nn.Module]) -> None:
    for name in ("llama-tied", "llama-untied", "gpt2-tied"):
        model: Any = tiny_model(name)
        tokens = torch.tensor([[1, 2, 3]])
        before: Tensor = model(tokens).logits
        apply_lora(model, LoRAConfig(rank=2))
        train_token_rows(model, [64])
        after = model(torch.tensor([[1, 2, 3, 64]])).logits
        assert model.config.vocab_size == 65
        assert (after[:, :3, :64] - before).abs().max() < 1e-5
        assert find_token_tables(model).is_tied is not name.endswith("untied")
        remove_lora(model)
        assert torch.equal(model(tokens).logits, before)


def test_what_cannot_train_is_refused_and_the_model_unchanged(fill_random: Fill) -> None:
    def adapted(**options: Any) -> Decoder:
        model = tiny(fill_random, tied=False)
        apply_lora(model, LoRAConfig(rank=2, **options))
        return model

    cases: list[tuple[Decoder, Any, type[Exception], str]] = [
        (
            adapted(targets=("lm_head",)),
            IDS,
            TargetError,
            "'lm_head': it is adapted through LoRA too",
        ),
        (
            adapted(modules_to_save=("embed_tokens",)),
            IDS,
            TargetError,
            "modules_to_save trains all of it",
        ),
        (adapted(), [], ConfigError, "at least one"),
        (adapted(), [3, 3], ConfigError, "each once"),
        (adapted(), [-1], ConfigError, "ids ≥ 0"),
        (adapted(), [2**20], ModelError, "at most 65,536 are added"),
        (adapted(), {"model.embed": [3]}, TargetError, "Did you mean 'model.embed_tokens'"),
        (tiny(fill_random, tied=True), IDS, TargetError, "has no LoRA"),
    ]
    for model, ids, kind, words in cases:
        before = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
        with pytest.raises(kind, match=words):
            train_token_rows(model, ids)
        assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == before
        assert model.config.vocab_size == VOCAB
    twice = with_rows(fill_random, tied=True)
    with pytest.raises(TargetError, match="has trainable tokens already"):
        train_token_rows(twice, [5])
