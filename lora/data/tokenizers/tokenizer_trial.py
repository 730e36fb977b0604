"""A stranger's tokenizer.json is loaded and tried in a subprocess first.

The tokenizers library panics or aborts on some damaged files: nothing in this process could catch
that. What passed is remembered by its digest in the cache folder, so each file is tried once.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lora.data.tokenizers.text_growth import why_it_grows
from lora.errors import DataError
from lora.runs.disk import cache_path
from lora.runs.subprocesses import import_path

MAX_TRIAL_S = 120.0
"""CPU time; large tokenizers take about 3 s."""
MIN_MEMORY_BYTES, MEMORY_PER_BYTE = 1 << 30, 40
"""The trial's address space: at least, and for each byte of the file."""
MAX_TOKEN_CHARACTERS = 1 << 16
KNOWN_FOLDER = "tokenizers"
"""In the cache folder: one empty file for each tokenizer.json that passed, named by its digest."""
TRIAL_VERSION = 1
"""Increase it when the trial finds more than it did."""

_HAS_LIMITS = importlib.util.find_spec("resource") is not None
_START = (
    "import sys; module, limit, sys.path[:] = sys.argv[1], int(sys.argv[2]), sys.argv[3:]; "
    "from lora.data.tokenizers.tokenizer_trial import main; main(module, limit)"
)
_TEXTS = (
    "",
    " ",
    "The quick brown fox\n\n jumps over 13 lazy dogs.\t",
    "Ünï-cödé \N{GRINNING FACE}\N{ZERO WIDTH JOINER}\N{CJK UNIFIED IDEOGRAPH-4E2D}\ufdfa e\u0301",
    "<|im_start|>user\nx<|im_end|><s></s><pad>",
    "a" * 300 + " " * 300 + "\n" * 300,
)
_MAX_LITERALS, _MAX_TRIED_IDS = 2000, 5000


def check_tokenizer(path: Path, data: bytes, module: str = __name__) -> None:
    """Raise DataError if loading or trying a tokenizer ends in a panic, an abort or a limit.

    `data` is what the file at `path` holds of it, and goes to the function `find_fault` of a
    module, in a subprocess. An ordinary error while it is loaded is not reported here.
    """
    if not (_HAS_LIMITS and sys.executable):
        return
    version = f"{importlib.metadata.version('tokenizers')} {TRIAL_VERSION} {module}"
    digest = hashlib.sha256(version.encode() + b"\0" + data).hexdigest()
    known: Path | None = None
    with contextlib.suppress(RuntimeError):  # no home directory: nothing is remembered
        known = cache_path() / KNOWN_FOLDER / digest
    if known is not None and known.is_file():
        return
    fault = _try_in_subprocess(module, data, MIN_MEMORY_BYTES + MEMORY_PER_BYTE * len(data))
    if fault:
        raise DataError(
            f"Cannot load the tokenizer {path}: {fault}. Copy the file again, or use another."
        )
    if known is not None:
        with contextlib.suppress(OSError):
            known.parent.mkdir(parents=True, exist_ok=True)
            known.touch()


def is_panic(error: BaseException) -> bool:
    """Whether the tokenizers library panicked; its class is no Exception and has no public name."""
    return type(error).__name__ == "PanicException"


def _try_in_subprocess(module: str, data: bytes, max_memory_bytes: int) -> str | None:
    limit, path = str(max_memory_bytes), import_path()
    command = [sys.executable, "-I", "-S", "-c", _START, module, limit, *path]
    # One thread and one arena: others take address space for themselves.
    alone = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "1"}
    found = subprocess.run(
        command,
        input=data,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **alone, "RUST_BACKTRACE": "0"},
        check=False,
    )
    code = found.returncode
    if code == 0:
        fault = json.loads(found.stdout)
        return None if fault is None else str(fault)
    if code == -signal.SIGPROF:
        return f"loading and trying it takes more than {MAX_TRIAL_S:.0f} s"
    ended = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    return (
        "loading and trying it in a subprocess takes more memory than "
        f"{max_memory_bytes / 1e6:,.0f} MB, or crashes it: it ended {ended}"
    )


def main(module: str, max_memory_bytes: int) -> None:
    """Try the tokenizer on standard input within limits; print its fault as JSON, or null."""
    import resource

    find: Callable[[str], str | None] = importlib.import_module(module).find_fault

    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, MAX_TRIAL_S)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        max_memory_bytes = min(most, max_memory_bytes)
    resource.setrlimit(resource.RLIMIT_AS, (max_memory_bytes, max_memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.setrecursionlimit(5000)
    text = sys.stdin.buffer.read().decode("utf-8-sig", "replace")
    try:
        fault = find(text)
    except BaseException as error:
        if not is_panic(error):
            raise
        fault = f"the tokenizers library panics: {str(error)[:200]}"
    json.dump(fault, sys.stdout)


def find_fault(text: str) -> str | None:
    """Return what is wrong with the text of a tokenizer.json, or None."""
    try:
        parts = json.loads(text)
    except (ValueError, RecursionError):
        parts = {}  # the library says what is wrong with it
    parts = parts if isinstance(parts, dict) else {}
    fault = _token_fault(parts) or why_it_grows(parts.get("normalizer"), "normalizer")
    fault = fault or why_it_grows(parts.get("decoder"), "decoder")
    if fault:
        return fault
    try:
        backend = Tokenizer.from_str(text)
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, ValueError):
            raise
        return None  # this error is raised again where the file is loaded
    backend.no_truncation()
    backend.no_padding()
    names = ("normalizer", "pre_tokenizer", "decoder", "post_processor", "added_tokens")
    literals = _strings([parts.get(name) for name in names])
    probes = [*_TEXTS, *_all_characters(), *dict.fromkeys(list(literals)[:_MAX_LITERALS])]
    for probe in probes:
        _encode(backend, probe)
    ids = range(min(_MAX_TRIED_IDS, backend.get_vocab_size(with_added_tokens=True)))
    backend.decode(list(ids), skip_special_tokens=False)
    return None


def _token_fault(parts: dict[str, Any]) -> str | None:
    added = parts.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        content = token.get("content") if isinstance(token, dict) else None
        if isinstance(content, str) and len(content) > MAX_TOKEN_CHARACTERS:
            return (
                f"it has a token of {len(content):,} characters; at most "
                f"{MAX_TOKEN_CHARACTERS:,} are allowed"
            )
    return None


def _encode(backend: Tokenizer, text: str) -> None:
    for special in (False, True):
        try:
            found = backend.encode(text, add_special_tokens=special)
            backend.decode(found.ids, skip_special_tokens=not special)
        except Exception as error:
            if type(error) is not Exception:
                raise
            # Some good tokenizers cannot encode every character and say so.


def _all_characters() -> Iterator[str]:
    """Yield the characters of the basic plane in texts of 1,024."""
    for first in range(0, 0x10000, 1024):
        if not 0xD800 <= first < 0xE000:
            yield "".join(map(chr, range(first, first + 1024)))


def _strings(value: Any) -> Iterator[str]:
    """Yield the strings in a JSON value that are not too long to try."""
    if isinstance(value, str) and len(value) <= 1024:
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
