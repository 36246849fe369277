"""A base's chat template and tokenizer, run in a process of their own.

Both come with the base and are untrusted: a template can loop for hours or double a string until
the memory is gone, and a normaliser or an expression can do so too. A thread can't be stopped, so a
process runs them, within limits of time and memory, and is replaced when it exceeds them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import BaseModelError, EngineError
from ..files.strict import one_line

MOST_SECONDS = 10.0  # for one answer, waiting for a processor included
SECONDS = 3  # of processor time for one answer
STARTING = 60.0  # seconds for the process to start and load the tokenizer
MEMORY = 512 << 20  # bytes beyond those it has after its start
MOST_CHARACTERS = 16 << 20  # of one conversation
MOST_BYTES = 8 * MOST_CHARACTERS  # of a reply
KEPT = ("TZ", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # no keys, no tokens
START = "import sys; sys.path[:] = sys.argv[1:]; from {module} import main; main()"
STOPPED = "The server was stopped."
NO_START = "The process for the base's tokenizer didn't start: {}."
MODULE = f"{__package__}.text_process"


class Counted(NamedTuple):
    """A text or tokens, cut to what was asked for, and the length of the whole."""

    content: Any
    length: int


@dataclass
class TimeLeft:
    """The seconds that a request's questions may still take together."""

    seconds: float = MOST_SECONDS


