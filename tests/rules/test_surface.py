"""What a user meets first: the public names, and what importing them costs."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pydoc
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import lora
from lora.public.packages import PEFT_NAMES

HEAVY = [
    "transformers",
    "matplotlib",
    "rich",
    "cyclopts",
    "datasets",
    "pyarrow",
    "huggingface_hub",
    "tokenizers",
    "gguf",
    "peft",
    "tensorboard",
    "pandas",
    "jinja2",
    "yaml",
    "fastapi",
]
MAX_HELP_CPU_S = 1.0  # 0.2 on an idle machine

Trees = dict[str, ast.Module]


def modules_after(code: str) -> set[str]:
    """Return the top-level packages that a fresh Python has loaded after running `code`."""
    show = "; import sys; print(); print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code + show], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def test_importing_lora_loads_no_torch() -> None:
    loaded = modules_after("import lora")
    assert "lora" in loaded
    assert not loaded & {"torch", "numpy", *HEAVY}


def test_the_help_loads_no_torch() -> None:
    loaded = modules_after("from lora.cli import main; main(['--help'])")
    assert "cyclopts" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "matplotlib", "tokenizers"}


def test_the_process_of_the_help_loads_no_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "lora", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    loaded = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}
    assert {"lora", "cyclopts"} <= loaded
    assert "Usage: lora COMMAND" in done.stdout
    assert not loaded & {"torch", "numpy", "transformers", "matplotlib", "tokenizers"}


def test_the_layer_loads_torch_and_nothing_heavier() -> None:
    loaded = modules_after("from lora import LoRALinear")
    assert "torch" in loaded
    assert not loaded & set(HEAVY)


def test_the_help_is_there_at_once() -> None:
    code = (
        "import time; from lora.cli import main; main(['--help']); "
        "print(); print(time.process_time())"
    )
    seconds = [
        float(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout.split()[-1]
        )
        for _ in range(3)
    ]
    assert min(seconds) < MAX_HELP_CPU_S


def test_public_names_are_sorted_and_there() -> None:
    assert lora.__all__ == sorted(set(lora.__all__)) == sorted(lora._HOMES)
    for name in lora.__all__:
        found = getattr(importlib.import_module(lora._HOMES[name]), name)
        own = getattr(lora, name)
        assert getattr(own, name, None) is found if name in lora._PACKAGES else own is found


def test_dir_lists_the_public_names_and_nothing_else() -> None:
    importlib.import_module("lora.finetune.run")  # sets lora.finetune, lora.config … as attributes
    assert dir(lora) == lora.__all__
    for name in lora._PACKAGES:
        assert dir(getattr(lora, name)) == sorted(getattr(lora, name).__all__)


@pytest.mark.parametrize("name", lora._PACKAGES)
def test_a_package_is_called_like_its_function(name: str) -> None:
    package = importlib.import_module(f"lora.{name}")
    assert getattr(lora, name) is package
    assert isinstance(package, ModuleType)
    assert inspect.signature(package) == inspect.signature(getattr(package, name))
    with pytest.raises(TypeError, match=rf"{name}\(\).*nothing_like_this|positional argument"):
        package(nothing_like_this=1)


def test_the_name_stays_callable_after_any_import() -> None:
    code = (
        "import lora.finetune.job, lora; from lora.finetune import FinetuneJob; "
        "assert callable(lora.finetune) and lora.finetune.FinetuneJob is FinetuneJob; "
        "import lora.export.gguf as gguf; assert lora.export.gguf is gguf"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_help_of_settings_has_the_fields_texts() -> None:
    for owner in (lora.LoRAConfig, lora.TrainConfig, lora.DataConfig, lora.RunConfig):
        text = pydoc.render_doc(owner, renderer=pydoc.plaintext)
        for field in dataclasses.fields(owner):
            assert f"{field.name}: " in text
    text = pydoc.render_doc(lora.LoRAConfig, renderer=pydoc.plaintext)
    assert "rank: int = 8\n" in text
    assert "LoRA rank (PEFT's r), typically 8 to 64." in text
    assert "alpha_pattern: dict[str, float] = dict()" in text
    job = pydoc.render_doc(lora.finetune.FinetuneJob, renderer=pydoc.plaintext)  # type: ignore[attr-defined]
    assert "A file or directory of examples, or a list of dicts." in job  # of its parent


def test_type_checkers_see_the_same_names(trees: Trees) -> None:
    guarded = [node for node in trees["lora/__init__.py"].body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module
        for guard in guarded
        for node in guard.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == lora._HOMES
    assert sorted(seen) == lora.__all__


def test_an_unknown_name_is_the_usual_error() -> None:
    with pytest.raises(AttributeError, match="module 'lora' has no attribute 'LoRALinaer'"):
        lora.LoRALinaer  # type: ignore[attr-defined]  # noqa: B018


def test_a_name_of_peft_is_answered_with_ours() -> None:
    with pytest.raises(AttributeError, match="'get_peft_model': here it is 'apply_lora'"):
        lora.get_peft_model  # type: ignore[attr-defined]  # noqa: B018
    assert set(PEFT_NAMES.values()) <= set(lora.__all__)
    assert not PEFT_NAMES.keys() & set(lora.__all__)


def test_the_version_is_that_of_the_project_file(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    assert lora.__version__ == project["project"]["version"]


def test_the_package_tells_type_checkers_that_it_is_typed(root: Path) -> None:
    assert (root / "lora" / "py.typed").is_file()
