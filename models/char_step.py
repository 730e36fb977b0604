"""The character GPT's training step on a CPU, with forward and backward written by hand.

What differs from `bigram_lm_v2`: queries, keys and values are one matmul; LoRA is merged into the
weights once a step; what trains lies in one flat buffer with one AdamW; autograd is not used. At
the sizes of this model a step is bound by the number of operations, and here there are few. The
same step does full fine-tuning, so that LoRA is compared with a baseline that is as fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.config import TrainConfig
from lora.device import DeviceChoice
from lora.fast.runner import DeviceStepRunner
from lora.fast.step import trains_all_weights
from lora.fast.weights.flat import FlatParameters, accumulate
from lora.fast.weights.norms_and_embeddings import WeightGroup
from lora.fast.weights.update import HostUpdate
from lora.lora_module import LoRALinear
from lora.training.checkpoint import OptimizerState
from lora.training.plain_step import PlainStepRunner
from lora.training.step_runner import StepRunner
from models.bigram_lm_v2 import BigramLanguageModel, Block, bigram_loss
from models.char_attention import MAX_TOKENS, DenseAttention, Scratch, Sizes
from models.char_linears import FusedLinears

Pair = tuple[Tensor, Tensor]

# What autograd itself calls in backward; that of relu can write its result over its input.
_norm_backward = torch.ops.aten.native_layer_norm_backward.default
_relu_backward = torch.ops.aten.threshold_backward.grad_input


class Norms:
    """Layer norms of one width: frozen, or training in full fine-tuning."""

    def __init__(
        self,
        modules: Sequence[nn.LayerNorm],
        flat: FlatParameters,
        dtype: torch.dtype,
        trains: bool,
    ) -> None:
        self.eps, self.trains = modules[0].eps, trains
        self.weight, self.bias = (
            WeightGroup(modules, flat, dtype, name=name) for name in ("weight", "bias")
        )

    def forward(self, norm: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the normed x (N, C), the means and 1 / deviation, each (N, 1)."""
        weight, bias = self.weight.tensors[norm], self.bias.tensors[norm]
        return torch.native_layer_norm(x, weight.shape, weight, bias, self.eps)

    def backward(
        self, norm: int, dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, *, first: bool
    ) -> Tensor:
        """Return dx (N, C); the gradients of weight and bias are added, or written if `first`."""
        weight, bias = self.weight.tensors[norm], self.bias.tensors[norm]
        dx, *gradients = _norm_backward(
            dy, x, weight.shape, mean, rstd, weight, bias, (True, self.trains, self.trains)
        )
        if self.weight.slot is not None and self.bias.slot is not None:
            for slot, gradient in zip((self.weight.slot, self.bias.slot), gradients, strict=True):
                accumulate(slot.gradients[norm], gradient, first=first)
        return dx


class CharNetwork:
    """The model's weights as tensors of the step; its parameters become views of `flat`.

    `embedding_lr_fraction` is the part of the learning rate that embeddings beside LoRA take.
    """

    def __init__(
        self,
        model: BigramLanguageModel,
        flat: FlatParameters,
        dtype: torch.dtype,
        embedding_lr_fraction: float,
    ) -> None:
        whole = trains_all_weights(model)
        blocks = cast(list[Block], list(model.blocks))
        sa, ffwd = [b.sa for b in blocks], [b.ffwd.net for b in blocks]

        def join(blocks: list[list[nn.Module]]) -> FusedLinears:
            return FusedLinears(blocks, flat, dtype, trains_all_weights=whole)

        def table(module: nn.Embedding) -> WeightGroup:
            fraction = 1.0 if whole else embedding_lr_fraction
            return WeightGroup([module], flat, dtype, lr_fraction=fraction)

        # Slots are reserved in this order, which is the layout of the flat buffer.
        self.qkv = join([[s.query, s.key, s.value] for s in sa])
        self.proj = join([[s.proj] for s in sa])
        self.wide = join([[net[0]] for net in ffwd])
        self.narrow = join([[net[2]] for net in ffwd])
        self.head = join([[model.lm_head]])
        self.linears = (self.qkv, self.proj, self.wide, self.narrow, self.head)
        norms = [norm for b in blocks for norm in (b.ln1, b.ln2)]
        self.norms = Norms([*norms, model.ln_f], flat, dtype, whole)
        self.tokens = table(model.token_embedding_table)
        self.positions = table(model.position_embedding_table)
        self.n_layers, self.n_heads = len(blocks), model.sizes.n_head
        self.attention: list[DenseAttention] = []
        self._shape = torch.Size()

    def fill(self) -> None:
        """Put all values into their slots, once these are allocated."""
        for linears in self.linears:
            linears.fill()
        for weights in (self.norms.weight, self.norms.bias, self.tokens, self.positions):
            weights.fill()

    def allocate(self, shape: torch.Size) -> None:
        """Allocate what a pass over a batch of `shape` (B, T) writes."""
        if shape == self._shape:
            return
        self._shape, (batch_size, n_tokens) = shape, shape
        for linears in self.linears:
            linears.allocate(batch_size * n_tokens)
        table = self.tokens.tensors[0]
        width = table.shape[1] // self.n_heads
        sizes = Sizes(batch_size, n_tokens, self.n_heads, width, table.dtype)
        scratch = Scratch(sizes)
        self.attention = [DenseAttention(sizes, scratch) for _ in range(self.n_layers)]

    def refresh(self) -> None:
        """Bring the weights that matmuls read up to date."""
        for linears in self.linears:
            linears.refresh()


