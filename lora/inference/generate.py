"""Text from a decoder: batched, with a cache, each row as if it were alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lora.config import SamplingConfig
from lora.decoder.decoder import Decoder
from lora.errors import DataError, ModelError

PADDING_DOCUMENT = -1


@torch.inference_mode()
def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig | None = None,
    *,
    stop_ids: Sequence[int] = (),
    on_token: Callable[[int, int], None] = lambda row, token: None,
) -> list[list[int]]:
    """Return the new tokens of each prompt, without the stop token that ended them.

    Prompts of different length share a batch; a row's answer does not depend on its neighbours
    beyond rounding. `on_token(row, token)` hears of each token as it comes. Raises DataError for
    an empty prompt or a token that the model does not have, ModelError if its logits are not
    finite.
    """
    sampling = sampling or SamplingConfig()
    _check_prompts(prompts, model.config.vocab_size)
    if not prompts:
        return []
    with _evaluating(model):
        return _generate(model, prompts, sampling, frozenset(stop_ids), on_token)


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise DataError("An answer was asked for to an empty prompt: give it a token at least.")
        outside = [token for token in (min(prompt), max(prompt)) if not 0 <= token < vocab_size]
        if outside:
            raise DataError(
                f"Prompt {number} has token {outside[0]}: the model has {vocab_size:,} tokens, "
                f"from 0. Use the tokenizer that belongs to it."
            )


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while; what was switched off before stays so afterwards."""
    were_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in were_training:
            module.training = True


def _generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    stop_ids: frozenset[int],
    on_token: Callable[[int, int], None],
) -> list[list[int]]:
    device = next(model.parameters()).device
    input_ids, positions, documents = _left_padded(prompts, device)
    cache = model.new_cache(len(prompts), input_ids.shape[1] + sampling.max_new_tokens)
    logits = _last_logits(
        model, input_ids, position_ids=positions, document_ids=documents, cache=cache
    )
    draws = [torch.Generator().manual_seed(sampling.seed + row) for row in range(len(prompts))]
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # row of the batch -> prompt
    for made in range(1, sampling.max_new_tokens + 1):
        tokens = _choose(logits, sampling, [draws[row] for row in rows])
        kept = []
        for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if token in stop_ids:
                continue
            answers[row].append(token)
            on_token(row, token)
            kept.append(place)
        if not kept or made == sampling.max_new_tokens:
            break
        if len(kept) < len(rows):  # rows that have ended cost nothing more
            cache.select_sequences(torch.tensor(kept, device=device))
            rows = [rows[place] for place in kept]
        following = torch.tensor([[tokens[place]] for place in kept], device=device)  # (B, 1)
        logits = _last_logits(model, following, cache=cache)
    return answers


def _last_logits(model: Decoder, input_ids: Tensor, **places: object) -> Tensor:
    hidden = model.hidden_states(input_ids, **places)[:, -1]  # type: ignore[arg-type]  # (B, C)
    return model.output_head()(hidden)  # (B, V): only the last token's, V is wide


def _left_padded(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    longest = max(map(len, prompts))
    input_ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    positions = torch.zeros_like(input_ids)
    documents = torch.full_like(input_ids, PADDING_DOCUMENT)
    for row, prompt in enumerate(prompts):
        start = longest - len(prompt)
        input_ids[row, start:] = torch.tensor(prompt)
        positions[row, start:] = torch.arange(len(prompt))
        documents[row, start:] = 0
    return input_ids.to(device), positions.to(device), documents.to(device)  # each (B, T)


def _choose(
    logits: Tensor, sampling: SamplingConfig, draws: Sequence[torch.Generator]
) -> list[int]:
    if sampling.temperature == 0:
        best = logits.max(-1)
        _check_finite(best.values)  # the host waits here
        return [int(token) for token in best.indices.tolist()]
    wide = logits.float().cpu() / sampling.temperature  # (B, V); draws are made on the CPU
    ordered, order = wide.sort(dim=-1, descending=True, stable=True)  # (B, V)
    _check_finite(ordered[:, 0])
    if sampling.top_k:
        ordered[:, sampling.top_k :] = -torch.inf
    shares = ordered.softmax(-1)  # (B, V)
    if sampling.top_p < 1:
        # The token that crosses the limit stays in, so there is always one to draw.
        shares = shares.masked_fill(shares.cumsum(-1) - shares >= sampling.top_p, 0.0)
    chosen = [
        torch.multinomial(share, 1, generator=draw)
        for share, draw in zip(shares, draws, strict=True)
    ]
    return [int(places[place]) for places, place in zip(order, chosen, strict=True)]


def _check_finite(largest: Tensor) -> None:
    """Raise ModelError unless the `largest` logits (B,) are numbers; NaN counts as largest."""
    if not bool(largest.isfinite().all()):
        raise ModelError(
            "The model's logits are not finite: no token can be chosen from them. Its weights are "
            "damaged or a training run diverged, or it needs bf16 or fp32 instead of fp16."
        )
