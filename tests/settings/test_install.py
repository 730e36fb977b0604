"""Install commands: this Python's pip, and the place that the package came from."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from lora.settings import install as module
from lora.settings.install import install, install_extra


@pytest.fixture(autouse=True)
def with_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python that has pip and is not the one of the PATH."""
    monkeypatch.setattr(sys, "executable", "/my env/bin/python")
    monkeypatch.setattr(module, "_is_installed", lambda name: True)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")


def test_the_pip_is_that_of_this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    assert install("gguf") == "'/my env/bin/python' -m pip install gguf"
    monkeypatch.setattr(sys, "executable", "/usr/bin/python")
    assert install("gguf") == "python -m pip install gguf"


def test_an_environment_of_uv_has_no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_is_installed", lambda name: name != "pip")
    assert install("gguf") == "uv pip install --python '/my env/bin/python' gguf"


def test_an_extra_comes_from_where_the_package_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_is_installed", lambda name: True)
    assert install_extra("hub").endswith("-m pip install 'lora-lm[hub]'")
    monkeypatch.setattr(module, "_is_installed", lambda name: name == "pip")
    source = Path(module.__file__).parents[2]
    assert install_extra("hub").endswith(f"-m pip install -e '{source}[hub]'")
