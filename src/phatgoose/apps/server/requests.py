"""A request's bytes become prompts as tokens and decoding settings, at bounded cost.

A body of 1 MiB can hold hundreds of thousands of lists and objects. Creating them takes seconds,
since Python's garbage collector scans all of them again and again, and validating each against
every form that a field may have takes minutes and gigabytes. So they are counted first.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from transformers import PreTrainedTokenizerBase

from ...config import Serving
from ...errors import BaseModelError, EngineError
from ...files import shortened
from ...tasks.task import question_of
from ...untrusted_text import MOST_SECONDS, UntrustedText
from .protocol import (
    AnyRequest,
    ApiError,
    ChatRequest,
    CompletionRequest,
    Deadline,
    bad_request,
    for_clients,
)

MOST_CONTAINERS = 10_000  # objects and lists in one request
MOST_FIELDS = 20_000  # of all objects together
MOST_CHOICES = 64  # answers to one request
SHOWN = 60  # characters of a field's name that an error repeats

Kind = TypeVar("Kind", bound=BaseModel)


def parsed(kind: type[Kind], body: bytes) -> Kind:
    """The request in `body`. Raises ApiError: names of fields, and a router's refusal cut short."""
    _check_size(body)
    try:
        value = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise _invalid(f"The body is not JSON: {error}.") from None
    json.loads(body, object_pairs_hook=_check_keys)  # from_json silently takes the last of two
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _first_of(error, value) from None


def _check_size(body: bytes) -> None:
    def is_small(text: bytes) -> bool:
        containers = text.count(b"[") + text.count(b"{")
        return containers <= MOST_CONTAINERS and text.count(b":") <= MOST_FIELDS

    if not is_small(body):
        # Brackets in strings count only where that decides: counting without them takes longer.
        without_escapes = body.replace(b"\\\\", b"").replace(b'\\"', b"")
        if not is_small(b"".join(without_escapes.split(b'"')[::2])):  # outside of strings
            raise _invalid(
                f"The body has more than {MOST_CONTAINERS} objects and lists or {MOST_FIELDS} "
                f"fields."
            )


def _check_keys(pairs: list[tuple[str, Any]]) -> None:
    if len({key for key, _ in pairs}) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        shown = shortened(key, SHOWN)[1:-1]
        raise _invalid(f"The key {shown} appears twice in one object.", shown)


def _first_of(error: ValidationError, body: Any) -> ApiError:
    """The first error of a request, `body`.

    A field of several forms has an error for each. The one to report is of the form that the value
    fits best: it lies deepest, and isn't about the type.
    """
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    placed = [(_place_of(each["loc"], body, each["type"]), each) for each in errors]
    of_one_field = [pair for pair in placed if pair[1]["loc"][:1] == errors[0]["loc"][:1]]

    def how_far(pair: tuple[tuple[int | str, ...], Any]) -> tuple[int, int, bool]:
        place, first = pair
        item = place[-1] if place and isinstance(place[-1], int) else 0
        return len(place), item, not first["type"].endswith("_type")

    place, first = max(of_one_field, key=how_far)
    shown = [shortened(str(part), SHOWN)[1:-1] for part in place]
    message = f"{'.'.join(shown)}: {first['msg']}" if shown else str(first["msg"])
    return _invalid(message, shown[0] if shown else None)


def _place_of(path: Sequence[int | str], body: Any, kind: str) -> tuple[int | str, ...]:
    """Where in `body` an error is: its path without the names of the forms of a field."""
    place: list[int | str] = []
    value: Any = body
    for number, part in enumerate(path):
        is_key = isinstance(value, dict) and part in value
        if is_key or (isinstance(value, list) and isinstance(part, int)):
            value = value[part]
        elif kind != "missing" or number < len(path) - 1:
            continue
        place.append(part)
    return tuple(place)


def _invalid(message: str, param: str | None = None) -> ApiError:
    return bad_request(message, param, "invalid_request")


TOO_LONG, UNREADABLE = "context_length_exceeded", "prompt_unreadable"
CHARACTERS = 16  # a token; a text with more is refused before it is turned into tokens
DEFAULT_LENGTH = 16  # of a completion, as OpenAI has it
SEEDS = 1 << 63


