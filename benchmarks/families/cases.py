"""The cells of `gpu_families.py`: published models' sizes, ways to train them, and their peers.

A cell's name is SHAPE:VARIANT, such as "Qwen3-0.6B-4x512:ours". Each Llama has the sizes of the
model whose time per FLOP is compared with its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from devices.cases import Case
from one_gpu.cases import Shape

QWEN3_06B: dict[str, Any] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": True,
}
"""The config.json of each model as it was published, without what does not shape the network."""
QWEN3_8B = {
    **QWEN3_06B,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
GEMMA3_1B: dict[str, Any] = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262144,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_local_base_freq": 10000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA_1B: dict[str, Any] = {
    **QWEN3_06B,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "head_dim": 64,
    "vocab_size": 128256,
}
SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings",
)  # fmt: skip


def llama_like(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a Llama of these sizes."""
    return {**LLAMA_1B, **{name: config[name] for name in SIZES}}


def shape_of(config: dict[str, Any], rows: int, tokens: int, warm_up: int, timed: int) -> Shape:
    """Return the sizes of a step of `rows` × `tokens` tokens on the model of this config."""
    return Shape(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        shared=config["num_key_value_heads"],
        feed_forward=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        rows=rows,
        tokens=tokens,
        tied=config["tie_word_embeddings"],
        warm_up_steps=warm_up,
        timed_steps=timed,
        config=config,
    )


FAMILIES = {
    "Qwen3-0.6B-4x512": shape_of(QWEN3_06B, 4, 512, 6, 20),
    "Gemma-3-1B-4x512": shape_of(GEMMA3_1B, 4, 512, 6, 20),
    "Gemma-3-1B-4x2048": shape_of(GEMMA3_1B, 4, 2048, 4, 16),
    "Qwen3-8B-4x2048": shape_of(QWEN3_8B, 4, 2048, 3, 16),
}
SMALL = "Qwen3-0.6B-1x512"
"""Of a sweep whose candidates leave most of a GPU idle one by one."""
LLAMA = "Llama-1B-4x2048"
"""Whose transformers' model takes our captured step."""


def llama_of(shape: str) -> str:
    """Return the name of the Llama of a shape's sizes."""
    return f"Llama-as-{shape}"


SHAPES = {
    **FAMILIES,
    **{llama_of(n): replace(s, config=llama_like(s.config or {})) for n, s in FAMILIES.items()},
    SMALL: shape_of(QWEN3_06B, 1, 512, 6, 20),
    LLAMA: shape_of(LLAMA_1B, 4, 2048, 4, 16),
}
SMOKE_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "sliding_window": 16,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 16,
}
"""Where only the code is to be run, on a CPU."""
SWEEP = 4
"""Candidates that train together."""


@dataclass(frozen=True)
class Cell(Case):
    """A case on one device."""

    @property
    def name(self) -> str:
        """What `--only` matches."""
        return f"{self.shape}:{self.variant}"

    def sizes(self, *, smoke: bool = False) -> Shape:
        """Return the sizes of the model and of a step."""
        shape = SHAPES[self.shape]
        if not smoke:
            return shape
        config = dict(shape.config or {})
        config |= {name: value for name, value in SMOKE_SIZES.items() if name in config}
        tokens = 512 if self.is_packed else 32  # documents to be packed have up to 400
        return shape_of(config, 2, tokens, 1, 3)


START_S = 6
"""Of a process: opening the GPU, random weights, the first kernels."""
COMPILE_S = 40
STEP_S = {SMALL: 0.1, "Qwen3-0.6B-4x512": 0.2, "Gemma-3-1B-4x512": 0.2, "Gemma-3-1B-4x2048": 0.3}
"""Of a peer, about; 8B takes longer."""
OUR_STEP_S = {"Qwen3-0.6B-4x512": 0.03, "Gemma-3-1B-4x512": 0.03, "Gemma-3-1B-4x2048": 0.1}
VARIANTS = ("ours", "ours_packed", "peft_liger", "full_transformers", "peft", "ours_full")


def cells() -> list[Cell]:
    """Return all cells, those worth most first."""
    found = [_cell("Qwen3-0.6B-4x512", "probe", 15)]
    for variant in VARIANTS:
        for shape in FAMILIES:
            found.append(_cell(shape, variant))
            if variant == "ours":
                found.append(_cell(llama_of(shape), variant))
        if variant == "peft_liger":
            sweeps = (SMALL, "Qwen3-0.6B-4x512")
            found += [_cell(shape, f"sweep_{SWEEP}") for shape in sweeps]
            found += [_cell(LLAMA, "theirs_compiled")]
    found += [_cell(LLAMA, "theirs_captured")]
    return [*found, *(_cell(shape, "full_transformers_compiled") for shape in FAMILIES)]


def _cell(shape: str, variant: str, expected_s: float | None = None) -> Cell:
    if expected_s is None:
        sizes = SHAPES[shape]
        times = OUR_STEP_S if variant.startswith("ours") else STEP_S
        step_s = times.get(shape.removeprefix("Llama-as-"), 0.25 if shape == LLAMA else 0.6)
        expected_s = START_S + step_s * (sizes.warm_up_steps + sizes.timed_steps)
        expected_s += {"theirs_compiled": 15, "full_transformers_compiled": COMPILE_S}.get(
            variant, 0
        )
    seconds = round(expected_s)
    return Cell(shape, variant, "none", 1, seconds, 2 * seconds + 20)
