"""Answers in JSON, and calls of tools, which are JSON in the form that a base's template shows.

Tokens that would break a form or a schema are left out, by llguidance.

Its matcher gives the tokens that may come next. It never raises, but says that it is in error. A
schema is a client's: llguidance limits the work of a step, but not how long it compiles, so each
is first compiled in a process that can be ended (`grammars`).
"""

from __future__ import annotations

import json
import re
import secrets
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import Any

import torch
from pydantic_core import from_json
from starlette.concurrency import run_in_threadpool
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ....errors import EngineError
from ....files import first_line, reading
from ....untrusted_text import end, new_process, reply_of
from ... import grammars
from ..protocol import AnyRequest, ApiError, ChatRequest, bad_request, busy
from ..replies import Progress, written
from ..requests import Asked
from ..service import Turns
from .runner import MIB, ModelRunner

try:
    from llguidance import LLMatcher, LLParserLimits
    from llguidance.hf import from_tokenizer
except ImportError:
    LLMatcher = LLParserLimits = from_tokenizer = None

# As Python's json writes it: a small model that may write spaces writes nothing else.
WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
UNWRITABLE = "The JSON can't be written: {}"
AT_ONCE = 2  # grammars that are proven, and as many that are compiled
SECONDS = 2.0  # of processor time to compile a grammar
LONGEST = 30.0  # for that, waiting for a processor included
MEMORY = 64 * MIB  # to compile it
MOST_PROOFS = 1_000  # that are remembered
LARGE, MOST_LARGE = 8 * MIB, 192 * MIB  # a large grammar, and all of these that are in use

_known: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, Any] = weakref.WeakKeyDictionary()
_reading = threading.Lock()


@dataclass(frozen=True, eq=False)
class Proof:
    """Why a grammar can't be compiled within limits, empty if it can, and the bytes it needs."""

    why: str
    bytes: int


class JsonForm:
    """What may follow in one answer; `copy` begins another of the same form.

    Its grammar is in use while its `proof` is.
    """

    def __init__(self, matcher: Any, proof: Proof | None = None) -> None:
        self._matcher, self._proof = matcher, proof

    def copy(self) -> JsonForm:
        return JsonForm(self._matcher.deep_copy(), self._proof)

    def allowed(self, logits: Tensor) -> Tensor:
        """`logits` [V], minus infinity for tokens that can't follow. Raises EngineError."""
        marks = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        self._check()
        allowed = torch.zeros(len(logits), dtype=torch.bool)
        allowed[: len(marks)] = marks[: len(logits)] > 0
        return logits.masked_fill(~allowed.to(logits.device), float("-inf"))

    def add(self, token: int) -> bool:
        """True where the answer is whole with `token`. Raises EngineError."""
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            said = first_line(self._matcher.get_error())
            raise EngineError(f"{UNWRITABLE.format(said)}.")


class Forms:
    """The forms of answers. Clients take turns to have grammars proven, and to have them compiled.

    What was proven once isn't proven again.
    """

    def __init__(self, waiting: int) -> None:
        """As many requests as `waiting` may wait."""
        self._proving, self._compiling = Turns(AT_ONCE, waiting), Turns(AT_ONCE, waiting)
        self._proofs: dict[bytes, Proof] = {}  # by the grammar's hash, the last used last
        self._in_use = weakref.WeakSet[Proof]()

    async def of(self, asked: Asked, calls: Calls | None, runner: ModelRunner) -> JsonForm | None:
        """The form of a model's answers, by a schema or with `calls`, if any. Raises ApiError.

        The first one for a tokenizer takes seconds.
        """
        request, client, deadline = asked.request, asked.client, asked.deadline
        if request.schema_asked is None and not (calls and calls.are_bound):
            return None
        if LLMatcher is None:
            raise _refusal(
                request, calls, "this server lacks llguidance (pip install 'phatgoose[json]')"
            )
        grammar = await run_in_threadpool(_grammar, request, calls and calls.without_numbers())
        key = sha256(grammar.encode()).digest()
        proof = self._proofs.pop(key, None)
        if proof is None:
            proof = await self._proving.run(client, deadline, partial(proven, grammar))
        self._proofs[key] = proof
        if len(self._proofs) > MOST_PROOFS:
            del self._proofs[next(iter(self._proofs))]
        if proof.why:
            raise _refusal(request, calls, proof.why)
        self._in_use.add(used := replace(proof))
        large = sum(each.bytes for each in self._in_use if each.bytes > LARGE)
        if used.bytes > LARGE and large > MOST_LARGE:
            raise busy("Too many large schemas are in use; try again in a while.", 5)
        compiled = partial(form_of, request, calls, runner, used)
        return await self._compiling.run(client, deadline, lambda _: compiled())


