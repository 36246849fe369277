"""One request while its answers are computed: whole or as a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from ..api_errors import CLIENT_GONE, ApiError
from ..deadline import Deadline
from ..engine.generation_engine import GenerationEngine
from ..engine.sequences import ActiveSequence, Failure, Progress
from .response_builders import ResponseBuilder

__all__ = ["EventStream", "PendingReply", "whole_answer"]

LARGE = 256  # tokens in one event from which on JSON is written in a thread


class PendingReply:
    """The answers to one request, while they are computed."""

    def __init__(
        self,
        engine: GenerationEngine,
        builder: ResponseBuilder,
        client: str,
        deadline: Deadline,
        done: Callable[[], None],
    ) -> None:
        """Queue all answers, due by `deadline`; `done` is called once, when the reply is closed.

        Must be made in the event loop's thread. Raises ApiError when the queue has no room.
        """
        self.builder, self._engine, self._done = builder, engine, done
        self._deadline, loop = deadline, asyncio.get_running_loop()
        self._events: asyncio.Queue[Progress | Failure] = asyncio.Queue()

        def deliver(event: Progress | Failure) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        runner, answers = builder.prepared.runner, builder.prepared.answers
        self._sequences = [
            ActiveSequence(
                runner,
                each.prompt.tokens,
                each.decoding,
                deliver,
                choice,
                client,
                each.experts,
                echoed=each.prompt.text if each.decoding.echo else "",
            )
            for choice, each in enumerate(answers)
        ]
        engine.submit(self._sequences)

    async def progress(self) -> AsyncIterator[Progress]:
        """What is new, until all answers are finished.

        Raises ApiError when the time is over or the engine failed.
        """
        left = len(self._sequences)
        while left:
            try:
                event = await asyncio.wait_for(self._events.get(), self._deadline.left)
            except asyncio.TimeoutError:
                raise self._deadline.missed() from None
            if isinstance(event, Failure):
                raise ApiError(500, event.message)
            left -= event.finish is not None
            yield event

    def close(self) -> None:
        """Free the places of unfinished answers; must be called in any case."""
        self._engine.cancel([each for each in self._sequences if each.finish is None])
        done, self._done = self._done, lambda: None
        done()


async def whole_answer(reply: PendingReply, request: Request) -> str:
    """All answers at once, as JSON. A client that disconnects frees the reply's places."""
    gone = asyncio.ensure_future(_gone(request))
    work = asyncio.ensure_future(_everything(reply))
    try:
        await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ApiError(CLIENT_GONE, "The client went away.")
        return work.result()
    finally:
        for task in (gone, work):
            task.cancel()
        reply.close()


async def _everything(reply: PendingReply) -> str:
    builder = reply.builder
    events: list[list[Progress]] = [[] for _ in builder.prepared.answers]
    size = 0
    async for progress in reply.progress():
        events[progress.choice].append(progress)
        size += progress.size
    return await _written(size, lambda: builder.whole(events).model_dump_json())


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """All answers as they come, in server-sent events."""

    def __init__(self, reply: PendingReply) -> None:
        super().__init__(_events(reply), media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-store"
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything; close the reply when the client has it or is gone."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._reply.close()


async def _events(reply: PendingReply) -> AsyncIterator[str]:
    builder = reply.builder
    options = builder.request.stream_options
    try:
        for chunk in builder.opening():
            yield _event(chunk)
        async for progress in reply.progress():
            yield await _written(progress.size, partial(_chunk, builder, progress))
        if options is not None and options.include_usage:
            yield _event(builder.closing())
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body)


def _chunk(builder: ResponseBuilder, progress: Progress) -> str:
    return _event(builder.chunk(progress))


async def _written(size: int, write: Callable[[], str]) -> str:
    """The JSON that `write` returns, in a thread if it is large: the event loop serves others."""
    return await run_in_threadpool(write) if size > LARGE else write()


def _event(content: BaseModel | dict[str, Any]) -> str:
    if isinstance(content, BaseModel):
        return f"data: {content.model_dump_json(exclude_none=False)}\n\n"
    return f"data: {json.dumps(content)}\n\n"
