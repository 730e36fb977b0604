"""Tiny models of transformers' architectures: two blocks, every tensor random, the same each time.

A few thousand parameters each, so that a test can go through all of them. Settings that change the
arithmetic (windows, caps, multipliers, biases, partial rotary embeddings, ties) are not neutral
wherever the architecture has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

VOCAB = 64
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED = _COMMON | {"num_key_value_heads": 2}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_EXPERTS = _GROUPED | {"num_experts_per_tok": 2}
_LOCAL_AND_GLOBAL = ["sliding_attention", "full_attention"]

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED | {"tie_word_embeddings": True, "attention_bias": True},
    "llama-untied": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": _GROUPED | {"head_dim": 16, "tie_word_embeddings": True},
    "mistral": _GROUPED | {"sliding_window": 4},
    "smollm3": _GROUPED | {"no_rope_layer_interval": 2},
    "gemma": _GROUPED | {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": _GROUPED
    | {
        "head_dim": 16,
        "query_pre_attn_scalar": 12,
        "sliding_window": 4,
        "layer_types": _LOCAL_AND_GLOBAL,
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 2.0,
    },
    "gemma3_text": _GROUPED
    | {
        "head_dim": 16,
        "query_pre_attn_scalar": 12,
        "sliding_window": 4,
        "layer_types": _LOCAL_AND_GLOBAL,
    },
    "phi3": _GROUPED | {"partial_rotary_factor": 0.5},
    "olmo": _GROUPED | {"clip_qkv": 1.5},
    "olmo2": _GROUPED,
    "olmo3": _GROUPED | {"sliding_window": 4, "layer_types": _LOCAL_AND_GLOBAL},
    "granite": _GROUPED
    | {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "tie_word_embeddings": True,
    },
    "cohere": _GROUPED | {"logit_scale": 0.5, "use_qk_norm": True},
    "cohere2": _GROUPED
    | {"logit_scale": 0.5, "sliding_window": 4, "layer_types": _LOCAL_AND_GLOBAL},
    "glm4": _GROUPED | {"head_dim": 8, "partial_rotary_factor": 0.5},
    "stablelm": _GROUPED | {"use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "starcoder2": _GROUPED | {"use_bias": True},
    "phi": _GROUPED | {"partial_rotary_factor": 0.5},
    "nemotron": _GROUPED | {"partial_rotary_factor": 0.5},
    "exaone4": _GROUPED | {"sliding_window": 4, "layer_types": _LOCAL_AND_GLOBAL},
    "gpt2": _GPT2,
    "gpt2-untied": _GPT2 | {"tie_word_embeddings": False},
    "gpt_bigcode": _GPT2 | {"multi_query": True},
    "gptj": _GPT2 | {"rotary_dim": 4},
    "codegen": _GPT2 | {"rotary_dim": 4},
    "gpt_neo": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
    },
    "gpt_neox": _COMMON | {"rotary_pct": 0.5},
    "opt": _COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2},
    "falcon": _COMMON
    | {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 48},
    "falcon-multi-query": _COMMON
    | {"multi_query": True, "parallel_attn": True, "bias": False, "ffn_hidden_size": 48},
    "falcon-alibi": _COMMON
    | {
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
        "alibi": True,
        "ffn_hidden_size": 48,
    },
    "mixtral": _EXPERTS | {"num_local_experts": 4},
    "qwen3_moe": _EXPERTS
    | {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8, "mlp_only_layers": [0]},
    "gpt_oss": _EXPERTS
    | {
        "num_local_experts": 4,
        "head_dim": 16,
        "sliding_window": 4,
        "layer_types": _LOCAL_AND_GLOBAL,
    },
    "llama4_text": _EXPERTS
    | {
        "num_experts_per_tok": 1,
        "num_local_experts": 4,
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 4,
        "no_rope_layers": [1, 0],
        "layer_types": ["chunked_attention", "full_attention"],
    },
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 2},
}
"""Settings by name: model_type, or model_type and, after a hyphen, a variant of it."""
_MIXER = {"mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 4, "mamba_d_head": 8}
_LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_SMALL_EXPERTS = _EXPERTS | {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}
_ROUTED = _EXPERTS | {
    "n_routed_experts": 4,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
}
FURTHER: dict[str, dict[str, Any]] = {
    "ernie4_5": _GROUPED,
    "seed_oss": _GROUPED | {"head_dim": 8},
    "hunyuan_v1_dense": _GROUPED | {"head_dim": 8},
    "apertus": _GROUPED,
    "arcee": _GROUPED,
    "helium": _GROUPED | {"head_dim": 8},
    "vaultgemma": _GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "persimmon": _COMMON,
    "biogpt": _COMMON,
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    "qwen2_moe": _EXPERTS
    | {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "deepseek_v2": _ROUTED | _LATENT | {"n_shared_experts": 1},
    "deepseek_v3": _ROUTED | _LATENT,
    "glm4_moe": _ROUTED | {"head_dim": 8},
    "ernie4_5_moe": _EXPERTS | {"moe_num_experts": 4, "moe_intermediate_size": 16, "moe_k": 2},
    "olmoe": _EXPERTS | {"num_experts": 4},
    "phimoe": _EXPERTS | {"num_local_experts": 4},
    "granitemoe": _EXPERTS | {"num_local_experts": 4},
    "qwen3_next": _SMALL_EXPERTS
    | {
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "minimax": _EXPERTS
    | {
        "num_local_experts": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 8,
        "block_size": 4,
    },
    "lfm2": _GROUPED
    | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "granitemoehybrid": _EXPERTS
    | _MIXER
    | {
        "num_local_experts": 4,
        "shared_intermediate_size": 32,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
    },
    "bamba": _GROUPED | _MIXER | {"attn_layer_indices": [1], "mamba_n_heads": 8},
    "falcon_h1": _GROUPED | _MIXER | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "head_dim": 8},
    "jamba": _GROUPED
    | {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 2,
    },
    "nemotron_h": _GROUPED
    | {
        "hybrid_override_pattern": "M*",
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 4,
        "n_groups": 1,
        "chunk_size": 4,
        "head_dim": 8,
    },
    "recurrent_gemma": _GROUPED
    | {
        "lru_width": 32,
        "attention_window_size": 4,
        "block_types": ["recurrent", "attention"],
        "head_dim": 8,
    },
    "mamba2": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "state_size": 4,
        "num_heads": 4,
        "head_dim": 8,
        "n_groups": 1,
        "chunk_size": 4,
    },
    "falcon_mamba": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "state_size": 4,
        "time_step_rank": 2,
    },
    "rwkv": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "attention_hidden_size": 32,
        "context_length": 64,
    },
}
"""More architectures, whose tests are among the slow ones."""


def model_type_of(name: str) -> str:
    """Return model_type of the architecture `name`."""
    return name.partition("-")[0]


def tiny_config(name: str, **settings: Any) -> Any:
    """Return transformers' configuration of the architecture `name`, changed by `settings`."""
    import transformers

    given = {"vocab_size": VOCAB} | _IDS | (ARCHITECTURES | FURTHER)[name] | settings
    return transformers.AutoConfig.for_model(model_type_of(name), **given)


def tiny_transformers(name: str, *, seed: int = 0, **settings: Any) -> Any:
    """Return a model of transformers in fp32, in eval mode, all of its tensors random."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(name, **settings))
        randomise(model, seed)
    return model.eval()


def tiny_multimodal(*, seed: int = 0, **settings: Any) -> Any:
    """Return a Gemma 3 with a vision tower, all tensors random; `settings` are of its text part."""
    import transformers

    vision = {
        **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    }
    config = transformers.Gemma3Config(
        text_config=tiny_config("gemma3_text", **settings).to_dict(),
        vision_config=vision,
        mm_tokens_per_image=4,
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    randomise(model, seed)
    return model.eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Changes `model` in place: matrices are drawn, vectors move away from where they start.

    A norm's weight stays near what makes it a norm, 1 or, where the model adds 1 to it, 0.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.2
        parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)


def save_tiny_transformers(name: str, folder: Path, **settings: Any) -> Path:
    """Write what `tiny_transformers` returns as a Hugging Face directory, without a tokenizer."""
    tiny_transformers(name, **settings).save_pretrained(folder)
    return folder