@dataclass(frozen=True)
class Frame:
    """What there is to know of a model to read prompts for it.

    `context` is how many tokens it can hold, None for any, `added` are those before and after the
    text of a prompt. `looks_prompts_up` says that a router reads them, `in_chats` that it read the
    experts' in the chat template.
    """

    tokenizer: PreTrainedTokenizerBase
    context: int | None
    vocabulary: int
    added: tuple[Sequence[int], Sequence[int]]
    looks_prompts_up: bool
    in_chats: bool


@dataclass(frozen=True)
class RequestPrompt:
    """A prompt's tokens, and the text that stands for them where a prompt is echoed.

    `asked` are the tokens that routers per prompt read.
    """

    tokens: tuple[int, ...]
    text: str
    asked: tuple[int, ...]


@dataclass(frozen=True)
class Decoding:
    """How an answer is generated.

    `temperature` 0 is greedy. With `ignores_end` only `max_tokens` and `stop` end it. `logprobs` is
    the number of alternatives to each token (None: no log-probabilities at all).
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    echo: bool = False
    routing: bool = False
    ignores_end: bool = False

    @property
    def scores_prompt(self) -> bool:
        return self.echo and self.logprobs is not None


class Answer(NamedTuple):
    """Answer `number` of a request, to its prompt number `row`."""

    number: int
    row: int
    prompt: RequestPrompt
    decoding: Decoding

    @property
    def echoed(self) -> str:
        return self.prompt.text if self.decoding.echo else ""


@dataclass(frozen=True)
class Asked:
    """A request to a model, read; a `mixture` of experts stands for what its router chooses."""

    request: AnyRequest
    mixture: Mapping[str, float] | None
    prompts: list[RequestPrompt]
    answers: list[Answer]
    client: str
    deadline: Deadline


class RequestReader:
    """Reads requests to one model within the server's limits; refusals are ApiErrors.

    `texts` runs the base's chat template and tokenizer.
    """

    def __init__(self, frame: Frame, limits: Serving, texts: UntrustedText) -> None:
        self._frame, self._limits, self._texts = frame, limits, texts
        self._most_tokens = min(limits.max_batch_tokens, frame.context or limits.max_batch_tokens)

    def prompts(self, request: AnyRequest, seconds: float = MOST_SECONDS) -> list[RequestPrompt]:
        seconds = min(seconds, MOST_SECONDS)
        try:
            if isinstance(request, ChatRequest):
                return [self._chat_prompt(request, seconds)]
            return self._completion_prompts(request, seconds)
        except BaseModelError as error:
            field = "messages" if isinstance(request, ChatRequest) else "prompt"
            raise bad_request(for_clients(error), field, UNREADABLE) from error
        except EngineError as error:
            raise ApiError(503, for_clients(error)) from error

    def _completion_prompts(
        self, request: CompletionRequest, seconds: float
    ) -> list[RequestPrompt]:
        written, frame = request.prompt, self._frame
        is_one = isinstance(written, str) or isinstance(written[0], int)
        prompts = cast("list[str | list[int]]", [written] if is_one else written)
        self._check_number(len(prompts), request.n or 1)
        for prompt in prompts:
            kind, each = ("characters", CHARACTERS) if isinstance(prompt, str) else ("tokens", 1)
            self._check_length(len(prompt), kind, each, "prompt")
        texts = [each for each in prompts if isinstance(each, str)]
        if texts:
            tokens = [self._plain(each) for _, each in self._read(texts, "prompt", seconds)]
            return list(map(RequestPrompt, tokens, texts, tokens))
        rows = [tuple(each) for each in prompts if not isinstance(each, str)]
        largest = max(token for row in rows for token in row)
        if largest >= frame.vocabulary:
            message = f"Token {largest} is unknown; the model has {frame.vocabulary}."
            raise bad_request(message, "prompt")
        plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        texts = [frame.tokenizer.decode(row, **plain) for row in rows]
        return list(map(RequestPrompt, rows, texts, rows))

    def _chat_prompt(self, request: ChatRequest, seconds: float) -> RequestPrompt:
        frame = self._frame
        if not frame.tokenizer.chat_template:
            message = "The base model has no chat template; use /v1/completions."
            raise bad_request(message, "model", "no_chat_template")
        self._check_number(1, request.n or 1)
        length = sum(len(message.text) for message in request.messages)
        self._check_length(length, "characters", CHARACTERS, "messages")
        messages = request.plain_messages
        asked: Any = question_of([(each["role"], each["content"]) for each in messages])
        if frame.in_chats:
            asked = [{"role": "user", "content": asked}]
        texts = [messages, asked] if frame.looks_prompts_up else [messages]
        (text, tokens), *questions = self._read(texts, "messages", seconds)
        if not questions:
            return RequestPrompt(tuple(tokens), text, tuple(tokens))
        read = questions[0][1]
        question = tuple(read) if frame.in_chats else self._plain(read)
        self._check_length(len(question), "tokens", 1, "messages")
        return RequestPrompt(tuple(tokens), text, question)

    def _plain(self, tokens: Sequence[int]) -> tuple[int, ...]:
        (before, after), tokenizer = self._frame.added, self._frame.tokenizer
        if not (before or tokens or after):
            first = tokenizer.bos_token_id
            return (int(tokenizer.eos_token_id if first is None else first),)
        return (*before, *tokens, *after)

    def _read(self, texts: list[Any], field: str, seconds: float) -> list[tuple[str, list[int]]]:
        most = self._most_tokens * CHARACTERS  # what exceeds less is refused with its answer
        rows = self._texts.read(texts, seconds, most, add_generation_prompt=True)
        for _, characters, _ in rows:
            self._check_length(characters, "characters", CHARACTERS, field)
        return [(text, tokens) for text, _, tokens in rows]

    def _check_number(self, prompts: int, n: int) -> None:
        if prompts * n > MOST_CHOICES:
            raise bad_request(
                f"Prompts times n are {prompts * n} answers; one request may have {MOST_CHOICES}.",
                "n",
            )

    def _check_length(self, count: int, kind: str, each: int, field: str) -> None:
        if count > self._most_tokens * each:
            message = f"The prompt has {count} {kind}; the model can hold {self._most_tokens}"
            raise bad_request(f"{message} tokens.", field, TOO_LONG)

    def decoding(self, request: AnyRequest, number: int, prompt: RequestPrompt) -> Decoding:
        """How answer `number` is generated."""
        if isinstance(request, ChatRequest):
            asked, is_echo = request.max_completion_tokens or request.max_tokens, False
            logprobs = (request.top_logprobs or 0) if request.logprobs else None
            if request.top_logprobs and not request.logprobs:
                raise bad_request("top_logprobs needs logprobs to be true.", "top_logprobs")
        else:
            asked = DEFAULT_LENGTH if request.max_tokens is None else request.max_tokens
            logprobs, is_echo = request.logprobs, bool(request.echo)
        stop, seed = request.stop or [], request.seed
        return Decoding(
            max_tokens=self._length(asked, prompt),
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=secrets.randbelow(SEEDS) if seed is None else (seed + number) % SEEDS,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            logprobs=logprobs,
            echo=is_echo,
            routing=bool(request.routing),
            ignores_end=bool(request.ignore_eos),
        )

    def _length(self, asked: int | None, prompt: RequestPrompt) -> int:
        """How many tokens an answer may have."""
        limit, count = self._limits.max_tokens, len(prompt.tokens)
        if asked is not None and asked > limit:
            message = f"max_tokens is {asked}; this server generates {limit} at most."
            raise bad_request(message, "max_tokens")
        room, least = self._most_tokens - count, 1 if asked is None else asked
        if room < least:
            raise bad_request(
                f"The prompt has {count} tokens and the answer {least}; the model can hold "
                f"{self._most_tokens} together.",
                {None: "messages", 0: "prompt"}.get(asked, "max_tokens"),
                TOO_LONG,
            )
        return min(room, limit) if asked is None else asked
