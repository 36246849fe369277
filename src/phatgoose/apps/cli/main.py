"""The `phatgoose` command: its subcommands, and how errors and warnings reach the user."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable

import typer
from typer.exceptions import TyperException

from ... import __version__
from ...errors import EngineError, PhatgooseError, TrainingError
from ...files import first_line, reason, shortened
from ..console import PlainFormatter, complain, say, set_voice
from ..processor import set_threads
from . import evaluation, experts, routed, serving, sharing
from .options import VOICE, with_flags

HELP = """Turn a folder of LoRA adapters into one model that picks the right one by itself.

Start with `phatgoose demo`, or: train, check, pool, audit, route, compose, generate, evaluate,
compare, analyse, serve, export.
"""

FAILED_DISK = (errno.ENOSPC, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC))
INTERRUPTED, READER_GONE = 130, 141  # as shells have it for SIGINT and SIGPIPE
app = typer.Typer(help=HELP, invoke_without_command=True, pretty_exceptions_enable=False)
COMMANDS: dict[str, Callable[..., int | None]] = {
    command.__name__.rstrip("_"): command
    for command in (
        experts.train,
        experts.gate,
        experts.stats,
        experts.check,
        sharing.import_,
        sharing.push,
        sharing.pull,
        routed.pool,
        routed.audit,
        routed.route,
        routed.prompts,
        routed.compose,
        sharing.export,
        routed.generate,
        routed.evaluate,
        routed.demo,
        routed.add,
        routed.remove,
        evaluation.compare,
        evaluation.replay,
        evaluation.analyse,
        evaluation.routers,
        serving.serve,
    )
}
HANDS_ON = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],  # lm-eval has a --help of its own
}
for name, command in COMMANDS.items():
    app.command(name)(with_flags(command))
app.command("lm-eval", context_settings=HANDS_ON)(evaluation.lm_eval)


@app.callback()
def _options(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version."),
    quiet: bool = typer.Option(False, "--quiet", help=VOICE["quiet"]),
    verbose: bool = typer.Option(False, "--verbose", help=VOICE["verbose"]),
) -> None:
    set_voice(quiet, verbose)
    if version:
        typer.echo(f"phatgoose {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit.

    0 if all is well, 2 for what can't be done as it was asked, 1 for what failed on the way, or
    where `audit` or `check` found something, 130 on Ctrl-C, 141 where no one reads on.
    """
    set_threads()
    _quieten()
    try:
        code = app(args=arguments, standalone_mode=False)
    except PhatgooseError as error:
        code = _failed(str(error), 1 if _is_failure(error) else 2)
    except TyperException as error:  # an unknown flag, a missing argument, a wrong type
        code = _failed(error.format_message())
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        code = _reader_gone()
    except SystemExit as ended:
        if not isinstance(ended.__context__, BrokenPipeError):  # of which typer makes one with a 1
            raise
        code = _reader_gone()
    except OSError as error:  # a name that is too long, a folder that is closed to the user
        named = error.filename is not None
        what = f"{shortened(str(error.filename))} can't be used: {reason(error)}."
        code = _failed(what if named else first_line(error), 1 if _is_failure(error) else 2)
    if code == INTERRUPTED:
        say("interrupted; train and gate go on with --resume, compare by itself", err=True)
    sys.exit(code if isinstance(code, int) else 0)


def _reader_gone() -> int:
    # Python flushes its output at exit, and would complain again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return READER_GONE


def _failed(message: str, code: int = 2) -> int:
    complain("error", message, "bold red")
    return code


def _is_failure(error: BaseException | None) -> bool:
    """True for what another command line wouldn't mend: a full disk, lost workers, divergence."""
    if isinstance(error, EngineError | TrainingError):
        return True
    if isinstance(error, OSError) and error.errno in FAILED_DISK:
        return True
    return error is not None and _is_failure(error.__cause__)


def _quieten() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Imports set these loggers' levels; the Hub's would tell of every retry.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    lines = logging.StreamHandler()
    lines.setFormatter(PlainFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[lines])
    logging.getLogger("phatgoose").setLevel(logging.INFO)
    warnings.simplefilter("ignore", FutureWarning)
    warnings.showwarning = lambda message, *_, **__: complain("warning", message, "yellow")
