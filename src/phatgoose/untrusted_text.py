"""A base's chat template and tokenizer, run in a process of their own.

Both come with the base and are untrusted: a template can loop for hours or double a string until
the memory is gone, and a normaliser or an expression can do so too. A thread can't be stopped, so a
process runs them, within limits of time and memory, and is replaced when it exceeds them. It
answers a line of JSON with a line of JSON. Libraries' pools of processes would unpickle what it
sends, run the user's script in it once more, and hand it the environment with the server's keys.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

from .errors import BaseModelError, EngineError
from .files import JsonObject, one_line, reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_SECONDS = 10.0  # for one answer, waiting for a processor included
STARTING = 60.0  # seconds for the process to start and load the tokenizer
MOST_BYTES = 128 << 20  # of a reply
PACKAGES = ("transformers", "transformers.utils")
KEPT = {"TZ", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"}  # no keys, no tokens
START = "import sys; sys.path[:] = sys.argv[1:]; from %s import main; main()"
NO_TEMPLATE = (
    "{{ raise_exception('the base has no default chat template; choose one that has, or read chats "
    "with --template') }}"
)


class UntrustedText:
    """Reads texts and chats for one tokenizer. Threads take turns.

    The process starts with the first question.
    """

    seconds = 3  # of processor time for one answer
    memory = 512 << 20  # bytes beyond those it has after its start

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from transformers import PreTrainedTokenizerFast as Fast

        self._tokenizer = tokenizer
        self._description = ""
        self._splits = False  # special tokens that users write
        # What no JSON describes, since it is of Python code, is transformers' own and used here.
        with suppress(Exception):  # tokenizers raises plain ones for parts written in Python
            if type(tokenizer)._encode_plus is Fast._encode_plus:
                self._description = tokenizer.backend_tokenizer.to_str()
                self._splits = tokenizer.split_special_tokens
        self._turn = threading.Lock()
        self._is_closed = False
        self._children: list[Popen[str]] = []  # one or none
        weakref.finalize(self, end, self._children)  # also when the program ends
        self.ended = 0  # processes that exceeded a limit

    def start(self) -> None:
        self._is_closed = False
        self.read([])

    def close(self) -> None:
        """End the process, whatever it is at; questions fail until `start`."""
        self._is_closed = True
        end(self._children)

    def read(
        self,
        texts: Sequence[object],
        seconds: float = MOST_SECONDS,
        most: int = MOST_BYTES,
        **variables: object,
    ) -> list[Any]:
        """[each text, its characters, its tokens]; text and tokens are cut to `most`.

        A list of messages becomes text by the tokenizer's chat template, with these `variables`.
        Raises BaseModelError when template or tokenizer fail, or exceed the process's limits or the
        `seconds`; EngineError when no process can be started, or it was closed.
        """
        variables = self._tokenizer.special_tokens_map | variables | {"chat_template": NO_TEMPLATE}
        with suppress(ValueError, NotImplementedError):  # of several, none may be the default
            tools = variables.get("tools")
            variables["chat_template"] = self._tokenizer.get_chat_template(tools=tools)
        with self._turn:
            reply = reply_of(self._running(), (texts, most, variables), seconds)
            if not reply:
                end(self._children)
                self.ended += not self._is_closed
                self._running()
        if "texts" not in reply:
            reason = reply.get("failed", "it took too much time or memory")
            raise BaseModelError(f"The base's chat template or tokenizer failed: {reason}.")
        if not self._description:
            for triple in reply["texts"]:
                ids = self._tokenizer(triple[0], add_special_tokens=False).input_ids
                triple[2] = ids[:most]
        return list(reply["texts"])

    def _running(self) -> Popen[str]:
        if self._is_closed:
            raise EngineError("The server was stopped.")
        if not self._children or self._children[0].poll() is not None:
            end(self._children)
            paths = {name: [*sys.modules[name].__path__] for name in PACKAGES}
            setup = (self._description, self._splits, paths, self.memory, self.seconds)
            with reading("The tokenizer's new process", EngineError):
                child = new_process(__name__)
                self._children.append(child)
                if not reply_of(child, setup, STARTING):
                    end(self._children)
                    raise OSError("it ended at once")
        return self._children[0]


def new_process(module: str) -> Popen[str]:
    """A process that runs `main` of a module of ours; OSError where none can be started."""
    # -I: neither the environment nor the working directory can put modules in its way.
    run = [sys.executable, "-Iu", "-c", START % module, *sys.path]
    kept = {name: os.environ[name] for name in KEPT & os.environ.keys()}
    return Popen(run, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=kept, text=True)


def reply_of(child: Any, question: object, seconds: float) -> JsonObject:
    """The reply to `question`; an empty one when the process ends, as it does after `seconds`."""
    until = time.monotonic() + seconds
    # readline can't time out on every system, but it ends when the process does.
    timer = threading.Timer(seconds, child.kill)
    timer.start()
    try:
        child.stdin.write(json.dumps(question) + "\n")
        child.stdin.flush()
        reply: JsonObject = json.loads(child.stdout.readline(MOST_BYTES))
    except (OSError, ValueError):
        reply = {}
    finally:
        timer.cancel()
    return reply if time.monotonic() < until else {}


def end(children: list[Popen[str]]) -> None:
    """Nothing happens to a process that a forked copy of this program has from its parent."""
    while children:
        with suppress(OSError, IndexError), children.pop() as child:  # what it didn't read is lost
            child.kill()


def resident(field: int = 1) -> int:
    """Bytes of this process in memory on Linux, else 0; those of all addresses for field 0."""
    if sys.platform != "linux":
        return 0
    import resource

    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[field]
    return int(pages) * resource.getpagesize()


def limit_memory(more: int) -> None:
    """Let this process have so many bytes beyond what it has. Only on Linux."""
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (resident(0) + more,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # users' prompts would be in such a file


def limit_seconds(seconds: float) -> None:
    """End this process after so many of the processor from now on. Not on Windows."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, seconds)


def main() -> None:
    """The process: answer questions, a line of JSON each, until standard input ends.

    Its parent limits the time, too.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent stops this process when it stops
        signal.signal(number, signal.SIG_IGN)
    description, splits, paths, memory, seconds = json.loads(sys.stdin.readline())
    # Only the module of templates: importing all of its packages takes a second, torch another.
    for name in paths:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = paths[name]
    sys.modules["torch"] = None  # type: ignore[assignment]
    from transformers.utils.chat_template_utils import render_jinja_template as render

    tokenizer = Tokenizer.from_str(description) if description else Tokenizer(BPE())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = splits
    limit_memory(memory)
    sys.stdout.write('{"ready": true}\n')
    for line in sys.stdin:
        limit_seconds(seconds)
        texts, most, variables = json.loads(line)
        triples = []
        try:
            for text in texts:
                if not isinstance(text, str):
                    text = render([text], **variables)[0][0]
                ids = tokenizer.encode(text[:most], add_special_tokens=False).ids
                triples.append((text[:most], len(text), ids[:most]))
            reply = json.dumps({"texts": triples})
        except MemoryError:
            raise
        except BaseException as error:  # a panic in Rust is no Exception
            reply = json.dumps({"failed": one_line(f"{type(error).__name__}: {error}")})
        sys.stdout.write(reply + "\n")
