from __future__ import annotations

import dataclasses
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora.config import DataConfig
from lora.data.chat import template_environment, template_workers
from lora.data.chat.choose_template import choose_template
from lora.data.chat.template import ChatTemplate
from lora.data.chat.template_renderer import LocalRenderer, TemplateLimitError, TemplateSource
from lora.data.chat.template_workers import WorkerRenderer, open_renderer
from lora.data.reading.readers import read_examples
from lora.data.sequences.encode import encode_examples
from lora.data.tokenizers.subword import TextTokenizer
from lora.errors import DataError

USER = {"role": "user", "content": "Hi"}
ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": f"What is {n} + ünï?\n"},
            {"role": "assistant", "content": "It is <2>.", "thinking": "hm"},
            {"role": "user", "content": "And now? \U0001f600"},
            {"role": "assistant", "content": f" {n + 1}"},
        ]
    }
    for n in range(7)
]
DOUBLED = (
    "{% set ns = namespace(a=['x'], b=['x']) %}{% for i in range(45) %}"
    "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}"
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers of this test alone, with a tenth of a second and 200 MB."""
    monkeypatch.setattr(template_environment, "MAX_RENDER_S", 0.1)
    monkeypatch.setattr(template_workers, "MAX_MEMORY_BYTES", 200_000_000)
    pool = template_workers._Pool()
    monkeypatch.setattr(template_workers, "_POOL", pool)
    yield
    pool.close()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "source",
    [
        DOUBLED + "{{ ns.a }}",
        DOUBLED + "{{ ns.a == ns.b }}",
        DOUBLED + "{{ [ns.a, ns.b] | sort }}",
        DOUBLED + "{{ [ns.a, ns.b] | unique | list }}",
        DOUBLED + "{{ ns.a | join }}",
        DOUBLED + "{{ ns.a | tojson }}",
        DOUBLED + "{{ '%s' % ns.a }}",
        DOUBLED + "{{ '{}'.format(ns.a) }}",
        "{% set ns = namespace(a=10**1000) %}"
        "{% for i in range(40) %}{% set ns.a = ns.a * ns.a %}{% endfor %}{{ ns.a % 7 }}",
        "{% set ns = namespace(a=10**1000) %}{% for i in range(9) %}{% set ns.a = ns.a * ns.a %}"
        "{% endfor %}{{ ns.a | round(-99999) }}",
        "{{ ('x\n' * 30000000) | indent(9999) }}",
        "{% set a = 'a' * 60000000 %}{{ [a, a ~ 1, a ~ 2, a ~ 3] | join | urlize }}",
    ],
)
def test_what_no_check_in_a_loop_sees_is_stopped(source: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began_s = time.monotonic()
    with pytest.raises(DataError, match=r"^the chat template rejects the conversation: \w+"):
        ChatTemplate(source).render([USER])
    assert time.monotonic() - began_s < 8  # seconds on a busy machine
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


@pytest.mark.usefixtures("small")
def test_the_limits_are_named() -> None:
    with pytest.raises(TemplateLimitError, match=r"rejects .*: it takes more than 0 s\. Give"):
        ChatTemplate(DOUBLED + "{{ ns.a == ns.b }}").render([USER])
    assert ChatTemplate("{{ messages[0].content }}").render([USER]) == "Hi"
    with pytest.raises(TemplateLimitError, match=r"rejects .*: it takes more memory than 200 MB"):
        ChatTemplate("{{ ('x\n' * 30000000) | indent(9999) }}").render([USER])


@pytest.mark.usefixtures("small")
def test_a_conversation_has_a_limit_for_all_its_renderings(
    monkeypatch: pytest.MonkeyPatch, tokenizer: TextTokenizer
) -> None:
    monkeypatch.setattr(template_workers, "MAX_CONVERSATION_S", 0.2)
    monkeypatch.setattr(template_environment, "MAX_RENDER_S", 0.15)
    source = "{% for i in range(9999) %}{% endfor %}" * 30 + "{{ messages[-1].content }}"
    slow = dataclasses.replace(tokenizer, chat_template=source)
    with pytest.raises(TemplateLimitError, match=r"^row 1: .* takes more than 0 s"):
        encode_examples(read_examples(ROWS), slow, DataConfig())


@pytest.mark.usefixtures("small")
def test_the_first_conversation_beyond_a_limit_ends_the_reading(tokenizer: TextTokenizer) -> None:
    source = DOUBLED + (
        "{% for m in messages %}{{ m.content }}{% if '4 +' in m.content %}{{ ns.a == ns.b }}"
        "{% endif %}{% endfor %}"
    )
    hostile = dataclasses.replace(tokenizer, chat_template=source)
    began_s = time.monotonic()
    with pytest.raises(TemplateLimitError, match=r"^row 5: the chat template rejects .* 0 s"):
        encode_examples(read_examples(ROWS * 9), hostile, DataConfig())
    assert time.monotonic() - began_s < 8


@pytest.mark.parametrize("learn_on", ["assistant", "all"])
def test_a_worker_changes_no_token(
    tokenizer: TextTokenizer,
    templates: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    learn_on: Any,
) -> None:
    examples = read_examples(ROWS)
    config = DataConfig(learn_on=learn_on, allow_dropped_fields=True)
    tokenizers = [dataclasses.replace(tokenizer, chat_template=t) for t in templates.values()]
    isolated = [encode_examples(examples, chosen, config) for chosen in tokenizers]
    monkeypatch.setattr(template_workers, "_HAS_LIMITS", False)
    for chosen, found in zip(tokenizers, isolated, strict=True):
        here = encode_examples(examples, chosen, config)
        assert here.counts == found.counts
        assert here.dropped_fields == found.dropped_fields
        for mine, theirs in zip(
            dataclasses.astuple(here.documents), dataclasses.astuple(found.documents), strict=True
        ):
            np.testing.assert_array_equal(mine, theirs)


def test_rejections_of_a_batch_are_gathered(tokenizer: TextTokenizer) -> None:
    source = (
        "{% if '3 +' in messages[0].content or '5 +' in messages[0].content %}"
        "{{ raise_exception('no threes') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    picky = dataclasses.replace(tokenizer, chat_template=source)
    with pytest.raises(DataError, match=r"row 4 and 1 more: .*: no threes"):
        encode_examples(read_examples(ROWS), picky, DataConfig())


def test_known_templates_need_no_worker(
    tokenizer: TextTokenizer, bos_tokenizer: TextTokenizer, smollm2_tokenizer: TextTokenizer
) -> None:
    plain = [tokenizer, bos_tokenizer, dataclasses.replace(tokenizer, eos_token=None)]
    chosen = [choose_template(one, None)[0].chat_template for one in plain]
    for source in (*chosen, smollm2_tokenizer.chat_template):
        assert source is not None
        assert isinstance(open_renderer(TemplateSource(source, "x")), LocalRenderer)
        assert isinstance(open_renderer(TemplateSource(source + " ", "x")), WorkerRenderer)


def test_without_limits_of_the_system_it_renders_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_workers, "_HAS_LIMITS", False)
    template = ChatTemplate("{{ messages[0].content }}")
    assert isinstance(template.renderer, LocalRenderer)
    assert template.render([USER]) == "Hi"


def test_threads_and_forks_have_workers_of_their_own() -> None:
    template, wrong = ChatTemplate("{{ messages[0].content }}"), list[str]()

    def work(name: str) -> None:
        wrong.extend(
            text
            for n in range(30)
            if (text := template.render([{**USER, "content": f"{name} {n}"}])) != f"{name} {n}"
        )

    threads = [threading.Thread(target=work, args=(f"thread {k}",)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    code = (
        "import os; from lora.data.chat.template import ChatTemplate as T\n"
        "t = T('{{ messages[0].content }}'); child = not os.fork()\n"
        "texts = [t.render([{'content': f'{child}{n}'}]) for n in range(50)]\n"
        "assert texts == [f'{child}{n}' for n in range(50)]\n"
        "child or exit(os.wait()[1])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_worker_loads_nothing_heavy() -> None:
    code = (
        "import sys, lora.data.chat.template_worker; "
        "print({'torch', 'numpy', 'tokenizers', 'rich'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


@pytest.mark.parametrize("ending", ["pass", "os.kill(os.getpid(), 9)", "os._exit(0)"])
def test_the_worker_ends_with_its_process(ending: str) -> None:
    code = (
        "import os; from lora.data.chat.template import ChatTemplate as T\n"
        "t = T('{{ messages[0].content }}'); t.render([{'content': 'x'}])\n"
        "with t.renderer.lease() as worker: print(worker._process.pid, flush=True)\n" + ending
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert not found.stderr
    path, until_s = Path("/proc") / found.stdout.strip(), time.monotonic() + 10
    while path.exists() and " (zombie)" not in (path / "status").read_text():
        assert time.monotonic() < until_s, "the worker outlived its process"
        time.sleep(0.02)


def test_a_worker_that_was_killed_is_replaced() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    assert isinstance(template.renderer, WorkerRenderer)
    with template.renderer.lease() as worker:
        os.kill(worker._process.pid, signal.SIGKILL)
        worker._process.wait()
    assert template.render([USER]) == "Hi"
    with pytest.raises(TemplateLimitError, match=r"memory than 1,074 MB.* ended by SIGKILL"):
        _kill_while_it_works(template.renderer)
    assert template.render([USER]) == "Hi"


def _kill_while_it_works(renderer: WorkerRenderer) -> None:
    with renderer.lease() as worker:
        os.kill(worker._process.pid, signal.SIGSTOP)
        worker.ask("render", ({"messages": [USER]}, "", ""))
        os.kill(worker._process.pid, signal.SIGKILL)
        worker.answer()
