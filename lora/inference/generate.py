"""Batched text generation with a KV cache; each sequence gets the answer it would get alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lora.config import SamplingConfig
from lora.decoder.language_model import LanguageModel
from lora.device import available_bytes
from lora.errors import ConfigError, DataError, ModelError

MAX_BATCH_PROMPTS = 256
MEMORY_FRACTION = 0.25
"""Of the free memory: what the prompts that are answered together may take."""
MIN_TEMPERATURE = 1e-30
"""Below it only the most likely token has a probability, and logits / temperature overflows."""
PADDING_DOCUMENT = -1
"""Document id of padding: tokens attend within their document, so never to padding."""


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig | None = None,
    *,
    stop_ids: Sequence[int] = (),
    on_token: Callable[[int, int], None] = lambda prompt, token: None,
    numbers: Sequence[int] | None = None,
    free_bytes: int | None = None,
) -> list[list[int]]:
    """Return the new tokens of each prompt, without the stop token that ended them.

    Prompts of different lengths share a batch, as many as memory has room for; up to rounding, an
    answer does not depend on the other prompts. `on_token(index of the prompt, token)` is called
    with each new token. A prompt is sampled with the seed of `sampling` plus its number: of
    `numbers`, else its index. `free_bytes` is the memory to count with; None: what is free here.

    Raises DataError for an empty prompt or a token outside the vocabulary, ConfigError if the
    memory has no room for `max_new_tokens`, ModelError if the logits are not finite.
    """
    sampling = sampling or SamplingConfig()
    check_prompts(prompts, model.config.vocab_size)
    if not prompts:
        return []
    numbers = range(len(prompts)) if numbers is None else numbers
    lengths = [len(prompt) for prompt in prompts]
    batches = _split_by_memory(model, lengths, sampling, free_bytes)
    answers: list[list[int]] = []
    with _eval_mode(model):
        for batch in batches:

            def tell(index: int, token: int, first: int = batch.start) -> None:
                on_token(first + index, token)

            # A generator for each prompt: its tokens do not depend on how many others are sampled
            # with it.
            seeds = [sampling.seed + numbers[index] for index in batch]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            asked = prompts[batch.start : batch.stop]
            answers += _generate(model, asked, sampling, generators, frozenset(stop_ids), tell)
    return answers


def _split_by_memory(
    model: LanguageModel, lengths: Sequence[int], sampling: SamplingConfig, free_bytes: int | None
) -> list[range]:
    """Return the prompts that are answered together, in order.

    Raises ConfigError if the cache of one prompt needs more memory than there is.
    """
    first = next(model.parameters())
    free = available_bytes(first.device.type) if free_bytes is None else free_bytes
    token_bytes = model.token_cache_bytes()
    cache_bytes = (max(lengths) + sampling.max_new_tokens) * token_bytes
    if free is not None and cache_bytes > free:
        raise ConfigError(
            f"Cannot generate {sampling.max_new_tokens} tokens after a prompt of {max(lengths)}: "
            f"their keys and values take {cache_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are "
            "free. Lower max_new_tokens."
        )
    if free is None:
        return [range(i, min(i + 16, len(lengths))) for i in range(0, len(lengths), 16)]
    batches, start, longest = [], 0, 0
    for number, length in enumerate(lengths):
        longest = max(longest, length)
        n_prompts = number + 1 - start
        # Beside the cache: the mask and scores of padded attention, hidden states, logits.
        each = (longest + sampling.max_new_tokens) * token_bytes + 8 * longest**2
        each += 64 * longest * model.config.hidden_size + 32 * model.config.vocab_size
        is_full = n_prompts * each > free * MEMORY_FRACTION or n_prompts > MAX_BATCH_PROMPTS
        if is_full and number > start:
            batches.append(range(start, number))
            start, longest = number, length
    return [*batches, range(start, len(lengths))]


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raise DataError for an empty prompt, or one with a token outside the vocabulary."""
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"Cannot generate from prompt {number}: it is empty. Give it a token.")
        outside = [token for token in (min(prompt), max(prompt)) if not 0 <= token < vocab_size]
        if outside:
            raise DataError(
                f"Cannot generate from prompt {number}: it has token {outside[0]}. Allowed: 0 to "
                f"{vocab_size - 1}. Use the model's own tokenizer."
            )


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Within the block dropout is off; afterwards each module is in the mode it was in."""
    were_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in were_training:
            module.training = True


def _generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    generators: Sequence[torch.Generator],
    stop_ids: frozenset[int],
    on_token: Callable[[int, int], None],
) -> list[list[int]]:
    device = next(model.parameters()).device
    input_ids, positions, documents = _left_padded(prompts, device)
    cache = model.new_cache(len(prompts), input_ids.shape[1] + sampling.max_new_tokens)
    logits = _last_logits(
        model, input_ids, position_ids=positions, document_ids=documents, cache=cache
    )
    answers: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))  # index in the batch -> prompt
    for n_new in range(1, sampling.max_new_tokens + 1):
        tokens = _choose_tokens(logits, sampling, [generators[i] for i in active])
        kept = []
        for index, (prompt, token) in enumerate(zip(active, tokens, strict=True)):
            if token in stop_ids:
                continue
            answers[prompt].append(token)
            on_token(prompt, token)
            kept.append(index)
        if not kept or n_new == sampling.max_new_tokens:
            break
        if len(kept) < len(active):  # a sequence that has ended leaves the batch
            cache.select_sequences(torch.tensor(kept, device=device))
            active = [active[index] for index in kept]
        next_ids = torch.tensor([[tokens[index]] for index in kept], device=device)  # (B, 1)
        logits = _last_logits(model, next_ids, cache=cache)
    return answers


def _last_logits(model: LanguageModel, input_ids: Tensor, **inputs: object) -> Tensor:
    hidden = model.hidden_states(input_ids, **inputs)[:, -1]  # type: ignore[arg-type]  # (B, C)
    return model.logits_of(hidden)  # (B, V): of the last token alone, V is large


def _left_padded(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return token ids, positions and document ids of the prompts, each (B, T).

    Padded on the left, so that the last token of every prompt is in the last column.
    """
    longest = max(map(len, prompts))
    input_ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    positions = torch.zeros_like(input_ids)
    documents = torch.full_like(input_ids, PADDING_DOCUMENT)
    for i, prompt in enumerate(prompts):
        start = longest - len(prompt)
        input_ids[i, start:] = torch.tensor(prompt)
        positions[i, start:] = torch.arange(len(prompt))
        documents[i, start:] = 0
    return input_ids.to(device), positions.to(device), documents.to(device)


