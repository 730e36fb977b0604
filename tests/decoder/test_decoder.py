"""The decoder agrees with transformers, alone, padded, packed, cached, and in its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora.decoder.cache import KVCache
from lora.decoder.decoder import INIT_STD, Decoder, build_decoder, build_empty_decoder
from lora.decoder.families import decoder_config
from lora.errors import ModelError

TOLERANCE = 1e-4  # largest difference of logits in fp32; they reach about 10
T = 21  # longer than every sliding window of the cases

PACKED = torch.tensor([[0] * 9 + [1] * 8 + [2] * 2 + [-1] * 2, [0] * 2 + [1] * 19])


@torch.no_grad()
def reference_logits(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    return model(ids, **inputs).logits


def assert_close(ours: Tensor, reference: Tensor) -> None:
    assert ours.shape == reference.shape
    assert (ours - reference).abs().max().item() < TOLERANCE


@torch.no_grad()
def test_logits_agree_with_transformers(pair: Any, make_ids: Callable[..., Tensor]) -> None:
    ids = make_ids(2, T)
    assert_close(pair.ours(ids), reference_logits(pair.reference, ids))


@torch.no_grad()
def test_one_token(pair: Any, make_ids: Callable[..., Tensor]) -> None:
    ids = make_ids(2, 1)
    assert_close(pair.ours(ids), reference_logits(pair.reference, ids))


@torch.no_grad()
def test_left_padding_agrees_with_transformers(pair: Any, make_ids: Callable[..., Tensor]) -> None:
    ids = make_ids(3, T)
    documents = torch.zeros_like(ids)
    documents[0, :4], documents[2, :13] = -1, -1
    is_real = documents == 0
    positions = (is_real.cumsum(1) - 1).clamp(min=0)
    ours = pair.ours(ids, document_ids=documents)
    theirs = reference_logits(
        pair.reference, ids, attention_mask=is_real.long(), position_ids=positions
    )
    assert ours.isfinite().all()
    assert_close(ours[is_real], theirs[is_real])


@torch.no_grad()
def test_packed_documents_equal_each_alone(pair: Any, make_ids: Callable[..., Tensor]) -> None:
    ids = make_ids(2, T)
    packed = pair.ours(ids, document_ids=PACKED)
    assert packed.isfinite().all()
    for row in range(2):
        for document in PACKED[row].unique():
            if document >= 0:
                where = PACKED[row] == document
                alone = reference_logits(pair.reference, ids[row, where][None])[0]
                assert_close(packed[row, where], alone)


@torch.no_grad()
def test_positions_given_equal_positions_found(pair: Any, make_ids: Callable[..., Tensor]) -> None:
    ids = make_ids(2, T)
    positions = torch.tensor(
        [[*range(9), *range(8), *range(2), *range(2)], [*range(2), *range(19)]]
    )
    given = pair.ours(ids, document_ids=PACKED, position_ids=positions)
    assert torch.equal(given, pair.ours(ids, document_ids=PACKED))


@torch.no_grad()
def test_a_sequence_that_is_all_padding_stays_finite(
    pair: Any, make_ids: Callable[..., Tensor]
) -> None:
    ids = make_ids(2, T)
    documents = torch.zeros_like(ids)
    documents[1] = -1
    logits = pair.ours(ids, document_ids=documents)
    assert logits.isfinite().all()
    assert_close(logits[0], reference_logits(pair.reference, ids[:1])[0])


@torch.no_grad()
@pytest.mark.parametrize("first_tokens", [1, 6, 15])
def test_cached_decoding_equals_the_full_forward(
    pair: Any, make_ids: Callable[..., Tensor], first_tokens: int
) -> None:
    ids = make_ids(2, T)
    cache = pair.ours.new_cache(2, T)
    parts = [pair.ours(ids[:, :first_tokens], cache=cache)]
    for i in range(first_tokens, T - 3):
        parts.append(pair.ours(ids[:, i : i + 1], cache=cache))
    parts.append(pair.ours(ids[:, T - 3 :], cache=cache))  # several tokens into a filled cache
    assert cache.n_tokens == T
    assert_close(torch.cat(parts, 1), reference_logits(pair.reference, ids))


@torch.no_grad()
def test_cached_decoding_of_left_padded_sequences(
    pair: Any, make_ids: Callable[..., Tensor]
) -> None:
    ids = make_ids(2, T)
    documents = torch.zeros_like(ids)
    documents[1, :7] = -1
    cache = pair.ours.new_cache(2, T + 5)
    parts = [pair.ours(ids[:, :12], document_ids=documents[:, :12], cache=cache)]
    for i in range(12, T):
        parts.append(pair.ours(ids[:, i : i + 1], cache=cache))
    logits = torch.cat(parts, 1)
    assert_close(logits[0], reference_logits(pair.reference, ids[:1])[0])
    assert_close(logits[1, 7:], reference_logits(pair.reference, ids[1:, 7:])[0])


@torch.no_grad()
def test_sequences_of_a_cache_can_be_dropped(pair: Any, make_ids: Callable[..., Tensor]) -> None:
    ids = make_ids(3, T)
    cache = pair.ours.new_cache(3, T)
    pair.ours(ids[:, :10], cache=cache)
    cache.select_sequences(torch.tensor([2, 0]))
    rest = pair.ours(ids[[2, 0], 10:], cache=cache)
    assert_close(rest, reference_logits(pair.reference, ids[[2, 0]])[:, 10:])


@torch.no_grad()
def test_hidden_states_are_what_the_head_gets(pair: Any, make_ids: Callable[..., Tensor]) -> None:
    ids = make_ids(2, T)
    hidden = pair.ours.hidden_states(ids)
    assert hidden.shape == (2, T, pair.ours.config.hidden_size)
    assert torch.equal(pair.ours.logits_of(hidden), pair.ours(ids))


LONG = 9  # tokens, above which the case "long" rotates by other factors


@torch.no_grad()
@pytest.mark.parametrize("n_tokens", [LONG - 1, LONG, LONG + 1, T])
def test_longrope_chooses_by_length_as_transformers_does(
    build_pair: Callable[..., Any], make_ids: Callable[..., Tensor], n_tokens: int
) -> None:
    pair, ids = build_pair("long"), make_ids(2, n_tokens)
    assert pair.ours.config.longrope_tokens == LONG
    assert_close(pair.ours(ids), reference_logits(pair.reference, ids))


@torch.no_grad()
def test_longrope_chooses_for_each_document(
    build_pair: Callable[..., Any], make_ids: Callable[..., Tensor]
) -> None:
    pair, ids = build_pair("long"), make_ids(2, T)
    documents = torch.tensor(
        [[0] * 10 + [1] * 8 + [2] * 2 + [-1], [-1] * 12 + [0] * 9]  # long, short, short; short
    )
    packed = pair.ours(ids, document_ids=documents)
    for row in range(2):
        for document in range(int(documents[row].max()) + 1):
            where = documents[row] == document
            alone = reference_logits(pair.reference, ids[row, where][None])[0]
            assert_close(packed[row, where], alone)


@torch.no_grad()
def test_a_cache_that_outgrows_longropes_short_factors(
    build_pair: Callable[..., Any], make_ids: Callable[..., Tensor]
) -> None:
    pair, ids = build_pair("long"), make_ids(3, T)
    starts = (0, 4, 7)
    documents = torch.zeros_like(ids)
    for row, start in enumerate(starts):
        documents[row, :start] = -1
    cache = pair.ours.new_cache(3, T)
    parts = [pair.ours(ids[:, :8], document_ids=documents[:, :8], cache=cache)[:, -1:]]
    for i in range(8, T - 3):
        parts.append(pair.ours(ids[:, i : i + 1], cache=cache))
    for i, logits in zip(range(8, T - 2), parts, strict=True):
        for row, start in enumerate(starts):
            alone = reference_logits(pair.reference, ids[row : row + 1, start:i])[0, -1]
            assert_close(logits[row, 0], alone)
    with pytest.raises(ModelError, match="cache 4 more tokens"):
        pair.ours(ids[:, :4], cache=cache)
    cache.select_sequences(torch.tensor([2, 0]))
    rest = pair.ours(ids[[2, 0], T - 3 :], cache=cache)
    assert_close(rest[1], reference_logits(pair.reference, ids[:1])[0, -3:])


def test_names_are_those_of_transformers(pair: Any) -> None:
    theirs = {name for name, _ in pair.reference.named_parameters()}
    assert {name for name, _ in pair.ours.named_parameters()} == theirs
    assert dict(pair.ours.named_buffers()) == {}


def test_gradients_agree_with_transformers(pair: Any, make_ids: Callable[..., Tensor]) -> None:
    ids = make_ids(2, T)
    weights = torch.randn(2, T, 97, generator=torch.Generator().manual_seed(1))
    gradients = []
    for model, logits in (
        (pair.reference, pair.reference(ids).logits),
        (pair.ours, pair.ours(ids)),
    ):
        named = dict(model.named_parameters())
        found = torch.autograd.grad((logits * weights).sum(), list(named.values()))
        gradients.append(dict(zip(named, found, strict=True)))
    theirs, ours = gradients
    for name, gradient in ours.items():
        is_conv1d = gradient.shape != theirs[name].shape or "c_proj.weight" in name
        wanted = theirs[name].T if is_conv1d else theirs[name]
        difference = (gradient - wanted).norm() / wanted.norm()
        assert difference.item() < 1e-4, name


def test_every_linear_and_the_embedding_are_called_as_modules(
    pair: Any, make_ids: Callable[..., Tensor]
) -> None:
    called: set[str] = set()
    hooks = []
    wanted = set()
    for name, module in pair.ours.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            wanted.add(name)
            hooks.append(module.register_forward_hook(lambda *_, name=name: called.add(name)))
    pair.ours(make_ids(1, 4))
    for hook in hooks:
        hook.remove()
    assert called == wanted


def llama_config(**overrides: Any) -> dict[str, Any]:
    sizes = {
        "model_type": "llama",
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return {**sizes, **overrides}


def test_a_tied_head_is_the_embedding_itself() -> None:
    tied = build_decoder(decoder_config(llama_config(tie_word_embeddings=True)))
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    free = build_decoder(decoder_config(llama_config(tie_word_embeddings=False)))
    assert free.lm_head.weight is not free.get_input_embeddings().weight
    assert tied.get_output_embeddings() is tied.output_head() is tied.lm_head


def test_random_values_come_from_the_seed_alone() -> None:
    config = decoder_config(llama_config(attention_bias=True))
    torch.manual_seed(3)
    first, second = build_decoder(config, seed=7), build_decoder(config, seed=7)
    other = build_decoder(config, seed=8)
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(first.get_parameter(q_proj), other.get_parameter(q_proj))
    assert abs(first.get_parameter(q_proj).std().item() - INIT_STD) < 0.002
    assert first.get_parameter("model.norm.weight").eq(1).all()
    assert first.get_parameter("model.layers.1.self_attn.q_proj.bias").eq(0).all()


def test_gemmas_neutral_norm_is_zero() -> None:
    config = llama_config(model_type="gemma3_text", head_dim=8)
    model = build_decoder(decoder_config(config), dtype=torch.bfloat16)
    assert model.get_parameter("model.norm.weight").eq(0).all()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_an_empty_decoder_has_no_storage() -> None:
    model = build_empty_decoder(decoder_config(llama_config()))
    assert all(parameter.is_meta for parameter in model.parameters())


def tiny() -> Decoder:
    return build_decoder(decoder_config(llama_config()), seed=1)


def test_a_full_cache_is_an_error() -> None:
    model = tiny()
    cache = model.new_cache(1, 4)
    model(torch.zeros(1, 3, dtype=torch.int64), cache=cache)
    with pytest.raises(
        ModelError, match=r"cache 2 more tokens.*batch size 1 and max_tokens 4, 3 of them"
    ):
        model(torch.zeros(1, 2, dtype=torch.int64), cache=cache)


def test_a_cache_of_another_batch_size_is_an_error() -> None:
    model = tiny()
    with pytest.raises(ModelError, match="for a batch of 1: the cache has batch size 3"):
        model(torch.zeros(1, 2, dtype=torch.int64), cache=model.new_cache(3, 4))


def test_a_cache_has_the_models_dtype_or_a_given_one() -> None:
    model = tiny()
    assert model.new_cache(1, 4).keys[0].dtype == torch.float32
    cache: KVCache = model.new_cache(1, 4, dtype=torch.bfloat16)
    assert cache.keys[0].dtype == torch.bfloat16
    assert model(torch.zeros(1, 2, dtype=torch.int64), cache=cache).dtype == torch.float32


def test_learned_positions_have_an_end(build_pair: Callable[..., Any]) -> None:
    model = build_pair("gpt2").ours
    with pytest.raises(ModelError, match=r"65 positions.*learned position embeddings for 64"):
        model(torch.zeros(1, 65, dtype=torch.int64))


def test_frequencies_stay_in_fp32_when_the_model_is_cast() -> None:
    model = tiny().to(torch.bfloat16)
    (rope,) = model.trunk.ropes.values()
    cos, _ = rope.tables(torch.tensor([[1000]]), torch.float32)
    assert cos[0, 0, 0, 0].item() == pytest.approx(torch.tensor(1000.0).cos().item(), abs=1e-6)


def test_bf16_stays_near_fp32(make_ids: Callable[..., Tensor]) -> None:
    wide = tiny()
    narrow = build_decoder(decoder_config(llama_config()), seed=1, dtype=torch.bfloat16)
    ids = make_ids(2, 12) % 50
    difference = (narrow(ids).float() - wide(ids)).norm() / wide(ids).norm()
    assert narrow(ids).dtype == torch.bfloat16
    assert difference.item() < 0.02
