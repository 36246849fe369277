"""For mkdocs: links to files of the repository that are no pages become their names."""

from __future__ import annotations

import posixpath
import re
from typing import Any

LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>\.\./[^)\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page's text, in which `[a suite](../recipes/suites)` is `a suite (recipes/suites)`.

    Called by mkdocs. A link that stays among the documents is left alone.
    """
    folder = posixpath.dirname(posixpath.join("docs", page.file.src_uri))

    def named(link: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join(folder, link["target"]))
        inside = place.startswith("docs/")
        return link[0] if inside else f"{link['text']} (`{place}`)"

    return LINK.sub(named, markdown)
