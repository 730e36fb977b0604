"""The subprocess that renders chat templates: what runs in it. No torch.

It takes pickled requests from its parent on standard input and answers in JSON on standard output,
since what a template produced is never unpickled. Timers of the kernel end it: their signals kill
the process wherever it is, inside one long call of C too.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from lora.data.chat import template_environment
from lora.data.chat.dropped_fields import DroppedFieldFinder
from lora.data.chat.template import ChatTemplate
from lora.data.chat.template_renderer import LocalRenderer, TemplateLimitError, TemplateSource
from lora.data.chat.turns import render_example
from lora.data.reading.formats import Example
from lora.errors import DataError

Answer = dict[str, Any]


class _LimitedRenderer(LocalRenderer):
    """A renderer whose process is killed if one rendering takes more than its limit."""

    limit_s = template_environment.MAX_RENDER_S

    def render(self, values: dict[str, Any], begin: str, end: str) -> str:
        # Loops stop at the limit by themselves, which is cheaper than a new process.
        signal.setitimer(signal.ITIMER_PROF, 1.1 * self.limit_s + 0.05)
        try:
            return super().render(values, begin, end)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)


class _Worker:
    """Answers requests; the last template stays compiled."""

    def __init__(self) -> None:
        self._renderer: _LimitedRenderer | None = None
        self._finder = DroppedFieldFinder()

    def answers(self, kind: str, limits_s: tuple[float, float], request: Any) -> Iterator[Answer]:
        """Yield the answers to one request; `limits_s` are a rendering's and a conversation's."""
        rendering_s, conversation_s = limits_s
        _LimitedRenderer.limit_s = rendering_s
        if kind == "load":
            signal.setitimer(signal.ITIMER_PROF, rendering_s)
            yield _answer(self._load, request)
            signal.setitimer(signal.ITIMER_PROF, 0)
        elif kind == "render":
            yield _answer(self._render, request)
        else:
            for example in request["examples"]:
                signal.setitimer(signal.ITIMER_VIRTUAL, conversation_s)
                yield _answer(self._converse, example, request)
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    def _load(self, source: TemplateSource) -> Answer:
        self._renderer = None  # the former one's memory is free before
        self._renderer, self._finder = _LimitedRenderer(source), DroppedFieldFinder()
        return {}

    def _render(self, request: tuple[dict[str, Any], str, str]) -> Answer:
        assert self._renderer is not None
        return {"text": self._renderer.render(*request)}

    def _converse(self, example: Example, request: dict[str, Any]) -> Answer:
        template = ChatTemplate(**request["template"], renderer=self._renderer)
        texts = render_example(template, example, self._finder, whole=request["whole"])
        return dataclasses.asdict(texts)


def _answer(work: Any, *arguments: Any) -> Answer:
    try:
        return {"value": work(*arguments)}
    except TemplateLimitError as error:
        return {"limit": str(error)}
    except MemoryError:
        return {"limit": ""}
    except RecursionError:
        return {"error": "the conversation is nested too deeply"}
    except DataError as error:
        return {"error": str(error)}


def main(max_memory_bytes: int) -> None:
    """Answer requests until standard input ends."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        max_memory_bytes = min(most, max_memory_bytes)
    _LimitedRenderer.memory_limit = f"{max_memory_bytes / 1e6:,.0f} MB"
    resource.setrlimit(resource.RLIMIT_AS, (max_memory_bytes, max_memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, answers = Connection(0, writable=False), Connection(1, readable=False)
    worker = _Worker()
    while True:
        try:
            request = requests.recv()
        except EOFError:
            return
        for answer in worker.answers(*request):
            text = json.dumps(answer, ensure_ascii=False, check_circular=False)
            answers.send_bytes(text.encode("utf-8", "surrogatepass"))
