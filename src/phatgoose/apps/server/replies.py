"""Answers on their way to a client: what is new of them becomes chunks, or a whole response.

Who computes them, here or in another engine, puts `Progress` into a `Reply`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic_core import to_json
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from ...base.detokenising import UNFINISHED
from ...routing.choice import BASE_ALONE, Chosen
from .protocol import CLIENT_GONE, ApiError, ChatRequest, Fields, Weights
from .requests import PreparedRequest
from .turns import Deadline

if TYPE_CHECKING:
    from ...analysis.traces import TraceStream

Result = TypeVar("Result")
EXPERTS = "X-Phatgoose-Experts"
SHADOW = "X-Phatgoose-Shadow"
MOST_TOKENS = "X-Phatgoose-Max-Tokens"
MOST_OF_A_HEADER = 4000  # characters


def headers_of(
    prepared: PreparedRequest, chosen: Sequence[Chosen] | None, shadow: Sequence[Chosen] | None
) -> dict[str, str]:
    """What is told before an answer: its most tokens, if more were asked for, and prompts' experts.

    Also those that would have been chosen.
    """
    headers = {}
    decodings = [answer.decoding for answer in prepared.answers]
    cut = [decoding.max_tokens for decoding in decodings if decoding.is_cut]
    if cut:
        headers[MOST_TOKENS] = str(min(cut))
    for name, choices in ((EXPERTS, chosen), (SHADOW, shadow)):
        if choices is not None:
            headers[name] = in_a_line(choices)[:MOST_OF_A_HEADER]
    return headers


def in_a_line(choices: Sequence[Chosen]) -> str:
    """The experts of two prompts as reviews=0.71, trivia=0.29; base=1."""
    prompts = []
    for chosen in choices:
        best_first = sorted((chosen.weights or BASE_ALONE).items(), key=lambda pair: -pair[1])
        prompts.append(", ".join(f"{name}={weight:.4g}" for name, weight in best_first))
    return "; ".join(prompts)


@dataclass(frozen=True)
class ScoredToken:
    """A token as text with its log-probability, if that was asked for.

    `place` is where that text begins in the answer. `top` are the best alternatives, best first,
    each with its text.
    """

    text: str
    place: int
    logprob: float = 0.0
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Progress:
    """What is new of a request's answer `number`.

    `routing` is what its backend reports of the new tokens' experts. `finish` is None while more is
    to come. `generated` counts all tokens so far. What only its engine knows are fields of the
    `message`, `beside` it in its choice, and of the whole `reply` (its `usage` too).
    """

    number: int
    text: str
    tokens: tuple[ScoredToken, ...] = ()
    routing: tuple[TraceStream, ...] = ()
    finish: str | None = None
    generated: int = 0
    message: Fields = field(default_factory=dict)
    beside: Fields = field(default_factory=dict)
    reply: Fields = field(default_factory=dict)

    @staticmethod
    def joined(events: Sequence[Progress]) -> Progress:
        """One answer's events as one."""
        text = "".join(event.text for event in events)
        message: Fields = {}
        beside: Fields = {}
        reply: Fields = {}
        calls: list[Fields] = []
        tokens: list[ScoredToken] = []
        routing: list[TraceStream] = []
        for event in events:
            message |= event.message
            beside |= event.beside
            reply |= event.reply
            calls += event.message.get("tool_calls") or ()
            tokens += event.tokens
            routing += event.routing
        if calls:
            for number, call in enumerate(calls):
                calls[number] = {name: field for name, field in call.items() if name != "index"}
            message |= {"content": text or None, "tool_calls": calls}
        return replace(
            events[-1],
            text=text,
            tokens=tuple(tokens),
            routing=tuple(routing),
            message=message,
            beside=beside,
            reply=reply,
        )


def routing_report(
    router: str,
    k: int | None,
    experts: Iterable[str],
    tokens: Sequence[Fields],
    summary: Weights,
) -> Fields:
    """Which experts served an answer's `tokens`; `summary` has each expert's share of all so far.

    Each token has its text (`token`), its `part`, prompt or answer, its `stream`, and its `experts`
    by name, with the mean of their weights over all sites. Behind a gateway tokens are the pieces
    in which an engine sends an answer, and `chosen` are the experts of a choice of which only the
    first could be sent. A `summary` of "base" says that no expert acts. `trace`, of the same
    tokens, is present if it was asked for (docs/analysis.md).
    """
    return {
        "router": router,
        "k": k,
        "experts": list(experts),
        "tokens": tokens,
        "summary": summary,
        "chosen": None,
        "trace": None,
    }


