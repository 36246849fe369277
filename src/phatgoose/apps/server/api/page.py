"""The page at /: a prompt, answers that stream, and each token's experts.

It is one self-contained file that asks the API for everything it shows of the models. Its headers
let the browser run only these scripts and styles and reach only this server.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

from ...report.assets import EXPLORER_CSS, EXPLORER_JS, asset, render
from ..engine.loaded_models import REQUESTABLE_ROUTERS

__all__ = ["HEADERS", "PAGE"]

FOLDER = Path(__file__).parent


def _allowed(content: str) -> str:
    """The source in a Content-Security-Policy that allows this text alone."""
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


CSS = asset("report.css") + asset(EXPLORER_CSS) + asset("page.css", FOLDER)
ROUTERS = f"const ROUTERS = {json.dumps(['', *REQUESTABLE_ROUTERS])};\n"
SCRIPT = asset(EXPLORER_JS) + ROUTERS + asset("page.js", FOLDER)
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
