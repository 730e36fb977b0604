"""A comparison's members without the subprocesses that they are isolated in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def run_in_this_process(
    stage: Callable[..., Any], *arguments: Any, progress: Any, environment: object
) -> Any:
    """Stand for `lora.runs.subprocesses.run_in_subprocess`: starting one takes seconds."""
    return stage(*arguments, progress)
