"""A request's bytes become prompts as tokens and decoding settings, at bounded cost.

A body of 1 MiB can hold hundreds of thousands of lists and objects. Creating them takes seconds,
since Python's garbage collector scans all of them again and again, and validating each against
every form that a field may have takes minutes and gigabytes. So they are counted first.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastapi.exceptions import RequestValidationError
from pydantic_core import from_json, to_json
from transformers import PreTrainedTokenizerBase

from ...config import Serving
from ...errors import BaseModelError, EngineError
from ...files import distinct_keys, shortened
from ...routing.conversation import ChatTexts
from ...tasks.task import said_in
from ...untrusted_text import MOST_SECONDS, UntrustedText
from . import protocol
from .protocol import SEEDS, AnyRequest, ApiError, ChatRequest, Deadline, bad_request, for_clients

MOST_CONTAINERS = 10_000  # objects and lists in one request
MOST_FIELDS = 20_000  # of all objects together
TOO_LONG, UNREADABLE = "context_length_exceeded", "prompt_unreadable"


def check_body(body: bytes) -> None:
    """Raise ApiError for what is no strict JSON, or takes long to read."""

    def is_small(text: bytes) -> bool:
        containers = text.count(b"[") + text.count(b"{")
        return containers <= MOST_CONTAINERS and text.count(b":") <= MOST_FIELDS

    why = f"has more than {MOST_CONTAINERS} objects and lists or {MOST_FIELDS} fields"
    without_escapes = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    # Brackets in strings count only where that decides: counting without them takes longer.
    if is_small(body) or is_small(b"".join(without_escapes.split(b'"')[::2])):
        try:
            # Python's reader would take NaN, half surrogate pairs, and hundreds of levels.
            from_json(body, allow_inf_nan=False)
            # And from_json the last of two keys.
            json.loads(body, object_pairs_hook=distinct_keys)
            return
        except ValueError as error:
            why = f"is no JSON: {error}"
    raise bad_request(f"The body {why}.", code=protocol.INVALID)


def invalid(error: RequestValidationError) -> ApiError:
    """The first error of a request; names of fields are cut."""
    first = error.errors()[0]
    place = [shortened(str(part), protocol.SHOWN)[1:-1] for part in first["loc"][1:]]
    message = ": ".join([".".join(place), first["msg"]] if place else [first["msg"]])
    return bad_request(message, place[0] if place else None, protocol.INVALID)


CHARACTERS = 16  # a token; a text with more is refused before it is turned into tokens
DEFAULT_LENGTH = 16  # of a completion, as OpenAI has it


@dataclass(frozen=True)
class Frame:
    """What there is to know of a model to read prompts for it.

    `context` is how many tokens it can hold, None for any, `added` are those before and after the
    text of a prompt. `looks_prompts_up` says that a router reads them. Without a `tokenizer` it is
    an engine that makes prompts of chats, and tokens.
    """

    tokenizer: PreTrainedTokenizerBase | None
    context: int | None
    looks_prompts_up: bool
    added: tuple[Sequence[int], Sequence[int]] = ((), ())


@dataclass(frozen=True)
class RequestPrompt:
    """A prompt's tokens and its text; `asked` is what routers per prompt read, if any do."""

    tokens: tuple[int, ...]
    text: str
    asked: tuple[int, ...] | ChatTexts


