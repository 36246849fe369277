"""The process that runs a base's chat template and tokenizer for `untrusted_text`.

It answers one line of JSON with one line of JSON. Its processor time and memory are limited on
Linux; its parent limits the time everywhere. It loads jinja2 and tokenizers, neither torch nor
transformers, so that it starts in a tenth of a second.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from ..errors import BaseModelError
from ..files.strict import one_line

if sys.platform == "linux":
    import resource


LARGEST_MESSAGE = 300  # characters of a template's own error

Reply = dict[str, Any]


def main() -> None:
    """Answer questions, a line of JSON each, until standard input ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent stops this process when it stops
        signal.signal(number, signal.SIG_IGN)
    source, replies = sys.stdin.buffer, sys.stdout.buffer
    setup = json.loads(source.readline())
    tokenizer = _tokenizer(setup)
    # After the tokenizer is loaded: the limit is for what questions need beyond that.
    _limit_memory(setup["memory"])
    reply: Reply = {"ready": True}
    while True:
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()
        line = source.readline()
        if not line:
            return
        _limit_time(setup["seconds"])
        reply = answer(json.loads(line), tokenizer)


def answer(question: Reply, tokenizer: Tokenizer | None) -> Reply:
    """The reply to one question: {"found": [...]}, each item cut, with its full length.

    A question has a chat's "template", "variables" and "most" characters; or "texts" and "most"
    tokens of each; or "tokens" to turn into text. {"refused": ...} is the template's own error,
    {"failed": ...} any other.
    """
    try:
        if "template" in question:
            found: list[Any] = [_compiled(question["template"]).render(**question["variables"])]
        elif tokenizer is None:
            raise BaseModelError("there is no tokenizer")
        elif "texts" in question:
            found = [tokenizer.encode(t, add_special_tokens=False).ids for t in question["texts"]]
        else:
            found = [tokenizer.decode(t, skip_special_tokens=True) for t in question["tokens"]]
        return {"found": [[each[: question["most"]], len(each)] for each in found]}
    except jinja2.TemplateError as error:
        return {"refused": one_line(error, LARGEST_MESSAGE)}
    except MemoryError:
        return {"memory": True}
    except BaseException as error:  # a panic in Rust is no Exception
        return {"failed": one_line(f"{type(error).__name__}: {error}", LARGEST_MESSAGE)}


def _tokenizer(setup: Reply) -> Tokenizer | None:
    if setup["tokenizer"] is None:
        return None
    tokenizer = Tokenizer.from_str(setup["tokenizer"])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = setup["split_special_tokens"]
    return tokenizer


def _limit_memory(more: int) -> None:
    if sys.platform == "linux":
        # SIGXCPU would leave a core file, with the user's prompts in it.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + more
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def _limit_time(seconds: int) -> None:
    if sys.platform == "linux":
        used = resource.getrusage(resource.RUSAGE_SELF)
        # The limit counts from the process's start, so each question moves it on.
        most = int(used.ru_utime + used.ru_stime) + 1 + seconds
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(resource.RLIMIT_CPU, (most, hard))


# From here on as transformers 5.24 does in utils/chat_template_utils.py. Importing that takes a
# second; a test compares what both write.


class _Generation(Extension):
    """The tag {% generation %}, which marks what an assistant says and writes it unchanged."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """Jinja's `dict` without the type's attributes."""

    def __call__(self, *pairs: Any, **named: Any) -> dict[Any, Any]:
        return dict(*pairs, **named)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's `namespace` without names that begin with an underscore."""

    def __init__(*arguments: Any, **named: Any) -> None:  # `self` may be a name
        self, *others = arguments
        values = dict(*others, **named)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a namespace can't have {name!r}, which begins with an underscore"
        )


@lru_cache(maxsize=4)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment.from_string(template)


def _raise(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
