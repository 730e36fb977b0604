"""Weights in nf4: 4-bit codes of 16 levels, and one scale for each block of values.

A weight (O, I) is cut row by row into blocks; the last may be shorter. A block's scale is its
largest magnitude, and value = level · scale. With double quantisation the scales are 8-bit codes
themselves, in groups of 256: scale = level of the code · the group's scale + the offset, which is
the mean of all scales. (QLoRA, arXiv 2305.14314; the 8-bit levels: arXiv 2110.02861.) Codes, scales
and values are those of bitsandbytes' CPU build, to the bit and on every device.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Quantiles of a normal distribution, of which one is zero (arXiv 2305.14314, appendix E)."""
GROUP = 256
"""Blocks whose scales share a scale."""
UNPACKED_VALUES = 2**20
"""Values that are unpacked at once: they and their codes stay in a CPU's cache meanwhile."""
N_POINTS = 2**16
"""From -1 to 1: a scale over its group's takes the 8-bit level that is nearest to such a point."""
MIN_PEAK = 1e-38
"""Blocks whose largest magnitude is smaller are divided by this: 1 / scale stays finite."""
N_CELLS = 2**13
"""Equal parts from -1 to 1, in which codes are looked up."""
PIECE_VALUES, CPU_PIECE_VALUES = 2**22, 2**19
"""Values that are quantised at once: what is temporary is a few times as large. On a CPU it stays
in the cache."""


@dataclass(frozen=True)
class Nf4Tensor:
    """A weight (O, I) in nf4."""

    codes: Tensor
    """(O, I/2), uint8: two values each, the first in the high four bits."""
    scales: Tensor
    """(n_blocks,): uint8 with double quantisation, else fp32."""
    group_scales: Tensor
    """(n_groups,), fp32; empty without double quantisation."""
    offset: Tensor
    """(), fp32: what is added to the scales of double quantisation."""
    block: int
    """Values that share a scale."""

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.codes.shape[0], 2 * self.codes.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All that its values are made of, in the order of the fields."""
        return self.codes, self.scales, self.group_scales, self.offset

    @property
    def is_double(self) -> bool:
        """Whether the scales are 8-bit codes."""
        return self.scales.dtype is torch.uint8


def n_blocks(n_values: int, block: int) -> int:
    """Return how many blocks `n_values` take."""
    return -(-n_values // block)


def quantise_nf4(weight: Tensor, block: int = 64, *, double_quant: bool = True) -> Nf4Tensor:
    """Return `weight` (O, I), of any floating dtype, in nf4; I must be even.

    What is temporary does not grow with the weight, but for the scales.
    """
    rows, width = weight.shape
    flat = weight.reshape(-1)
    codes = flat.new_empty(flat.numel() // 2, dtype=torch.uint8)
    scales = flat.new_empty(n_blocks(flat.numel(), block), dtype=torch.float32)
    size = CPU_PIECE_VALUES if flat.device.type == "cpu" else PIECE_VALUES
    for start in range(0, flat.numel(), size):  # a multiple of every block
        piece = flat[start : start + size]
        first = start // block
        found = scales[first : first + n_blocks(piece.numel(), block)]
        codes[start // 2 : (start + piece.numel()) // 2] = _quantise_piece(piece, block, found)
    packed = pack_scales(scales, double_quant=double_quant)
    return Nf4Tensor(codes.view(rows, width // 2), *packed, block)


def pack_scales(scales: Tensor, *, double_quant: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scales, group scales and offset of an Nf4Tensor with these `scales`, fp32."""
    if not double_quant:
        return scales, scales.new_empty(0), scales.new_zeros(())
    # On the CPU, whatever the device: a GPU adds in another order, and its mean is another one.
    offset = scales.cpu().mean().to(scales.device)
    scale_codes, group_scales = _quantise_scales(scales - offset)
    return scale_codes, group_scales, offset


def nf4_scales(packed: Nf4Tensor, blocks: slice = slice(None)) -> Tensor:
    """Return the scales of `blocks`, fp32."""
    if not packed.is_double:
        return packed.scales[blocks]
    start, stop, _ = blocks.indices(len(packed.scales))
    scales = dynamic_levels(packed.scales).index_select(0, packed.scales[start:stop].int())
    return scales.mul_(_spread(packed.group_scales, GROUP, start, stop)).add_(packed.offset)