Reports = Callable[[Progress], Fields | None]


class Builder:
    """Builds the response to one request, whole or as chunks.

    `report` makes of an answer's progress what is told of its routing.
    """

    def __init__(self, prepared: PreparedRequest, report: Reports) -> None:
        self.request = prepared.request
        self._report = report
        self.is_chat = isinstance(prepared.request, ChatRequest)
        self._rows = [answer.row for answer in prepared.answers]
        self._prompt_tokens = [len(prompt.tokens) for prompt in prepared.prompts]
        self.answers = len(prepared.answers)
        self._generated = [0] * self.answers
        self._counted: Fields = {}  # by an engine
        kind = "chatcmpl" if self.is_chat else "cmpl"
        self._identity: Fields = {
            "id": f"{kind}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": prepared.request.model,
        }

    @property
    def usage(self) -> Fields:
        prompt = sum(self._prompt_tokens)
        answers = sum(self._generated)
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": answers,
            "total_tokens": prompt + answers,
        }
        if self.answers == 1:
            usage |= self._counted
        return usage

    def opening(self) -> list[Fields]:
        """The chunks before the first token: in chats, who speaks."""
        chunks = []
        delta = {"role": "assistant", "content": ""}
        for number in range(self.answers if self.is_chat else 0):
            chunks.append(self._chunk({"index": number, "delta": delta, "finish_reason": None}))
        return chunks

    def chunks(self, progress: Progress) -> list[Fields]:
        self._count(progress)
        delta = {"content": progress.text, **progress.message}
        return [{**progress.reply, **self._chunk(self._choice(progress, "delta", delta))}]

    def closing(self) -> list[Fields]:
        """The chunks after the last token: what was used, if that was asked for."""
        options = self.request.stream_options
        return [self._chunk(usage=self.usage)] if options and options.include_usage else []

    def failed(self, error: ApiError) -> list[Fields]:
        """The chunks that come in place of all others."""
        return [error.body]

    def _count(self, progress: Progress) -> None:
        self._generated[progress.number] = progress.generated
        counted = progress.reply.get("usage", {})
        self._counted |= counted
        row = self._rows[progress.number]
        self._prompt_tokens[row] = counted.get("prompt_tokens", self._prompt_tokens[row])

    def _chunk(self, *choices: Fields, usage: Fields | None = None) -> Fields:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {**self._identity, "object": kind, "choices": choices, "usage": usage}

    def whole(self, events: Sequence[Sequence[Progress]]) -> Fields:
        choices = []
        for answer in map(Progress.joined, events):
            self._count(answer)
            message = {
                "role": "assistant",
                "content": answer.text,
                "refusal": None,
                **answer.message,
            }
            choices.append(self._choice(answer, "message", message))
        reply = {**answer.reply, **self._chunk(*choices, usage=self.usage)}
        if self.is_chat:
            reply["object"] = "chat.completion"
        return reply

    def _choice(self, progress: Progress, name: str, message: Fields) -> Fields:
        """One of a reply's choices; a chat's has the `message` under this name."""
        return {
            "index": progress.number,
            "finish_reason": progress.finish,
            "routing": self._report(progress),
            **({name: message} if self.is_chat else {"text": progress.text}),
            "logprobs": self._logprobs(progress.tokens),
            **progress.beside,
        }

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> Fields | None:
        request = self.request
        if isinstance(request, ChatRequest):
            if not request.logprobs:
                return None
            content = []
            for token in tokens:
                top = [_with_bytes(text, logprob) for text, logprob in token.top]
                content.append({**_with_bytes(token.text, token.logprob), "top_logprobs": top})
            return {"content": content, "refusal": None}
        if request.logprobs is None:
            return None
        texts = [token.text for token in tokens]
        logprobs = [token.logprob for token in tokens]
        places = [token.place for token in tokens]
        return {
            "tokens": texts,
            "token_logprobs": logprobs,
            "top_logprobs": list(map(_by_text, tokens)),
            "text_offset": places,
        }


