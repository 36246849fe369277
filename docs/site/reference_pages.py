"""Write the pages of docs/reference that follow from the code: commands.md and settings.md.

    python docs/site/reference_pages.py           prints them
    python docs/site/reference_pages.py --write   writes them; a test compares

Commands and flags are those that typer has, settings those of the classes in phatgoose.config and
of the routers' records.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer

from phatgoose.apps.cli import app
from phatgoose.config import (
    IA3,
    Bottleneck,
    Dora,
    Formatting,
    GateTraining,
    Lora,
    Routing,
    Serving,
    Settings,
    Training,
    settings_of,
)
from phatgoose.routing.routers.registry import ROUTERS

FOLDER = Path(__file__).parents[1] / "reference"
CLASSES = (Training, GateTraining, Formatting, Lora, Dora, IA3, Bottleneck, Routing, Serving)
COMMON = 4  # commands that have an option in the same words: it is told once, at the end
WRITTEN = "\n<!-- written by docs/site/reference_pages.py -->\n\n"

COMMANDS = """# Commands

What `phatgoose … --help` says. Settings may stand in a file too (`--config FILE`, TOML or YAML); a
flag wins over it. `phatgoose --install-completion` makes the shell complete commands and flags.
"""
SETTINGS = """# Settings

The classes of `phatgoose.config`: frozen dataclasses, checked when they are made. The command line
has a flag for each setting (`learning_rate` is `--learning-rate`) and a recipe an entry.
"""
ROUTERS_HEAD = """## Routers' own settings

They follow the router's name after a colon: `--router arrow:form=peft,temperature=2`. Routers that
are not here have none.

"""


def cell(text: str) -> str:
    """`text` for a cell of a table."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").split())


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, followed by an empty line; nothing where there are no rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def rows_of_command(command: Any, kind: str) -> Iterator[list[str]]:
    """A row for each "argument" or "option" of a command: its names, its default, its help."""
    for given in (parameter for parameter in command.params if parameter.param_type_name == kind):
        names = ", ".join(f"`{name}`" for name in (*given.opts, *given.secondary_opts))
        plain = isinstance(given.default, str | int | float) and given.default is not False
        yield [names, f"`{given.default}`" if plain else "", cell(given.help or "")]


def commands_page() -> str:
    """All commands in the order of `phatgoose --help`, then the options that many of them have."""
    every = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    commands = {name: each for name, each in every.items() if not each.hidden}
    options = {name: list(rows_of_command(each, "option")) for name, each in commands.items()}
    uses = Counter(map(tuple, chain(*options.values())))
    common = {row[0]: row for row, count in uses.items() if count >= COMMON}
    page = COMMANDS + WRITTEN
    for name, command in commands.items():
        usage = " ".join(command.collect_usage_pieces(typer.Context(command)))
        page += f"## {name}\n\n{command.help.strip()}\n\n```text\nphatgoose {name} {usage}\n```\n\n"
        page += table(["argument", "default", ""], list(rows_of_command(command, "argument")))
        own = [row for row in options[name] if tuple(row) not in common.values()]
        page += table(["option", "default", ""], own)
        shared = ", ".join(row[0] for row in options[name] if tuple(row) in common.values())
        page += f"[Common options](#common-options): {shared}.\n\n" if shared else ""
    page += "## Common options\n\n" + table(["option", "default", ""], list(common.values()))
    return page.rstrip() + "\n"


def rows_of_class(config: type[Settings]) -> Iterator[list[str]]:
    """A row for each setting of a class: its name, type, default and help."""
    hints = get_type_hints(config, include_extras=True)
    for setting in settings_of(config):
        annotation = hints[setting.name]
        inner = get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation
        kind = getattr(inner, "__name__", str(inner)) if isinstance(inner, type) else str(inner)
        kind = kind.replace(" | ", " or ")
        yield [f"`{setting.name}`", kind, f"`{setting.default!r}`", cell(setting.help)]


def settings_page() -> str:
    """All settings, by class."""
    page = SETTINGS + WRITTEN
    for config in CLASSES:
        page += (
            f"::: {config.__module__}.{config.__qualname__}\n    options:\n      members: false\n\n"
        )
        page += table(["setting", "type", "default", ""], list(rows_of_class(config)))
    page += ROUTERS_HEAD
    for name, spec in ROUTERS.items():
        if settings_of(spec.config):
            page += f"### {name}\n\n"
            page += table(["setting", "type", "default", ""], list(rows_of_class(spec.config)))
    return page.rstrip() + "\n"


PAGES = {"commands.md": commands_page, "settings.md": settings_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        if sys.argv[1:] == ["--write"]:
            (FOLDER / name).write_text(page(), encoding="utf-8")
        else:
            sys.stdout.write(page())
