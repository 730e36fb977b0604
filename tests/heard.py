"""What a run says, kept for tests."""

from __future__ import annotations

from lora.runs.progress import NoProgress


class Heard(NoProgress):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, message: str) -> None:
        self.said.append(message)
