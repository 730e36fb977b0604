"""The peers that `gpu_step.py` measures, used as documented: transformers, PEFT, Liger, Unsloth.

Each function takes a shape and a rank and returns step_ms, peak_gb and start_s of bf16 training
with fused AdamW, without reading the loss between steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class PeerMissing(Exception):
    """A peer's package is not installed; the message names it."""


def build_theirs(
    shape: Any, device: str | torch.device = "cuda", dtype: torch.dtype = torch.bfloat16
) -> Any:
    """Return transformers' model of this shape, random: a Llama, or what its config says."""
    import transformers

    config: Any
    if shape.config is not None:
        config = transformers.AutoConfig.for_model(**shape.config, use_cache=False)
    else:
        config = _llama_config(shape)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


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


def add_peft(model: Any, rank: int) -> Any:
    """Return `model` with PEFT's LoRA on all linears, adapters in bf16 as the base."""
    import peft

    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def measure(model: Any, shape: Any, build_s: float) -> dict[str, Any]:
    """Return step_ms (the median over random batches), peak_gb, start_s and build_s."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    draw = torch.Generator().manual_seed(0)
    size = (8, shape.rows, shape.tokens)
    ids = torch.randint(0, shape.vocabulary, size, generator=draw).cuda()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for number in range(shape.warm_up_steps + shape.timed_steps):
        began_s = time.perf_counter()
        batch = ids[number % len(ids)]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began_s)
    timed = sorted(seconds[shape.warm_up_steps :])
    return {
        "step_ms": 1000 * timed[len(timed) // 2],
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "start_s": seconds[0],
        "build_s": build_s,
    }


def _timed(build: Callable[[], Any]) -> tuple[Any, float]:
    began_s = time.perf_counter()
    model = build()
    torch.cuda.synchronize()
    return model, time.perf_counter() - began_s


def full_transformers(shape: Any, rank: int) -> dict[str, Any]:
    """Full fine-tuning of transformers' model."""
    model, build_s = _timed(lambda: build_theirs(shape))
    return measure(model, shape, build_s)


def full_transformers_compiled(shape: Any, rank: int) -> dict[str, Any]:
    """The same through torch.compile."""
    model, build_s = _timed(lambda: build_theirs(shape))
    return measure(torch.compile(model), shape, build_s)


def peft(shape: Any, rank: int) -> dict[str, Any]:
    """PEFT's LoRA on transformers' model."""
    model, build_s = _timed(lambda: add_peft(build_theirs(shape), rank))
    return measure(model, shape, build_s)


def peft_compiled(shape: Any, rank: int) -> dict[str, Any]:
    """PEFT's LoRA through torch.compile."""
    model, build_s = _timed(lambda: add_peft(build_theirs(shape), rank))
    return measure(torch.compile(model), shape, build_s)


def peft_liger(shape: Any, rank: int) -> dict[str, Any]:
    """PEFT's LoRA on transformers' model with Liger's kernels in it."""
    use_liger(shape)
    model, build_s = _timed(lambda: add_peft(build_theirs(shape), rank))
    return measure(model, shape, build_s)


def peft_liger_recompute(shape: Any, rank: int) -> dict[str, Any]:
    """The same with transformers' gradient checkpointing: whole blocks are recomputed."""
    use_liger(shape)

    def build() -> Any:
        model = add_peft(build_theirs(shape), rank)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        return model

    model, build_s = _timed(build)
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


def unsloth(shape: Any, rank: int) -> dict[str, Any]:
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
            folder, max_seq_length=shape.tokens, dtype=torch.bfloat16, load_in_4bit=False
        )
        model = FastLanguageModel.get_peft_model(model, r=rank, lora_alpha=2 * rank)
        return measure(model, shape, time.perf_counter() - began_s)


PEERS: dict[str, Callable[[Any, int], dict[str, Any]]] = {
    "full_transformers": full_transformers,
    "full_transformers_compiled": full_transformers_compiled,
    "peft": peft,
    "peft_compiled": peft_compiled,
    "peft_liger": peft_liger,
    "peft_liger_recompute": peft_liger_recompute,
    "unsloth": unsloth,
}
