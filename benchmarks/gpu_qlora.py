"""QLoRA as its users run it, for `gpu_step.py`: transformers, PEFT and bitsandbytes.

nf4 with double quantisation and bf16 matmuls, transformers' default attention (SDPA), adapters on
all linears. `peft_bnb` is PEFT's documented recipe: `prepare_model_for_kbit_training`, which casts
embeddings, norms and head to fp32, adapters in fp32, bf16 autocast as by the Trainer's `bf16=True`.
`peft_bnb_liger` is the same at its best: Liger's kernels, nothing cast to fp32, adapters in bf16.
`recompute` adds transformers' gradient checkpointing. The optimizer is torch's fused AdamW; many
use bitsandbytes' paged_adamw_8bit, which would save six bytes for each adapter parameter.

No bf16 model is built: the model is made without values, and each linear's weight is drawn,
quantised and dropped before the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_peers import PeerMissing, add_peft, measure, theirs_config, timed, use_liger
from torch import nn

Recipe = Callable[[Any, int], dict[str, Any]]


def build_in_4_bits(shape: Any) -> nn.Module:
    """Return transformers' model of this shape with random values, its blocks' linears in nf4."""
    try:
        import bitsandbytes
        from accelerate import init_empty_weights
    except ImportError as error:
        raise PeerMissing(f"bitsandbytes cannot be imported: {error}") from None
    import transformers

    with init_empty_weights(include_buffers=False):  # rotary frequencies have values
        model = transformers.AutoModelForCausalLM.from_config(
            theirs_config(shape), dtype=torch.bfloat16
        )
    draw = torch.Generator(shape.device).manual_seed(0)
    for name, child in list(model.model.layers.named_modules()):
        if isinstance(child, nn.Linear):
            linear = bitsandbytes.nn.Linear4bit(
                child.in_features,
                child.out_features,
                bias=child.bias is not None,
                compute_dtype=torch.bfloat16,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            linear.weight = bitsandbytes.nn.Params4bit(
                _drawn(child.weight, shape.device, draw),
                requires_grad=False,
                compress_statistics=True,
                quant_type="nf4",
                module=linear,
            ).to(shape.device)
            model.model.layers.set_submodule(name, linear)
    model.tie_weights()
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner = model.get_submodule(name.rpartition(".")[0])
            value = nn.Parameter(_drawn(parameter, shape.device, draw), requires_grad=False)
            setattr(owner, name.rpartition(".")[2], value)
    model.tie_weights()
    model.to(shape.device)
    model.is_loaded_in_4bit = True  # as `from_pretrained(quantization_config=…)` marks it
    return model


def _drawn(like: torch.Tensor, device: str, draw: torch.Generator) -> torch.Tensor:
    if like.ndim == 1:
        return torch.ones(like.shape, dtype=torch.bfloat16, device=device)
    drawn = torch.randn(tuple(like.shape), dtype=torch.bfloat16, device=device, generator=draw)
    return drawn.mul_(0.02)


def recipe(*, liger: bool, recompute: bool) -> Recipe:
    """Return one way to run QLoRA."""

    def run(shape: Any, rank: int) -> dict[str, Any]:
        if liger:
            use_liger(shape)
        model, build_s = timed(lambda: _adapted(shape, rank, liger, recompute), shape.device)
        found = measure(model, shape, build_s, autocast=not liger)
        packed = [p for p in model.parameters() if p.dtype is torch.uint8]
        return {**found, "packed_linears": len(packed)}

    return run


def _adapted(shape: Any, rank: int, liger: bool, recompute: bool) -> nn.Module:
    import peft

    model: Any = build_in_4_bits(shape)
    settings = {"use_reentrant": False}
    if liger:
        model.requires_grad_(False)
        if recompute:
            model.gradient_checkpointing_enable(settings)
            model.enable_input_require_grads()
        return add_peft(model, rank)
    model = peft.prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=recompute, gradient_checkpointing_kwargs=settings
    )
    return add_peft(model, rank, adapters_in_fp32=True)


QLORA_PEERS: dict[str, Recipe] = {
    "peft_bnb": recipe(liger=False, recompute=False),
    "peft_bnb_recompute": recipe(liger=False, recompute=True),
    "peft_bnb_liger": recipe(liger=True, recompute=False),
    "peft_bnb_liger_recompute": recipe(liger=True, recompute=True),
}
