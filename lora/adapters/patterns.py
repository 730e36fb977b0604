"""Module names matched against regular expressions from outside, within a limit on time.

Python's `re` has no such limit: a pattern such as (a|a)+ can take longer than a life. The package
`regex` has one. What it reads differently from `re` is refused, so where a match ends it is the one
that `re` finds.
"""

from __future__ import annotations

import re
import time
import warnings
from functools import lru_cache

import regex

from lora.errors import TargetError

MAX_MATCHING_S = 2.0
"""Time for all slow matches of one configuration together."""
MAX_PATTERN_CHARS = 200_000
_FREE_S = 1e-3
"""A match that takes less does not count: there may be thousands of names."""
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_CLASS = re.compile(r"\[\^?\]?[^\]]*\]")
_REPEAT = re.compile(r"\{(\d+(,\d*)?|,\d*)\}")


class NameMatcher:
    """Matches names as `re` does; raises TargetError once its time is spent."""

    def __init__(self) -> None:
        self._left_s = MAX_MATCHING_S

    def fullmatch(self, pattern: str, name: str) -> bool:
        """Whether all of `name` matches `pattern`."""
        return self._groups(pattern, name, whole=True) is not None

    def match(self, pattern: str, name: str) -> tuple[str | None, ...] | None:
        """Return the groups of the match at the start of `name`, or None without a match."""
        return self._groups(pattern, name, whole=False)

    def _groups(self, pattern: str, name: str, *, whole: bool) -> tuple[str | None, ...] | None:
        compiled, started = _compile(pattern), time.thread_time()  # waiting is free
        match = compiled.fullmatch if whole else compiled.match
        try:
            found = match(name, timeout=self._left_s)
        except TimeoutError:
            found, self._left_s = None, 0.0
        self._left_s -= max(0.0, time.thread_time() - started - _FREE_S)
        if self._left_s <= 0:
            raise TargetError(
                f"Cannot match the pattern {_shortened(pattern)!r} with {name!r}: it takes longer "
                f"than {MAX_MATCHING_S:g} s, because its repeats can be split in too many ways. "
                "Write it without a repeat inside a repeat, or list the names."
            )
        return None if found is None else found.groups()


def why_not_pattern(pattern: str) -> str | None:
    """Return why `pattern` is not accepted as a regular expression, or None."""
    if len(pattern) > MAX_PATTERN_CHARS:
        return f"it has {len(pattern):,} characters, allowed are {MAX_PATTERN_CHARS:,}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of nested sets, refused below
            re.compile(pattern)
            regex.compile(pattern)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        return f"it is no regular expression ({error})"
    plain = _ESCAPED.sub("", pattern)
    classes = _CLASS.findall(plain)
    if any("[" in found[1:] for found in classes):
        return "it has a [ in a character class, whose meaning will change in Python; write \\["
    if "{" in _REPEAT.sub("", _CLASS.sub("", plain)):  # `regex` would match approximately
        return "it has a { that begins no repeat; write \\{"
    return None


@lru_cache(maxsize=1024)
def _compile(pattern: str) -> regex.Pattern[str]:
    why = why_not_pattern(pattern)
    if why is not None:
        raise TargetError(f"Cannot use the pattern {_shortened(pattern)!r}: {why}.")
    return regex.compile(pattern)


def _shortened(pattern: str) -> str:
    return pattern if len(pattern) <= 200 else f"{pattern[:200]}…"
