"""What commands print: nothing of others steers the terminal or is taken for markup."""

import ast
import logging
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

import phatgoose.apps
from phatgoose.apps.console import COLOURS, PlainFormatter, coloured, complain, say, show

APPS = Path(phatgoose.apps.__file__).parent
STEERING = ["\x1b[2J", "\x1b]0;title\x07", "\x9b2J", "\r", "\x08", "\u202e", "\u2028", "\ud800"]


def printed(capsys) -> str:
    captured = capsys.readouterr()
    return captured.out + captured.err


@pytest.mark.parametrize("words", STEERING)
def test_what_could_steer_a_terminal_is_printed_as_an_escape(capsys, words):
    table = Table(title=words)
    table.add_column(words)
    table.add_row(words, style="bold")
    say(f"name{words}\nforged")
    complain("error", f"name{words}", "red")
    show(table, Text(words), words)
    show(f"name{words}", wrap=False)
    told = printed(capsys)
    assert "\nforged" not in told
    assert words not in told
    assert repr(words)[1:-1].rstrip("J") in told.replace("\n", "")
    record = logging.LogRecord("x", logging.INFO, "x", 1, "name%s", (words,), None)
    assert words not in PlainFormatter("%(message)s").format(record)


@pytest.mark.parametrize("words", ["[red]x[/red]", "[/]", ":duck:"])
def test_markup_of_others_is_text(capsys, words):
    table = Table(title=words)
    table.add_column(words)
    table.add_row(words)
    show(table, words)
    complain("error", words, "red")
    assert printed(capsys).count(words) == 5


def test_commands_print_through_it_alone():
    for path in sorted(APPS.rglob("*.py")):
        if path.name == "console.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            own = path.name == "main.py" and ast.unparse(node).startswith(
                ("typer.echo(f'phatgoose {__version__}')", "typer.echo(context.get_help())")
            )
            assert name not in ("typer.echo", "Console", "print", "click.echo") or own, path


def test_tokens_have_their_experts_colours_above_a_legend():
    text = coloured([("a", 0, False), ("b", None, False), ("c", 8, True)], {8: "eighth"})
    assert text.plain == "abc\n\n eighth  "
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles == {
        "a": COLOURS[0],
        "c": f"{COLOURS[1]} underline bold",
        " eighth ": f"reverse {COLOURS[1]} underline",
    }
