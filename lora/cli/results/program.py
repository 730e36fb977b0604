"""How the command line is called here, for commands that are printed to be copied."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path


def program() -> str:
    """Return `lora`, or the path or the call of Python that reaches it, quoted for a shell."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":  # python -m lora
        return f"{shlex.quote(sys.executable)} -m lora"
    found = shutil.which("lora")
    is_on_path = found is not None and Path(found).resolve() == called.resolve()
    return shlex.quote(str(called)) if called.name == "lora" and not is_on_path else "lora"
