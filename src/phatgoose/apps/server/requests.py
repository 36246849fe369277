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
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from fastapi.exceptions import RequestValidationError
from pydantic_core import from_json, to_json

from ...config import Serving
from ...errors import BaseModelError, EngineError
from ...files import distinct_keys, shortened
from ...routing.conversation import ChatTexts
from ...tasks.task import said_in
from ...untrusted_text import MOST_SECONDS, UntrustedText
from . import protocol
from .protocol import (
    OF_CHATS,
    OF_TEXTS,
    SEEDS,
    AnyRequest,
    ApiError,
    ChatRequest,
    Fields,
    Weights,
    bad_request,
    for_clients,
)
from .turns import Deadline

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_CONTAINERS = 10_000  # objects and lists in one request
MOST_FIELDS = 20_000  # of all objects together
TOO_LONG = "context_length_exceeded"
UNREADABLE = "prompt_unreadable"

Tokens: TypeAlias = tuple[int, ...]


def check_body(body: bytes) -> None:
    """Raise ApiError for what is no strict JSON, or takes long to read."""
    without_escapes = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    # Brackets in strings count only where that decides: counting without them takes longer.
    if not _is_small(body) and not _is_small(b"".join(without_escapes.split(b'"')[::2])):
        why = f"has more than {MOST_CONTAINERS} objects and lists or {MOST_FIELDS} fields"
        raise bad_request(f"The body {why}.", code=protocol.INVALID)
    try:
        # Python's reader would take NaN, half surrogate pairs, and hundreds of levels.
        from_json(body, allow_inf_nan=False)
        # And from_json the last of two keys.
        json.loads(body, object_pairs_hook=distinct_keys)
    except ValueError as error:
        raise bad_request(f"The body is no JSON: {error}.", code=protocol.INVALID) from None


def _is_small(body: bytes) -> bool:
    containers = body.count(b"[") + body.count(b"{")
    return containers <= MOST_CONTAINERS and body.count(b":") <= MOST_FIELDS


def invalid(error: RequestValidationError) -> ApiError:
    """The first error of a request; names of fields are cut."""
    first = error.errors()[0]
    parts = [part for part in first["loc"][1:] if part not in (OF_CHATS, OF_TEXTS)]
    place = [shortened(str(part), protocol.SHOWN)[1:-1] for part in parts]
    if not place:
        return bad_request(first["msg"], code=protocol.INVALID)
    return bad_request(f"{'.'.join(place)}: {first['msg']}", place[0], protocol.INVALID)


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

    tokens: Tokens
    text: str
    asked: Tokens | ChatTexts


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


# Fields of requests that are those of Decoding.
SAMPLING = {
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "logit_bias",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
}


class Answer(NamedTuple):
    """Answer `number` of a request, to its prompt number `row`."""

    number: int
    row: int
    prompt: RequestPrompt
    decoding: Decoding


@dataclass(frozen=True)
class PreparedRequest:
    """A request to a model, read; a `mixture` of experts stands for what its router chooses.

    `experts` are those of the model that its client may use. `builder` builds the response.
    `trace` are headers that an engine gets along.
    """

    request: AnyRequest
    mixture: Weights | None
    prompts: list[RequestPrompt]
    answers: list[Answer]
    client: str
    deadline: Deadline
    experts: tuple[str, ...]
    builder: Callable[..., Any]
    trace: Mapping[str, str]


def _read_calls(messages: list[Fields], shows_calls: bool) -> None:
    """Make objects of the arguments of messages' calls; unless the template `shows_calls`, text.

    Templates want objects, and one that doesn't know calls would leave them out.
    """
    room = MOST_CONTAINERS  # in all of these texts; more of them stay texts
    for message in messages:
        if "tool_calls" not in message:
            continue
        functions = [call.get("function", call) for call in message["tool_calls"]]
        for function in functions:
            # There may be none, or no text, or no JSON.
            with suppress(AttributeError, ValueError, TypeError, KeyError):
                arguments = function["arguments"]
                room -= arguments.count("[") + arguments.count("{")
                if room >= 0:
                    function["arguments"] = from_json(arguments, allow_inf_nan=False)
        if not shows_calls:
            texts = [message["content"], *(to_json(call).decode() for call in functions)]
            message["content"] = "\n".join(filter(None, texts))
            message["tool_calls"] = None


