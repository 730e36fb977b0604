"""Text from a decoder: batched, with a cache, each row as if it were alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora.decoder.decoder import Decoder
from lora.errors import ConfigError, DataError

PADDING_DOCUMENT = -1


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen."""

    max_new_tokens: int = 256
    """Most tokens of an answer."""
    temperature: float = 0.0
    """0 takes the likeliest token; 1 draws from the model's own distribution."""
    top_k: int = 0
    """Draw from so many of the likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    seed: int = 0
    """Of the draws; row number n of a batch draws with seed + n."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens}: allowed is an int ≥ 1")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature}: allowed is a number ≥ 0")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"top_k={self.top_k}, top_p={self.top_p}: allowed are ≥ 0 and 0 < top_p ≤ 1"
            )


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
    an empty prompt.
    """
    sampling = sampling or SamplingConfig()
    if any(not prompt for prompt in prompts):
        raise DataError("An answer was asked for to an empty prompt: give it at least one token.")
    if not prompts:
        return []
    was_training = model.training
    model.eval()
    try:
        return _generate(model, prompts, sampling, frozenset(stop_ids), on_token)
    finally:
        model.train(was_training)


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
            cache.select_rows(torch.tensor(kept, device=device))
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
        return [int(token) for token in logits.argmax(-1).tolist()]  # the host waits here
    wide = logits.float().cpu() / sampling.temperature  # (B, V); draws are made on the CPU
    if sampling.top_k:
        least = wide.topk(min(sampling.top_k, wide.shape[-1])).values[:, -1:]  # (B, 1)
        wide = wide.masked_fill(wide < least, -torch.inf)
    shares, order = wide.softmax(-1).sort(-1, descending=True)  # (B, V)
    if sampling.top_p < 1:
        # The token that crosses the limit stays in, so there is always one to draw.
        shares = shares.masked_fill(shares.cumsum(-1) - shares >= sampling.top_p, 0.0)
    chosen = [
        torch.multinomial(share, 1, generator=draw)
        for share, draw in zip(shares, draws, strict=True)
    ]
    return [int(places[place]) for places, place in zip(order, chosen, strict=True)]
