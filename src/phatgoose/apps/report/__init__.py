"""The report page of an analysis (`phatgoose analyse`).

page.py            write_report(): the page, its numbers and its figures
contents.py        what the page says, section by section
assets.py          the files below
report.*           the page's template, style and script
explorer.js, .css  the token explorer, which any other page may use
"""

from __future__ import annotations

from .assets import EXPLORER_CSS, EXPLORER_JS, asset, inline_json, render
from .page import REPORT, report_page, write_report

__all__ = [
    "EXPLORER_CSS",
    "EXPLORER_JS",
    "REPORT",
    "asset",
    "inline_json",
    "render",
    "report_page",
    "write_report",
]
