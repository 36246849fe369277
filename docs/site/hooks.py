"""For mkdocs: pages that follow from the code; links to files that are no pages; addresses."""

from __future__ import annotations

import posixpath
import re
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File
from reference_pages import PAGES

LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>\.\./[^)\s]+)\)")

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def on_config(config: Any) -> None:
    """Called by mkdocs. Nothing is linked while the repository has no owner."""
    urls = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["urls"]
    if "OWNER" not in urls["Repository"]:
        config.repo_url, config.site_url = urls["Repository"], urls["Documentation"]


def on_files(files: Any, *, config: Any) -> None:
    """Called by mkdocs: its files, with the pages of the reference that follow from the code."""
    for name, page in PAGES.items():
        files.append(File.generated(config, f"reference/{name}", content=page()))


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page's text, in which `[a recipe](../recipes/x.toml)` is `a recipe (recipes/x.toml)`.

    Called by mkdocs. A link that stays among the documents is left alone.
    """
    folder = posixpath.dirname(posixpath.join("docs", page.file.src_uri))

    def named(link: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join(folder, link["target"]))
        inside = place.startswith("docs/")
        return link[0] if inside else f"{link['text']} (`{place}`)"

    return LINK.sub(named, markdown)
