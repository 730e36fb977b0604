"""Generated text against a simple loop without cache, padding or batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lora.config import SamplingConfig
from lora.decoder.cache import KVCache
from lora.decoder.decoder import Decoder, build_decoder
from lora.decoder.families import decoder_config
from lora.errors import ConfigError, DataError, ModelError
from lora.inference import generate as generation
from lora.inference.generate import generate

VOCAB = 53
_LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "gemma3": {
        **_LLAMA,
        "model_type": "gemma3_text",
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": False,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
        "tie_word_embeddings": False,
    },
}
PROMPTS = [[5, 9, 2, 7, 11, 30, 8], [3], [40, 41, 42, 17]]
FillRandom = Callable[..., torch.nn.Module]


def build(name: str, fill_random: FillRandom) -> Decoder:
    model = build_decoder(decoder_config(_CONFIGS[name]))
    fill_random(model, 5, std=1.0)  # of few seeds GPT-2 says more than one word
    return model.eval()


@pytest.fixture(scope="module", params=list(_CONFIGS))
def any_model(request: pytest.FixtureRequest, fill_random: FillRandom) -> Decoder:
    return build(request.param, fill_random)


@pytest.fixture(scope="module")
def model(fill_random: FillRandom) -> Decoder:
    return build("llama", fill_random)


@torch.no_grad()
def plain_greedy(model: Decoder, prompt: Sequence[int], n_tokens: int) -> list[int]:
    """Return the most likely tokens, each from a forward pass over all tokens before it."""
    ids = list(prompt)
    for _ in range(n_tokens):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def last_shares(model: Decoder, prompt: Sequence[int], temperature: float = 1.0) -> Tensor:
    """Return the distribution of the token after `prompt`, (V,)."""
    return (model(torch.tensor([list(prompt)]))[0, -1] / temperature).softmax(-1)


def first_tokens(model: Decoder, n_draws: int, **settings: Any) -> list[int]:
    """Return the first tokens sampled after `count` copies of the same prompt."""
    sampling = SamplingConfig(max_new_tokens=1, **{"temperature": 1.0, **settings})
    return [answer[0] for answer in generate(model, [PROMPTS[0]] * n_draws, sampling)]


def test_greedy_text_is_that_of_a_loop_without_a_cache(any_model: Decoder) -> None:
    wanted = [plain_greedy(any_model, prompt, 12) for prompt in PROMPTS]
    assert len({*wanted[0], *wanted[1], *wanted[2]}) > 3  # a model stuck on a token proves nothing
    answers = [generate(any_model, [p], SamplingConfig(max_new_tokens=12))[0] for p in PROMPTS]
    assert answers == wanted


def test_sequences_of_a_batch_are_as_if_alone(any_model: Decoder) -> None:
    wanted = [plain_greedy(any_model, prompt, 12) for prompt in PROMPTS]
    assert generate(any_model, PROMPTS, SamplingConfig(max_new_tokens=12)) == wanted


def test_sampled_sequences_are_as_if_alone_with_their_own_seed(model: Decoder) -> None:
    sampling = SamplingConfig(max_new_tokens=10, temperature=1.0, seed=7)
    together = generate(model, PROMPTS, sampling)
    for row, prompt in enumerate(PROMPTS):
        own = SamplingConfig(max_new_tokens=10, temperature=1.0, seed=7 + row)
        assert generate(model, [prompt], own) == [together[row]]


def test_a_stop_token_ends_its_sequence_alone_and_is_left_out(model: Decoder) -> None:
    wanted = [plain_greedy(model, prompt, 10) for prompt in PROMPTS]
    stop = wanted[0][4]
    ended = [row[: row.index(stop)] if stop in row else row for row in wanted]
    lengths = sorted(map(len, ended))
    assert lengths[0] < lengths[-1] == 10
    answers = generate(model, PROMPTS, SamplingConfig(max_new_tokens=10), stop_ids=[stop, VOCAB])
    assert answers == ended


def test_a_sequence_may_end_at_once(model: Decoder) -> None:
    stop = plain_greedy(model, PROMPTS[0], 1)[0]
    assert generate(model, PROMPTS[:1], stop_ids=[stop]) == [[]]


class _Counting(Decoder):
    """Records the batch size of each forward pass."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.rows: list[int] = []

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        self.rows.append(input_ids.shape[0])
        return super().hidden_states(
            input_ids, position_ids=position_ids, document_ids=document_ids, cache=cache
        )


def test_ended_sequences_leave_the_batch_and_the_last_token_costs_no_forward(
    model: Decoder,
) -> None:
    wanted = [plain_greedy(model, prompt, 10) for prompt in PROMPTS]
    stop = wanted[0][4]
    ends = [row.index(stop) if stop in row else 10 for row in wanted]
    counting = _Counting(model.config)
    counting.load_state_dict(model.state_dict())
    generate(counting, PROMPTS, SamplingConfig(max_new_tokens=10), stop_ids=[stop])
    # Token number n+1 needs a forward of the rows that are still going after n tokens.
    assert counting.rows == [sum(end >= n for end in ends) for n in range(max(ends))]
    assert counting.rows[0] == 3
    assert counting.rows[-1] < 3


