"""The page at /: a prompt, answers that stream, and who served each of their tokens.

It is one file with everything in it and holds nothing of the models; what it shows it asks of the
API. Its header lets the browser run these very scripts and styles and reach this server alone.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from ...report.assets import EXPLORER_CSS, EXPLORER_JS, asset, render

__all__ = ["HEADERS", "PAGE"]

FOLDER = Path(__file__).parent


def _allowed(content: str) -> str:
    """The source of a Content-Security-Policy that is this text alone."""
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


CSS = asset("report.css") + asset(EXPLORER_CSS) + asset("page.css", FOLDER)
SCRIPT = asset(EXPLORER_JS) + asset("page.js", FOLDER)
PAGE = render("page.html.jinja", FOLDER, css=CSS, script=SCRIPT)
HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_allowed(SCRIPT)}; style-src {_allowed(CSS)}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
