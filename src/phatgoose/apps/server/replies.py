"""Replies: followed while they are computed, and written as whole responses or event streams."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from ...analysis.measures import heaviest
from ...analysis.routing_distribution import PARTS
from ...analysis.traces import Trace, TraceStream, chosen_for_whole, join_streams
from ...base import UNFINISHED
from ...routing.composition import composition_of
from . import protocol
from .local.engine import GenerationEngine
from .local.sequences import ActiveSequence, Failure, Progress, ScoredToken
from .protocol import CLIENT_GONE, AnswerReply, ApiError, Deadline
from .requests import PreparedRequest

Found = TypeVar("Found")
LARGE = 256  # tokens in one event from which on JSON is written in a thread


class ResponseBuilder:
    """Builds the response to one request, whole or as chunks; a subclass for each endpoint."""

    prefix: str
    whole_model: type[AnswerReply]
    chunk_model: type[AnswerReply]

    def __init__(self, prepared: PreparedRequest) -> None:
        self.prepared, self.request = prepared, prepared.request
        self.identity: dict[str, Any] = {
            "id": self.prefix + secrets.token_hex(12),
            "created": int(time.time()),
            "model": self.request.model,
        }
        self._streams: dict[int, tuple[str, ...]] = {}  # of each choice's trace, once it was sent
        self._summaries = [_Summary() for _ in prepared.answers]
        self._generated = [0] * len(prepared.answers)

    @property
    def usage(self) -> protocol.Usage:
        given = sum(len(prompt.tokens) for prompt in self.prepared.prompts)
        made = sum(self._generated)
        return protocol.Usage(
            prompt_tokens=given, completion_tokens=made, total_tokens=given + made
        )

    def opening(self) -> list[AnswerReply]:
        return []

    def chunk(self, progress: Progress) -> AnswerReply:
        self._generated[progress.choice] = progress.generated
        return self.chunk_model(**self.identity, choices=[self._chunk_choice(progress)])

    def closing(self) -> AnswerReply:
        return self.chunk_model(**self.identity, choices=[], usage=self.usage)

    def whole(self, events: Sequence[Sequence[Progress]]) -> AnswerReply:
        joined = [_joined(each) for each in events]
        self._generated = [each.generated for each in joined]
        choices = [self._choice(each) for each in joined]
        return self.whole_model(**self.identity, choices=choices, usage=self.usage)

    def _choice(self, progress: Progress) -> Any:
        raise NotImplementedError

    def _chunk_choice(self, progress: Progress) -> Any:
        raise NotImplementedError

    def _routing(self, progress: Progress) -> protocol.RoutingReport | None:
        if not progress.routing:
            return None
        detail = self.request.routing_detail
        parts = composition_of(self.prepared.runner.model)
        streams = join_streams(progress.routing)
        report = protocol.RoutingReport(
            router=parts.router.recorded.router,
            k=parts.router.k or None,
            experts=list(parts.experts),
            tokens=[
                token
                for stream in streams
                if stream.has(detail.layer, detail.kind)
                for token in _token_routings(stream, parts.experts, detail)
            ],
        )
        report.summary = self._summaries[progress.choice].with_(report.tokens)
        sent = self._streams.get(progress.choice)
        if detail.trace and sent:
            report.more = [
                {"stream": sent.index(stream.name), **stream.tokens_dict()} for stream in streams
            ]
        elif detail.trace:
            self._streams[progress.choice] = tuple(stream.name for stream in streams)
            routed = self.prepared.answers[progress.choice].routed
            whole = chosen_for_whole(parts, routed.choice if routed else None)
            trace = Trace(parts.experts, parts.router.recorded.router, tuple(streams), whole)
            report.trace = trace.to_dict()
        return report


class _Summary:
    """Each expert's share of an answer's tokens so far."""

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()
        self._tokens = 0

    def with_(self, tokens: Sequence[protocol.TokenRouting]) -> dict[str, float]:
        for token in tokens:
            self._sums.update(token.experts)
            self._tokens += bool(token.experts)
        return {name: round(total / self._tokens, 4) for name, total in self._sums.most_common()}


def builder_of(prepared: PreparedRequest) -> ResponseBuilder:
    is_chat = isinstance(prepared.request, protocol.ChatRequest)
    return (ChatBuilder if is_chat else CompletionBuilder)(prepared)


def _joined(events: Sequence[Progress]) -> Progress:
    last = events[-1]
    return Progress(
        last.choice,
        "".join(each.text for each in events),
        tuple(token for each in events for token in each.tokens),
        tuple(stream for each in events for stream in each.routing),
        last.finish,
        last.generated,
    )


def _token_routings(
    stream: TraceStream, experts: Sequence[str], detail: protocol.RoutingDetail
) -> list[protocol.TokenRouting]:
    shares = stream.shares(len(experts), detail.layer, detail.kind)
    return [
        protocol.TokenRouting(
            token=token,
            part=PARTS[part],
            stream=stream.name,
            experts={experts[z]: round(float(row[z]), 4) for z in heaviest(row, len(row))},
        )
        for token, part, row in zip(stream.tokens, stream.parts, shares, strict=True)
    ]


class CompletionBuilder(ResponseBuilder):
    prefix = "cmpl-"
    whole_model = chunk_model = protocol.CompletionReply
    request: protocol.CompletionRequest

    def __init__(self, prepared: PreparedRequest) -> None:
        super().__init__(prepared)
        answers = prepared.answers if self.request.echo else []
        self._echoes = {choice: each.prompt.text for choice, each in enumerate(answers)}

    def _choice(self, progress: Progress) -> protocol.CompletionChoice:
        logprobs = None
        if self.request.logprobs is not None:
            logprobs = protocol.TextLogprobs(
                tokens=[token.text for token in progress.tokens],
                token_logprobs=[token.logprob for token in progress.tokens],
                top_logprobs=[_by_text(token) for token in progress.tokens],
                text_offset=[token.place for token in progress.tokens],
            )
        return protocol.CompletionChoice(
            index=progress.choice,
            text=self._echoes.pop(progress.choice, "") + progress.text,  # once
            logprobs=logprobs,
            finish_reason=progress.finish,
            routing=self._routing(progress),
        )

    _chunk_choice = _choice


def _by_text(token: ScoredToken) -> dict[str, float] | None:
    """Log-probabilities of the best tokens and the chosen one; the likelier of two of one text."""
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for text, logprob in (*token.top, (token.text, token.logprob)):
        found.setdefault(text, logprob)
    return found


class ChatBuilder(ResponseBuilder):
    prefix = "chatcmpl-"
    whole_model, chunk_model = protocol.ChatReply, protocol.ChatChunk
    request: protocol.ChatRequest

    def opening(self) -> list[AnswerReply]:
        role = protocol.Delta(role="assistant", content="")
        choices = [
            protocol.ChatChunkChoice(index=index, delta=role)
            for index in range(len(self.prepared.answers))
        ]
        return [protocol.ChatChunk(**self.identity, choices=[choice]) for choice in choices]

    def _choice(self, progress: Progress) -> protocol.ChatChoice:
        return protocol.ChatChoice(
            index=progress.choice,
            message=protocol.AssistantMessage(content=progress.text),
            logprobs=self._logprobs(progress),
            finish_reason=progress.finish or "stop",
            routing=self._routing(progress),
        )

    def _chunk_choice(self, progress: Progress) -> protocol.ChatChunkChoice:
        return protocol.ChatChunkChoice(
            index=progress.choice,
            delta=protocol.Delta(content=progress.text) if progress.text else protocol.Delta(),
            logprobs=self._logprobs(progress),
            finish_reason=progress.finish,
            routing=self._routing(progress),
        )

    def _logprobs(self, progress: Progress) -> protocol.ChatLogprobs | None:
        if not self.request.logprobs:
            return None
        return protocol.ChatLogprobs(content=[_chat_token(token) for token in progress.tokens])


def _chat_token(token: ScoredToken) -> protocol.ChatToken:
    best = [protocol.TopToken(token=t, logprob=p, bytes=_bytes_of(t)) for t, p in token.top]
    own = token.logprob if token.logprob is not None else 0.0
    return protocol.ChatToken(
        token=token.text, logprob=own, bytes=_bytes_of(token.text), top_logprobs=best
    )


def _bytes_of(text: str) -> list[int] | None:
    # A part of a character has none; they come with its last token.
    return None if UNFINISHED in text else list(text.encode())


class OpenReply:
    """The answers to one request while they come; `close` must be called in any case."""

    def close(self) -> None:
        """Free the places of unfinished answers."""
        raise NotImplementedError

    def events(self) -> AsyncIterator[str]:
        """The answers as server-sent events."""
        raise NotImplementedError

    async def everything(self) -> str:
        """All answers at once, as JSON."""
        raise NotImplementedError

    async def whole(self, request: Request) -> str:
        """All answers at once, as JSON. A client that disconnects frees the reply's places."""
        try:
            return await unless_gone(request, self.everything())
        finally:
            self.close()


