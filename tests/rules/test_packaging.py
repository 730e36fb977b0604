"""What pip installs, what the project file promises, and that warnings are errors in tests."""

from __future__ import annotations

import os
import re
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
from setuptools import find_namespace_packages, find_packages

import lora.cli
from lora import doctor


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    """The content of pyproject.toml."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def packages_of(project: dict[str, Any], root: Path) -> set[str]:
    """Return the packages that setuptools puts into the wheel."""
    settings = project["tool"]["setuptools"]
    assert "py-modules" not in settings, "single modules would be installed beside lora/"
    assert set(settings["packages"]) == {"find"}, "packages are found, not listed by hand"
    find = dict(settings["packages"]["find"])
    where = [str(root / folder) for folder in find.pop("where", ["."])]
    # A project file finds folders without __init__.py too, unless it says otherwise.
    finder = find_namespace_packages if find.pop("namespaces", True) else find_packages
    return {name for folder in where for name in finder(folder, **find)}


def test_the_wheel_holds_lora_only(project: dict[str, Any], root: Path) -> None:
    others = {name for name in packages_of(project, root) if name.split(".")[0] != "lora"}
    assert not others, f"pip would also install {sorted(others)}: narrow packages.find.include"


def test_the_wheel_holds_every_folder_of_lora(
    project: dict[str, Any], root: Path, trees: dict[str, Any]
) -> None:
    folders = {path.rsplit("/", 1)[0] for path in trees if path.startswith("lora/")}
    missing = {name.replace("/", ".") for name in folders} - packages_of(project, root)
    bare = sorted(name for name in folders if f"{name}/__init__.py" not in trees)
    assert not missing, f"pip would leave out {sorted(missing)}: widen packages.find.include"
    assert not bare, f"{bare} have no __init__.py: type checkers would not see them as packages"


def test_the_wheel_holds_every_file_that_is_no_module(
    project: dict[str, Any], root: Path, tracked: list[Path]
) -> None:
    files = {path.relative_to(root) for path in tracked if path.suffix != ".py"}
    data = {path for path in files if path.parts[0] == "lora"}
    patterns = project["tool"]["setuptools"]["package-data"]
    installed = {
        path.relative_to(root)
        for package, globs in patterns.items()
        for glob in globs
        for path in (root / package.replace(".", "/")).glob(glob)
    }
    left_out = sorted(map(str, data - installed))
    assert not left_out, f"pip would leave out {left_out}: name them in setuptools.package-data"


def test_the_project_says_whose_it_is_and_what_for(project: dict[str, Any]) -> None:
    about = project["project"]
    assert all(author["name"] for author in about["authors"])
    assert about["urls"]
    assert all(url.startswith("https://") for url in about["urls"].values())
    needed = {"Typing :: Typed", "Environment :: Console", "Programming Language :: Python :: 3.11"}
    assert needed <= set(about["classifiers"])
    assert not [each for each in about["classifiers"] if each.startswith("License ::")]


def test_the_command_is_lora(project: dict[str, Any]) -> None:
    assert project["project"]["scripts"] == {"lora": "lora.__main__:main"}
    assert callable(lora.cli.main)


def test_warnings_are_errors(project: dict[str, Any]) -> None:
    filters = project["tool"]["pytest"]["ini_options"]["filterwarnings"]
    assert filters[0] == "error", 'filterwarnings begins with "error"; exceptions come after it'


def test_warnings_are_errors_in_this_very_run(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("filterwarnings")[0] == "error"
    with pytest.raises(UserWarning, match="a trial"):
        warnings.warn("a trial", stacklevel=1)


def test_every_extra_that_an_error_offers_exists(project: dict[str, Any], root: Path) -> None:
    extras = set(project["project"]["optional-dependencies"])
    offered = {
        name
        for path in (root / "lora").rglob("*.py")
        for name in extras_named_in(path.read_text(encoding="utf-8"))
    }
    assert offered <= extras, f"an install line names {sorted(offered - extras)}, which is no extra"


def extras_named_in(text: str) -> set[str]:
    """Return the extras that install lines in `text` ask for: lora-lm[a,b]."""
    parts = [part.split("]")[0] for part in text.split("lora-lm[")[1:]]
    named = {name.strip() for part in parts for name in part.split(",") if "{" not in name}
    return named | set(re.findall(r"install_extra\(['\"](\w+)['\"]\)", text))


def test_the_extras_of_an_install_line_are_found() -> None:
    assert extras_named_in("pip install 'lora-lm[data, hub]' x[y]") == {"data", "hub"}
    assert extras_named_in("Run: {install_extra('track')}") == {"track"}


def test_the_extras_that_doctor_names_exist(project: dict[str, Any]) -> None:
    extras = {extra for _, extra in doctor.OPTIONAL.values()} - {None}
    assert extras <= set(project["project"]["optional-dependencies"])


def test_install_lines_are_made_for_this_python(root: Path) -> None:
    by_hand = {
        path.relative_to(root).as_posix()
        for path in (root / "lora").rglob("*.py")
        if "Run: pip install" in path.read_text(encoding="utf-8")
    }
    assert not by_hand, "use install() or install_extra() of lora/settings/install.py"


@pytest.mark.xdist_group("groups")
def test_workers_keep_groups_of_tests_together(request: pytest.FixtureRequest) -> None:
    # Without it every worker would start the processes that a module's tests share.
    if "PYTEST_XDIST_WORKER" not in os.environ or not request.config.option.loadgroup:
        pytest.skip("no workers that keep groups: see `make test`")
    assert request.node.nodeid.endswith("@groups")