class RequestReader:
    """Reads requests to one model within the server's limits; refusals are ApiErrors.

    `texts` runs the base's chat template and tokenizer; None where an engine does.
    """

    def __init__(self, frame: Frame, limits: Serving, texts: UntrustedText | None) -> None:
        self._frame = frame
        self._limits = limits
        self._texts = texts
        self._most_tokens = min(limits.max_batch_tokens, frame.context or limits.max_batch_tokens)

    def prompts(self, request: AnyRequest, seconds: float = MOST_SECONDS) -> list[RequestPrompt]:
        if isinstance(request, ChatRequest):
            return [self._chat_prompt(request, seconds)]
        prompts = []
        for text, tokens in self._read(request.prompt, request.asks, seconds):
            asked = self._asked(request, [("user", text)])
            prompts.append(RequestPrompt(self._plain(tokens), text, asked))
        return prompts

    def _chat_prompt(self, request: ChatRequest, seconds: float) -> RequestPrompt:
        messages = [message.plain for message in request.messages]
        turns = [(message["role"], message["content"]) for message in messages]
        if self._texts is None:
            self._read(["".join(content for _, content in turns)], request.asks, seconds)
            return RequestPrompt((), "", self._asked(request, turns))
        template = str(getattr(self._frame.tokenizer, "chat_template", ""))
        _read_calls(messages, "tool_calls" in template)
        tools = [
            {"type": "function", "function": function.model_dump(exclude_unset=True)}
            for function in request.functions
        ]
        variables = {**(request.chat_template_kwargs or {}), "tools": tools or None}
        if request.reasoning_effort:
            variables["reasoning_effort"] = request.reasoning_effort
        ((text, tokens),) = self._read([messages], request.asks, seconds, **variables)
        # Some templates write nothing of an empty message.
        tokens = tokens or self._plain(())
        return RequestPrompt(tokens, text, self._asked(request, turns))

    def _asked(self, request: AnyRequest, turns: Sequence[tuple[str, str]]) -> ChatTexts | Tokens:
        """What a router by prompt reads of (role, text) each; nothing without it or turns."""
        reads_prompts = self._frame.looks_prompts_up
        if request.route_by is not None:
            if not reads_prompts:
                message = "No router reads route_by: experts are named, or chosen for every token."
                raise bad_request(message, "route_by")
            turns = [("user", request.route_by)]
        elif turns and self._limits.reads == "last-message":
            turns = [("user", said_in(turns)[1][-1])]
        return ChatTexts.of(turns) if turns and reads_prompts else ()

    def _plain(self, tokens: Tokens) -> Tokens:
        before, after = self._frame.added
        tokenizer = self._frame.tokenizer
        plain = (*before, *tokens, *after)
        if plain or tokenizer is None:
            return plain
        first = tokenizer.bos_token_id
        return (int(tokenizer.eos_token_id if first is None else first),)

    def _read(
        self,
        texts: Sequence[str | list[Fields]],
        field: str,
        seconds: float,
        /,
        **variables: object,
    ) -> list[tuple[str, Tokens]]:
        """Each text with its tokens, none where an engine makes them."""
        rows: Sequence[tuple[str, int, Sequence[int]]]
        most = self._most_tokens * CHARACTERS  # what exceeds less is refused with its answer
        if self._texts is None:
            rows = [(str(text), len(text), ()) for text in texts]
        else:
            try:
                rows = self._texts.read(
                    list(texts),
                    min(seconds, MOST_SECONDS),
                    most,
                    add_generation_prompt=True,
                    **variables,
                )
            except (BaseModelError, EngineError) as error:
                status = 503 if isinstance(error, EngineError) else 400
                raise ApiError(status, for_clients(error), param=field, code=UNREADABLE) from error
        longest = max(characters for _, characters, _ in rows)
        if longest > most:
            message = f"The prompt has {longest} characters; the model can hold {self._most_tokens}"
            raise bad_request(f"{message} tokens.", field, TOO_LONG)
        return [(text, tuple(tokens)) for text, _, tokens in rows]

    def answers(self, request: AnyRequest, prompts: Sequence[RequestPrompt]) -> list[Answer]:
        """The answers, n to each of `prompts`, and how they are generated."""
        answers = list[Answer]()
        for row, prompt in enumerate(prompts):
            for _ in range(request.n or 1):
                number = len(answers)
                answers.append(Answer(number, row, prompt, self._decoding(request, number, prompt)))
        return answers

    def _decoding(self, request: AnyRequest, number: int, prompt: RequestPrompt) -> Decoding:
        if isinstance(request, ChatRequest):
            length = request.max_completion_tokens or request.max_tokens or 0
            logprobs = (request.top_logprobs or 0) if request.logprobs else None
        else:
            length = DEFAULT_LENGTH if request.max_tokens is None else request.max_tokens
            logprobs = request.logprobs
        most = self._most_tokens
        count = len(prompt.tokens)
        if count >= most:
            message = f"The prompt has {count} tokens; the model can hold {most} with the answer."
            raise bad_request(message, request.asks, TOO_LONG)
        seed = secrets.randbelow(SEEDS)
        if request.seed is not None:
            seed = (request.seed + number) % SEEDS
        room = min(self._limits.max_tokens, most - count)
        return Decoding(
            max_tokens=min(length or room, room),
            is_cut=room < length < protocol.NO_LIMIT,
            seed=seed,
            stop=tuple(request.stop or ()),
            logprobs=logprobs,
            routing=bool(request.routing),
            ignores_end=bool(request.ignore_eos),
            **request.model_dump(include=SAMPLING),
        )
