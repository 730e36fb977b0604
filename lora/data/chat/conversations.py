"""The texts of many conversations: rendered in batches, ahead of their use."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from lora.data.chat.dropped_fields import DroppedFieldFinder
from lora.data.chat.template import ChatTemplate
from lora.data.chat.template_workers import Worker, WorkerRenderer
from lora.data.chat.turns import ConversationTexts, SpannedText, render_example
from lora.data.reading.formats import Example
from lora.errors import DataError


class ConversationRenderer:
    """Renders conversations with one template; use it in a `with` statement.

    `prepare` sends a batch to the template's worker, and `render` takes the results in that order,
    so the worker renders while the caller does something else.
    """

    def __init__(self, template: ChatTemplate | None, *, whole: bool) -> None:
        self._template, self._whole = template, whole
        self._finder = DroppedFieldFinder()
        self._worker: Worker | None = None
        self._sent: deque[Example] = deque()
        self._leases = ExitStack()

    def __enter__(self) -> ConversationRenderer:
        if self._template is not None and isinstance(self._template.renderer, WorkerRenderer):
            self._worker = self._leases.enter_context(self._template.renderer.lease())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leases.close()

    def prepare(self, examples: Sequence[Example]) -> None:
        """Begin with those of `examples` that are conversations; all earlier ones are taken."""
        chats = [example for example in examples if example.messages is not None]
        chats = [example for example in chats if not example.is_context]
        template = self._template
        if self._worker is None or template is None or not chats:
            return
        self._sent.extend(chats)
        described = {
            "source": template.source,
            "special_tokens": template.special_tokens,
            "name": template.name,
            "now": template.now,
        }
        request = {"examples": chats, "template": described, "whole": self._whole}
        self._worker.ask("conversations", request, len(chats))

    def render(self, example: Example) -> ConversationTexts:
        """Return the texts of the next conversation.

        Raises DataError if the template rejects it, TemplateLimitError if it exceeds a limit.
        """
        if self._template is None:
            raise DataError("Cannot render a conversation: there is no chat template.")
        if not self._sent or self._sent[0] is not example or self._worker is None:
            return render_example(self._template, example, self._finder, whole=self._whole)
        self._sent.popleft()
        return _from_json(self._worker.answer())


def _from_json(value: dict[str, Any]) -> ConversationTexts:
    """Return what `dataclasses.asdict` and JSON made of a conversation's texts."""
    texts = [SpannedText(**{**t, "spans": [(a, b) for a, b in t["spans"]]}) for t in value["texts"]]
    return ConversationTexts(**{**value, "texts": texts})
