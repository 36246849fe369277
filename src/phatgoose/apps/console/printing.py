"""What the commands print: the one place where text of others reaches the user's terminal.

Names of experts, tasks, folders and tokens are others' words. No control character of theirs gets
through (an escape sequence could rewrite the screen, or the line above), and nothing of them is
taken for rich's markup.
"""

from __future__ import annotations

import logging
import unicodedata
from dataclasses import dataclass

import typer
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.text import Text

__all__ = ["PlainFormatter", "complain", "plain", "say", "show"]

# Control characters, what is no character, line ends of Unicode, and what turns the direction.
STEERING = ("Cc", "Cs", "Zl", "Zp")
TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def harmless(text: str) -> str:
    """`text` with Python's escapes in the place of what could steer a terminal."""
    return "".join(map(_harmless, text))


def plain(text: object) -> str:
    """`text` on one line, harmless."""
    return harmless(str(text)).replace("\n", "\\n").replace("\t", "\\t")


def say(text: object, *, err: bool = False) -> None:
    """Print `text` on one line, to the standard error if `err`."""
    typer.echo(plain(text), err=err)


def complain(kind: str, message: object, style: str) -> None:
    """Print "kind: message" on one line of the standard error, `kind` in rich's `style`."""
    told = Text.assemble((f"{kind}:", style), f" {harmless(' '.join(str(message).split()))}")
    Console(stderr=True, soft_wrap=True, highlight=False).print(told)


def show(*things: RenderableType, wrap: bool = True, width: int | None = None) -> None:
    """Print texts, tables and whatever else rich can, one below the other, without markup.

    `wrap` False leaves long lines to the terminal. `width` is that of a file in columns; a terminal
    knows its own.
    """
    console = Console(markup=False, emoji=False, highlight=False)
    if width is not None and not console.is_terminal:
        console = Console(markup=False, emoji=False, highlight=False, width=width)
    for thing in things:
        console.print(_Harmless(thing) if wrap else Text(harmless(str(thing))), soft_wrap=not wrap)


@dataclass(frozen=True)
class _Harmless:
    """A renderable of rich's whose text is harmless, wherever in it that stands."""

    thing: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.thing, options):
            yield Segment(harmless(segment.text), segment.style, segment.control)


class PlainFormatter(logging.Formatter):
    """Log records as lines that are harmless."""

    def format(self, record: logging.LogRecord) -> str:
        """The record, its traceback if any, with escapes for what could steer a terminal."""
        return harmless(super().format(record))


def _harmless(character: str) -> str:
    steers = unicodedata.category(character) in STEERING or character in TURNING
    return character if character in "\n\t" or not steers else repr(character)[1:-1]
