"""Install commands that work here: with this Python, from where the package was installed."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import shlex
import shutil
import sys
import urllib.parse
from pathlib import Path

DISTRIBUTION = "lora-lm"


def install_extra(extra: str) -> str:
    """Return the command that installs what an extra of this package needs."""
    if not _is_installed(DISTRIBUTION):
        source = Path(__file__).parents[2]
        if (source / "pyproject.toml").is_file():  # run from its source
            return install(f"-e {shlex.quote(f'{source}[{extra}]')}")
    return install(f"'{DISTRIBUTION}[{extra}]'")


def install(what: str) -> str:
    """Return the command that installs `what`, as pip's arguments, into this Python.

    Not the `pip` of the PATH, which may belong to another one.
    """
    python = sys.executable or "python"
    found = shutil.which("python")
    named = "python" if found is not None and found == python else shlex.quote(python)
    if not _is_installed("pip") and shutil.which("uv") is not None:
        return f"uv pip install --python {named} {what}"
    return f"{named} -m pip install {what}"


def installed_from() -> Path | str:
    """Return where another machine can install this package from: a directory here, or for pip.

    The directory is the source that it runs from, or was installed from; else what pip takes is a
    commit of a repository, or the version on the package index.
    """
    source = Path(__file__).parents[2]
    if (source / "pyproject.toml").is_file():
        return source
    try:
        installed = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return DISTRIBUTION
    origin = json.loads(installed.read_text("direct_url.json") or "{}")  # PEP 610
    url = str(origin.get("url", ""))
    if url.startswith("file://"):
        path = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path))
        if (path / "pyproject.toml").is_file():
            return path
    vcs = origin.get("vcs_info", {})
    if {"vcs", "commit_id"} <= vcs.keys():
        return f"{DISTRIBUTION} @ {vcs['vcs']}+{url}@{vcs['commit_id']}"
    return f"{DISTRIBUTION}=={installed.version}"


@functools.cache
def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
