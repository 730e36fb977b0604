"""The candidates of a sweep: every combination of the given values. No torch.

--rank 4,8 --learning-rate 1e-4,3e-4 --alpha 2r     four candidates, alpha twice the rank
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any, cast

from lora.config import COMPARED, LORA_LEARNING_RATE, LoRAConfig, Schedule, TrainConfig
from lora.errors import ConfigError, LoraError, gather

SWEPT = ("rank", "learning_rate", "alpha", "dropout", "seed", "schedule")
"""Settings of a grid, in the order in which candidates are numbered: the last changes fastest."""
_LORA_SETTINGS = ("rank", "alpha", "dropout")
SHORT_NAMES = {"learning_rate": "rate"}
"""In names of directories and headings of tables."""
MAX_CANDIDATES = 999


@dataclass(frozen=True)
class Grid:
    """Values of the settings that a sweep can vary: one each, or several separated by commas."""

    rank: tuple[int | str, ...] = field(default=(LoRAConfig.rank,), metadata=COMPARED)
    """LoRA ranks to try: 4,8,16."""
    learning_rate: tuple[float | str, ...] = field(default=(LORA_LEARNING_RATE,), metadata=COMPARED)
    """Peak learning rates to try: 1e-4,3e-4,1e-3."""
    alpha: tuple[float | str, ...] = field(default=(LoRAConfig.alpha,), metadata=COMPARED)
    """LoRA alphas to try: numbers, or multiples of the rank such as 2r (same scaling at every
    rank)."""
    dropout: tuple[float | str, ...] = field(default=(LoRAConfig.dropout,), metadata=COMPARED)
    """Dropout probabilities on LoRA's inputs to try: 0,0.1."""
    seed: tuple[int | str, ...] = field(default=(TrainConfig.seed,), metadata=COMPARED)
    """Random seeds to try: A's initialization, dropout and data order.

    The first one also decides the validation split and the packing, for all candidates."""
    schedule: tuple[Schedule | str, ...] = field(default=(TrainConfig.schedule,), metadata=COMPARED)
    """Learning rate schedules to try: cosine,linear,constant."""

    def __post_init__(self) -> None:
        faults: list[str] = []
        for name in SWEPT:
            words = _split(getattr(self, name))
            values = [_read(name, word, faults) for word in words]
            if not words:
                faults.append(f"{name}: no value is given")
            twice = sorted({str(word) for word in words if words.count(word) > 1})
            if twice:
                faults.append(f"{name}: given more than once: {', '.join(twice)}")
            object.__setattr__(self, name, tuple(values))
        if faults:
            advice = "Separate values by commas, as in --rank 4,8,16."
            raise ConfigError(gather(faults, "Cannot use these values of a sweep:", advice))

    def swept(self) -> tuple[str, ...]:
        """Return the names of the settings that have several values."""
        return tuple(name for name in SWEPT if len(getattr(self, name)) > 1)


@dataclass(frozen=True)
class Candidate:
    """One combination of the grid: a LoRA configuration and a training configuration."""

    number: int
    """From 1."""
    name: str
    """Of its directory: the number, and the values of the settings that vary."""
    lora: LoRAConfig
    train: TrainConfig
    """Its `learning_rate` is a number."""

    @property
    def rate(self) -> float:
        """Peak learning rate."""
        return cast(float, self.train.learning_rate)

    def settings(self) -> dict[str, Any]:
        """Return the values of the swept settings, by name."""
        values = {**asdict(self.train), **asdict(self.lora)}
        return {name: values[name] for name in SWEPT}


def build_candidates(grid: Grid, lora: LoRAConfig, train: TrainConfig) -> list[Candidate]:
    """Return every combination of `grid`, the other settings from `lora` and `train`.

    Raises ConfigError for fewer than two or more than 999 combinations, and, all at once, for
    combinations whose settings are out of range.
    """
    combinations = list(product(*(getattr(grid, name) for name in SWEPT)))
    if len(combinations) < 2:
        raise ConfigError(
            "Cannot sweep over 1 candidate. Allowed: 2 or more. Give several values, as in "
            "--rank 4,8,16 --learning-rate 3e-4,1e-3, or use lora finetune."
        )
    if len(combinations) > MAX_CANDIDATES:
        raise ConfigError(
            f"Cannot sweep over {len(combinations):,} candidates. Allowed: at most "
            f"{MAX_CANDIDATES}. Sweep the learning rate first, then the rest around the best one."
        )
    swept, faults, candidates = grid.swept(), [], []
    for number, values in enumerate(combinations, start=1):
        chosen = dict(zip(SWEPT, values, strict=True))
        try:
            candidates.append(_build(number, chosen, swept, lora, train))
        except LoraError as error:
            faults.append(f"candidate {number}: {' '.join(str(error).split())}")
    if faults:
        raise ConfigError(gather(faults, "Cannot train these candidates:", "Change these values."))
    return candidates


def short_number(value: float) -> str:
    """Return `value` in its shortest form: 0.0003 as 3e-4, 16.0 as 16."""
    if value and not 1e-3 < abs(value) < 1e4:
        digits, power = f"{value:.6e}".split("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:g}"


def _build(
    number: int,
    chosen: dict[str, Any],
    swept: tuple[str, ...],
    lora: LoRAConfig,
    train: TrainConfig,
) -> Candidate:
    if isinstance(chosen["alpha"], str):  # a multiple of the rank
        chosen["alpha"] = float(chosen["alpha"].removesuffix("r") or 1) * chosen["rank"]
    lora_values = {name: chosen[name] for name in _LORA_SETTINGS}
    train_values = {name: value for name, value in chosen.items() if name not in _LORA_SETTINGS}
    seed = chosen["seed"]
    parts = [f"{number:03d}", *(_label(name, chosen[name]) for name in swept)]
    config = replace(lora, **lora_values, init_seed=seed)
    return Candidate(number, "-".join(parts), config, replace(train, **train_values))


def _label(name: str, value: Any) -> str:
    shown = value if isinstance(value, str | int) else short_number(value)
    return f"{SHORT_NAMES.get(name, name)}{shown}"


def _split(value: object) -> list[object]:
    """Return the values in `value`, strings split at commas."""
    items = list(value) if isinstance(value, list | tuple) else [value]
    parts: list[object] = []
    for item in items:
        parts += [word.strip() for word in item.split(",")] if isinstance(item, str) else [item]
    return parts


def _read(name: str, word: object, faults: list[str]) -> Any:
    """Return `word` as a value of the setting `name`, and add it to `faults` if it is none."""
    kind, allowed = _KINDS[name]
    if isinstance(word, bool) or word is None:
        faults.append(f"{name}={word!r}: must be {allowed}")
        return word
    if name == "schedule" or (name == "alpha" and _is_multiple(word)):
        return word
    try:
        value = kind(word)
    except (TypeError, ValueError, OverflowError):
        faults.append(f"{name}={word!r}: must be {allowed}")
        return word
    if not math.isfinite(value) or (isinstance(word, float) and value != word):
        faults.append(f"{name}={word!r}: must be {allowed}")
    return value


def _is_multiple(word: object) -> bool:
    if not isinstance(word, str) or not word.endswith("r"):
        return False
    try:
        return float(word.removesuffix("r") or 1) > 0
    except ValueError:
        return False


_KINDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "rank": (int, "an int ≥ 1"),
    "learning_rate": (float, "a number > 0"),
    "alpha": (float, "a number > 0, or a multiple of the rank such as 2r"),
    "dropout": (float, "a number from 0 to below 1"),
    "seed": (int, "an int ≥ 0"),
    "schedule": (str, "one of cosine, linear, constant"),
}