class UntrustedText:
    """Renders and tokenises for one tokenizer, or without one only renders.

    The process starts with the first question. Threads take turns. All questions raise
    BaseModelError when the template refuses its messages, when template or tokenizer fail, and when
    they take more than the time `left` or the process's limits; EngineError when there is no
    process: it can't be started, or was closed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self._described = None if tokenizer is None else _description(tokenizer)
        # One of Python code is transformers' own, and is used in this process.
        self._own = tokenizer if self._described is None else None
        self._splits = bool(getattr(tokenizer, "split_special_tokens", False))
        self._turn = threading.Lock()
        self._process: _Process | None = None
        self._finalizer: Any = None  # ends the process when this object or the program ends
        self._is_closed = False
        self.ended = 0  # processes that exceeded a limit

    def start(self) -> None:
        with self._turn:
            self._is_closed = False
            self._running()

    def close(self) -> None:
        """End the process, whatever it is at; questions fail until `start`."""
        self._is_closed = True
        process = self._process
        if process is not None:
            # Without the lock, which the thread that waits for an answer holds.
            process.kill()  # whoever waits for its answer then gives up the turn
        with self._turn:
            self._end()

    def chat(
        self,
        template: str,
        variables: Mapping[str, Any],
        left: TimeLeft | None = None,
        *,
        most: int = MOST_CHARACTERS,
    ) -> Counted:
        """What a chat `template` writes, cut to `most` characters."""
        question = {"template": template, "variables": dict(variables), "most": most}
        (found,) = self._ask(question, left, "chat template")
        return found

    def tokens(
        self, texts: Sequence[str], left: TimeLeft | None = None, *, most: int
    ) -> list[Counted]:
        """The tokens of each text without added ones, cut to `most`."""
        if self._own is not None:
            found = [list(self._own(text, add_special_tokens=False).input_ids) for text in texts]
            return [Counted(each[:most], len(each)) for each in found]
        return self._ask({"texts": list(texts), "most": most}, left, "tokenizer")

    def texts(self, tokens: Sequence[Sequence[int]], left: TimeLeft | None = None) -> list[str]:
        if self._own is not None:
            return [str(self._own.decode(list(each), skip_special_tokens=True)) for each in tokens]
        question = {"tokens": [list(each) for each in tokens], "most": MOST_CHARACTERS}
        return [str(each.content) for each in self._ask(question, left, "tokenizer")]

    def _ask(self, question: Mapping[str, Any], left: TimeLeft | None, what: str) -> list[Counted]:
        left = left or TimeLeft()
        with self._turn:
            process = self._running()
            begun = time.monotonic()
            reply = process.ask(question, left.seconds)
            left.seconds -= time.monotonic() - begun
            if process.is_over or "memory" in reply:
                self._end()
                self.ended += not self._is_closed
        if self._is_closed and process.is_over:
            raise EngineError(STOPPED)
        if "refused" in reply:
            raise BaseModelError(f"The base's {what} refuses the messages: {reply['refused']}")
        if "found" not in reply:
            reason = process.reason if process.is_over else reply.get("failed", "too much memory")
            raise BaseModelError(f"The base's {what} failed: {one_line(reason)}.")
        return [Counted(*each) for each in reply["found"]]

    def _running(self) -> _Process:
        if self._is_closed:
            raise EngineError(STOPPED)
        if self._process is None or self._process.has_ended:
            self._end()
            try:
                process = self._process = _Process()
            except OSError as error:  # no memory or processes left
                raise EngineError(NO_START.format(one_line(error))) from error
            # The finalizer holds the process, not this object, which could then never be collected.
            self._finalizer = weakref.finalize(self, process.end)
            setup = {
                "tokenizer": self._described,
                "split_special_tokens": self._splits,
                "memory": MEMORY,
                "seconds": SECONDS,
            }
            if "ready" not in process.ask(setup, STARTING):
                self._end()
                raise EngineError(NO_START.format(process.reason))
        return self._process

    def _end(self) -> None:
        if self._finalizer is not None:
            self._finalizer()  # once: the finalizer is dead then, and holds the process no more
        self._process = self._finalizer = None


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    *,
    begins_answer: bool = True,
) -> str:
    """`messages` as the tokenizer's chat template writes them, followed by the answer's beginning.

    That beginning, the generation prompt, is left out unless `begins_answer`. Raises
    BaseModelError when the template can't or doesn't within its limits.
    """
    rendered = _shared(os.getpid()).chat(*chat_of(tokenizer, messages, begins_answer))
    if rendered.length > MOST_CHARACTERS:
        raise BaseModelError(
            f"The base's chat template writes {rendered.length} characters; at most "
            f"{MOST_CHARACTERS} are read."
        )
    return str(rendered.content)


def chat_of(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    begins_answer: bool = True,
) -> tuple[str, dict[str, Any]]:
    """(the tokenizer's chat template, its variables for `messages`). Raises BaseModelError."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # several templates and none of them the default
        raise BaseModelError(one_line(error)) from error
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    given = {"messages": [dict(each) for each in messages], "add_generation_prompt": begins_answer}
    return str(template), {**special, **given, "tools": None, "documents": None}


@lru_cache(maxsize=1)
def _shared(pid: int) -> UntrustedText:
    """The command's own process for templates; a forked process `pid` gets another."""
    return UntrustedText()


def _description(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer as JSON; None for one of Python code, which no JSON describes."""
    is_plain = isinstance(tokenizer, PreTrainedTokenizerFast) and (
        type(tokenizer)._encode_plus is PreTrainedTokenizerFast._encode_plus
    )
    try:
        return str(tokenizer.backend_tokenizer.to_str()) if is_plain else None
    except Exception:  # tokenizers raises plain ones for parts written in Python
        return None


class _Process:
    def __init__(self) -> None:
        # -I: neither the environment nor the working directory can put modules in its way.
        command = [sys.executable, "-I", "-c", START.format(module=MODULE), *map(str, sys.path)]
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in KEPT if name in os.environ},
        )
        self._pid = os.getpid()
        self._state = threading.Lock()
        self._is_late = self._is_answered = False
        self.is_over = False

    def ask(self, question: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The reply to `question`; an empty one when the process is over, also after `seconds`."""
        self._is_answered = False
        # readline can't time out on every system, but it ends when the process does.
        timer = threading.Timer(max(seconds, 0.0), self._expire)
        timer.daemon = True
        timer.start()
        try:
            reply = self._exchange(json.dumps(question).encode() + b"\n")
        except OSError:  # it has ended
            reply = b""
        finally:
            timer.cancel()
        with self._state:
            self._is_answered = True
            self.is_over = self.is_over or self._is_late or not reply.endswith(b"\n")
        found: dict[str, Any] = {} if self.is_over else json.loads(reply)
        return found

    def _exchange(self, line: bytes) -> bytes:
        if self._child.stdin is None or self._child.stdout is None:
            return b""
        self._child.stdin.write(line)
        self._child.stdin.flush()
        return self._child.stdout.readline(MOST_BYTES)

    def _expire(self) -> None:
        with self._state:
            if not self._is_answered:
                self._is_late = True
                self._child.kill()

    @property
    def has_ended(self) -> bool:
        return self.is_over or self._child.poll() is not None

    @property
    def reason(self) -> str:
        code = self._child.wait()
        if self._is_late:
            return "it took too long"
        if code == -getattr(signal, "SIGXCPU", 0):
            return f"it took more than {SECONDS} seconds of the processor"
        return "it took too much memory, or ended by itself"

    def kill(self) -> None:
        # A forked copy of this program has the pipes too, but the process isn't its child.
        if os.getpid() == self._pid:
            self._child.kill()

    def end(self) -> None:
        self.is_over = True
        self.kill()
        if os.getpid() == self._pid:
            self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with suppress(OSError):  # what it didn't read
                    pipe.close()
