"""Our own attention kernels by the sizes of their tiles, beside torch's FlashAttention.

    python benchmarks/attention_tiles.py [--out FILE]     on a GPU

Prints the milliseconds of each kernel at the widths of heads that have tiles of their own, with and
without soft caps. NARROW and WIDE in lora/kernels/step/attention_triton.py say which are used.
torch's kernels have no caps: they are measured without.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from devices.rows import main_on_a_gpu

from lora.fast.llama.attention import AttentionShape, attend_packed
from lora.kernels.step import attention_triton
from lora.kernels.step.attention import AttentionSettings, find_begins, find_ends
from lora.kernels.step.attention_triton import Tiles

REPEATS = 10


@dataclass(frozen=True)
class Case:
    """An attention of a model that people train."""

    heads: tuple[int, int, int]
    tokens: int
    """Of the batch."""
    document_tokens: int
    window_tokens: int = 0
    softcap: float = 0.0


CASES = {
    "Gemma-2-2B 4x2048": Case((8, 4, 256), 8192, 2048, softcap=50.0),
    "Gemma-2-2B 1x8192": Case((8, 4, 256), 8192, 8192, 4096, 50.0),
    "Gemma-2-27B 4x2048": Case((32, 16, 128), 8192, 2048, softcap=50.0),
    "Gemma-3-1B 4x512, short documents": Case((4, 1, 256), 2048, 128),
    "Gemma-3-1B 4x2048, windows": Case((4, 1, 256), 8192, 2048, 512),
    "Phi-3-mini 4x512, short documents": Case((32, 32, 96), 2048, 128),
    "Phi-3-mini 4x2048": Case((32, 32, 96), 8192, 2048),
    "Qwen3-0.6B 4x512, short documents": Case((16, 8, 128), 2048, 128),
}
TRIED = {
    "Gemma-2-2B 4x2048": {
        "forward": [(64, 32, 8, 2), (64, 64, 8, 2), (128, 32, 8, 2)],
        "keys": [(32, 32, 8, 2), (64, 32, 8, 2)],
        "queries": [(32, 32, 8, 2), (64, 64, 8, 2)],
    },
    "Gemma-2-27B 4x2048": {
        "forward": [(128, 64, 8, 2), (64, 64, 8, 3)],
        "keys": [(64, 64, 8, 2), (32, 64, 4, 2), (32, 64, 8, 2)],
        "queries": [(64, 64, 8, 2), (128, 64, 8, 2)],
    },
}
"""Of a case: by kernel, the queries, keys, warps and stages to try, one kernel at a time."""


def main() -> int:
    """Print one line for each measurement."""
    return main_on_a_gpu(__doc__, _measurements())


def _measurements() -> Iterator[dict[str, Any]]:
    for name, case in CASES.items():
        run = Attention(case)
        yield {"case": name, "ours_ms": run.ours(), "torch_ms": run.torchs()}
    for name, kernels in TRIED.items():
        run = Attention(CASES[name])
        is_wide = CASES[name].heads[2] > attention_triton.WIDE_HEAD
        table = attention_triton.WIDE if is_wide else attention_triton.NARROW
        for kernel, tried in kernels.items():
            usual = table[kernel]
            for tiles in (usual, *(Tiles(*sizes) for sizes in tried)):
                table[kernel] = tiles
                row = {"case": name, "kernel": kernel, "tiles": vars(tiles)}
                yield row | {"ms": run.kernels(kernel)}
            table[kernel] = usual


class Attention:
    """The tensors of one case."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        n_heads, shared, width = case.heads
        self.case, kind = case, {"device": "cuda", "dtype": torch.bfloat16}
        self.settings = AttentionSettings(case.heads, width**-0.5, case.window_tokens, case.softcap)
        self.qkv = torch.randn(case.tokens, (n_heads + 2 * shared) * width, **kind)
        positions = torch.arange(case.tokens, device="cuda") % case.document_tokens
        self.begins = find_begins(positions)
        self.ends = find_ends(self.begins)
        self.out = torch.empty(case.tokens, n_heads * width, **kind)
        self.dy = torch.randn_like(self.out)
        self.lse = torch.empty(n_heads, case.tokens, device="cuda")
        self.partial = torch.empty(case.tokens, n_heads, 2, width, device="cuda")

    def kernels(self, name: str) -> float:
        """Return the milliseconds of the pass that kernel `name` is in."""
        split = self.settings.split
        qk, v = self.qkv[:, :split], self.qkv[:, split:]

        def forward() -> None:
            attention_triton.attend_triton(qk, v, self.begins, self.settings, self.out, self.lse)

        def backward() -> None:
            attention_triton.attend_gradients_triton(
                qk, v, self.begins, self.ends, self.settings, self.out, self.lse, self.dy,
                self.partial,
            )  # fmt: skip

        forward()
        return _milliseconds(forward if name == "forward" else backward)

    def ours(self) -> list[float]:
        """Return the milliseconds of our forward and backward."""
        return [self.kernels("forward"), self.kernels("keys")]

    def torchs(self) -> list[float]:
        """Return the same of torch's kernels, without caps."""
        case, (n_heads, shared, width) = self.case, self.case.heads
        q, k, v = self.qkv.unflatten(1, (-1, width)).split((n_heads, shared, shared), 1)
        starts = torch.arange(0, case.tokens + 1, case.document_tokens, device="cuda")
        shape = AttentionShape(1, case.document_tokens, width**-0.5, case.window_tokens or None)
        bounds, dy = starts.to(torch.int32), self.dy.unflatten(1, (n_heads, width))

        def forward() -> Any:
            return attend_packed(q, k, v, bounds, shape, self.out)

        both = _milliseconds(lambda: forward().backward(dy))
        alone = _milliseconds(forward)
        return [alone, round(both - alone, 4)]


def _milliseconds(function: Callable[[], Any]) -> float:
    """Return the time of one call, on the device."""
    for _ in range(2):
        function()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPEATS):
        function()
    end.record()
    end.synchronize()
    return round(start.elapsed_time(end) / REPEATS, 4)


if __name__ == "__main__":
    sys.exit(main())
