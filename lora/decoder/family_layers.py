"""Per-block settings of each family: rotary embedding, sliding window, scale of the logits."""

from __future__ import annotations

from lora.decoder.config import LayerConfig, RopeConfig
from lora.decoder.fields import Fields, read_rope

FULL, SLIDING = "full_attention", "sliding_attention"
"""Values of `layer_types` in config.json."""


def _one_rope(fields: Fields) -> RopeConfig:
    """Return the rope that all blocks share, from transformers 5's field or from 4's two."""
    theta = fields.number("rope_theta")
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    return read_rope(fields, name, fields.get(name) or {}, theta)


def plain_layers(fields: Fields, n_layers: int, scale: float) -> tuple[LayerConfig, ...]:
    """Return the blocks of Llama: one rope, no window."""
    return (LayerConfig(_one_rope(fields), None, scale),) * n_layers


def mistral_layers(fields: Fields, n_layers: int, scale: float) -> tuple[LayerConfig, ...]:
    """Return the blocks of Mistral: one rope, the same window in every block, or none."""
    has_null = fields.values.get("sliding_window", 0) is None  # absent means 4096, null means none
    window = None if has_null else fields.count("sliding_window")
    fields.used.add("sliding_window")
    kind = FULL if window is None else SLIDING
    fields.listed("layer_types", n_layers, (kind,))  # all blocks have one type
    return (LayerConfig(_one_rope(fields), window, scale),) * n_layers


def _windows_by_type(fields: Fields, n_layers: int, kinds: list[str]) -> list[int | None]:
    kinds = fields.listed("layer_types", n_layers, (FULL, SLIDING)) or kinds
    if SLIDING not in kinds:
        fields.get("sliding_window")  # read, but has no effect
        return [None] * n_layers
    window = fields.count("sliding_window")
    return [window if kind == SLIDING else None for kind in kinds]


def qwen_layers(fields: Fields, n_layers: int, scale: float) -> tuple[LayerConfig, ...]:
    """Return the blocks of Qwen 2 and 3: one rope, a window from block `max_window_layers` on."""
    first = n_layers
    if fields.flag("use_sliding_window"):
        first = fields.count("max_window_layers", minimum=0)
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
    nested = fields.get("rope_parameters") or {}
    if not isinstance(nested, dict):
        fields.fault("rope_parameters", nested, "an object")
        nested = {}
    scaling = fields.get("rope_scaling")  # transformers 4: for the global layers only
    ropes = {}
    for kind, theta in thetas.items():
        parameters = nested.get(kind) or {}
        if scaling and kind == FULL:
            parameters = {**parameters, **scaling}
        ropes[kind] = read_rope(fields, f"rope_parameters.{kind}", parameters, theta)
    unknown = sorted(set(nested) - set(thetas))
    if unknown:
        fields.fault("rope_parameters", unknown, f"one object for {FULL} and one for {SLIDING}")
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
