"""Install commands that work here: with this Python, from where the package was installed."""

from __future__ import annotations

import functools
import importlib.metadata
import shlex
import shutil
import sys
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


@functools.cache
def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
