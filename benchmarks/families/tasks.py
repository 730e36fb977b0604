"""What the process of a cell runs: our step, a sweep's, transformers' model on ours, or a peer."""

from __future__ import annotations

import gc
from typing import Any

import torch
from devices.cases import Case
from devices.ours import time_ours
from devices.peers import measure
from devices.tasks import probe
from devices.whole import plan_case
from gpu_peers import PeerMissing, add_peft, build_theirs, use_liger
from one_gpu.cases import RANK, Shape
from one_gpu.models import build_empty
from sweep_speed import gpu_one, gpu_together

from families.cases import SWEEP, Cell
from lora.device import available_bytes
from lora.distributed.world import World
from lora.training.out_of_memory import is_out_of_memory


def run_cell(case: Case, world: World, smoke: bool) -> dict[str, Any]:
    """Return what was measured of `case`, or why it was skipped."""
    assert isinstance(case, Cell)
    shape, device = case.sizes(smoke=smoke), "cpu" if smoke else "cuda"
    if case.variant == "probe":
        return probe(world, smoke=smoke)
    try:
        found = _measured(case, shape, world, device, smoke=smoke)
    except PeerMissing as missing:
        return {"skipped": str(missing)}
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {"skipped": f"out of memory: {str(error).splitlines()[0][:200]}"}
    if "step_ms" not in found:
        return found
    flops = flops_of(shape, trains_all=case.is_full)
    tokens = found.pop("tokens", shape.rows * shape.tokens)
    return {**found, "tokens": tokens, "tflop": flops / 1e12}


def _measured(
    case: Cell, shape: Shape, world: World, device: str, *, smoke: bool
) -> dict[str, Any]:
    if case.variant.startswith("sweep"):
        return time_sweep(shape, device)
    if not case.variant.startswith(("ours", "theirs")):
        return time_peer(case, shape, world, device)
    if case.is_full:
        planned, free = plan_case(case, shape, is_cuda=not smoke).n_bytes, available_bytes(device)
        if free is not None and planned > free:
            gb = f"{planned / 1e9:.0f} GB planned, {free / 1e9:.0f} GB free"
            return {"skipped": f"does not fit: {gb}"}
    return time_ours(case, world, smoke)


def time_peer(case: Cell, shape: Shape, world: World, device: str) -> dict[str, Any]:
    """Return the time and memory of a peer, all of it in bf16."""
    if "liger" in case.variant:
        use_liger(shape)
    model = build_theirs(shape, device)
    if not case.is_full:
        model = add_peft(model, RANK)
    if case.variant.endswith("compiled"):
        model = torch.compile(model)
    return measure(model, shape, world, torch.device(device))


def time_sweep(shape: Shape, device: str) -> dict[str, Any]:
    """Return the time of a step of several candidates, and of one in the same process."""
    one = gpu_one(shape, device=device)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    together = gpu_together(shape, SWEEP, device)
    tokens = SWEEP * shape.rows * shape.tokens
    return {**together, "one_ms": one["step_ms"], "one_gb": one["peak_gb"], "tokens": tokens}


def flops_of(shape: Shape, *, trains_all: bool) -> float:
    """Return the arithmetic of a step: matmuls with weights, the head's too, and attention.

    Backward has the gradients of inputs, and those of weights where they train. Causal attention
    has half of its square, a window's less; recomputation counts nothing.
    """
    model = build_empty(shape)
    config, tokens = model.config, shape.rows * shape.tokens
    linears = [m for m in model.trunk.blocks().modules() if isinstance(m, torch.nn.Linear)]
    weights = sum(m.weight.numel() for m in linears) + config.vocab_size * config.hidden_size
    seen = 0  # tokens that all tokens of a sequence attend to, summed over blocks
    for layer in config.layers:
        window = min(layer.window_tokens or shape.tokens, shape.tokens)
        seen += window * (window + 1) // 2 + (shape.tokens - window) * window
    width = config.num_attention_heads * config.head_dim
    attention = 3 * 4 * width * seen * shape.rows
    return float((6 if trains_all else 4) * weights * tokens + attention)
