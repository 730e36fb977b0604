"""Per-block settings of each family: rotary embedding, sliding window, scale of the logits."""

from __future__ import annotations

from dataclasses import replace

from lora.decoder.config import LayerConfig, RopeConfig
from lora.decoder.fields import (
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_SIZE,
    Fields,
    is_positive_number,
    read_rope,
)

FULL, SLIDING = "full_attention", "sliding_attention"
"""Values of `layer_types` in config.json."""


def _rope_field(fields: Fields) -> tuple[str, object]:
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    return name, fields.get(name) or {}


def _one_rope(fields: Fields) -> RopeConfig:
    """Return the rope that all blocks share, from transformers 5's field or from 4's two."""
    theta = fields.number("rope_theta")
    return read_rope(fields, *_rope_field(fields), theta)


def _ropes_by_type(fields: Fields, thetas: dict[str, float]) -> dict[str, RopeConfig]:
    """Return the rope of each type of block, from transformers 5's field or from 4's two."""
    nested = fields.get("rope_parameters") or {}
    if not isinstance(nested, dict):
        fields.fault("rope_parameters", nested, "an object")
        nested = {}
    scaling = fields.get("rope_scaling") or {}  # transformers 4: for the global layers only
    if not isinstance(scaling, dict):
        fields.fault("rope_scaling", scaling, "an object")
        scaling = {}
    ropes = {}
    for kind, theta in thetas.items():
        parameters = nested.get(kind) or {}
        if scaling and kind == FULL and isinstance(parameters, dict):
            parameters = {**parameters, **scaling}
        ropes[kind] = read_rope(fields, f"rope_parameters.{kind}", parameters, theta)
    unknown = sorted(set(nested) - set(thetas))
    if unknown:
        fields.fault("rope_parameters", unknown, f"one object for {FULL} and one for {SLIDING}")
    return ropes


def plain_layers(fields: Fields, n_layers: int, scale: float) -> tuple[LayerConfig, ...]:
    """Return the blocks of Llama: one rope, no window."""
    return (LayerConfig(_one_rope(fields), None, scale),) * n_layers


def mistral_layers(fields: Fields, n_layers: int, scale: float) -> tuple[LayerConfig, ...]:
    """Return the blocks of Mistral: one rope, the same window in every block, or none."""
    window = None if _has_null(fields, "sliding_window") else fields.count("sliding_window")
    fields.used.add("sliding_window")
    kind = FULL if window is None else SLIDING
    fields.listed("layer_types", n_layers, (kind,))  # all blocks have one type
    return (LayerConfig(_one_rope(fields), window, scale),) * n_layers


def _has_null(fields: Fields, name: str) -> bool:
    """Whether the field is there and null, which is not the default."""
    return fields.values.get(name, 0) is None


def _windows_by_type(fields: Fields, n_layers: int, kinds: list[str]) -> list[int | None]:
    kinds = fields.listed("layer_types", n_layers, (FULL, SLIDING)) or kinds
    if SLIDING not in kinds:
        fields.get("sliding_window")  # read, but has no effect
        return [None] * n_layers
    if _has_null(fields, "sliding_window"):
        fields.fault("sliding_window", None, f"an int ≥ 1, for the blocks of type {SLIDING}")
    window = fields.count("sliding_window")
    return [window if kind == SLIDING else None for kind in kinds]


def qwen_layers(fields: Fields, n_layers: int, scale: float) -> tuple[LayerConfig, ...]:
    """Return the blocks of Qwen 2 and 3: one rope, a window from block `max_window_layers` on."""
    first = n_layers
    if fields.flag("use_sliding_window"):
        first = fields.count("max_window_layers", minimum=0)
        first = n_layers if _has_null(fields, "sliding_window") else first
    kinds = [SLIDING if i >= first else FULL for i in range(n_layers)]
    if not fields.flag("use_sliding_window"):  # then transformers ignores the window altogether
        fields.get("sliding_window")
        fields.listed("layer_types", n_layers, (FULL,))
        windows: list[int | None] = [None] * n_layers
    else:
        windows = _windows_by_type(fields, n_layers, kinds)
    rope = _one_rope(fields)
    return tuple(LayerConfig(rope, window, scale) for window in windows)


