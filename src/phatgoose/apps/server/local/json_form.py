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
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
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
from ..protocol import AnyRequest, ApiError, ChatRequest, Fields, bad_request, busy
from ..replies import Progress, beginning_of, written
from ..requests import PreparedRequest
from ..turns import Turns
from .runner import MIB, ModelRunner

try:
    from llguidance import LLMatcher, LLParserLimits
    from llguidance.hf import from_tokenizer
except ImportError:
    LLMatcher = None

# As Python's json writes it: a small model that may write spaces writes nothing else.
WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
UNWRITABLE = "The JSON can't be written: {}"
AT_ONCE = 2  # grammars that are proven, and as many that are compiled

_tokenizers = weakref.WeakKeyDictionary[PreTrainedTokenizerBase, Any]()
_reading = threading.Lock()


@dataclass(frozen=True)
class Limits:
    """What a grammar may take to compile, and what is kept of them.

    `seconds` are of processor time, and `longest` those of waiting for a processor too. A grammar
    of more bytes than `large` is large, and those in use have at most `most_large`.
    """

    seconds: float = 2.0
    longest: float = 30.0
    memory: int = 64 * MIB
    large: int = 8 * MIB
    most_large: int = 192 * MIB
    proofs: int = 1_000


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
        self._matcher = matcher
        self._proof = proof

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
            why = first_line(self._matcher.get_error())
            raise EngineError(f"{UNWRITABLE.format(why)}.")


class Forms:
    """The forms of answers. Clients take turns to have grammars proven, and to have them compiled.

    What was proven once isn't proven again.
    """

    def __init__(self, waiting: int) -> None:
        """As many requests as `waiting` may wait."""
        self.limits = Limits()
        self.prove = proven
        self.lacks_library = LLMatcher is None
        self._proving = Turns(AT_ONCE, waiting)
        self._compiling = Turns(AT_ONCE, waiting)
        self.proofs: dict[bytes, Proof] = {}  # by the grammar's hash, the last used last
        self._in_use = weakref.WeakSet[Proof]()

    async def of(
        self, prepared: PreparedRequest, calls: Calls | None, runner: ModelRunner
    ) -> JsonForm | None:
        """The form of a model's answers, by a schema or with `calls`, if any. Raises ApiError.

        The first one for a tokenizer takes seconds.
        """
        request = prepared.request
        if request.schema_of_answers is None and not (calls and calls.are_bound):
            return None
        if self.lacks_library:
            raise _refusal(
                request, calls, "this server lacks llguidance (pip install 'phatgoose[json]')"
            )
        proof = await self._proof_of(prepared, calls)
        if proof.why:
            raise _refusal(request, calls, proof.why)
        used = replace(proof)
        self._in_use.add(used)
        limits = self.limits
        large = sum(other.bytes for other in self._in_use if other.bytes > limits.large)
        if used.bytes > limits.large and large > limits.most_large:
            raise busy("Too many large schemas are in use; try again in a while.", 5)
        return await self._compiling.run(
            prepared.client,
            prepared.deadline,
            lambda _: form_of(request, calls, runner, used),
        )

    async def _proof_of(self, prepared: PreparedRequest, calls: Calls | None) -> Proof:
        without_numbers = calls and calls.without_numbers()
        grammar = await run_in_threadpool(_grammar, prepared.request, without_numbers)
        key = sha256(grammar.encode()).digest()
        proof = self.proofs.pop(key, None)
        if proof is None:
            limits = self.limits
            proof = await self._proving.run(
                prepared.client,
                prepared.deadline,
                lambda seconds: self.prove(grammar, seconds, limits),
            )
        self.proofs[key] = proof
        if len(self.proofs) > self.limits.proofs:
            del self.proofs[next(iter(self.proofs))]
        return proof


def proven(grammar: str, seconds: float, limits: Limits) -> Proof:
    """What a process of its own finds in `seconds`. Raises ApiError where these don't suffice."""
    seconds = min(seconds, limits.longest)
    until = time.monotonic() + seconds
    with reading("The schema's new process", EngineError):
        child = new_process(grammars.__name__)
    try:
        reply = reply_of(child, (grammar, limits.memory, limits.seconds), seconds)
    finally:
        end([child])
    if reply:
        return Proof(reply["error"] and UNWRITABLE.format(reply["error"]), reply["bytes"])
    if time.monotonic() >= until:
        raise busy("The server had no time to compile the schema; try again in a while.", 5)
    most = f"{limits.seconds:g} s or {limits.memory // MIB} MiB"
    return Proof(f"it takes more than {most} to compile", 0)


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
        if tokenizer not in _tokenizers:
            size = max(runner.vocabulary, len(tokenizer))
            _tokenizers[tokenizer] = from_tokenizer(tokenizer, size, sorted(runner.ends))
    limits = LLParserLimits(**grammars.LIMITS)
    matcher = LLMatcher(_tokenizers[tokenizer], grammar, log_level=0, limits=limits)
    form = JsonForm(matcher, proof)
    if not form.copy().allowed(torch.zeros(runner.vocabulary)).isfinite().any():
        # {"$ref": "#"}
        raise EngineError("no answer can begin by it, as where it is only itself")
    return form


