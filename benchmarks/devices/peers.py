"""The peers on several devices: transformers and PEFT under PyTorch's DDP or FSDP2, with Liger.

FSDP2 is applied as accelerate's plugin applies it: each block and then the whole model, resharded
after the forward pass, bf16 in the matmuls. Adapters and a frozen base are bf16; what is fully
fine-tuned is stored in fp32. A model is built on the meta device and only each process's shards
are filled, with random values, so that no process holds the whole.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from gpu_peers import add_peft, build_theirs, use_liger
from one_gpu.cases import RANK, Shape
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from devices.cases import Case
from lora.device import peak_memory_bytes
from lora.distributed.world import World

SPREAD = 0.02


def time_peer(case: Case, world: World, smoke: bool) -> dict[str, Any]:
    """Return the time and memory of this rank's steps of a peer."""
    shape, device = case.sizes(smoke=smoke), torch.device("cpu" if smoke else "cuda")
    if "liger" in case.variant and not smoke:
        use_liger(shape)
    begun_s = time.perf_counter()
    model = _build(case, shape, device)
    build_s = time.perf_counter() - begun_s
    return {**measure(model, shape, world, device), "build_s": build_s}


def _build(case: Case, shape: Shape, device: torch.device) -> nn.Module:
    full, sharded = case.is_full, case.parallel == "fsdp"
    dtype = torch.float32 if full else torch.bfloat16
    with torch.device("meta" if sharded else device):
        model = build_theirs(shape, "meta" if sharded else device, dtype)
        if not full:
            model = add_peft(model, RANK)
    if case.variant.endswith("recompute"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if sharded:
        return _sharded(model, device)
    if case.parallel == "none":
        return model
    ids = [torch.cuda.current_device()] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)


def _sharded(model: Any, device: torch.device) -> nn.Module:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    for block in blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return fill(model.to_empty(device=device))


@torch.no_grad()
def fill(model: Any) -> nn.Module:
    """Changes `model` in place: random matrices, norms of 1, LoRA's B of 0, true frequencies."""
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if parameter.ndim == 1:
            local.fill_(1.0)
        elif "lora_B" in name:
            local.zero_()
        else:
            local.normal_(0.0, SPREAD)
    for module in model.modules():
        if "RotaryEmbedding" in type(module).__name__:
            # Buffers came empty from the meta device; a new module of this config has them.
            with torch.device(next(model.parameters()).device):
                fresh = type(module)(module.config)
            for name, buffer in fresh.named_buffers():
                module.get_buffer(name).copy_(buffer)
    return model


def measure(model: nn.Module, shape: Shape, world: World, device: torch.device) -> dict[str, Any]:
    """Return step_ms (the median over random batches), peak_gb and start_s."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=fused)
    draw = torch.Generator().manual_seed(world.rank)
    size = (8, shape.rows, shape.tokens)
    ids = torch.randint(0, shape.vocabulary, size, generator=draw).to(device)
    if fused:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for number in range(shape.warm_up_steps + shape.timed_steps):
        begun_s = time.perf_counter()
        batch = ids[number % len(ids)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if fused:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun_s)
        losses.append(loss.detach())
    return {
        "step_ms": 1000 * statistics.median(seconds[shape.warm_up_steps :]),
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "peak_gb": peak_memory_bytes(device if fused else torch.device("cpu")) / 1e9,
        "start_s": seconds[0],
        "first_and_last_loss": [round(losses[0].item(), 4), round(losses[-1].item(), 4)],
    }
