"""The peak memory of an autograd training step, found by running it on fake tensors.

Fake tensors have shapes and no memory, so a step of any size is traced on any machine. Each storage
is counted from the operation that allocates it to the moment nothing references it. Of blocks that
are alike only one is run (`lora.fast.memory.sections`), so a trace takes a fraction of a second.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from lora.decoder.attention import NO_CACHE, TokenPositions
from lora.decoder.decoder import Decoder
from lora.fast.memory.sections import (
    AFTER,
    BEFORE,
    HEAD,
    NOTHING,
    Bytes,
    Label,
    Section,
    block_kinds,
    peak_of,
    representatives,
    retain_blocks,
)
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


class StepTracer:
    """Traces the steps of one model, of any size, on fake tensors.

    Changes `model` in place: its tensors become fake ones, and most of its blocks go.

    Args:
        model: on the meta device, with LoRA applied or all of it trained.
        compute_dtype: of matmuls, through autocast where it is bf16.
        holds_gradients: False drops each gradient of a parameter as soon as it is there, as sharded
            training does.
        whole: run every block and every chunk of the loss, not one of each kind. The result is the
            same; it is for tests.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        compute_dtype: torch.dtype,
        holds_gradients: bool = True,
        whole: bool = False,
    ) -> None:
        self.model, self.compute_dtype, self.whole = model, compute_dtype, whole
        self.holds_gradients = holds_gradients
        kinds = block_kinds(model)
        self._stands_for = list(range(len(kinds))) if whole else representatives(kinds)
        """For each block of the model: which of them is traced in its place."""
        self._traced = sorted(set(self._stands_for))
        retain_blocks(model.trunk.blocks(), self._traced)
        # Rotary frequencies are real tensors.
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self._fake:
            _fill_with_fakes(model)

    def trace(
        self,
        batch_size: int,
        tokens: int,
        *,
        packed: bool,
        learned_fraction: float = 1.0,
        learns: bool = True,
    ) -> StepMemory:
        """Return what forward, loss and backward of one micro-batch hold at their peak.

        Args:
            batch_size: B.
            tokens: T.
            packed: sequences of several documents, which need a mask (B, 1, T, T).
            learned_fraction: of the tokens, those with a target in the loss.
            learns: False for a validation pass, which saves nothing for backward.
        """
        autocast = _autocast(self.compute_dtype)
        with self._fake, autocast, torch.set_grad_enabled(learns):
            ids = torch.zeros(batch_size, tokens, dtype=torch.int64)  # (B, T)
            n_tokens = batch_size * tokens
            n_learned = max(1, round(learned_fraction * n_tokens))
            live = _Live(self.model, holds_gradients=self.holds_gradients)
            with live, _marked(self.model.trunk.blocks(), self._traced, live):
                hidden = _hidden(self.model, ids, packed=packed)
                live.phase = "loss"
                # A copy, as the loss selects the rows of learned tokens: which ones does not
                # matter.
                learned = hidden if n_learned == n_tokens else hidden[:n_learned].clone()
                labels = ids.flatten()[: self._n_labels(n_learned)]
                weight = self.model.output_head().weight
                loss = learned_cross_entropy(learned, weight, labels, CHUNK_TOKENS)
                live.phase = "backward"
                del hidden, learned  # else this function would keep them alive through backward
                if loss.requires_grad:
                    loss.backward()
            live.finish()
            self.model.zero_grad()
        return _at_peak(peak_of(live.sections, self._stands_for))

    def _n_labels(self, n_learned: int) -> int:
        """Return how many labels the loss is traced with.

        Its tensors have a row for each learned token however many labels there are, and one chunk
        of it holds as much as the next.
        """
        return n_learned if self.whole else min(n_learned, CHUNK_TOKENS)


