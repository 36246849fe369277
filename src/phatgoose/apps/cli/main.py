"""The command's frame: the app, and how errors, warnings and interruptions reach the user."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from typing import Any

import typer
from typer.exceptions import TyperException

from ... import __version__
from ...errors import PhatgooseError
from ..console.printing import PlainFormatter, complain, say
from . import analysis, comparison, experts, routed, segments, serving, sharing

__all__ = ["app", "main"]

HELP = """Many independently trained PEFT experts, routed per token and module into one model.

Start with `phatgoose demo`, or: train, check, pool, compose, generate, evaluate, compare,
analyse, serve.
"""

INTERRUPTED = 130

app = typer.Typer(
    help=HELP,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
experts.register(app)
sharing.register(app)
routed.register(app)
segments.register(app)
comparison.register(app)
analysis.register(app)
serving.register(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"phatgoose {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version."
    ),
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 if all is well, 2 after a one-line error, 130 on Ctrl-C."""
    _quieten()
    try:
        code = app(args=arguments, standalone_mode=False)
    except PhatgooseError as error:
        code = _failed(str(error))
    except TyperException as error:  # an unknown flag, a missing argument, a wrong type
        code = _failed(error.format_message())
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    if code == INTERRUPTED:
        say("interrupted; training and gates go on with --resume", err=True)
    sys.exit(code if isinstance(code, int) else 0)


def _failed(message: str) -> int:
    complain("error", message, "bold red")
    return 2


def _quieten() -> None:
    """Warnings as one line each, our own log lines as they are, no advice of other libraries.

    Names of files that are no UTF-8 are printed as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    lines = logging.StreamHandler()
    lines.setFormatter(PlainFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[lines])
    logging.getLogger("phatgoose").setLevel(logging.INFO)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    complain("warning", message, "yellow")
