"""Subprocesses that render untrusted chat templates under hard limits on time and memory.

The sandbox of jinja2 and the checks of `template_limits.py` stop most runaway templates with a good
message. What they cannot stop is one long call inside C: a nested list that was built by doubling
and is then printed, compared or sorted. So a template that is not known runs in a subprocess whose
address space is limited and which timers of the kernel kill. A worker is started for the first
template (about 0.2 s), serves one caller at a time, keeps its template compiled, and ends with this
process. Without the module `resource` (Windows) templates run here, with the checks alone.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from lora.data.chat import template_environment
from lora.data.chat.template_renderer import (
    LocalRenderer,
    TemplateLimitError,
    TemplateRenderer,
    TemplateSource,
)
from lora.errors import DataError
from lora.runs.disk import os_reason
from lora.runs.subprocesses import import_path

MAX_MEMORY_BYTES = 1 << 30
"""Address space of a worker: its own 30 MB, the conversation, the template's values, the text."""
MAX_CONVERSATION_S = 60.0
"""CPU time for all renderings of one conversation; MAX_RENDER_S is for each of them."""
KNOWN_TEMPLATES = frozenset(
    (
        "1e1f67b28030dee3cbea9a58c02717484db942ff8c3f68e1e8b4e81e571e79cc",
        "0e81fc560400fe676b16031a450a09499a9fc6383b75b02a66251e2174a5e404",
        "862730a95b0504853061442b25a115aa403d369f921012425ea50d09b77eb6ff",
        "24f740fc4d39ccce1da3dd6e1ec2ec66cd00ca219a8a61ae68d3f0d0d95920c3",
        "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",
    )
)
"""SHA-256 of templates that render in this process: the four forms of PLAIN_TEMPLATE, and the
default model's own. A template whose digest is not here only costs a worker."""

_MAX_IDLE = 4
_START = (
    "import sys; limit, sys.path[:] = int(sys.argv[1]), sys.argv[2:]; "
    "from lora.data.chat.template_worker import main; main(limit)"
)
_HAS_LIMITS = importlib.util.find_spec("resource") is not None


def open_renderer(source: TemplateSource) -> TemplateRenderer:
    """Return what renders a template: a worker, or this process for known templates.

    Raises DataError if the template is not valid.
    """
    digest = hashlib.sha256(source.source.encode(errors="replace")).hexdigest()
    if digest in KNOWN_TEMPLATES or not (_HAS_LIMITS and sys.executable):
        return LocalRenderer(source)
    renderer = WorkerRenderer(source)
    with renderer.lease():
        return renderer


class WorkerRenderer:
    """Renders in a worker."""

    def __init__(self, source: TemplateSource) -> None:
        self.source = source

    def render(self, values: dict[str, Any], begin: str, end: str) -> str:
        """Return the text; see TemplateRenderer."""
        with self.lease() as worker:
            worker.ask("render", (values, begin, end))
            return str(worker.answer()["text"])

    @contextmanager
    def lease(self) -> Iterator[Worker]:
        """Give a worker that has the template loaded; nobody else uses it meanwhile.

        All answers must be taken. Raises DataError if the template is not valid.
        """
        worker = _POOL.take(self.source)
        try:
            if worker.source != self.source:
                worker.load(self.source)
            yield worker
        finally:
            _POOL.give_back(worker)


class Worker:
    """One subprocess, and the pipes to it."""

    def __init__(self) -> None:
        limit, path = str(MAX_MEMORY_BYTES), import_path()
        command = [sys.executable, "-I", "-S", "-c", _START, limit, *path]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the parent alone
            )
        except OSError as error:
            raise DataError(
                f"Cannot start the subprocess that renders chat templates: {os_reason(error)}."
            ) from None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests = Connection(os.dup(self._process.stdin.fileno()), readable=False)
        self._answers = Connection(os.dup(self._process.stdout.fileno()), writable=False)
        self._process.stdin.close()
        self._process.stdout.close()
        self.source: TemplateSource | None = None
        self._loading: TemplateSource | None = None
        self._n_open = 0
        """Answers that are still to come."""

    @property
    def is_usable(self) -> bool:
        """Whether it waits for a request."""
        return not self._n_open and self._process.poll() is None

    def load(self, source: TemplateSource) -> None:
        """Compile a template. Raises DataError if it is not valid."""
        self.source, self._loading = None, source
        self.ask("load", source)
        self.answer()
        self.source = source

    def ask(self, kind: str, request: Any, n_answers: int = 1) -> None:
        """Send a request whose answers `answer` returns one by one."""
        limits_s = (template_environment.MAX_RENDER_S, MAX_CONVERSATION_S)
        self._n_open = n_answers
        try:
            self._requests.send((kind, limits_s, request))
        except OSError:
            raise self._limit_error() from None
        except RecursionError:
            raise DataError(self._message("it is nested too deeply")) from None

    def answer(self) -> dict[str, Any]:
        """Return the next answer.

        Raises DataError as the template raised it, TemplateLimitError if that killed the worker.
        """
        try:
            answer = json.loads(self._answers.recv_bytes())
        except (EOFError, OSError):
            raise self._limit_error() from None
        self._n_open -= 1
        if "limit" in answer:
            raise TemplateLimitError(answer["limit"] or self._message(_memory_limit()))
        if "error" in answer:
            raise DataError(answer["error"])
        value: dict[str, Any] = answer["value"]
        return value

    def close(self) -> None:
        """End the subprocess."""
        self._requests.close()
        self._answers.close()
        self._process.kill()
        self._process.wait()

    def _limit_error(self) -> TemplateLimitError:
        code = self._process.wait()
        render_s = template_environment.MAX_RENDER_S
        if code == -signal.SIGPROF:
            return TemplateLimitError(self._message(f"it takes more than {render_s:.0f} s"))
        if code == -signal.SIGVTALRM:
            seen = f"one conversation takes more than {MAX_CONVERSATION_S:.0f} s"
            return TemplateLimitError(self._message(seen))
        ended = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        return TemplateLimitError(
            self._message(f"{_memory_limit()}, or is damaged: its subprocess ended {ended}")
        )

    def _message(self, problem: str) -> str:
        source = self.source or self._loading
        name = "the chat template" if source is None else source.name
        return f"{name} rejects the conversation: {problem}. Give another with chat_template."


def _memory_limit() -> str:
    return f"it takes more memory than {MAX_MEMORY_BYTES / 1e6:,.0f} MB"


class _Pool:
    """Workers that nobody uses at the moment."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[Worker] = []
        self._process_id: int | None = None

    def take(self, source: TemplateSource) -> Worker:
        """Return an idle worker, at best one that has `source` loaded, or a new one."""
        with self._lock:
            if self._process_id != os.getpid():  # a fork's copies belong to its parent
                self._idle, self._process_id = [], os.getpid()
                atexit.register(self.close)
            self._idle.sort(key=lambda worker: worker.source == source)
            while self._idle:
                worker = self._idle.pop()
                if worker.is_usable:
                    return worker
                worker.close()
        return Worker()

    def give_back(self, worker: Worker) -> None:
        """Keep a worker for later, or end it if it cannot be used again."""
        with self._lock:
            if worker.is_usable and len(self._idle) < _MAX_IDLE:
                self._idle.append(worker)
                return
        worker.close()

    def close(self) -> None:
        """End all idle workers."""
        with self._lock:
            while self._idle:
                self._idle.pop().close()


_POOL = _Pool()