def _choose_tokens(
    logits: Tensor, sampling: SamplingConfig, generators: Sequence[torch.Generator]
) -> list[int]:
    """Return the next token of each sequence from its logits (B, V)."""
    if sampling.temperature < MIN_TEMPERATURE:
        best = logits.max(-1)
        _check_finite(best.values)  # the host waits for the device here
        return [int(token) for token in best.indices.tolist()]
    wide = logits.float().cpu() / sampling.temperature  # (B, V); sampled on the CPU, so that
    # a seed gives the same tokens on every device
    ordered, order = wide.sort(dim=-1, descending=True, stable=True)  # (B, V)
    _check_finite(ordered[:, 0])
    if sampling.top_k:
        ordered[:, min(sampling.top_k, ordered.shape[-1]) :] = -torch.inf
    probabilities = ordered.softmax(-1)  # (B, V)
    if sampling.top_p < 1:
        # The token that crosses top_p is kept, so there is always one to sample.
        before = probabilities.cumsum(-1) - probabilities  # (B, V): mass of more likely tokens
        is_out = before >= sampling.top_p
        is_out[:, 0] = False  # a top_p that is 0 in fp32 would leave none
        probabilities = probabilities.masked_fill(is_out, 0.0)
    ranks = [
        torch.multinomial(own, 1, generator=generator)
        for own, generator in zip(probabilities, generators, strict=True)
    ]
    return [int(tokens[rank]) for tokens, rank in zip(order, ranks, strict=True)]


def _check_finite(largest: Tensor) -> None:
    """Raise ModelError unless the `largest` logits (B,) are finite; max and sort put NaN first."""
    if not bool(largest.isfinite().all()):
        raise ModelError(
            "Cannot choose a token: the model's logits are not finite. Its weights are damaged, "
            "its training diverged, or it needs bf16 or fp32 instead of fp16."
        )