class CharPass:
    """One forward and backward pass over a batch (B, T)."""

    def __init__(self, net: CharNetwork, idx: Tensor, *, first: bool) -> None:
        self.net, self.idx, self.first = net, idx, first
        # Saved activations: input, output, mean, 1 / deviation of each norm; of each block the
        # attention output and the feed-forward's hidden layer.
        self.norms: list[tuple[Tensor, ...]] = []
        self.blocks: list[tuple[Tensor, Tensor]] = []

    def run(self) -> Tensor:
        """Return the logits (B·T, V)."""
        net, (batch_size, n_tokens) = self.net, self.idx.shape
        net.allocate(self.idx.shape)
        x = F.embedding(self.idx, net.tokens.tensors[0])  # (B, T, C)
        x = x.add_(net.positions.tensors[0][:n_tokens])
        x = x.view(batch_size * n_tokens, -1)  # (B·T, C)
        for layer in range(net.n_layers):
            qkv = net.qkv.forward(layer, self._norm(2 * layer, x))  # (B·T, 3·C)
            # Each operation writes into the buffer that its reader's weight gradient reads later.
            attended = net.attention[layer].forward(qkv, net.proj.inputs[layer])  # (B·T, C)
            x = net.proj.forward(layer, attended).add_(x)
            normed, buffer = self._norm(2 * layer + 1, x), net.narrow.inputs[layer]
            hidden = net.wide.forward(layer, normed, buffer).relu_()  # (B·T, F)
            x = net.narrow.forward(layer, hidden).add_(x)
            self.blocks.append((attended, hidden))
        return net.head.forward(0, self._norm(2 * net.n_layers, x))

    def backward(self, d_logits: Tensor) -> None:
        """Put the gradients of all that trains into their slots, from `d_logits` (B·T, V)."""
        net, first = self.net, self.first
        last = 2 * net.n_layers
        dy = net.head.backward(0, self.norms[last][1], d_logits, first=first)
        dx = self._norm_backward(last, dy)
        for layer in reversed(range(net.n_layers)):
            attended, hidden = self.blocks[layer]
            buffer = net.wide.gradients[layer]
            dh = net.narrow.backward(layer, hidden, dx, first=first, out=buffer)  # (B·T, F)
            # relu was in place: its output is positive where its input was.
            _relu_backward(dh, hidden, 0, grad_input=dh)
            dy = net.wide.backward(layer, self.norms[2 * layer + 1][1], dh, first=first)
            dy = self._norm_backward(2 * layer + 1, dy)
            dx = torch.add(dx, dy, out=net.proj.gradients[layer])
            dy = net.proj.backward(layer, attended, dx, first=first)
            dqkv = net.attention[layer].backward(dy, net.qkv.gradients[layer])
            dy = net.qkv.backward(layer, self.norms[2 * layer][1], dqkv, first=first)
            dy = self._norm_backward(2 * layer, dy)
            dx = torch.add(dx, dy, out=net.narrow.gradients[layer - 1] if layer else None)
        for linears in net.linears:
            linears.accumulate_gradients(first=first)
        self._embedding_backward(dx)

    def _norm(self, norm: int, x: Tensor) -> Tensor:
        y, mean, rstd = self.net.norms.forward(norm, x)
        self.norms.append((x, y, mean, rstd))
        return y

    def _norm_backward(self, norm: int, dy: Tensor) -> Tensor:
        x, _, mean, rstd = self.norms[norm]
        return self.net.norms.backward(norm, dy, x, mean, rstd, first=self.first)

    def _embedding_backward(self, dx: Tensor) -> None:
        tokens, positions = self.net.tokens, self.net.positions
        dx = dx.view(*self.idx.shape, -1)  # (B, T, C)
        if tokens.slot is not None:
            gradients = tokens.slot.gradients[0]  # (V, C)
            if self.first:
                gradients.zero_()
            gradients.index_add_(0, self.idx.flatten(), dx.flatten(0, 1))
        if positions.slot is not None:
            if self.first:
                positions.slot.gradients.zero_()
            positions.slot.gradients[0, : dx.shape[1]].add_(dx.sum(0))  # (T, C)


