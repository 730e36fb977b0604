"""What rounding the base to fp8, int8 and nf4 changes: the weights of SmolLM2-135M, and its logits.

    python benchmarks/base_error.py                      # a minute on two cores
    python benchmarks/base_error.py --text FILE --tokens 512

Weights: ‖rounded − original‖ / ‖original‖ over all linears of the blocks, and of the worst one.
Logits: the same of the logits on the first tokens of a text (this repository's LICENSE), the mean
Kullback-Leibler divergence of the next token, how often the most likely one is another, and the
loss. The installed SmolLM2-135M comes from a 4-bit file (Q4_1), so its weights have 16 levels in
blocks of 32: "random" is a linear of normally distributed values, which other weights are nearly.
Prints JSON lines.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.config import BaseWeights
from lora.data.tokenizers.subword import load_tokenizer
from lora.decoder.decoder import Decoder
from lora.decoder.quantised.base import quantised_modules
from lora.layers.quantised_model import build_quantised
from lora.pretrained.hf_weights import load_decoder
from lora.pretrained.sources import find_model

BASES = {
    "bf16": None,
    "fp8": BaseWeights("fp8"),
    "int8": BaseWeights("int8"),
    "nf4": BaseWeights("nf4"),
    "nf4, plain scales": BaseWeights("nf4", nf4_double_quant=False),
    "nf4, blocks of 256": BaseWeights("nf4", nf4_block=256),
}
TEXT = Path(__file__).parents[1] / "LICENSE"


Values = dict[str, Tensor]


def weight_errors(model: Decoder, original: Values) -> dict[str, float]:
    """Return how far the linears of the blocks are from those of `original`, by name: all, worst.

    Each is ‖difference‖ / ‖original‖.
    """
    squares, norms = {}, {}
    for name, weight in original.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        is_packed = name.removesuffix(".weight") in quantised_modules(model)
        now = module.unpacked(torch.float32) if is_packed else model.get_parameter(name).float()
        squares[name] = (now - weight).square().sum().item()
        norms[name] = weight.square().sum().item()
    each = {name: (squares[name] / norms[name]) ** 0.5 for name in squares}
    total = (sum(squares.values()) / sum(norms.values())) ** 0.5
    return {"weights": round(total, 5), "worst_linear": round(max(each.values()), 5)}


def random_error(base: BaseWeights | None) -> float:
    """Return the error of a linear of 1024 × 1024 normally distributed values."""
    with torch.device("meta"):
        linear = nn.Linear(1024, 1024, bias=False)
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    if base is None:
        now = weight.bfloat16().float()
    else:
        module = build_quantised(linear, "random", base)
        module.load(weight, "random")
        now = module.unpacked(torch.float32)
    return round(((now - weight).norm() / weight.norm()).item(), 5)


def logit_errors(logits: Tensor, original: Tensor, ids: Tensor) -> dict[str, float]:
    """Return how far `logits` (T, V) are from `original` after the tokens `ids` (T,)."""
    one, other = logits.log_softmax(-1), original.log_softmax(-1)
    divergence = F.kl_div(one, other, log_target=True, reduction="sum") / len(ids)
    return {
        "logits": round(((logits - original).norm() / original.norm()).item(), 5),
        "divergence_nats": round(divergence.item(), 5),
        "other_next_token": round((one.argmax(-1) != other.argmax(-1)).float().mean().item(), 4),
        "loss": round(F.cross_entropy(logits[:-1], ids[1:]).item(), 4),
    }


def main() -> None:
    """Print a line for each way to store the base."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--tokens", type=int, default=1024)
    arguments = parser.parse_args()
    folder = find_model().folder
    text = arguments.text.read_text(encoding="utf-8")
    ids = torch.tensor(load_tokenizer(folder).encode(text)[: arguments.tokens])
    plain = load_decoder(folder).requires_grad_(False)
    inside = set(plain.trunk.blocks().modules())
    linears = (n for n, m in plain.named_modules() if isinstance(m, nn.Linear) and m in inside)
    original = {f"{name}.weight": plain.get_parameter(f"{name}.weight") for name in linears}
    with torch.no_grad():
        expected = plain(ids[None])[0]
        print(json.dumps({"base": "fp32", "tokens": len(ids), **loss_alone(expected, ids)}))
        for name, base in BASES.items():
            model = load_decoder(folder, base=base)
            if base is None:  # the values of bf16, computed with in fp32 as the others are
                for weight in (model.get_parameter(key) for key in original):
                    weight.data = weight.bfloat16().float()
            row = {"base": name, "tokens": len(ids), **weight_errors(model, original)}
            row |= {"random": random_error(base)}
            print(json.dumps(row | logit_errors(model(ids[None])[0], expected, ids)), flush=True)


def loss_alone(logits: Tensor, ids: Tensor) -> dict[str, float]:
    """Return the loss after the tokens `ids` (T,)."""
    return {"loss": round(F.cross_entropy(logits[:-1], ids[1:]).item(), 4)}


if __name__ == "__main__":
    main()