class PendingReply(OpenReply):
    """The answers to one request, due by `deadline`; `done` is called once, when it is closed.

    Must be made in the event loop's thread. Raises ApiError when the queue has no room.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        builder: ResponseBuilder,
        client: str,
        deadline: Deadline,
        done: Callable[[], None],
    ) -> None:
        self.builder, self._engine, self._done = builder, engine, done
        self._deadline, loop = deadline, asyncio.get_running_loop()
        self._events: asyncio.Queue[Progress | Failure] = asyncio.Queue()

        def deliver(event: Progress | Failure) -> None:
            # Called in the engine's thread.
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._sequences = [
            ActiveSequence(
                builder.prepared.runner,
                each.prompt.tokens,
                each.decoding,
                deliver,
                choice,
                client,
                each.routed,
                echoed=each.prompt.text if each.decoding.echo else "",
            )
            for choice, each in enumerate(builder.prepared.answers)
        ]
        engine.submit(self._sequences)

    async def progress(self) -> AsyncIterator[Progress]:
        """What is new, until all answers are finished; ApiError when time is over or the engine
        failed.
        """
        left = len(self._sequences)
        while left:
            try:
                async with asyncio.timeout(self._deadline.left):
                    event = await self._events.get()
            except TimeoutError:
                raise self._deadline.missed() from None
            if isinstance(event, Failure):
                raise ApiError(event.status, event.message)
            left -= event.finish is not None
            yield event

    def close(self) -> None:
        self._engine.cancel([each for each in self._sequences if each.finish is None])
        done, self._done = self._done, lambda: None
        done()

    async def everything(self) -> str:
        events: list[list[Progress]] = [[] for _ in self._sequences]
        size = 0
        async for progress in self.progress():
            events[progress.choice].append(progress)
            size += progress.size
        return await _written(size, lambda: self.builder.whole(events).model_dump_json())

    async def events(self) -> AsyncIterator[str]:
        builder, options = self.builder, self.builder.request.stream_options
        try:
            for chunk in builder.opening():
                yield _event(chunk)
            async for progress in self.progress():
                write = partial(_chunk_event, builder, progress)
                yield await _written(progress.size, write)
            if options is not None and options.include_usage:
                yield _event(builder.closing())
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield f"data: {json.dumps(error.body)}\n\n"


async def unless_gone(request: Request, work: Coroutine[Any, Any, Found]) -> Found:
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


async def _written(size: int, write: Callable[[], str]) -> str:
    return await run_in_threadpool(write) if size > LARGE else write()


def _event(content: BaseModel) -> str:
    return f"data: {content.model_dump_json()}\n\n"


def _chunk_event(builder: ResponseBuilder, progress: Progress) -> str:
    return _event(builder.chunk(progress))


class EventStream(StreamingResponse):
    """A reply's events; closes it when the client has them or is gone."""

    def __init__(self, reply: OpenReply, more: Mapping[str, str] | None = None) -> None:
        headers = {"Cache-Control": "no-store", **(more or {})}
        super().__init__(reply.events(), media_type="text/event-stream", headers=headers)
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._reply.close()