def summed_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy () of logits (N, V), and its gradient (N, V)."""
    chosen = targets.reshape(-1, 1)  # (N, 1)
    logs = logits.log_softmax(-1)  # (N, V)
    of_target = logs.gather(1, chosen)  # (N, 1)
    loss_sum = of_target.sum().neg_()
    # softmax − one-hot in place; `of_target` has been summed and serves as the column of −1.
    return loss_sum, logs.exp_().scatter_add_(1, chosen, of_target.fill_(-1))


class CharStep:
    """Trains `model`, LoRA or all of it; what trains becomes views of one flat buffer.

    `embedding_lr_fraction` is the part of the learning rate that embeddings beside LoRA take.
    """

    def __init__(
        self,
        model: BigramLanguageModel,
        *,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        embedding_lr_fraction: float = 1.0,
    ) -> None:
        self.model = model
        first = next(model.parameters())
        flat = FlatParameters(first.device, first.dtype)
        with torch.no_grad():
            self.net = CharNetwork(model, flat, first.dtype, embedding_lr_fraction)
            flat.allocate()
            self.net.fill()
        self.update = HostUpdate(flat, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
        self.report = self.update.report

    @torch.inference_mode()  # as no_grad, with less to do for every operation
    def launch(self, batches: Sequence[Pair], learning_rate: float, number: int = 1) -> None:
        """Train step `number` on micro-batches of inputs and targets, both (B, T)."""
        self.update.set_learning_rate(learning_rate)
        for index, (inputs, targets) in enumerate(batches):
            step = CharPass(self.net, inputs, first=index == 0)
            loss_sum, d_logits = summed_loss(step.run(), targets)
            step.backward(d_logits)
            self.update.count(loss_sum, torch.tensor(targets.numel()), first=index == 0)
        for linears in self.net.linears:
            linears.finish()
        self.update.run()
        self.net.refresh()

    def optimizer_state(self) -> OptimizerState:
        """Return AdamW's state by parameter name, views of the step's tensors."""
        return self.update.optimizer_state(self.model)

    @torch.no_grad()
    def load_optimizer_state(self, saved: OptimizerState) -> None:
        """Changes AdamW's state in place, after the model's parameters were restored."""
        self.update.load_optimizer_state(self.model, saved)
        self.net.refresh()  # merged weights are of the parameters before


class CharStepRunner(DeviceStepRunner):
    """Runs the character GPT's hand-written step, where `why_not_hand_written` allows it."""

    def __init__(
        self, model: BigramLanguageModel, choice: DeviceChoice, config: TrainConfig
    ) -> None:
        step = CharStep(
            model,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            embedding_lr_fraction=config.whole_rate_fraction,
        )
        how = "all weights train" if trains_all_weights(model) else "LoRA merged once per step"
        super().__init__(model, step, choice, f"hand-written step: {how}", bigram_loss)


def why_not_hand_written(model: BigramLanguageModel, choice: DeviceChoice) -> str | None:
    """Return why the hand-written step cannot train `model`, or None if it can."""
    if choice.device.type != "cpu":
        return "the hand-written step runs on CPUs"
    if choice.compute_dtype is not torch.float32:
        return "the hand-written step computes in fp32"
    if model.block_size > MAX_TOKENS:
        return f"sequences of {model.block_size} tokens are longer than {MAX_TOKENS}"
    dropouts = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    if any(dropouts) or model.sizes.dropout:
        return "the hand-written step has no dropout"
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    trained = [p for p in model.parameters() if p.requires_grad]
    tables = model.token_embedding_table.weight, model.position_embedding_table.weight
    n_known = 2 * len(layers) + sum(p.requires_grad for p in tables)
    if not trains_all_weights(model) and len(trained) != n_known:
        return "other parameters train beside LoRA and the embeddings"
    return None


def char_steps(
    model: BigramLanguageModel,
    choice: DeviceChoice,
    config: TrainConfig,
    on_message: Callable[[str], None] = lambda text: None,
) -> StepRunner:
    """Return the hand-written step's runner where it can train `model`, else the plain one's."""
    why_not = why_not_hand_written(model, choice)
    if why_not is not None:
        on_message(f"plain step: {why_not}")
        return PlainStepRunner(model, bigram_loss, choice, config)
    steps = CharStepRunner(model, choice, config)
    on_message(steps.describe())
    return steps