def _by_text(token: ScoredToken) -> dict[str, float]:
    """Log-probabilities of the best tokens and the chosen one; the likelier of two of one text."""
    by_text: dict[str, float] = {}
    for text, logprob in (*token.top, (token.text, token.logprob)):
        by_text.setdefault(text, logprob)
    return by_text


def _with_bytes(text: str, logprob: float) -> Fields:
    # A part of a character has no bytes; they come with its last token.
    content = None if UNFINISHED in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": content}


def beginning_of(stops: Sequence[str], text: str) -> int:
    """How many characters at the end of `text` may be the beginning of one of `stops`."""
    longest = 0
    for stop in stops:
        place = text.find(stop[0], max(len(text) - len(stop) + 1, 0))
        while place >= 0 and not stop.startswith(text[place:]):
            place = text.find(stop[0], place + 1)
        if place >= 0:
            longest = max(longest, len(text) - place)
    return longest


class Reply:
    """The answers to one request while they come, due by `deadline`; made in the event loop.

    Whoever computes them puts what is new into `events`, which holds `room` of them (0: any
    number), or an error. `at_end` has what is done when the reply is closed, which it must be in
    any case: the places of unfinished answers are freed.
    """

    def __init__(self, builder: Builder, deadline: Deadline, room: int = 0) -> None:
        self.builder = builder
        self._deadline = deadline
        self.at_end: list[Callable[[], object]] = []
        self.events: asyncio.Queue[Progress | ApiError] = asyncio.Queue(room)
        self._first: Progress | None = None

    def close(self) -> None:
        for end in self.at_end:
            end()

    async def wait_for_first(self, http: Request) -> None:
        """Wait for the first event. Raises ApiError when that is an error, or no one waits.

        Then it is closed.
        """
        try:
            self._first = await unless_gone(http, self._next())
        except BaseException:
            self.close()
            raise

    async def progress(self) -> AsyncIterator[Progress]:
        """What is new, until all answers are finished. Raises ApiError."""
        left = self.builder.answers
        while left:
            event = self._first or await self._next()
            self._first = None
            left -= event.finish is not None
            yield event

    async def whole(self) -> str:
        """All answers at once, as JSON."""
        events: list[list[Progress]] = [[] for _ in range(self.builder.answers)]
        async for progress in self.progress():
            events[progress.number].append(progress)
        return await run_in_threadpool(lambda: written(self.builder.whole(events)))

    async def as_events(self) -> AsyncIterator[str]:
        """The answers as server-sent events."""
        builder = self.builder
        try:
            yield _events(builder.opening)
            async for new in self.progress():
                make = partial(_events, builder.chunks, new)
                # That of a prompt's tokens takes long.
                yield await run_in_threadpool(make) if new.routing else make()
            yield await run_in_threadpool(_events, builder.closing)
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _events(builder.failed, error)

    async def _next(self) -> Progress:
        async with self._deadline.kept():
            event = await self.events.get()
        if not self._deadline.left:  # where pieces wait for a slow reader
            event = self._deadline.missed()
        if isinstance(event, ApiError):
            raise event
        return event


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """What `work` returns; ApiError when the client disconnects before."""
    gone = asyncio.ensure_future(_gone(request))
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({gone, task}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(CLIENT_GONE, "The client went away.")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def written(content: object) -> str:
    """`content` as JSON, in which numbers beyond its range are null."""
    return to_json(content, inf_nan_mode="null").decode()


def _events(make: Callable[..., list[Fields]], *new: object) -> str:
    """The chunks that come of what is `new`, as events; those of the Responses API are named."""
    events = ""
    for chunk in make(*new):
        if "sequence_number" in chunk:
            events += f"event: {chunk['type']}\n"
        events += f"data: {written(chunk)}\n\n"
    return events


class EventStream(StreamingResponse):
    """A reply's events; the reply is closed when the client has them or is gone."""

    def __init__(self, reply: Reply, headers: Mapping[str, str]) -> None:
        headers = {"Cache-Control": "no-store", **headers}
        super().__init__(reply.as_events(), media_type="text/event-stream", headers=headers)
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with closing(self._reply):
            await super().__call__(scope, receive, send)
