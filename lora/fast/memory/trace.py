"""The peak memory of an autograd training step, found by running it on fake tensors.

Fake tensors have shapes and no memory, so a step of any size is traced in seconds, on any machine.
Every storage is counted from the operation that allocates it to the moment nothing references it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from lora.decoder.attention import NO_CACHE, TokenPositions
from lora.decoder.config import DecoderConfig
from lora.decoder.decoder import Decoder, assign_parameters, build_empty_decoder
from lora.kernels.cross_entropy import CHUNK_TOKENS, learned_cross_entropy

Phase = str
"""forward, loss or backward: where a tensor was allocated."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes beside the weights at the peak of a step."""

    activations: int
    """Saved by the forward pass, and allocated by the backward pass."""
    loss: int
    """Logits, and what else the loss allocates."""
    gradients: int
    """Of what trains."""


def trace_step(
    config: DecoderConfig,
    prepare: Callable[[Decoder], nn.Module],
    batch_size: int,
    tokens: int,
    *,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    packed: bool,
    learned_fraction: float = 1.0,
    learns: bool = True,
) -> StepMemory:
    """Return what forward, loss and backward of one micro-batch hold at their peak.

    Args:
        config: of the decoder.
        prepare: applies LoRA, or lets all weights train.
        batch_size: B.
        tokens: T.
        dtype: of the base's weights.
        compute_dtype: of matmuls, through autocast where it is bf16.
        packed: sequences of several documents, which need a mask (B, 1, T, T).
        learned_fraction: of the tokens, those with a target in the loss.
        learns: False for a validation pass, which saves nothing for backward.
    """
    with FakeTensorMode(), _autocast(compute_dtype), torch.set_grad_enabled(learns):
        model = build_empty_decoder(config)
        shapes = [(name, p.shape) for name, p in model.named_parameters()]
        assign_parameters(model, [(name, torch.empty(x, dtype=dtype)) for name, x in shapes])
        prepare(model)
        ids = torch.zeros(batch_size, tokens, dtype=torch.int64)  # (B, T)
        n_tokens = batch_size * tokens
        n_learned = max(1, round(learned_fraction * n_tokens))
        live = _Live(model)
        with live:
            hidden = _hidden(model, ids, packed=packed)
            live.phase = "loss"
            # A copy, as the loss selects the rows of learned tokens: which ones does not matter.
            learned = hidden if n_learned == n_tokens else hidden[:n_learned].clone()
            labels = ids.flatten()[:n_learned]
            weight = model.output_head().weight
            loss = learned_cross_entropy(learned, weight, labels, CHUNK_TOKENS)
            live.phase = "backward"
            del hidden, learned  # else this function would keep them alive through backward
            if loss.requires_grad:
                loss.backward()
    return live.at_peak


def _hidden(model: Decoder, ids: Tensor, *, packed: bool) -> Tensor:
    """Return the head's input (B·T, C), through the mask that packed sequences have."""
    positions = TokenPositions(torch.zeros_like(ids), ids if packed else None, NO_CACHE)
    x = model.get_input_embeddings()(ids)  # (B, T, C)
    return model.trunk.through_blocks(x, positions).flatten(0, 1)  # (B·T, C)


def _autocast(dtype: torch.dtype) -> AbstractContextManager[object]:
    return nullcontext() if dtype is torch.float32 else torch.autocast("cpu", dtype=dtype)


class _Live(TorchDispatchMode):
    """Counts the bytes of all live storages that operations allocated, by phase."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.phase: Phase = "forward"
        self.bytes_in: dict[Phase, int] = {"forward": 0, "loss": 0, "backward": 0}
        self.gradients, self.peak = 0, -1
        self.at_peak = StepMemory(0, 0, 0)
        # Views share a storage: it counts once. Weak keys, so that counting keeps none alive.
        self._seen = WeakIdKeyDictionary()
        for parameter in model.parameters():
            self._seen[parameter.untyped_storage()] = True
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._note_gradient)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, results)
        return results

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen[storage] = True
        n_bytes, phase = storage.nbytes(), self.phase
        self.bytes_in[phase] += n_bytes
        weakref.finalize(storage, self._forget, phase, n_bytes)
        self._look()

    def _forget(self, phase: Phase, n_bytes: int) -> None:
        self.bytes_in[phase] -= n_bytes

    def _note_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.gradients += parameter.grad.untyped_storage().nbytes()
        self._look()

    def _look(self) -> None:
        total = sum(self.bytes_in.values())
        if total >= self.peak:
            self.peak = total
            live = self.bytes_in
            # Gradients are allocated in backward too, but are a part of their own.
            activations = max(0, live["forward"] + live["backward"] - self.gradients)
            self.at_peak = StepMemory(activations, live["loss"], self.gradients)
