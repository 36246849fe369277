"""Tables as people read them, in a terminal and in Markdown."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows of texts under a head; `notes` come below. Rows that begin with `bold` stand out."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    bold: str | None = None

    def markdown(self) -> str:
        """A section of Markdown; names in it are of untrusted files, so nothing in it is HTML."""
        table = [self.head, ["---"] * len(self.head)]
        for name, *cells in self.rows:
            shown = f"**{name}**" if name == self.bold else name
            table.append([shown, *cells])
        text = f"## {self.title}\n\n"
        for row in table:
            escaped = [cell.replace("|", "\\|") for cell in row]
            text += f"| {' | '.join(escaped)} |\n"
        for note in self.notes:
            text += f"\n{note}\n"
        return html.escape(text, quote=False)
