"""The pages of docs/reference that follow from the code; hooks.py gives them to the site.

Commands and flags are those that typer has, settings those of the classes in phatgoose.config and
of the routers' records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from phatgoose.apps.cli import app
from phatgoose.apps.cli.options import RECIPE_TABLES, SHAPES, VOICE, flag_of
from phatgoose.config import Settings, settings_of
from phatgoose.routing.routers.router import all_routers

TABLES = dict(sorted(RECIPE_TABLES.items(), key=lambda item: item[0] in SHAPES))  # kinds last
COMMON = 3  # commands that have an option in the same words: it is described once, at the end

COMMANDS = """# Commands

What `phatgoose … --help` says. A command has a flag for each [setting](settings.md) of the
classes named under it: `learning_rate` is `--learning-rate`, and `--no-chat` switches `chat` off.
Settings may also be in a file (`--recipe FILE`, TOML); a flag wins over it.
"""
SETTINGS = """# Settings

The classes of `phatgoose.config`: frozen dataclasses, checked when they are made. The command line
has a flag for each setting (`learning_rate` is `--learning-rate`), and a recipe has an entry.
"""
ROUTERS_HEAD = """## Routers' own settings

They follow the router's name after a colon: `--router arrow:form=peft,temperature=2`.

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


def names_of(parameter: Any) -> str:
    return ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))


def row_of(parameter: Any) -> tuple[str, str]:
    """An argument or option: its names, its help with its default."""
    default, text = parameter.default, cell(parameter.help or "")
    shown = isinstance(default, str | int | float) and not isinstance(default, bool)
    return names_of(parameter), f"{text} Default: `{default}`." if shown else text


def settings_among(parameters: Sequence[Any]) -> list[str]:
    """The classes of settings that these flags are of, and which flags if not all."""
    tables = [
        (parameter.rich_help_panel.partition("Settings: ")[2].split(", "), parameter)
        for parameter in parameters
    ]
    found = []
    for name, config in TABLES.items():
        flags = [names_of(parameter) for owners, parameter in tables if name in owners]
        only = f" ({', '.join(flags)})" if len(flags) < len(settings_of(config)) else ""
        found += [f"[{config.__name__}](settings.md#{config.__name__.lower()}){only}"] * bool(flags)
    return found


def commands_page() -> str:
    """All commands in the order of `phatgoose --help`, then the options that several have."""
    every = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    commands = {name: each for name, each in every.items() if not each.hidden}
    settings, rows = {}, {}
    for name, each in commands.items():
        settings[name] = [p for p in each.params if getattr(p, "rich_help_panel", None)]
        others = (p for p in each.params if p not in settings[name] and p.name not in VOICE)
        rows[name] = [row_of(parameter) for parameter in others]
    uses = Counter(chain(*rows.values()))
    common = [row for row, count in uses.items() if count >= COMMON and row[0].startswith("`--")]
    page = COMMANDS + "\n"
    for name, command in commands.items():
        usage = " ".join(command.collect_usage_pieces(typer.Context(command)))
        page += f"## {name}\n\n{command.help.strip()}\n\n```text\nphatgoose {name} {usage}\n```\n\n"
        page += table(["", ""], [row for row in rows[name] if row not in common])
        shared = [row[0] for row in rows[name] if row in common]
        lines = {"Settings": settings_among(settings[name]), "[Common](#common-options)": shared}
        page += "".join(f"{kind}: {', '.join(each)}.\n\n" for kind, each in lines.items() if each)
    voice = [(f"`{flag_of(name)}`", text) for name, text in VOICE.items()]
    page += "## Common options\n\nEvery command has the first two.\n\n"
    return (page + table(["", ""], [*voice, *common])).rstrip() + "\n"


def rows_of_class(config: type[Settings]) -> Iterator[list[str]]:
    """A row for each setting of a class: its name, type, default and help."""
    for setting in settings_of(config):
        kind, default = words_of(setting.type), f"`{setting.default!r}`"
        yield [f"`{setting.name}`", kind, default, cell(setting.help)]


def words_of(kind: Any) -> str:
    """A type in words, such as "int or None" or "left or right"."""
    if get_origin(kind) is Annotated:
        return words_of(get_args(kind)[0])
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return " or ".join(parts)
    return " or ".join(map(words_of, parts)) or str(kind.__name__).replace("NoneType", "None")


def settings_page() -> str:
    """All settings, by class; then those of routers, a row for each that several share."""
    page = SETTINGS + "\n"
    head = ["type", "default", ""]
    for name, config in TABLES.items():
        page += f"## {config.__name__}\n\n::: {config.__module__}.{config.__qualname__}\n"
        page += "    options:\n      members: false\n      show_bases: false\n"
        page += "      show_root_heading: false\n"
        page += f"      show_root_toc_entry: false\n\nIn a recipe: `[{name}]`.\n\n"
        page += table(["setting", *head], list(rows_of_class(config)))
    owners: dict[tuple[str, ...], list[str]] = {}
    for name, kind in all_routers().items():
        for row in rows_of_class(kind):
            owners.setdefault(tuple(row), []).append(name)
    rows = [[row[0], ", ".join(names), *row[1:]] for row, names in owners.items()]
    page += ROUTERS_HEAD + table(["setting", "routers", *head], sorted(rows))
    return page.rstrip() + "\n"


PAGES = {"commands.md": commands_page, "settings.md": settings_page}
