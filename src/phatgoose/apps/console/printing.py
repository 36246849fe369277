"""What the commands print: the one place where strangers' text reaches the user's terminal.

Names of experts, tasks and folders, and tokens, may come from strangers. Their control characters
are escaped (they could rewrite the screen, or the line above), and none of their text is taken for
rich's markup.
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

# Control characters, surrogates, Unicode line ends, and marks that turn the text direction.
STEERING = ("Cc", "Cs", "Zl", "Zp")
TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def harmless(text: str) -> str:
    """`text` with what could steer a terminal replaced by Python's escapes."""
    return "".join(repr(c)[1:-1] if _steers(c) else c for c in text)


def _steers(character: str) -> bool:
    if character in "\n\t":
        return False
    return unicodedata.category(character) in STEERING or character in TURNING


def plain(text: object) -> str:
    """`text` on one line, harmless."""
    return harmless(str(text)).replace("\n", "\\n").replace("\t", "\\t")


def say(text: object, *, err: bool = False) -> None:
    """Print `text` on one line, to the standard error if `err`."""
    typer.echo(plain(text), err=err)


def complain(kind: str, message: object, style: str) -> None:
    """Print "kind: message" on one line of the standard error, `kind` in rich's `style`."""
    line = Text.assemble((f"{kind}:", style), f" {harmless(' '.join(str(message).split()))}")
    Console(stderr=True, soft_wrap=True, highlight=False).print(line)


def show(*things: RenderableType, wrap: bool = True, width: int | None = None) -> None:
    """Print texts, tables and other renderables of rich, one below the other, without markup.

    `wrap` False leaves long lines to the terminal. `width` is the number of columns where output
    goes to a file; a terminal has its own.
    """
    console = Console(markup=False, emoji=False, highlight=False)
    if width is not None and not console.is_terminal:
        console = Console(markup=False, emoji=False, highlight=False, width=width)
    for thing in things:
        console.print(_Harmless(thing) if wrap else Text(harmless(str(thing))), soft_wrap=not wrap)


@dataclass(frozen=True)
class _Harmless:
    """A renderable of rich's, all of whose text is harmless."""

    thing: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.thing, options):
            yield Segment(harmless(segment.text), segment.style, segment.control)


class PlainFormatter(logging.Formatter):
    """Formats log records as harmless lines."""

    def format(self, record: logging.LogRecord) -> str:
        """The record and its traceback, if any, with escapes for what could steer a terminal."""
        return harmless(super().format(record))
