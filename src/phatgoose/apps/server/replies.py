"""Answers on their way to a client: what is new of them becomes chunks, or a whole response.

Who computes them, here or in another engine, puts `Progress` into a `Reply`.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic_core import to_json
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from ...base.detokenising import UNFINISHED
from ...routing.choice import ALONE
from .protocol import CLIENT_GONE, ApiError, ChatRequest, Deadline
from .requests import Asked

Result = TypeVar("Result")
Weights = dict[str, float]  # of experts by name, best first; none of the base
EXPERTS, MOST_TOKENS = "X-Phatgoose-Experts", "X-Phatgoose-Max-Tokens"
MOST_OF_A_HEADER = 4000  # characters


def headers_of(asked: Asked, chosen: Sequence[Weights] | None) -> dict[str, str]:
    """What is told before an answer: its most tokens, if more were asked for, and prompts' experts.

    Those of two prompts are written as reviews=0.71, trivia=0.29; base=1.
    """
    cut = [each.decoding.max_tokens for each in asked.answers if each.decoding.is_cut]
    headers = {MOST_TOKENS: str(min(cut))} if cut else {}
    if chosen is not None:
        prompts = [sorted((each or ALONE).items(), key=lambda pair: -pair[1]) for each in chosen]
        parts = (", ".join(f"{name}={weight:.4g}" for name, weight in each) for each in prompts)
        headers[EXPERTS] = "; ".join(parts)[:MOST_OF_A_HEADER]
    return headers


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
    """What is new of answer number `choice`.

    `routing` is what its backend reports of the new tokens' experts. `finish` is None while more is
    to come. `generated` counts all tokens so far. What only its engine knows are fields of the
    `message`, `beside` it in its choice, and of the whole `reply` (its `usage` too).
    """

    choice: int
    text: str
    tokens: tuple[ScoredToken, ...] = ()
    routing: tuple[Any, ...] = ()
    finish: str | None = None
    generated: int = 0
    message: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)
    reply: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def joined(events: Sequence[Progress]) -> Progress:
        """One answer's events as one."""
        last, text = events[-1], "".join(each.text for each in events)
        told: dict[str, Any] = {"message": {}, "beside": {}, "reply": {}}
        for event, level in itertools.product(events, told):
            told[level] |= getattr(event, level)
        if calls := [each for new in events for each in new.message.get("tool_calls") or ()]:
            calls = [{n: v for n, v in each.items() if n != "index"} for each in calls]
            told["message"].update(content=text or None, tool_calls=calls)
        tokens = tuple(token for each in events for token in each.tokens)
        routing = tuple(part for each in events for part in each.routing)
        return replace(last, text=text, tokens=tokens, routing=routing, **told)


def routing_report(
    router: str,
    k: int | None,
    experts: Iterable[str],
    tokens: Sequence[Mapping[str, Any]],
    summary: Mapping[str, float],
) -> dict[str, Any]:
    """Which experts served an answer's `tokens`; `summary` has each expert's share of all so far.

    Each token has its text (`token`), its `part`, prompt or answer, its `stream`, and its `experts`
    by name, with the mean of their weights over all sites. Behind a gateway tokens are the pieces
    in which an engine sends an answer, and `chosen` are the experts of a choice of which only the
    first could be sent. A `summary` of "base" says that no expert acts. `trace`, of the same
    tokens, is present if it was asked for (docs/analysis.md).
    """
    rest = {"chosen": None, "trace": None}
    named = {"router": router, "k": k, "experts": list(experts)}
    return {**named, "tokens": list(tokens), "summary": dict(summary), **rest}


Reports = Callable[[Progress], dict[str, Any] | None]