def proven(grammar: str, seconds: float) -> Proof:
    """What a process of its own finds in `seconds`. Raises ApiError where these don't suffice."""
    seconds = min(seconds, LONGEST)
    until = time.monotonic() + seconds
    with reading("The schema's new process", EngineError):
        child = new_process(grammars.__name__)
    try:
        reply = reply_of(child, (grammar, MEMORY, SECONDS), seconds)
    finally:
        end([child])
    if not reply and time.monotonic() >= until:
        raise busy("The server had no time to compile the schema; try again in a while.", 5)
    if not reply:
        return Proof(f"it takes more than {SECONDS:g} s or {MEMORY // MIB} MiB to compile", 0)
    return Proof(reply["error"] and UNWRITABLE.format(reply["error"]), reply["bytes"])


def form_of(
    request: AnyRequest, calls: Calls | None, runner: ModelRunner, proof: Proof | None = None
) -> JsonForm:
    """The form of a model's answers, whose grammar was proven. Raises ApiError."""
    try:
        return compiled(_grammar(request, calls), runner, proof)
    except Exception as error:  # also of a tokenizer that is written in Python, or an odd one
        raise _refusal(request, calls, first_line(error)) from error


def compiled(grammar: str, runner: ModelRunner, proof: Proof | None = None) -> JsonForm:
    """The form that a proven `grammar` gives a model's answers. Raises EngineError, or others."""
    tokenizer = runner.tokenizer
    with _reading:
        if tokenizer not in _known:
            size = max(runner.vocabulary, len(tokenizer))
            _known[tokenizer] = from_tokenizer(tokenizer, size, sorted(runner.ends))
    limits = LLParserLimits(**grammars.LIMITS)
    form = JsonForm(LLMatcher(_known[tokenizer], grammar, log_level=0, limits=limits), proof)
    if not form.copy().allowed(torch.zeros(runner.vocabulary)).isfinite().any():
        # {"$ref": "#"}
        raise EngineError("no answer can begin by it, as where it is only itself")
    return form


def _refusal(request: AnyRequest, calls: Calls | None, why: str) -> ApiError:
    field = "tools" if calls else request.sent_as("response_format")
    return bad_request(f"Answers can't keep to this form: {why}.", field)


def _grammar(request: AnyRequest, calls: Calls | None) -> str:
    schema = request.schema_asked
    return calls.grammar(schema) if calls else f"start: {_by(schema)}"


def _by(schema: Any, **options: bool) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': {**WRITTEN, **options}})}"


# How bases write calls, by the mark before; the first one in the chat template counts. They are
# those of Hermes and Qwen, Mistral, Granite and Phi; of Llama, JSON alone.
FORMS = {"<tool_call>": "\n%s\n</tool_call>", "[TOOL_CALLS]": "[%s]", "<|tool_call|>": "[%s]"}
BEGINS = *FORMS, '{"name"'  # small models forget the mark
FORMS[""] = "%s"
MARK = re.compile(r"(</?tool_call>|\[TOOL_CALLS\]|<\|tool_call\|>)")
ENDS = r'</tool_call>|(?<=})(?=\n{"name")|\Z'
CALL = re.compile(rf'(?s)(?:{MARK.pattern}|(?={{"name"))(?P<json>.*?)(?:{ENDS})')


