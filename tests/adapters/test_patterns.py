"""Patterns from outside: equal to `re` where a match ends, and stopped where it does not."""

from __future__ import annotations

import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora.adapters import patterns
from lora.adapters.apply import apply_lora
from lora.adapters.patterns import NameMatcher, why_not_pattern
from lora.adapters.peft_config import read_description
from lora.config import LoRAConfig
from lora.errors import TargetError

LONG = "a" * 40 + ".q_proj"
HANGS = {
    "one name twice": r"(a|a)+b?\.q_prok",
    "a repeat in a repeat": r"(?:a|b|ab|aa)+\.q_pro[^j]",
    "a power of the length": ".*?".join(["(?:a|a)*"] * 12) + r"[^j]_pro[^j]",
    "a backreference": r"(a|aa)+\1+(?:a|aa)+\.q_pro[^j]",
}
PIECES = st.sampled_from(
    [
        "(a)\\1",
        r"\d",
        "(?i:A)",
        "a",
        "b",
        ".",
        r"\.",
        "a*",
        "b+",
        "(a|b)",
        "(?:ab)?",
        "[ab]",
        "[^a]",
        "a{2}",
        "b{1,3}",
        "|",
        r"\w",
        "$",
        "^",
        ".*",
        "(a+)+",
        "(?=b)",
        "(?<!a)",
        "{",
        "[[]",
    ]
)


@settings(max_examples=500, deadline=None)
@given(st.lists(PIECES, max_size=6).map("".join), st.text("ab.1", max_size=6))
def test_a_match_is_the_one_of_re(pattern: str, name: str) -> None:
    if why_not_pattern(pattern) is not None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole, start = re.fullmatch(pattern, name), re.match(pattern, name)
    assert NameMatcher().fullmatch(pattern, name) == (whole is not None)
    assert NameMatcher().match(pattern, name) == (start and start.groups())


@pytest.fixture
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "MAX_MATCHING_S", 0.05)


@pytest.mark.usefixtures("short_limit")
@pytest.mark.parametrize("kind", HANGS)
def test_a_pattern_that_would_hang_is_stopped(kind: str) -> None:
    with pytest.raises(TargetError, match="its repeats can be split in too many ways"):
        NameMatcher().fullmatch(HANGS[kind], LONG)


@pytest.mark.usefixtures("short_limit")
@pytest.mark.parametrize(
    "field",
    ["target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern"],
)
def test_it_is_refused_in_every_field(field: str) -> None:
    model = nn.ModuleDict({"a" * 40: nn.ModuleDict({"q_proj": nn.Linear(4, 4)})})
    value: object = HANGS["one name twice"]
    if field == "modules_to_save":
        value = [value]
    if field.endswith("pattern"):
        value = {value: 2}
    described = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    config, faults = read_description(described | {field: value}, model)
    assert config is None
    assert "its repeats can be split in too many ways" in faults[0]


@pytest.mark.usefixtures("short_limit")
def test_a_hanging_pattern_of_blocks_is_refused() -> None:
    model = nn.ModuleDict({"a" * 40: nn.ModuleDict({"0": nn.ModuleDict({"q": nn.Linear(4, 4)})})})
    fields = {"layers_to_transform": [0], "layers_pattern": r"(?:a|a)+\.[^0]"}
    described = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
    _, faults = read_description(described | fields, model)
    assert "its repeats can be split in too many ways" in faults[0]


@pytest.mark.usefixtures("short_limit")
def test_a_hanging_target_of_ones_own_is_refused() -> None:
    model = nn.ModuleDict({"a" * 40: nn.Linear(4, 4)})
    with pytest.raises(TargetError, match="Write it without a repeat inside a repeat"):
        apply_lora(model, LoRAConfig(rank=2, targets=r"(a|a)+b"))


@pytest.mark.usefixtures("short_limit")
def test_many_quick_matches_cost_nothing() -> None:
    matcher = NameMatcher()
    assert sum(matcher.fullmatch(r".*\.q_proj", f"{i}.q_proj") for i in range(20_000)) == 20_000