def smollm3_layers(fields: Fields, n_layers: int, scale: float) -> tuple[LayerConfig, ...]:
    """Return the blocks of SmolLM3: every fourth one, by default, has no rope."""
    every = fields.count("no_rope_layer_interval")
    have_rope = fields.listed("no_rope_layers", n_layers, (0, 1))
    have_rope = have_rope or [int((i + 1) % every != 0) for i in range(n_layers)]
    windowed = fields.flag("use_sliding_window") and fields.get("sliding_window") is not None
    kinds = [SLIDING if windowed and not has else FULL for has in have_rope]
    windows = _windows_by_type(fields, n_layers, kinds)
    rope = _one_rope(fields)
    return tuple(
        LayerConfig(rope if has else None, window, scale)
        for has, window in zip(have_rope, windows, strict=True)
    )


def gemma2_layers(fields: Fields, n_layers: int, scale: float) -> tuple[LayerConfig, ...]:
    """Return the blocks of Gemma 2: one rope; windowed and global ones in turn."""
    kinds = [FULL if i % 2 else SLIDING for i in range(n_layers)]
    windows = _windows_by_type(fields, n_layers, kinds)
    rope = _one_rope(fields)
    return tuple(LayerConfig(rope, window, scale) for window in windows)


def gemma3_layers(fields: Fields, n_layers: int, scale: float) -> tuple[LayerConfig, ...]:
    """Return the blocks of Gemma 3: windowed and global ones, each kind with its own rope."""
    pattern = fields.count("sliding_window_pattern")
    kinds = [SLIDING if (i + 1) % pattern else FULL for i in range(n_layers)]
    windows = _windows_by_type(fields, n_layers, kinds)
    thetas = {FULL: fields.number("rope_theta"), SLIDING: fields.number("rope_local_base_freq")}
    return _layers_by_type(windows, _ropes_by_type(fields, thetas), scale)


def olmo3_layers(fields: Fields, n_layers: int, scale: float) -> tuple[LayerConfig, ...]:
    """Return the blocks of OLMo 3: every fourth one is global, and its rope may be scaled."""
    kinds = [SLIDING if (i + 1) % 4 else FULL for i in range(n_layers)]
    windows = _windows_by_type(fields, n_layers, kinds)
    theta = fields.number("rope_theta")
    if theta != fields.defaults["rope_theta"] and not fields.get("rope_parameters"):
        # transformers 5 gives it to the global blocks alone, 4 gave it to all.
        allowed = f"in rope_parameters, one for {FULL} and one for {SLIDING}"
        fields.fault("rope_theta", theta, allowed)
    return _layers_by_type(windows, _ropes_by_type(fields, {FULL: theta, SLIDING: theta}), scale)


def phi3_layers(fields: Fields, n_layers: int, scale: float) -> tuple[LayerConfig, ...]:
    """Return the blocks of Phi-3: one window or none; a part of each head may rotate."""
    window = None if fields.get("sliding_window") is None else fields.count("sliding_window")
    name, given = _rope_field(fields)
    theta, share = fields.number("rope_theta"), fields.number("partial_rotary_factor", 1.0)
    if isinstance(given, dict):
        given = dict(given)
        kind = given.get("rope_type") or given.get("type")
        if kind in ("su", "yarn"):  # longrope's former names; Phi-3 has no other scaling
            given["rope_type"] = "longrope"
        inside = given.pop("partial_rotary_factor", None)
        share = share if inside is None else inside
    rope = read_rope(fields, name, given, theta)
    if not is_positive_number(share):
        fields.fault("partial_rotary_factor", share, "a number above 0, up to 1")
    elif share != 1:
        heads = fields.count("num_attention_heads", maximum=MAX_HEADS)
        width = fields.count("hidden_size", maximum=MAX_SIZE) // heads
        width = fields.count("head_dim", max(1, width), maximum=MAX_HEAD_DIM)
        rope = replace(rope, rotary_dim=int(width * share))
    return (LayerConfig(rope, window, scale),) * n_layers


def _layers_by_type(
    windows: list[int | None], ropes: dict[str, RopeConfig], scale: float
) -> tuple[LayerConfig, ...]:
    return tuple(
        LayerConfig(ropes[FULL if window is None else SLIDING], window, scale) for window in windows
    )


def gpt2_layers(fields: Fields, n_layers: int, scale: float) -> tuple[LayerConfig, ...]:
    """Return the blocks of GPT-2: no rope; logits may be scaled by depth."""
    if not fields.flag("scale_attn_weights"):
        scale = 1.0
    by_depth = fields.flag("scale_attn_by_inverse_layer_idx")
    return tuple(
        LayerConfig(None, None, scale / (i + 1) if by_depth else scale) for i in range(n_layers)
    )