class Builder:
    """Builds the response to one request, whole or as chunks.

    `report` makes of an answer's progress what is told of its routing.
    """

    def __init__(self, asked: Asked, report: Reports) -> None:
        self.request, self._report = asked.request, report
        self.is_chat = isinstance(asked.request, ChatRequest)
        self._rows = [answer.row for answer in asked.answers]
        self._prompt_tokens = [len(prompt.tokens) for prompt in asked.prompts]
        self.answers, self._generated = len(asked.answers), [0] * len(asked.answers)
        self._counted: dict[str, Any] = {}  # by an engine
        name = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._identity: dict[str, Any] = {"id": name, "created": int(time.time())}
        self._identity["model"] = asked.request.model

    @property
    def usage(self) -> dict[str, Any]:
        prompt = sum(self._prompt_tokens)
        answers = sum(self._generated)
        total = prompt + answers
        usage = {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": total}
        return usage | (self._counted if self.answers == 1 else {})

    def opening(self) -> list[dict[str, Any]]:
        """The chunks before the first token: in chats, who speaks."""
        delta = {"role": "assistant", "content": ""}
        numbers = range(self.answers if self.is_chat else 0)
        return [self._chunk({"index": n, "delta": delta, "finish_reason": None}) for n in numbers]

    def chunks(self, progress: Progress) -> list[dict[str, Any]]:
        self._count(progress)
        said = {"delta": {"content": progress.text, **progress.message}}
        return [{**progress.reply, **self._chunk(self._choice(progress, said))}]

    def closing(self) -> list[dict[str, Any]]:
        """The chunks after the last token: what was used, if that was asked for."""
        options = self.request.stream_options
        return [self._chunk(usage=self.usage)] if options and options.include_usage else []

    def failed(self, error: ApiError) -> list[dict[str, Any]]:
        """The chunks that come in place of all others."""
        return [error.body]

    def _count(self, progress: Progress) -> None:
        self._generated[progress.choice] = progress.generated
        counted = progress.reply.get("usage", {})
        self._counted |= counted
        row = self._rows[progress.choice]
        self._prompt_tokens[row] = counted.get("prompt_tokens", self._prompt_tokens[row])

    def _chunk(self, *choices: Any, usage: Any = None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {**self._identity, "object": kind, "choices": choices, "usage": usage}

    def whole(self, events: Sequence[Sequence[Progress]]) -> dict[str, Any]:
        answers, choices = [Progress.joined(each) for each in events], []
        for each in answers:
            self._count(each)
            message = {"role": "assistant", "content": each.text, "refusal": None, **each.message}
            choices.append(self._choice(each, {"message": message}))
        reply = {**answers[-1].reply, **self._chunk(*choices, usage=self.usage)}
        return reply | ({"object": "chat.completion"} if self.is_chat else {})

    def _choice(self, progress: Progress, said: Mapping[str, Any]) -> dict[str, Any]:
        tokens, report = progress.tokens, self._report(progress)
        common = {"index": progress.choice, "finish_reason": progress.finish, "routing": report}
        logprobs: dict[str, Any] | None = None
        if self.is_chat:
            if self.request.logprobs:
                content = [
                    _with_bytes(token.text, token.logprob)
                    | {"top_logprobs": [_with_bytes(*each) for each in token.top]}
                    for token in tokens
                ]
                logprobs = {"content": content, "refusal": None}
            return {**common, **said, "logprobs": logprobs, **progress.beside}
        if self.request.logprobs is not None:
            logprobs = {
                "tokens": [token.text for token in tokens],
                "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": [_by_text(token) for token in tokens],
                "text_offset": [token.place for token in tokens],
            }
        return {**common, "text": progress.text, "logprobs": logprobs, **progress.beside}


def _by_text(token: ScoredToken) -> dict[str, float]:
    """Log-probabilities of the best tokens and the chosen one; the likelier of two of one text."""
    by_text: dict[str, float] = {}
    for text, logprob in (*token.top, (token.text, token.logprob)):
        by_text.setdefault(text, logprob)
    return by_text


def _with_bytes(text: str, logprob: float) -> dict[str, Any]:
    # A part of a character has no bytes; they come with its last token.
    content = None if UNFINISHED in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": content}


class Reply:
    """The answers to one request while they come, due by `deadline`; made in the event loop.

    Whoever computes them puts what is new into `events`, which holds `room` of them (0: any
    number), or an error. `at_end` frees the places of unfinished answers: close it in any case.
    """

    def __init__(self, builder: Builder, deadline: Deadline, room: int = 0) -> None:
        self.builder, self._deadline = builder, deadline
        self.at_end = ExitStack()
        self.events: asyncio.Queue[Progress | ApiError] = asyncio.Queue(room)
        self._first: Progress | None = None

    async def begun(self, http: Request) -> None:
        """Wait for what is first. Raises ApiError when that is an error, or no one waits."""
        self._first = await unless_gone(http, self._next())

    async def progress(self) -> AsyncIterator[Progress]:
        """What is new, until all answers are finished. Raises ApiError."""
        left = self.builder.answers
        while left:
            event, self._first = self._first or await self._next(), None
            left -= event.finish is not None
            yield event

    async def whole(self) -> str:
        """All answers at once, as JSON."""
        events: list[list[Progress]] = [[] for _ in range(self.builder.answers)]
        async for progress in self.progress():
            events[progress.choice].append(progress)
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


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` returns; ApiError when the client disconnects before."""
    gone, task = asyncio.ensure_future(_gone(request)), asyncio.ensure_future(work)
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


def written(content: Any) -> str:
    """`content` as JSON, in which numbers beyond its range are null."""
    return to_json(content, inf_nan_mode="null").decode()


def _events(make: Callable[..., list[dict[str, Any]]], *new: Any) -> str:
    """The chunks that come of what is `new`, as events; those of the Responses API are named."""
    chunks = make(*new)
    names = [f"event: {each['type']}\n" if "sequence_number" in each else "" for each in chunks]
    return "".join(f"{n}data: {written(each)}\n\n" for n, each in zip(names, chunks, strict=True))


class EventStream(StreamingResponse):
    """A reply's events; `at_end` is closed when the client has them or is gone."""

    def __init__(self, reply: Reply, headers: Mapping[str, str], at_end: ExitStack) -> None:
        headers = {"Cache-Control": "no-store", **headers}
        super().__init__(reply.as_events(), media_type="text/event-stream", headers=headers)
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_end.close()
