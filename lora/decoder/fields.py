"""Fields of config.json, read one by one; faults are gathered instead of raised at the first."""

from __future__ import annotations

import math
import struct
import sys
from typing import Any

from lora.decoder.config import RopeConfig

_MISSING = object()
MAX_SIZE, MAX_HEADS, MAX_HEAD_DIM = 2**24, 2**16, 2**14
MAX_LAYERS, MAX_TOKENS = 1000, 2**32
"""Only damaged files exceed these; without bounds a damaged file could ask for endless memory."""
MAX_SHOWN = 200
"""Characters of a value in a message."""


class Fields:
    """The fields of one config.json; on a fault, records it and returns a harmless value.

    `names` maps our names to the family's own; `defaults`, by our names, are transformers' for
    absent fields. `used` collects the names that were read.
    """

    def __init__(
        self, values: dict[str, Any], names: dict[str, str], defaults: dict[str, Any]
    ) -> None:
        self.values, self.names, self.defaults = values, names, defaults
        self.used: set[str] = set()
        self.faults: list[str] = []
        self.is_damaged = False
        """Whether a field has a value that no model has, or a needed one is missing."""

    def get(self, name: str) -> Any:
        """Return the field, or its default if it is absent or null, or None without a default."""
        own = self.names.get(name, name)
        self.used.add(own)
        value = self.values.get(own)
        return self.defaults.get(name) if value is None else value

    def fault(self, name: str, value: object, allowed: str) -> None:
        """Record that field `name` has a `value` that is not allowed."""
        self.faults.append(f"{self.named(name, value)}: allowed: {allowed}")

    def damage(self, fault: str) -> None:
        """Record a fault that no implementation of the model could read."""
        self.is_damaged = True
        self.faults.append(fault)

    def named(self, name: str, value: object) -> str:
        """Return a field with its value, under the name that it has in the file."""
        return f"{self.names.get(name, name)}={_shown(value)}"

    def count(
        self,
        name: str,
        otherwise: int | None = None,
        *,
        minimum: int = 1,
        maximum: int = MAX_TOKENS,
    ) -> int:
        """Return an int from `minimum` to `maximum`; `otherwise` if the field is absent."""
        value = self.get(name)
        value = otherwise if value is None else value
        if value is None:
            self.damage(f"{self.names.get(name, name)} is missing")
            return 1
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            self.damage(f"{self.named(name, value)}: allowed: an int ≥ {minimum}")
            return minimum
        if value > maximum:
            self.damage(f"{self.named(name, value)}: allowed: at most {maximum:,}")
            return minimum
        return value

    def number(self, name: str, otherwise: float | None = None) -> float:
        """Return a finite number > 0; `otherwise` if the field is absent."""
        value = self.get(name)
        value = otherwise if value is None else value
        if value is None:
            self.damage(f"{self.names.get(name, name)} is missing")
            return 1.0
        if not is_positive_number(value):
            self.damage(f"{self.named(name, value)}: allowed: a finite number > 0")
            return 1.0
        return float(value)

    def flag(self, name: str) -> bool:
        """Return true or false; false if the field is absent and has no default."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            self.damage(f"{self.named(name, value)}: allowed: true or false")
        return bool(value)

    def choice(self, name: str, allowed: tuple[str, ...]) -> str:
        """Return one of `allowed`."""
        value = self.get(name)
        if value not in allowed:
            self.fault(name, value, ", ".join(allowed))
            return allowed[0]
        return str(value)

    def listed(self, name: str, length: int, allowed: tuple[Any, ...]) -> list[Any] | None:
        """Return a list of `length` values out of `allowed`, cut from a longer one, or None."""
        value = self.get(name)
        if value is None:
            return None
        good = isinstance(value, list) and len(value) >= length
        if not good or any(item not in allowed for item in value):
            kinds = " or ".join(repr(item) for item in allowed)
            self.fault(name, value, f"a list of {length} values, each {kinds}")
            return None
        return value[:length]


def is_positive_number(value: object) -> bool:
    """Whether `value` is a finite number > 0; an int beyond a float's range is not."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return 0 < value <= sys.float_info.max


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


_ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": (
        "short_factor",
        "long_factor",
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
    ),
}
_LISTS = ("short_factor", "long_factor")
_ROPE_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def read_rope(fields: Fields, where: str, parameters: object, theta: float) -> RopeConfig:
    """Return the rotary embedding described by `parameters`, the field called `where`.

    `theta` is used if `parameters` has none. Types, fields and values that are not supported are
    recorded as faults.
    """
    if not isinstance(parameters, dict):
        fields.faults.append(f"{where}={_shown(parameters)}: allowed: an object")
        return RopeConfig(theta)
    values = {name: value for name, value in parameters.items() if value is not None}
    kind = values.get("rope_type", values.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
        allowed = ", ".join(_ROPE_FIELDS)
        fields.faults.append(f"{where}.rope_type={_shown(kind)}: allowed: {allowed}")
        return RopeConfig(theta)
    _check_rope_fields(fields, where, kind, values)
    theta = values.get("rope_theta", theta)
    if not is_positive_number(theta):
        fields.faults.append(f"{where}.rope_theta={_shown(theta)}: allowed: a finite number > 0")
        return RopeConfig(1.0)
    if kind != "default":
        values = _rope_numbers(fields, where, kind, values)
    if kind == "yarn":
        values["attention_factor"] = _yarn_attention_factor(values)
    if kind == "longrope":
        factor = values.pop("factor", 1.0)  # it has no other effect
        original = values["original_max_position_embeddings"]
        if "attention_factor" not in values and is_positive_number(original):
            values["attention_factor"] = longrope_attention_factor(factor, original)
    known = RopeConfig.__dataclass_fields__
    kept = {name: value for name, value in values.items() if name in known}
    return RopeConfig(**{**kept, "rope_theta": float(theta), "rope_type": kind})


def _check_rope_fields(fields: Fields, where: str, kind: str, values: dict[str, Any]) -> None:
    known = {"rope_type", "type", "rope_theta", *_ROPE_FIELDS[kind]}
    harmless = {"partial_rotary_factor": 1.0}
    for name, value in values.items():
        # A field of another rope type has no effect: transformers ignores it too.
        is_of_other_type = any(name in names for names in _ROPE_FIELDS.values())
        if name not in known and not is_of_other_type and harmless.get(name, _MISSING) != value:
            fields.faults.append(
                f"{where}.{name}={_shown(value)}: not supported for rope_type {kind!r}"
            )


def _rope_numbers(fields: Fields, where: str, kind: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers that `kind` needs, checked, with defaults filled in."""
    context = fields.get("max_position_embeddings")
    original = fields.get("original_max_position_embeddings")  # older files have it one level up
    original = original or values.get("original_max_position_embeddings") or context
    values = {name: values[name] for name in _ROPE_FIELDS[kind] if name in values}
    if "original_max_position_embeddings" in _ROPE_FIELDS[kind]:
        values["original_max_position_embeddings"] = original
    are_numbers = is_positive_number(original) and is_positive_number(context)
    if kind in ("yarn", "longrope") and "factor" not in values and are_numbers:
        values["factor"] = context / original
    for name in _ROPE_FIELDS[kind]:
        needed = name not in _ROPE_OPTIONAL and name != "truncate"
        if name not in values and needed:
            fields.faults.append(f"{where}.{name} is missing; rope_type {kind!r} needs it")
        elif name in values and name in _LISTS:
            values[name] = _factors(fields, f"{where}.{name}", values[name])
        elif name in values and name != "truncate" and not is_positive_number(values[name]):
            seen = f"{where}.{name}={_shown(values.pop(name))}"
            fields.faults.append(f"{seen}: allowed: a finite number > 0")
    return values


def _factors(fields: Fields, name: str, value: object) -> tuple[float, ...]:
    """Return longrope's factor of each frequency."""
    items: list[Any] = value if isinstance(value, list) else [None]
    if len(items) <= MAX_HEAD_DIM and all(
        is_positive_number(item) and item <= MAX_SIZE for item in items
    ):
        # In fp32, as they are computed with and as GGUF files hold them.
        return struct.unpack(f"{len(items)}f", struct.pack(f"{len(items)}f", *items))
    fields.faults.append(f"{name}={_shown(value)}: allowed: a list of finite numbers > 0")
    return ()


def longrope_attention_factor(factor: float, original_tokens: float) -> float:
    """Return the factor of cosine and sine (LongRoPE, arXiv 2402.13753, as Phi-3 has it)."""
    if factor <= 1 or original_tokens <= 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original_tokens))


def _yarn_attention_factor(values: dict[str, Any]) -> float:
    """Return the factor of cosine and sine (YaRN, arXiv 2309.00071, section 3.4)."""
    if "attention_factor" in values:
        return float(values["attention_factor"])
    factor = values.get("factor", 1.0)

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if "mscale" in values and "mscale_all_dim" in values:
        return temperature(values["mscale"]) / temperature(values["mscale_all_dim"])
    return temperature(1.0)