def _refusal(request: AnyRequest, calls: Calls | None, why: str) -> ApiError:
    field = "tools" if calls else request.sent_as("response_format")
    return bad_request(f"Answers can't keep to this form: {why}.", field)


def _grammar(request: AnyRequest, calls: Calls | None) -> str:
    schema = request.schema_of_answers
    if calls:
        return calls.grammar(schema)
    return f"start: {json_rule(schema or {})}"


def json_rule(schema: Fields, **options: bool) -> str:
    """What is JSON by a schema, in a grammar."""
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
        self._functions = {function.name: function for function in request.functions}
        self._must = request.tool_choice != "auto"
        self._most = 1 if request.parallel_tool_calls is False else None
        self.are_bound = self._must or any(function.strict for function in request.functions)
        template = str(runner.tokenizer.chat_template)
        self._mark = next(mark for mark in FORMS if mark in template)
        self._numbers: dict[str, int] = {}
        self.hidden: dict[int, str] = {}
        for number, token in runner.tokenizer.added_tokens_decoder.items():
            self._numbers[token.content] = number
            if token.special and MARK.fullmatch(token.content):
                self.hidden[number] = token.content

    @classmethod
    def of(cls, request: ChatRequest, runner: ModelRunner) -> Calls | None:
        """None where the model isn't shown the tools, and needn't call one."""
        is_shown = "tools" in str(runner.tokenizer.chat_template)
        return cls(request, runner) if is_shown or request.tool_choice != "auto" else None

    def without_numbers(self) -> Calls:
        """These for a grammar that needs no tokenizer: 0 stands for each token's number."""
        same = copy(self)
        same._numbers = dict.fromkeys(self._numbers, 0)
        return same

    def grammar(self, schema: Fields | None) -> str:
        """llguidance's: one call where it must be, JSON by a `schema` or one, or calls in text."""
        before, after = FORMS[self._mark].split("%s")
        functions = []
        for function in self._functions.values():
            schema_counts = self._must or function.strict
            parameters = (schema_counts and function.parameters) or {}
            begin = self._lark_of(f'{before}{{"name": "{function.name}", "arguments": ')
            # Words of a schema that llguidance doesn't know matter where the client says strict.
            is_lenient = not function.strict
            arguments = json_rule(
                {**parameters, "type": "object"}, lenient=is_lenient, coerce_one_of=is_lenient
            )
            functions.append(begin + arguments)
        mark = self._lark_of(self._mark)
        if self._must:
            start = f"{mark} call"
        elif schema is not None:
            start = f"{json_rule(schema)} | {mark} call"
        elif mark:
            start = f"(head call){'*' if self._most is None else '?'} TEXT"
        else:
            start = r"call | /[^{](.|\n)*/"
        lazy = "" if self._mark in self._numbers else "[lazy]"  # as text ends where a mark begins
        text = f"start: {start}\nhead{lazy}: TEXT {mark}\nTEXT: /(.|\\n)*/\n"
        return f"{text}call: ({' | '.join(functions)}) {self._lark_of('}' + after)}\n"

    def _lark_of(self, text: str) -> str:
        """`text` in a grammar, where added tokens have numbers."""
        pieces = []
        for piece in filter(None, MARK.split(text)):
            number = self._numbers.get(piece)
            pieces.append(json.dumps(piece) if number is None else f"<[{number}]>")
        return " ".join(pieces)

    def parsed(self, new: Progress) -> Progress:
        """The end of an answer, with what it calls in OpenAI's form instead of text."""
        functions: list[Fields] = []
        left = ""
        end = 0
        for match in CALL.finditer(new.text):
            called = self._functions_in(match)
            if called:
                functions += called
                left += new.text[end : match.start()]
                end = match.end()
        if not functions:
            return new
        calls = []
        # Mistral's template takes no other ids.
        is_mistral = self._mark == "[TOOL_CALLS]"
        for index, function in enumerate(functions[: self._most]):
            number = secrets.token_hex(12)
            name = number[:9] if is_mistral else f"call_{number}"
            calls.append({"index": index, "id": name, "type": "function", "function": function})
        text = (left + new.text[end:]).rstrip()
        finish = "tool_calls" if new.finish == "stop" else new.finish
        return replace(new, text=text, message={"tool_calls": calls}, finish=finish)

    def _functions_in(self, match: re.Match[str]) -> list[Fields]:
        """What is called where calls may be; nothing where there is anything else."""
        functions = []
        with suppress(ValueError, TypeError, LookupError, AttributeError):
            value = from_json(match["json"], allow_inf_nan=False)
            for call in value if isinstance(value, list) else [value]:
                name = self._functions[call["name"]].name
                arguments = {**call.get("arguments", call.get("parameters", {}))}
                functions.append({"name": name, "arguments": written(arguments)})
            return functions
        return []


def calls_begin(text: str) -> int:
    """Where calls may begin in `text`, or the spaces before them; its length where none do."""
    places = [text.find(mark) for mark in BEGINS if mark in text]
    begin = min(places) if places else len(text) - beginning_of(BEGINS, text)
    return len(text[:begin].rstrip())