def test_the_callback_gets_each_token_as_it_comes(model: Decoder) -> None:
    told: list[tuple[int, int]] = []
    answers = generate(
        model,
        PROMPTS,
        SamplingConfig(max_new_tokens=5),
        on_token=lambda row, token: told.append((row, token)),
    )
    assert [row for row, _ in told] == [0, 1, 2] * 5
    for row, answer in enumerate(answers):
        assert [token for told_row, token in told if told_row == row] == answer


def test_a_seed_gives_the_same_text_and_another_seed_another(model: Decoder) -> None:
    def text(seed: int) -> list[list[int]]:
        sampling = SamplingConfig(max_new_tokens=12, temperature=1.5, seed=seed)
        return generate(model, PROMPTS, sampling)

    torch.manual_seed(0)
    first = text(3)
    torch.manual_seed(1)  # the global generator plays no part
    assert text(3) == first
    assert text(4) != first


def test_sampling_does_not_use_the_global_generator(model: Decoder) -> None:
    before = torch.get_rng_state()
    first_tokens(model, 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_samples_follow_the_models_distribution(model: Decoder, temperature: float) -> None:
    n_draws = 2000
    shares = last_shares(model, PROMPTS[0], temperature)
    drawn = first_tokens(model, n_draws, temperature=temperature, seed=100)
    seen = torch.bincount(torch.tensor(drawn), minlength=VOCAB) / n_draws
    deviations = (shares * (1 - shares) / n_draws).sqrt()
    assert bool(((seen - shares).abs() <= 5 * deviations + 1 / n_draws).all())


def test_top_k_samples_the_k_most_likely(model: Decoder) -> None:
    likeliest = set(last_shares(model, PROMPTS[0]).topk(4).indices.tolist())
    assert set(first_tokens(model, 500, temperature=3.0, top_k=4)) == likeliest


def test_a_k_beyond_the_vocabulary_changes_nothing(model: Decoder) -> None:
    assert first_tokens(model, 50, top_k=10 * VOCAB) == first_tokens(model, 50)


@pytest.mark.parametrize("limit", [0.2, 0.6, 0.95])
def test_top_p_samples_the_smallest_set_that_reaches_it(model: Decoder, limit: float) -> None:
    shares, order = last_shares(model, PROMPTS[0], 2.0).sort(descending=True)
    n_kept = 1
    while float(shares[:n_kept].sum()) < limit:
        n_kept += 1
    drawn = set(first_tokens(model, 2000, temperature=2.0, top_p=limit))
    assert drawn <= set(order[:n_kept].tolist())
    likely = order[:n_kept][shares[:n_kept] > 0.01]
    assert set(likely.tolist()) <= drawn


def test_top_p_counts_what_top_k_left(model: Decoder) -> None:
    shares, order = last_shares(model, PROMPTS[0], 3.0).sort(descending=True)
    first, second = (shares[:2] / shares[:2].sum()).tolist()
    limit = first + second / 2  # of the two likeliest, not of all
    drawn = first_tokens(model, 300, temperature=3.0, top_k=2, top_p=limit)
    assert set(drawn) == set(order[:2].tolist())
    only = first_tokens(model, 300, temperature=3.0, top_k=2, top_p=first / 2)
    assert set(only) == {int(order[0])}


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}])
def test_narrow_sampling_is_greedy(model: Decoder, settings: dict[str, Any]) -> None:
    sampling = SamplingConfig(max_new_tokens=8, **{"temperature": 1.0, **settings})
    wanted = [plain_greedy(model, prompt, 8) for prompt in PROMPTS]
    assert generate(model, PROMPTS, sampling) == wanted


