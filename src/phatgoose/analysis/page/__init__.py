"""Pages: templates of jinja2, and the token explorer, which the report and the server show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

FOLDER = Path(__file__).parent
EXPLORER_JS, EXPLORER_CSS = "explorer.js", "explorer.css"  # any page may use them; see explorer.js


def asset(name: str, folder: Path = FOLDER) -> str:
    return (folder / name).read_text(encoding="utf-8")


def inline_json(content: Any) -> str:
    """`content` as JSON that may stand inside a `<script>` element, whatever texts are in it."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def render(template: str, folder: Path = FOLDER, **values: Any) -> str:
    """The jinja2 `template` of `folder`, filled; values are escaped, missing ones refused."""
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(values)
