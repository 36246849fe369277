"""What the commands print: the one place where untrusted text reaches the user's terminal.

Control characters of names and tokens, which could rewrite the screen, are escaped, and none of
their text is taken for rich's markup.
"""

from __future__ import annotations

import json
import logging
import sys
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.text import Text
from tqdm.std import tqdm

from ..errors import ConfigError
from ..files import require_writable, write_text

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


def say(text: object, *, err: bool = False) -> None:
    """Print `text` on one line, to the standard error if `err`."""
    typer.echo(harmless(str(text)).replace("\n", "\\n").replace("\t", "\\t"), err=err)


def complain(kind: str, message: object, style: str) -> None:
    line = Text.assemble((f"{kind}:", style), f" {harmless(' '.join(str(message).split()))}")
    Console(stderr=True, soft_wrap=True, highlight=False).print(line)


def show(*things: RenderableType, wrap: bool = True, width: int | None = None) -> None:
    """Print texts, tables and other renderables of rich, one below the other, without markup.

    `wrap` False leaves long lines to the terminal; `width` is for output that goes to a file.
    """
    if sys.stdout.isatty():
        width = None
    console = Console(markup=False, emoji=False, highlight=False, width=width)
    for thing in things:
        printed = _Harmless(thing) if wrap else Text(harmless(str(thing)))
        console.print(printed, soft_wrap=not wrap)


@dataclass(frozen=True)
class _Harmless:
    thing: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.thing, options):
            yield Segment(harmless(segment.text), segment.style, segment.control)


def set_voice(quiet: bool, verbose: bool) -> None:
    """How much the commands say on the way; results, warnings and errors in any case."""
    logger = logging.getLogger("phatgoose")
    if verbose:
        logger.setLevel(logging.DEBUG)
    if quiet:
        logger.setLevel(logging.WARNING)
        shown = tqdm.__init__
        tqdm.__init__ = lambda *args, **options: shown(*args, **{**options, "disable": True})


def check_report(path: Path | None) -> None:
    """Raise ConfigError where `report` couldn't write to `path`; nothing is made there yet."""
    if path is not None and str(path) != "-":
        require_writable(path, ConfigError)


def report(path: Path | None, content: object, what: str) -> bool:
    """Write `content` as JSON to `path`, or for "-" to the standard output.

    True for "-", where nothing else should be printed there.
    """
    if path is None:
        return False
    text = json.dumps(content, indent=2, ensure_ascii=False)
    if str(path) == "-":
        typer.echo(text)
        return True
    write_text(path, text + "\n", ConfigError)
    say(f"{what} -> {path}")
    return False


class PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record))


# Tokens in the colours of their experts.

# An expert has the colour of its place in the pool, in the terminal, the report and the server's
# page. Paul Tol's "bright" ones, with a brown for his grey: colour-blind readers can tell them
# apart, and so can terminals of 16 colours, where each of them falls on another one.
COLOURS = ("#EE6677", "#4477AA", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#B25900")


def coloured(tokens: Iterable[tuple[str, int | None, bool]], labels: Mapping[int, str]) -> Text:
    """Text of (token, expert or None, bold) in the experts' colours, with a legend of `labels`."""
    text = Text()
    for token, expert, is_bold in tokens:
        style = "" if expert is None else expert_style(expert)
        if is_bold:
            style += " bold"
        text.append(token, style=style)
    text.append("\n\n")
    for expert, label in labels.items():
        text.append(f" {label} ", style=f"reverse {expert_style(expert)}")
        text.append(" ")
    return text


def expert_style(expert: int) -> str:
    style = COLOURS[expert % len(COLOURS)]
    return f"{style} underline" if expert >= len(COLOURS) else style
