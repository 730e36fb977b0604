"""mkdocs' hooks: the generated pages join those in docs/, and links stay inside the site."""

from __future__ import annotations

import sys
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))
from generate import ROOT_PAGES, complete_nav, generated_pages, with_site_links


def on_config(config: Any) -> Any:
    """Add the pages that the navigation does not list."""
    folder = Path(config.docs_dir)
    pages = [path.relative_to(folder).as_posix() for path in folder.rglob("*.md")]
    complete_nav(config.nav, [*pages, *generated_pages()])
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    for path, text in generated_pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Return a page of docs/ with links inside the site."""
    path = page.file.src_uri
    is_generated = page.file.generated_by is not None or path in ROOT_PAGES.values()
    if is_generated:
        return markdown
    return with_site_links(markdown, PurePosixPath("docs", path).parent)
