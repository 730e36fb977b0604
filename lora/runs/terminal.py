"""Text from data files made safe to print on a terminal."""

from __future__ import annotations

import re

# Control characters, and those that reverse the direction of the text after them.
_CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str, is_ascii: bool = False) -> str:
    """Return `text` with control characters written as escapes, and all but ASCII if `is_ascii`."""
    safe = _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return safe.encode("ascii", "backslashreplace").decode() if is_ascii else safe