@pytest.mark.parametrize("limit", ["number", "memory"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_many_prompts_are_answered_in_batches_as_in_one(
    model: Decoder, limit: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [PROMPTS[n % 3] for n in range(40)]
    sampling = SamplingConfig(max_new_tokens=5, temperature=temperature, seed=3)
    whole = generate(model, prompts, sampling)
    sizes: list[int] = []
    begin = model.new_cache

    def counted(batch_size: int, *more: Any) -> KVCache:
        sizes.append(batch_size)
        return begin(batch_size, *more)

    monkeypatch.setattr(model, "new_cache", counted)
    if limit == "number":
        monkeypatch.setattr(generation, "MAX_BATCH_PROMPTS", 7)
    else:
        monkeypatch.setattr(generation, "available_bytes", lambda device_type: 1 << 20)
    seen: dict[int, list[int]] = {}
    found = generate(
        model, prompts, sampling, on_token=lambda row, token: seen.setdefault(row, []).append(token)
    )
    assert found == whole == [seen[n] for n in range(40)]
    assert len(sizes) > 3
    assert sum(sizes) == 40


def test_answers_that_memory_has_no_room_for_are_refused_in_words(model: Decoder) -> None:
    with pytest.raises(ConfigError, match=r"Cannot generate 1000000000 tokens after .* free"):
        generate(model, PROMPTS, SamplingConfig(max_new_tokens=10**9))


def test_numbers_at_the_edges_sample_what_they_mean(model: Decoder) -> None:
    greedy = generate(model, PROMPTS, SamplingConfig(max_new_tokens=4))
    for narrow in ({"top_p": 1e-6}, {"temperature": 1e-6}):
        sampling = SamplingConfig(**{"max_new_tokens": 4, "temperature": 1.0, **narrow})
        assert generate(model, PROMPTS, sampling) == greedy
    for wide in ({"temperature": 1e9}, {"top_k": 10**9}, {"seed": 2**63 - 1}):
        sampling = SamplingConfig(**{"max_new_tokens": 4, "temperature": 1.0, **wide})
        assert [len(tokens) for tokens in generate(model, PROMPTS, sampling)] == [4, 4, 4]


def test_no_prompts_and_empty_prompts(model: Decoder) -> None:
    assert generate(model, []) == []
    with pytest.raises(DataError, match=r"prompt 1: it is empty.*Give it a token"):
        generate(model, [[1, 2], []])


def test_a_prompt_of_tokens_that_the_model_does_not_have(model: Decoder) -> None:
    for token in (VOCAB, -1):
        with pytest.raises(DataError, match=rf"token {token}.*0 to {VOCAB - 1}.*tokenizer"):
            generate(model, [[1, token]])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(
    fill_random: FillRandom, temperature: float, value: float
) -> None:
    model = build("llama", fill_random)
    with torch.no_grad():
        model.lm_head.weight[7] = value
    with pytest.raises(ModelError, match="logits are not finite"):
        generate(model, PROMPTS, SamplingConfig(max_new_tokens=2, temperature=temperature))


def test_equal_logits_are_cut_to_k_all_the_same(fill_random: FillRandom) -> None:
    model = build("llama", fill_random)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert len(set(first_tokens(model, 200, top_k=3))) == 3


def test_training_mode_is_restored(fill_random: FillRandom) -> None:
    model = build("llama", fill_random)
    model.train()
    seen: list[bool] = []
    generate(
        model,
        PROMPTS,
        SamplingConfig(max_new_tokens=2),
        on_token=lambda row, token: seen.append(model.training),
    )
    assert model.training
    assert seen == [False] * 6
    with pytest.raises(DataError):
        generate(model, [[]])
    assert model.training


def test_modes_of_submodules_are_restored_one_by_one(fill_random: FillRandom) -> None:
    model = build("llama", fill_random)
    model.train()
    model.trunk.eval()  # as who freezes part of a model leaves it
    modes = [module.training for module in model.modules()]
    generate(model, PROMPTS, SamplingConfig(max_new_tokens=2))
    assert [module.training for module in model.modules()] == modes


def test_learned_positions_are_a_hard_limit(fill_random: FillRandom) -> None:
    model = build("gpt2", fill_random)
    assert len(generate(model, [[1] * 30], SamplingConfig(max_new_tokens=3))[0]) == 3
    with pytest.raises(ModelError, match=r"Cannot run 33 positions: .* for 32"):
        generate(model, [[1] * 30], SamplingConfig(max_new_tokens=4))


def test_the_parameters_stay_usable_for_training(fill_random: FillRandom) -> None:
    model = build("llama", fill_random)
    generate(model, PROMPTS, SamplingConfig(max_new_tokens=2))
    model(torch.tensor([PROMPTS[0]])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": 0}, ["max_new_tokens=0", "an int ≥ 1"]),
        ({"max_new_tokens": 1.5}, ["max_new_tokens=1.5", "an int ≥ 1"]),
        ({"temperature": -0.1}, ["temperature=-0.1", "0, or a finite number ≥"]),
        ({"temperature": float("nan")}, ["temperature=nan"]),
        ({"temperature": float("inf")}, ["temperature=inf"]),
        ({"top_k": -1}, ["top_k=-1", "an int ≥ 0"]),
        ({"top_k": 2.5}, ["top_k=2.5"]),
        ({"top_p": 0.0}, ["top_p=0.0", "must be ≥ 1e-06 and ≤ 1"]),
        ({"top_p": 1.5}, ["top_p=1.5"]),
        ({"seed": "a"}, ["seed='a'", "an int"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"top_k": -1, "top_p": 2.0, "temperature": -1.0}, ["top_k", "top_p", "temperature"]),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingConfig(**settings)
    for word in words:
        assert word in str(caught.value)
