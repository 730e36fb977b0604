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

from lora.decoder.language_model import LanguageModel
from lora.fast.memory.sections import (
    AFTER,
    BEFORE,
    HEAD,
    NOTHING,
    Bytes,
    Label,
    Section,
    peak_of,
    representatives,
)
from lora.fast.memory.traced_model import captured_loss, plain_loss, traced_model
from lora.kernels.cross_entropy import CHUNK_TOKENS
from lora.kernels.unpack.tracing import traced_as_on_gpu

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
        captured: the step is the captured one, whose loss is another.
        on_gpu: packed weights are unpacked by a kernel.
        holds_gradients: False drops each gradient of a parameter as soon as it is there, as sharded
            training does.
        whole: run every block and every chunk of the loss, not one of each kind. The result is the
            same; it is for tests.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        compute_dtype: torch.dtype,
        captured: bool = False,
        on_gpu: bool = False,
        holds_gradients: bool = True,
        whole: bool = False,
    ) -> None:
        self._unpacking = traced_as_on_gpu if on_gpu else nullcontext
        self.model, self.compute_dtype, self.whole = model, compute_dtype, whole
        self.holds_gradients, self.captured = holds_gradients, captured
        self._traced_model = traced_model(model, compute_dtype, captured=captured)
        kinds = self._traced_model.kinds()
        self._stands_for = list(range(len(kinds))) if whole else representatives(kinds)
        """For each block of the model: which of them is traced in its place."""
        self.n_operations = 0
        """Of the last trace."""
        self._traced = sorted(set(self._stands_for))
        self._traced_model.retain(self._traced)
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
        self.model.train(learns)  # dropout has masks
        with self._fake, autocast, torch.set_grad_enabled(learns), self._unpacking():
            ids = torch.zeros(batch_size, tokens, dtype=torch.int64)  # (B, T)
            n_tokens = batch_size * tokens
            is_captured = self.captured and learns  # a validation pass is the plain one
            n_learned = n_tokens if is_captured else max(1, round(learned_fraction * n_tokens))
            live = _Live(self.model, holds_gradients=self.holds_gradients)
            with live, _marked(self.model.blocks(), self._traced, live):
                hidden = self._traced_model.hidden(ids, packed=packed)
                live.phase = "loss"
                # A copy, as the loss selects the rows of learned tokens: which ones does not
                # matter.
                learned = hidden if n_learned == n_tokens else hidden[:n_learned].clone()
                loss = self._loss(learned, ids.flatten()[:n_learned], is_captured=is_captured)
                live.phase = "backward"
                del hidden, learned  # else this function would keep them alive through backward
                if loss.requires_grad:
                    loss.backward()
            live.finish()
            self.n_operations = live.n_operations
            self.model.zero_grad()
        return _at_peak(peak_of(live.sections, self._stands_for))

    def _loss(self, learned: Tensor, labels: Tensor, *, is_captured: bool) -> Tensor:
        if is_captured:
            return captured_loss(self.model, learned, labels)
        # Its tensors have a row for each learned token however many labels there are, and one chunk
        # of it holds as much as the next.
        return plain_loss(self.model, learned, labels if self.whole else labels[:CHUNK_TOKENS])


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
    def before(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        states = inputs[0] if inputs else named["hidden_states"]
        if is_first and states.requires_grad:
            states.register_hook(lambda _: live.begin(AFTER))
        live.begin(("forward", label))

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        states = output if isinstance(output, Tensor) else output[0]
        # A hook on a tensor runs when its gradient is there, before the operation that made it.
        if states.requires_grad:
            states.register_hook(lambda _: live.begin(("backward", label)))

    return [
        block.register_forward_pre_hook(before, with_kwargs=True),
        block.register_forward_hook(after),
    ]


def _grouped_mm(x: Tensor, y: Tensor, offs: Tensor, *_: object, **settings: object) -> Tensor:
    """Return the output of experts' matmul: torch knows its shape for bf16 alone."""
    shape = x.shape[0], y.shape[-1]
    # Two matrices are multiplied expert by expert: the weights' gradients.
    return x.new_empty(offs.shape + shape if x.ndim == y.ndim == 2 else shape)


class _Live(TorchDispatchMode):
    """Counts the bytes of all live storages that operations allocated, by phase and section."""

    def __init__(self, model: nn.Module, *, holds_gradients: bool) -> None:
        super().__init__()
        self.holds_gradients = holds_gradients
        self.phase: Phase = "forward"
        self.bytes_in: dict[Phase, int] = {"forward": 0, "loss": 0, "backward": 0}
        self.gradients, self.n_operations = 0, 0
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
        self.n_operations += 1
        if func is torch.ops.aten._grouped_mm.default:
            results = _grouped_mm(*args, **(kwargs or {}))
        else:
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
