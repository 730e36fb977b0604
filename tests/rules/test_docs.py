"""The documentation site: every command, flag, name and field is in it; links and code hold.

`make docs` builds the site with mkdocs; these tests need only its sources.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import pytest
import yaml

import lora
from lora.cli import COMMANDS, build_app
from lora.data.reading.formats import example_from_row

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


@pytest.fixture(scope="module")
def generate(root: Path) -> Iterator[ModuleType]:
    """The generator of pages."""
    folder = root / "docs" / "site"
    spec = importlib.util.spec_from_file_location("docs_generate", folder / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    sys.modules.pop("coming_from", None)


@pytest.fixture(scope="module")
def site(root: Path, generate: ModuleType) -> dict[str, str]:
    """By path inside the site: the Markdown of each page, links as the site has them."""
    pages: dict[str, str] = generate.generated_pages()
    docs = root / "docs"
    for path in sorted(docs.rglob("*.md")):
        inside = path.relative_to(docs).as_posix()
        text = path.read_text(encoding="utf-8")
        assert inside not in pages, f"docs/{inside} has the path of a generated page"
        pages[inside] = generate.with_site_links(text, PurePosixPath("docs", inside).parent)
    return pages


@pytest.fixture(scope="module")
def nav(root: Path, site: dict[str, str], generate: ModuleType) -> list[Any]:
    """The site's navigation, completed."""
    settings = yaml.safe_load((root / "mkdocs.yml").read_text(encoding="utf-8"))
    found: list[Any] = settings["nav"]
    generate.complete_nav(found, list(site))
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_every_command_is_in_the_reference(
    command: str, site: dict[str, str]
) -> None:
    app = build_app()
    with app.app_stack([command]):
        arguments = app[command].assemble_argument_collection()
    page = site[f"commands/{command}.md"]
    missing = [a.name for a in arguments if a.name != "*" and f"`{a.name}" not in page]
    assert not [name for name in missing if name.startswith("--")]
    assert f"({command}.md)" in site["commands/index.md"]


def test_every_public_name_and_field_is_in_the_reference(site: dict[str, str]) -> None:
    page = site["python-reference.md"]
    for name in lora.__all__:
        assert f"### {name}\n" in page or f"| `{name}` |" in page, name
        value = getattr(lora, name)
        if dataclasses.is_dataclass(value):
            section = page.split(f"### {name}\n")[1].split("\n### ")[0]
            fields = [field.name for field in dataclasses.fields(value)]
            assert not [field for field in fields if f"| `{field}: " not in section]
    assert " at 0x" not in page, "a default is shown by its address"


def test_every_page_is_in_the_navigation(
    nav: list[Any], site: dict[str, str], generate: ModuleType
) -> None:
    listed = list(generate.pages_in(nav))
    assert sorted(listed) == sorted(site), "mkdocs.yml lists a page twice, or one that is not there"


def test_every_link_leads_to_a_page_or_a_file(root: Path, site: dict[str, str]) -> None:
    faults = []
    for page, text in site.items():
        for target in LINK.findall(BLOCK.sub("", text)):
            path, _, anchor = target.partition("#")
            if "://" in target:
                continue
            inside = (PurePosixPath(page).parent / path).as_posix() if path else page
            inside = re.sub(r"[^/]+/\.\./", "", inside)
            if inside not in site and not (root / "docs" / inside).is_file():
                faults.append(f"{page}: {target}")
            elif anchor and anchor not in anchors_of(site[inside]):
                faults.append(f"{page}: {target}: no such heading")
    assert not faults, "\n".join(faults)


def anchors_of(text: str) -> set[str]:
    """Return the anchors of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w-]+", "-", title.lower().replace("`", "")).strip("-") for title in titles}


def test_every_code_block_is_valid(site: dict[str, str]) -> None:
    faults = []
    for page, text in site.items():
        for language, block in BLOCK.findall(text):
            try:
                check_block(language, block)
            except (ValueError, SyntaxError, yaml.YAMLError) as error:
                faults.append(f"{page}: {language}: {error}")
    assert not faults, "\n".join(faults)


def check_block(language: str, block: str) -> None:
    """Raise what the block's language raises for it; rows of data must be examples."""
    if language == "python" and not block.startswith("lora."):  # signatures are no code
        ast.parse(block)
    elif language in ("yaml", "yml"):
        yaml.safe_load(block)
    elif language in ("json", "jsonl"):
        for number, line in enumerate(block.splitlines(), start=1):
            example_from_row(json.loads(line), f"line {number}")


@pytest.mark.parametrize(
    ("language", "block"),
    [
        ("python", "if x\n"),
        ("yaml", "a: [\n"),
        ("json", '{"prompt": "a"}\n'),
        ("json", "{'prompt'}\n"),
    ],
)
def test_a_wrong_block_is_found(language: str, block: str) -> None:
    with pytest.raises((ValueError, SyntaxError, yaml.YAMLError)):
        check_block(language, block)


@pytest.mark.slow
def test_mkdocs_builds_the_site(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="pip install '.[docs]'")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(root / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))
    assert (tmp_path / "commands" / "finetune" / "index.html").is_file()