class Calls:
    """The calls of tools in the answers to a request. What isn't one stays text.

    They `are_bound` if they need a grammar. `hidden` has the marks among the special tokens by
    number: as text, answers are without those.
    """

    def __init__(self, request: ChatRequest, runner: ModelRunner) -> None:
        tokens = runner.tokenizer.added_tokens_decoder.items()
        self._functions = {each.name: each for each in request.functions}
        self._must = request.tool_choice != "auto"
        self._most = 1 if request.parallel_tool_calls is False else None
        self.are_bound = self._must or any(each.strict for each in request.functions)
        self._mark = next(each for each in FORMS if each in str(runner.tokenizer.chat_template))
        self._numbers = {each.content: number for number, each in tokens}
        self.hidden = {n: t.content for n, t in tokens if t.special and MARK.fullmatch(t.content)}

    @classmethod
    def of(cls, request: AnyRequest, runner: ModelRunner) -> Calls | None:
        """None where there can be none, or the model isn't shown the tools. Raises ApiError."""
        if not isinstance(request, ChatRequest):
            return None
        if not request.functions and request.tool_choice not in ("auto", "none"):
            message = "tool_choice is none, auto, required, or one function of the tools by name."
            raise bad_request(message, "tool_choice")
        is_told = "tools" in str(runner.tokenizer.chat_template) or request.tool_choice != "auto"
        return cls(request, runner) if is_told and request.functions else None

    def without_numbers(self) -> Calls:
        """These for a grammar that needs no tokenizer: 0 stands for each token's number."""
        same = copy(self)
        same._numbers = dict.fromkeys(self._numbers, 0)
        return same

    def grammar(self, schema: Any) -> str:
        """llguidance's: one call where it must be, JSON by a `schema` or one, or calls in text."""
        (before, after), functions = FORMS[self._mark].split("%s"), list[str]()
        for each in self._functions.values():
            asked = (each.parameters if self._must or each.strict else None) or {}
            begin = self._lark_of(f'{before}{{"name": "{each.name}", "arguments": ')
            # Words of a schema that llguidance doesn't know matter where the client says strict.
            unknown = dict.fromkeys(("lenient", "coerce_one_of"), not each.strict)
            functions.append(begin + _by({**asked, "type": "object"}, **unknown))
        mark, often = self._lark_of(self._mark), "*" if self._most is None else "?"
        start = f"(head call){often} TEXT" if mark else r"call | /[^{](.|\n)*/"
        if self._must or schema is not None:
            start = f"{mark} call" if self._must else f"{_by(schema)} | {mark} call"
        lazy = "" if self._mark in self._numbers else "[lazy]"  # as text ends where a mark begins
        text = f"start: {start}\nhead{lazy}: TEXT {mark}\nTEXT: /(.|\\n)*/\n"
        return f"{text}call: ({' | '.join(functions)}) {self._lark_of('}' + after)}\n"

    def _lark_of(self, text: str) -> str:
        """`text` in a grammar, where added tokens have numbers."""
        numbers, pieces = self._numbers, filter(None, MARK.split(text))
        return " ".join(f"<[{numbers[p]}]>" if p in numbers else json.dumps(p) for p in pieces)

    def parsed(self, new: Progress) -> Progress:
        """The end of an answer, with what it calls in OpenAI's form instead of text."""
        called = {match.span(): self._functions_in(match) for match in CALL.finditer(new.text)}
        functions = [each for some in called.values() for each in some][: self._most]
        if not functions:
            return new
        left = CALL.sub(lambda match: "" if called[match.span()] else match[0], new.text)
        # Mistral's template takes no other ids.
        begin, digits = ("", 9) if self._mark == "[TOOL_CALLS]" else ("call_", 24)
        calls = [
            {"index": n, "id": begin + secrets.token_hex(12)[:digits], "type": "function", **each}
            for n, each in enumerate(functions)
        ]
        finish = "tool_calls" if new.finish == "stop" else new.finish
        return replace(new, text=left.rstrip(), message={"tool_calls": calls}, finish=finish)

    def _functions_in(self, match: re.Match[str]) -> list[dict[str, Any]]:
        """What is called where calls may be; nothing where there is anything else."""
        functions = []
        with suppress(ValueError, TypeError, LookupError, AttributeError):
            value = from_json(match["json"], allow_inf_nan=False)
            for each in value if isinstance(value, list) else [value]:
                name = self._functions[each["name"]].name
                arguments = {**each.get("arguments", each.get("parameters", {}))}
                functions.append({"function": {"name": name, "arguments": written(arguments)}})
            return functions
        return []


def calls_begin(text: str) -> int:
    """Where calls may begin in `text`, or the spaces before them; its length where none do."""
    places = [place for each in BEGINS if (place := text.find(each)) >= 0]
    return len(text[: min(places, default=len(text) - beginning_of(BEGINS, text))].rstrip())


def beginning_of(stops: Sequence[str], text: str) -> int:
    """How many characters at the end of `text` may be the beginning of one of `stops`."""

    def beginning(stop: str) -> int:
        place = max(len(text) - len(stop), -1)
        while (place := text.find(stop[0], place + 1)) >= 0:
            if stop.startswith(text[place:]):
                return len(text) - place
        return 0

    return max(map(beginning, stops), default=0)
