"""The peers that `gpu_step.py` measures, used as documented: transformers, PEFT, Liger, Unsloth.

Each function takes a shape and a rank and returns step_ms, peak_gb and start_s of bf16 training
with fused AdamW, without reading the loss between steps. Every step has the same batch, so the
loss falls. QLoRA is in `gpu_qlora.py`.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

LEARNING_RATE = 1e-3
"""Of all variants, ours too: the loss of a single batch falls within a few steps."""


class PeerMissing(Exception):
    """A peer's package is not installed; the message names it."""


def build_theirs(
    shape: Any, device: str | torch.device | None = None, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """Return transformers' model of this shape, random: a Llama, or what its config says.

    `device` is the shape's own unless it is given.
    """
    import transformers

    with torch.device(device or shape.device):
        return transformers.AutoModelForCausalLM.from_config(theirs_config(shape), dtype=dtype)


def theirs_config(shape: Any) -> Any:
    """Return transformers' configuration of this shape."""
    import transformers

    if shape.config is not None:
        return transformers.AutoConfig.for_model(**shape.config, use_cache=False)
    return _llama_config(shape)


def _llama_config(shape: Any) -> Any:
    import transformers

    return transformers.LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.shared,
        intermediate_size=shape.feed_forward,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=max(4096, shape.tokens),
        use_cache=False,
    )


def add_peft(model: Any, rank: int, *, adapters_in_fp32: bool = False) -> Any:
    """Return `model` with PEFT's LoRA on all linears, adapters in bf16 as the base, or in fp32."""
    import peft

    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    # False leaves adapters in the dtype of the base's weights; those of a packed one are no floats.
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=adapters_in_fp32)
    if not adapters_in_fp32:
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    return adapted


def measure(model: Any, shape: Any, build_s: float, *, autocast: bool = False) -> dict[str, Any]:
    """Return step_ms (the median), peak_gb, start_s, build_s, and what shows that it trains.

    `autocast` is to bf16, for models whose adapters, norms or head are fp32.
    """
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    draw = torch.Generator().manual_seed(0)
    size = (shape.rows, shape.tokens)
    batch = torch.randint(0, shape.vocabulary, size, generator=draw).to(shape.device)
    built_bytes = peak_bytes(shape.device)
    restart_peak(shape.device)
    seconds, losses = [], []
    for _ in range(shape.warm_up_steps + shape.timed_steps):
        began_s = time.perf_counter()
        with _autocast(shape.device) if autocast else nullcontext():
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait(shape.device)
        seconds.append(time.perf_counter() - began_s)
        losses.append(loss.detach())
    timed_s = sorted(seconds[shape.warm_up_steps :])
    return {
        "step_ms": 1000 * timed_s[len(timed_s) // 2],
        "peak_gb": peak_bytes(shape.device) / 1e9,
        "start_s": seconds[0],
        "build_s": build_s,
        "build_peak_gb": built_bytes / 1e9,
        "first_and_last_loss": [round(losses[0].item(), 4), round(losses[-1].item(), 4)],
        "trained_parameters": sum(p.numel() for p in trained),
    }


def _autocast(device: str) -> AbstractContextManager[object]:
    return torch.autocast(device, dtype=torch.bfloat16)


def wait(device: str) -> None:
    """Wait for the GPU; a CPU has nothing to wait for."""
    if device == "cuda":
        torch.cuda.synchronize()


def restart_peak(device: str) -> None:
    """Count the allocator's peak from here on."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(device: str) -> int:
    """Return the allocator's peak on a GPU; on a CPU that of the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def timed(build: Callable[[], Any], device: str = "cuda") -> tuple[Any, float]:
    """Return a model and the seconds it took to build."""
    began_s = time.perf_counter()
    model = build()
    wait(device)
    return model, time.perf_counter() - began_s


def full_transformers(shape: Any, rank: int) -> dict[str, Any]:
    """Full fine-tuning of transformers' model."""
    model, build_s = timed(lambda: build_theirs(shape), shape.device)
    return measure(model, shape, build_s)


def full_transformers_compiled(shape: Any, rank: int) -> dict[str, Any]:
    """The same through torch.compile."""
    model, build_s = timed(lambda: build_theirs(shape), shape.device)
    return measure(torch.compile(model), shape, build_s)


def peft(shape: Any, rank: int) -> dict[str, Any]:
    """PEFT's LoRA on transformers' model."""
    model, build_s = timed(lambda: add_peft(build_theirs(shape), rank), shape.device)
    return measure(model, shape, build_s)


def peft_compiled(shape: Any, rank: int) -> dict[str, Any]:
    """PEFT's LoRA through torch.compile."""
    model, build_s = timed(lambda: add_peft(build_theirs(shape), rank), shape.device)
    return measure(torch.compile(model), shape, build_s)


def peft_liger(shape: Any, rank: int) -> dict[str, Any]:
    """PEFT's LoRA on transformers' model with Liger's kernels in it."""
    use_liger(shape)
    model, build_s = timed(lambda: add_peft(build_theirs(shape), rank), shape.device)
    return measure(model, shape, build_s)


def peft_liger_recompute(shape: Any, rank: int) -> dict[str, Any]:
    """The same with transformers' gradient checkpointing: whole blocks are recomputed."""
    use_liger(shape)

    def build() -> Any:
        model = add_peft(build_theirs(shape), rank)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        return model

    model, build_s = timed(build, shape.device)
    return measure(model, shape, build_s)


def use_liger(shape: Any) -> None:
    """Put Liger's kernels into transformers' model of this family.

    Raises PeerMissing without the package, or where it does not know the family.
    """
    family = "llama" if shape.config is None else shape.config["model_type"]
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise PeerMissing(f"liger-kernel cannot be imported: {error}") from None
    if family not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise PeerMissing(f"liger-kernel has no kernels for {family}")
    MODEL_TYPE_TO_APPLY_LIGER_FN[family]()


def unsloth(shape: Any, rank: int, *, in_4_bits: bool = False) -> dict[str, Any]:
    """Unsloth's LoRA."""
    try:
        from unsloth import FastLanguageModel
    except (ImportError, NotImplementedError, RuntimeError) as error:
        raise PeerMissing(f"unsloth cannot be imported: {error}") from None
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        build_theirs(shape).save_pretrained(folder)
        began_s = time.perf_counter()
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=shape.tokens, dtype=torch.bfloat16, load_in_4bit=in_4_bits
        )
        model = FastLanguageModel.get_peft_model(model, r=rank, lora_alpha=2 * rank)
        return measure(model, shape, time.perf_counter() - began_s)


def unsloth_nf4(shape: Any, rank: int) -> dict[str, Any]:
    """The same over nf4."""
    return unsloth(shape, rank, in_4_bits=True)


PEERS: dict[str, Callable[[Any, int], dict[str, Any]]] = {
    "full_transformers": full_transformers,
    "full_transformers_compiled": full_transformers_compiled,
    "peft": peft,
    "peft_compiled": peft_compiled,
    "peft_liger": peft_liger,
    "peft_liger_recompute": peft_liger_recompute,
    "unsloth": unsloth,
    "unsloth_nf4": unsloth_nf4,
}