@dataclass(frozen=True)
class Decoding:
    """How an answer is generated.

    `temperature` 0 is greedy. With `ignores_end` only `max_tokens` and `stop` end it; `is_cut` says
    that more were asked for. `logprobs` is the number of alternatives to each token (None: no
    log-probabilities at all).
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[str, float] = field(default_factory=dict)
    is_cut: bool = False
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    routing: bool = False
    ignores_end: bool = False


PENALTIES = "repetition_penalty", "frequency_penalty", "presence_penalty"
SAMPLING = "temperature", "top_p", "top_k", "min_p", "logit_bias", *PENALTIES


class Answer(NamedTuple):
    """Answer `number` of a request, to its prompt number `row`."""

    number: int
    row: int
    prompt: RequestPrompt
    decoding: Decoding


@dataclass(frozen=True)
class Asked:
    """A request to a model, read; a `mixture` of experts stands for what its router chooses.

    `experts` are those of the model that its client may use. `builder` builds the response.
    """

    request: AnyRequest
    mixture: Mapping[str, float] | None
    prompts: list[RequestPrompt]
    answers: list[Answer]
    client: str
    deadline: Deadline
    experts: tuple[str, ...]
    builder: Callable[..., Any]


def _read_calls(messages: list[dict[str, Any]], are_known: bool) -> None:
    """Make objects of the arguments of messages' calls; add all to the text if not `are_known`.

    Templates want objects, and one that doesn't know calls would leave them out.
    """
    room = MOST_CONTAINERS  # in all of these texts; more of them stay texts
    for message in (each for each in messages if "tool_calls" in each):
        calls = [each.get("function", each) for each in message["tool_calls"]]
        for function in calls:
            # There may be none, or no text, or no JSON.
            with suppress(AttributeError, ValueError, TypeError, KeyError):
                room -= function["arguments"].count("[") + function["arguments"].count("{")
                if room >= 0:
                    function["arguments"] = from_json(function["arguments"], allow_inf_nan=False)
        if not are_known:
            texts = [message["content"], *(to_json(each).decode() for each in calls)]
            message |= {"content": "\n".join(filter(None, texts)), "tool_calls": None}


class RequestReader:
    """Reads requests to one model within the server's limits; refusals are ApiErrors.

    `texts` runs the base's chat template and tokenizer; None where an engine does.
    """

    def __init__(self, frame: Frame, limits: Serving, texts: UntrustedText | None) -> None:
        self._frame, self._limits, self._texts = frame, limits, texts
        self._most_tokens = min(limits.max_batch_tokens, frame.context or limits.max_batch_tokens)

    def prompts(self, request: AnyRequest, seconds: float = MOST_SECONDS) -> list[RequestPrompt]:
        process = self._texts
        if process is None:
            return self._unread(request)
        try:
            if isinstance(request, ChatRequest):
                return [self._chat_prompt(process, request, seconds)]
            rows = self._read(process, request.prompt, request.asks, seconds)
        except (BaseModelError, EngineError) as error:
            status, why = 503 if isinstance(error, EngineError) else 400, for_clients(error)
            raise ApiError(status, why, param=request.asks, code=UNREADABLE) from error
        return [
            RequestPrompt(self._plain(tokens), text, self._asked_by(request, text))
            for text, tokens in rows
        ]

    def _unread(self, request: AnyRequest) -> list[RequestPrompt]:
        """The prompts of a request that an engine turns into tokens."""
        if isinstance(request, ChatRequest):
            messages = [message.plain for message in request.messages]
            turns = [(message["role"], message["content"]) for message in messages]
            self._check_length("".join(text for _, text in turns), request.asks)
            return [RequestPrompt((), "", self._asked(request, turns) or ())]
        for text in request.prompt:
            self._check_length(text, request.asks)
        return [RequestPrompt((), text, self._asked_by(request, text)) for text in request.prompt]

    def _asked_by(self, request: AnyRequest, text: str) -> ChatTexts | tuple[int, ...]:
        return self._asked(request, [("user", text)]) or ()

    def _check_length(self, text: str, field: str) -> None:
        if len(text) > self._most_tokens * CHARACTERS:
            message = f"The prompt has {len(text)} characters; the model can hold"
            raise bad_request(f"{message} {self._most_tokens} tokens.", field, TOO_LONG)

    def _chat_prompt(
        self, process: UntrustedText, request: ChatRequest, seconds: float
    ) -> RequestPrompt:
        messages = [each.plain for each in request.messages]
        turns = [(each["role"], each["content"]) for each in messages]
        template = str(getattr(self._frame.tokenizer, "chat_template", ""))
        _read_calls(messages, "tool_calls" in template)
        functions = [each.model_dump(exclude_unset=True) for each in request.functions]
        variables = {**(request.chat_template_kwargs or {})}
        variables["tools"] = [{"type": "function", "function": each} for each in functions] or None
        if request.reasoning_effort:
            variables["reasoning_effort"] = request.reasoning_effort
        ((text, tokens),) = self._read(process, [messages], request.asks, seconds, **variables)
        tokens = tokens or self._plain(())  # some templates write nothing of an empty message
        return RequestPrompt(tokens, text, self._asked(request, turns) or ())

    def _asked(self, request: AnyRequest, turns: Sequence[tuple[str, str]]) -> ChatTexts | None:
        """What a router by prompt reads of (role, text) each; None without it or without turns."""
        reads_prompts = self._frame.looks_prompts_up
        if request.route_by is not None:
            if not reads_prompts:
                message = "No router reads route_by: experts are named, or chosen for every token."
                raise bad_request(message, "route_by")
            turns = [("user", request.route_by)]
        elif turns and self._limits.reads == "last-message":
            turns = [("user", said_in(turns)[1][-1])]
        return ChatTexts.of(turns) if turns and reads_prompts else None

    def _plain(self, tokens: Sequence[int]) -> tuple[int, ...]:
        before, after = self._frame.added
        tokenizer = self._frame.tokenizer
        if tokenizer is not None and not (before or tokens or after):
            first = tokenizer.bos_token_id
            return (int(tokenizer.eos_token_id if first is None else first),)
        return (*before, *tokens, *after)

    def _read(
        self,
        process: UntrustedText,
        texts: Sequence[Any],
        field: str,
        seconds: float,
        /,
        **variables: Any,
    ) -> list[tuple[str, tuple[int, ...]]]:
        most = self._most_tokens * CHARACTERS  # what exceeds less is refused with its answer
        rows = process.read(
            list(texts), min(seconds, MOST_SECONDS), most, add_generation_prompt=True, **variables
        )
        if (longest := max(characters for _, characters, _ in rows)) > most:
            message = f"The prompt has {longest} characters; the model can hold {self._most_tokens}"
            raise bad_request(f"{message} tokens.", field, TOO_LONG)
        return [(text, tuple(tokens)) for text, _, tokens in rows]

    def answers(self, request: AnyRequest, prompts: Sequence[RequestPrompt]) -> list[Answer]:
        """The answers, n to each of `prompts`, and how they are generated."""
        rows = [(row, each) for row, each in enumerate(prompts) for _ in range(request.n or 1)]
        return [Answer(n, *row, self._decoding(request, n, row[1])) for n, row in enumerate(rows)]

    def _decoding(self, request: AnyRequest, number: int, prompt: RequestPrompt) -> Decoding:
        if isinstance(request, ChatRequest):
            asked = request.max_completion_tokens or request.max_tokens
            logprobs = (request.top_logprobs or 0) if request.logprobs else None
        else:
            asked = DEFAULT_LENGTH if request.max_tokens is None else request.max_tokens
            logprobs = request.logprobs
        seed, most, count = request.seed, self._most_tokens, len(prompt.tokens)
        if count >= most:
            message = f"The prompt has {count} tokens; the model can hold {most} with the answer."
            raise bad_request(message, request.asks, TOO_LONG)
        room = min(self._limits.max_tokens, most - count)
        return Decoding(
            max_tokens=min(asked or room, room),
            is_cut=room < (asked or 0) < protocol.NO_LIMIT,
            seed=secrets.randbelow(SEEDS) if seed is None else (seed + number) % SEEDS,
            stop=tuple(request.stop or ()),
            logprobs=logprobs,
            routing=bool(request.routing),
            ignores_end=bool(request.ignore_eos),
            **{name: getattr(request, name) for name in SAMPLING},
        )
