"""The report page of an analysis (`phatgoose analyse`).

assets.py          The files that pages are made of, as text
contents.py        What the report's page says: its tables and figures, section by section
explorer.css
explorer.js
figures.py         Figures of an analysis: who served which tokens, and what came of it
page.py            The report of an analysis: a page that needs no network, its numbers and figures
report.css
report.html.jinja
report.js
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