def _spread(scales: Tensor, size: int, start: int, stop: int) -> Tensor:
    """Return for each of the values from `start` to `stop` the scale of its block of `size`."""
    first = start // size
    spread = scales[first : n_blocks(stop, size), None].expand(-1, size).reshape(-1)
    return spread[start - first * size : stop - first * size]


def unpack_nf4(packed: Nf4Tensor, out: Tensor, first_row: int = 0) -> None:
    """Changes `out` (rows, I) in place: the values of the rows from `first_row` on.

    They are computed in fp32 and rounded once to `out`'s dtype; `out` may have a row stride.
    """
    rows, width = out.shape
    # Two values are written as one of eight bytes: they must be neighbours, and aligned.
    is_direct = out.dtype is torch.float32 and out.is_contiguous() and out.storage_offset() % 2 == 0
    start = first_row * width
    first = start // packed.block
    scales = nf4_scales(packed, slice(first, n_blocks(start + rows * width, packed.block)))
    codes = packed.codes[first_row : first_row + rows].reshape(-1)
    n_rows = max(1, UNPACKED_VALUES // width)
    for row in range(0, rows, n_rows):
        part = out[row : row + n_rows]
        values = (
            part if is_direct else torch.empty(part.shape, dtype=torch.float32, device=part.device)
        )
        own = codes[row * width // 2 :][: part.numel() // 2]
        _unpack_flat(own, scales, start - first * packed.block + row * width, packed.block, values)
        if not is_direct:
            part.copy_(values)


def _unpack_flat(codes: Tensor, scales: Tensor, start: int, block: int, values: Tensor) -> None:
    """Changes `values`, fp32, in place: those of `codes`, which begin in block start / `block`."""
    flat = values.view(-1)
    pairs = nf4_pairs(codes).view(torch.int64).view(-1)
    torch.index_select(pairs, 0, codes.int(), out=flat.view(torch.int64))
    stop = start + len(flat)
    if start % block == 0 and stop % block == 0:
        flat.view(-1, block).mul_(scales[start // block : stop // block, None])
    else:  # rows that begin or end inside a block
        flat.mul_(_spread(scales, block, start, stop))


def unpack_nf4_rows(packed: Nf4Tensor, ids: Tensor, out: Tensor) -> None:
    """Changes `out` (N, I) in place: the rows `ids` (N,), as `unpack_nf4` has them."""
    n, width = out.shape
    cell = math.gcd(width, packed.block)  # values that lie in one row and in one block
    per_row = width // cell
    first = (ids * per_row)[:, None]
    blocks = (first + torch.arange(per_row, device=ids.device)) // (packed.block // cell)
    scales = packed.scales[blocks]  # (N, per_row)
    if packed.is_double:
        scales = dynamic_levels(packed.codes)[scales.int()] * packed.group_scales[blocks // GROUP]
        scales = scales.add_(packed.offset)
    values = nf4_pairs(packed.codes)[packed.codes[ids].int()].view(n, per_row, cell)
    out.copy_(values.mul_(scales[..., None]).view(n, width))


def _quantise_piece(values: Tensor, block: int, scales: Tensor) -> Tensor:
    """Changes `scales` in place: those of `values` (N,). Return their codes, (N/2,)."""
    values = values.float()
    whole = values.numel() // block * block
    blocks = values[:whole].view(-1, block)
    scales[: len(blocks)] = blocks.abs().amax(-1)
    inverse = 1.0 / scales[: len(blocks), None].clamp(min=MIN_PEAK)
    normal = (blocks * inverse).view(-1)
    if whole < values.numel():  # divided, where whole blocks are multiplied: as in bitsandbytes
        rest = values[whole:]
        scales[-1] = rest.abs().amax().clamp(min=MIN_PEAK)
        normal = torch.cat([normal, rest / scales[-1]])
    pairs = nearest_levels(normal).view(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]


def nearest_levels(values: Tensor) -> Tensor:
    """Return the codes (N,) of `values`, from -1 to 1, uint8; of a midpoint the lower one.

    A table of cells has the code of each cell's left edge and the midpoint above it, of which a
    cell has one at most. On a CPU that is a tenth of the time of a search among the midpoints.
    """
    cells = ((values + 1.0) * (N_CELLS / 2)).int().clamp_(0, N_CELLS)
    above = torch.index_select(_table("cell midpoints", values), 0, cells)
    codes = torch.index_select(_table("cell codes", values), 0, cells)
    return codes.add_(values > above)


def _quantise_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return 8-bit codes of `scales` (n,), whose mean is about zero, and the groups' scales."""
    n_groups = n_blocks(len(scales), GROUP)
    padded = scales.new_zeros(n_groups * GROUP)
    padded[: len(scales)] = scales
    groups = padded.view(n_groups, GROUP)
    peaks = groups.abs().amax(-1)
    normal = groups * (1.0 / peaks)[:, None]
    # Without a peak, or with one whose inverse is infinite, zeros become NaN: they get code 0.
    normal = normal.nan_to_num_(nan=-1.0).clamp_(-1.0, 1.0)
    # Not the nearest level but the nearest of 65,536 points and its level, as in bitsandbytes. Its
    # code multiplies and adds with one rounding; so does fp64 here, rounded once.
    points = (((normal + 1.0) * 0.5).double() * (N_POINTS - 1) + 0.5).float()
    codes = _table("points", scales)[points.int()]
    return codes.view(-1)[: len(scales)].clone(), peaks


def nf4_pairs(like: Tensor) -> Tensor:
    """Return the two levels of each byte of codes, (256, 2), fp32, on the device of `like`."""
    return _table("pairs", like)


def dynamic_levels(like: Tensor) -> Tensor:
    """Return the 256 levels of 8-bit scales, ascending, fp32, on the device of `like`."""
    return _table("dynamic", like)


def _table(name: str, like: Tensor) -> Tensor:
    # Tensors that a tracer has made go with tables of its own only, which are not to be kept.
    if type(like) in (Tensor, torch.nn.Parameter):
        return _kept_table(name, like.device)
    return _build_table(name, like.device)


@functools.cache
def _kept_table(name: str, device: torch.device) -> Tensor:
    return _build_table(name, device)


def _build_table(name: str, device: torch.device) -> Tensor:
    if name == "dynamic":
        return torch.tensor(_dynamic_levels(), dtype=torch.float32, device=device)
    if name == "pairs":
        pairs = [(high, low) for high in NF4_LEVELS for low in NF4_LEVELS]
        return torch.tensor(pairs, dtype=torch.float32, device=device)
    if name == "points":
        levels = _build_table("dynamic", device)
        points = 2 * torch.arange(N_POINTS, device=device).float() / (N_POINTS - 1) - 1
        return torch.bucketize(points, (levels[:-1] + levels[1:]) / 2, out_int32=True).byte()
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)
    midpoints = (levels[:-1] + levels[1:]) / 2
    edges = torch.arange(N_CELLS + 1, device=device).float() * (2 / N_CELLS) - 1
    codes = torch.bucketize(edges, midpoints)
    if name == "cell codes":
        return codes.to(torch.uint8)
    return torch.cat([midpoints, midpoints.new_tensor([torch.inf])])[codes]


@functools.cache
def _dynamic_levels() -> tuple[float, ...]:
    """Return the levels of arXiv 2110.02861, section 1.3, each rounded as bitsandbytes rounds it.

    They are the middles of equal parts of seven decades up to 1, each decade with twice as many
    parts as the one below, with both signs; 0 and 1.
    """
    found, low = [0.0, 1.0], _fp32(0.1)
    for decade in range(7):
        parts = 2**decade
        step, half = _fp32(_fp32(1.0 - low) / parts), (parts + 1) // 2
        edges = [
            _fp32(low + step * i) if i < half else _fp32(1.0 - step * (parts - i))
            for i in range(parts + 1)
        ]
        for left, right in itertools.pairwise(edges):
            level = _fp32(_fp32(10.0 ** (decade - 6)) * (_fp32(left + right) / 2))
            found += [level, -level]
    return tuple(sorted(found))


def _fp32(value: float) -> float:
    """Return the nearest value that fp32 has."""
    nearest: float = struct.unpack("f", struct.pack("f", value))[0]
    return nearest
