"""Answers in JSON, and calls of tools, which are JSON in the form that a base's template shows.

Tokens that would break a form or a schema are left out, by llguidance.

Its matcher gives the tokens that may come next, and has limits of its own on the size of a schema
and the work of a step: a schema is a client's. It never raises, but says that it is in error.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from pydantic_core import from_json
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ....errors import EngineError
from ....files import first_line
from ..protocol import AnyRequest, ChatRequest, bad_request
from ..replies import Progress, written
from .runner import ModelRunner

try:
    from llguidance import LLMatcher
    from llguidance.hf import from_tokenizer
except ImportError:
    LLMatcher = from_tokenizer = None

# As Python's json writes it: a small model that may write spaces writes nothing else.
WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
MOST_FIELDS = 5_000  # of schemas: twice as many take four times as long, and 10,000 ten seconds

_known: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, Any] = weakref.WeakKeyDictionary()
_reading = threading.Lock()


class JsonForm:
    """What may follow in one answer; `copy` begins another of the same form."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def copy(self) -> JsonForm:
        return JsonForm(self._matcher.deep_copy())

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
            raise EngineError(f"The JSON can't be written: {said}.")


def form_of(request: AnyRequest, calls: Calls | None, runner: ModelRunner) -> JsonForm | None:
    """The form of a model's answer, by a schema or with `calls`, if it has one. Raises ApiError.

    The first call for a tokenizer takes seconds.
    """
    if (schema := request.schema_asked) is None and not (calls and calls.are_bound):
        return None
    why = "this server lacks llguidance (pip install 'phatgoose[json]')"
    tokenizer = runner.tokenizer
    try:
        if LLMatcher is not None:
            with _reading:
                if tokenizer not in _known:
                    size = max(runner.vocabulary, len(tokenizer))
                    _known[tokenizer] = from_tokenizer(tokenizer, size, sorted(runner.ends))
            grammar = calls.grammar(schema) if calls else f"start: {_by(schema)}"
            why = f"it has more than {MOST_FIELDS} fields"
            if grammar.count('": ') <= MOST_FIELDS:
                form = JsonForm(LLMatcher(_known[tokenizer], grammar))
                if form.copy().allowed(torch.zeros(runner.vocabulary)).isfinite().any():
                    return form
                why = "no answer can begin by it, as where it is only itself"  # {"$ref": "#"}
    except Exception as error:  # also of a tokenizer that is written in Python, or an odd one
        why = first_line(error).rstrip(".")
    field = "tools" if calls else request.sent_as("response_format")
    raise bad_request(f"Answers can't keep to this form: {why}.", field)


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