def _fill_with_fakes(model: nn.Module) -> None:
    """Changes `model` in place: its tensors become new ones on the CPU; ties stay."""
    fakes: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            fake = fakes.get(id(parameter))
            if fake is None:
                values = torch.empty(parameter.shape, dtype=parameter.dtype)
                fake = fakes[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
            setattr(module, name, fake)
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _at_peak(peak: Bytes) -> StepMemory:
    # Gradients are allocated in backward too, but are a part of their own.
    activations = max(0, peak.forward + peak.backward - peak.gradients)
    return StepMemory(activations, peak.loss, peak.gradients)


def _hidden(model: Decoder, ids: Tensor, *, packed: bool) -> Tensor:
    """Return the head's input (B·T, C), through the mask that packed sequences have."""
    positions = TokenPositions(torch.zeros_like(ids), ids if packed else None, NO_CACHE)
    x = model.get_input_embeddings()(ids)  # (B, T, C)
    return model.trunk.through_blocks(x, positions).flatten(0, 1)  # (B·T, C)


def _autocast(dtype: torch.dtype) -> AbstractContextManager[object]:
    return nullcontext() if dtype is torch.float32 else torch.autocast("cpu", dtype=dtype)


@contextmanager
def _marked(blocks: nn.ModuleList, labels: Sequence[int], live: _Live) -> Iterator[None]:
    """Within the block, `live` begins a section at the boundaries of `blocks`, in both passes."""
    handles = []
    for label, block in zip(labels, blocks, strict=True):
        handles += _mark_block(block, label, live, is_first=block is blocks[0])
    handles.append(blocks[-1].register_forward_hook(lambda *_: live.begin(HEAD)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mark_block(
    block: nn.Module, label: int, live: _Live, *, is_first: bool
) -> list[RemovableHandle]:
    def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        if is_first and inputs[0].requires_grad:
            inputs[0].register_hook(lambda _: live.begin(AFTER))
        live.begin(("forward", label))

    def after(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        # A hook on a tensor runs when its gradient is there, before the operation that made it.
        if output.requires_grad:
            output.register_hook(lambda _: live.begin(("backward", label)))

    return [block.register_forward_pre_hook(before), block.register_forward_hook(after)]


class _Live(TorchDispatchMode):
    """Counts the bytes of all live storages that operations allocated, by phase and section."""

    def __init__(self, model: nn.Module, *, holds_gradients: bool) -> None:
        super().__init__()
        self.holds_gradients = holds_gradients
        self.phase: Phase = "forward"
        self.bytes_in: dict[Phase, int] = {"forward": 0, "loss": 0, "backward": 0}
        self.gradients = 0
        self._section = Section(NOTHING)
        self.sections: dict[Label, Section] = {BEFORE: self._section}
        # Views share a storage: it counts once. Weak keys, so that counting keeps none alive.
        self._seen = WeakIdKeyDictionary()
        self._handles = []
        for tensor in (*model.parameters(), *model.buffers()):
            self._seen[tensor.untyped_storage()] = True
            if tensor.requires_grad:
                hook = tensor.register_post_accumulate_grad_hook(self._note_gradient)
                self._handles.append(hook)

    def begin(self, label: Label) -> None:
        """End the section and begin the one called `label`."""
        self._section.end = self._now()
        self._section = self.sections[label] = Section(self._now())

    def finish(self) -> None:
        """End the last section, and leave the model's parameters alone."""
        self._section.end = self._now()
        for handle in self._handles:
            handle.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, results)
        return results

    def _now(self) -> Bytes:
        return Bytes(**self.bytes_in, gradients=self.gradients)

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
        if not self.holds_gradients:
            parameter.grad = None  # its storage is forgotten; at its fullest it was counted
            return
        self.gradients += parameter.grad.untyped_storage().nbytes()
        self._look()

    def _look(self) -> None:
        now, peak = self._now(), self._section.peak
        # At equal totals the later one, as gradients turn from activations into a part of their
        # own.
        if peak is None or now.total >= peak.total:
            self._section.peak = now
