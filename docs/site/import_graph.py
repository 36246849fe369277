"""Draw which entries of the package import which, as mermaid, between two marks in design.md.

    python docs/site/import_graph.py           prints the graph
    python docs/site/import_graph.py --write   puts it into docs/design.md, where a test compares it

Imports inside functions count. Arrows that follow from others are left out.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "phatgoose"
PAGE = Path(__file__).parents[1] / "design.md"
BEGIN, END = "<!-- import graph: begin -->\n", "<!-- import graph: end -->\n"


def imports() -> dict[str, set[str]]:
    """By entry, the other entries that its modules import."""
    entries = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or path.is_dir()}
    entries -= {"__init__", "__main__", "__pycache__", "py"}
    found: dict[str, set[str]] = {entry: set() for entry in entries}
    for path in SOURCE.rglob("*.py"):
        place = path.relative_to(SOURCE).with_suffix("").parts
        if place[0] not in entries:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == len(place):  # from the root
                named = [node.module] if node.module else [alias.name for alias in node.names]
                found[place[0]] |= {name.split(".")[0] for name in named} & entries - {place[0]}
    return found


def reduced(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows (importer, imported) that don't follow from others."""

    def reach(entry: str) -> set[str]:
        return graph[entry].union(*(reach(other) for other in graph[entry]))

    return sorted(
        (entry, other)
        for entry, others in graph.items()
        for other in others
        if not any(other in reach(between) for between in others - {other})
    )


def drawn() -> str:
    """The graph as a fenced mermaid block."""
    arrows = "".join(f"    {entry} --> {other}\n" for entry, other in reduced(imports()))
    return f"```mermaid\ngraph TD\n{arrows}```\n"


def page_with(graph: str) -> str:
    """docs/design.md with `graph` between its marks."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + graph + END + rest.partition(END)[2]


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page_with(drawn()), encoding="utf-8")
    else:
        sys.stdout.write(drawn())
