"""A character-level GPT in the style of Karpathy's bigram_lm_v2, without any LoRA.

What differs from the original: one key, one query and one value linear serve all heads, attention
is PyTorch's scaled_dot_product_attention, and a model is saved with the sizes needed to rebuild it.
"""

from __future__ import annotations

import json
import pickle  # for the name of its error; nothing is unpickled here
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from lora.errors import ConfigError, DataError, ModelError, ModelNotFoundError, gather
from lora.runs.disk import atomic_write

WEIGHTS_FILE = "model.safetensors"
SIZES_FILE = "config.json"
MAX_PARAMETERS, MAX_LAYERS = 10**9, 1000
"""Far above what a character model needs, and within a computer's memory."""


@dataclass(frozen=True)
class BigramSizes:
    """The sizes of a character model: all that is needed to rebuild it."""

    vocab_size: int
    n_embd: int = 64
    """Model width, C; a multiple of n_head."""
    n_head: int = 4
    n_layer: int = 2
    block_size: int = 32
    """Maximum context length in tokens, T."""
    dropout: float = 0.0

    def __post_init__(self) -> None:
        integers = {k: v for k, v in asdict(self).items() if k != "dropout"}
        faults = [f"{k}={v!r}: allowed is an int ≥ 1" for k, v in integers.items() if v < 1]
        if not faults and self.n_embd % self.n_head:
            faults.append(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        if not faults and self.n_parameters > MAX_PARAMETERS:
            faults.append(
                f"{self.n_parameters:,} parameters (n_embd, n_layer, block_size): allowed are "
                f"{MAX_PARAMETERS:,}"
            )
        if not faults and self.n_layer > MAX_LAYERS:
            faults.append(f"n_layer={self.n_layer}: allowed are {MAX_LAYERS}")
        if not 0 <= self.dropout < 1:
            faults.append(f"dropout={self.dropout!r}: allowed is 0 ≤ dropout < 1")
        if faults:
            raise ConfigError(
                gather(faults, "Cannot build a model of these sizes:", "Change them.")
            )

    @property
    def n_parameters(self) -> int:
        """Weights of the matrices and tables, without norms and biases."""
        blocks = 12 * self.n_layer * self.n_embd**2
        return blocks + (2 * self.vocab_size + self.block_size) * self.n_embd


class SelfAttention(nn.Module):
    """Causal self-attention, all heads in one call."""

    def __init__(self, n_embd: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.n_head, self.dropout = n_head, dropout
        self.key = nn.Linear(n_embd, n_embd, bias=False)
        self.query = nn.Linear(n_embd, n_embd, bias=False)
        self.value = nn.Linear(n_embd, n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd)
        self.proj_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        q, k, v = (self._heads(linear(x)) for linear in (self.query, self.key, self.value))
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        out = out.transpose(1, 2).flatten(2)  # (B, T, C)
        return self.proj_dropout(self.proj(out))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (B, H, T, D)


class FeedForward(nn.Module):
    """Two linears with a ReLU between them; the hidden width is four times the model's."""

    def __init__(self, n_embd: int, dropout: float) -> None:
        super().__init__()
        wide, narrow = nn.Linear(n_embd, 4 * n_embd), nn.Linear(4 * n_embd, n_embd)
        self.net = nn.Sequential(wide, nn.ReLU(), narrow, nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Block(nn.Module):
    """A pre-norm block: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, n_embd: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.sa = SelfAttention(n_embd, n_head, dropout)
        self.ffwd = FeedForward(n_embd, dropout)
        self.ln1 = nn.LayerNorm(n_embd)
        self.ln2 = nn.LayerNorm(n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.sa(self.ln1(x))
        return x + self.ffwd(self.ln2(x))


class BigramLanguageModel(nn.Module):
    """The character GPT: embeddings, pre-norm blocks, a final norm and an output head."""

    def __init__(
        self,
        vocab_size: int,
        n_embd: int = 64,
        n_head: int = 4,
        n_layer: int = 2,
        block_size: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.sizes = BigramSizes(vocab_size, n_embd, n_head, n_layer, block_size, dropout)
        self.block_size = block_size
        self.token_embedding_table = nn.Embedding(vocab_size, n_embd)
        self.position_embedding_table = nn.Embedding(block_size, n_embd)
        self.blocks = nn.Sequential(*(Block(n_embd, n_head, dropout) for _ in range(n_layer)))
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size)
        self.apply(_init_weights)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return logits (B, T, V) and, with `targets` (B, T), the mean loss in nats, else None.

        Raises DataError if T exceeds the block size.
        """
        length = idx.shape[1]
        if length > self.block_size:
            raise DataError(
                f"Cannot process {length} tokens. Allowed: at most block_size={self.block_size}. "
                f"Pass the last {self.block_size}, as generate() does."
            )
        positions = torch.arange(length, device=idx.device)
        x = self.token_embedding_table(idx) + self.position_embedding_table(positions)  # (B, T, C)
        logits = self.lm_head(self.ln_f(self.blocks(x)))  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return `idx` (B, T) extended by generated tokens, (B, T + max_new_tokens).

        `temperature` 0 is greedy decoding.
        """
        was_training = self.training
        self.eval()
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.block_size :])[0][:, -1]  # (B, V)
            idx = torch.cat([idx, _pick(logits, temperature, top_k, generator)], dim=1)
        self.train(was_training)
        return idx


def save_bigram(model: BigramLanguageModel, folder: Path) -> None:
    """Write the model's weights and sizes into `folder`, each file completely or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    atomic_write(folder / WEIGHTS_FILE, save(tensors))
    sizes = json.dumps(asdict(model.sizes), indent=2) + "\n"
    atomic_write(folder / SIZES_FILE, sizes.encode())


def load_bigram(path: Path, sizes: BigramSizes | None = None) -> BigramLanguageModel:
    """Return the model saved in a folder, or in a file of weights if `sizes` are given.

    A `.pt` file is read as a plain state dict with `weights_only=True`. Raises ModelError for a
    missing or damaged file, and one that lists all tensors that do not match the sizes.
    """
    if path.is_dir():
        sizes = _read_sizes(path / SIZES_FILE)
        path = path / WEIGHTS_FILE
    if sizes is None:
        raise ModelError(f"Cannot load {path} without sizes: pass sizes=BigramSizes(...) too.")
    state = read_state(path)
    with torch.device("meta"):  # no storage and no random draws: every tensor is replaced
        model = BigramLanguageModel(**asdict(sizes))
    _check_state(path, model.state_dict(), state)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True)


def bigram_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss function for the trainer: (inputs, targets), both (B, T) -> (loss sum, tokens), (1,)."""
    inputs, targets = batch
    logits, _ = model(inputs)
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
    return total[None], torch.tensor([targets.numel()], device=total.device)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, mean=0.0, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _pick(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    if temperature <= 0:
        return logits.argmax(-1, keepdim=True)  # (B, 1)
    logits = logits.float() / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)  # (B, 1)


def _read_sizes(path: Path) -> BigramSizes:
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        return BigramSizes(**values)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: the folder holds no saved character model.") from None
    except ConfigError:  # a ValueError too, which says what is wrong with the sizes
        raise
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"Cannot read the model's sizes from {path}: {error}.") from None


_DAMAGED = (
    SafetensorError,
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    OSError,
    struct.error,
)
"""What torch.load raises on bytes that are no state dict."""


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a `.safetensors` file, or of a `.pt` file with `weights_only=True`.

    Raises ModelError if the file is missing, damaged or anything but a plain state dict.
    """
    if not path.is_file():
        raise ModelNotFoundError(f"Cannot load the base weights {path}: there is no such file.")
    try:
        if path.suffix == ".safetensors":
            return load(path.read_bytes())
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"Cannot load {path}: it is no plain state dict, and pickles can run code: "
            f"{str(error)[:200].splitlines()[0]}"
        ) from None
    except _DAMAGED as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"Cannot load {path}: it is damaged or holds no weights: {reason[:200]}"
        ) from None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(t, Tensor) for name, t in state.items()
    ):
        raise ModelError(
            f"Cannot load {path}: it holds no state dict. Allowed: a dict of names and tensors."
        )
    return state


def _check_state(path: Path, wanted: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    faults = [
        f"missing: {name} {tuple(t.shape)}" for name, t in wanted.items() if name not in state
    ]
    faults += [f"not of this model: {name}" for name in state if name not in wanted]
    for name in wanted.keys() & state.keys():
        if wanted[name].shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)}, the model needs {tuple(wanted[name].shape)}"
            faults.append(f"{name} has shape {shapes}")
    if faults:
        advice = "Pass the sizes that the weights were trained with."
        raise ModelError(gather(sorted(faults), f"Cannot load {path} into the model:", advice))
