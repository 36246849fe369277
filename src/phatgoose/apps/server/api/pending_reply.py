"""One request at work: its rows in the engine, what they tell, and what happens at the end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from ..api_errors import CLIENT_GONE, ApiError
from ..engine.decoding import Decoding
from ..engine.generation_engine import GenerationEngine
from ..engine.model_runner import ModelRunner
from ..engine.sequences import ActiveSequence, Failure, Progress
from .response_builders import ResponseBuilder

__all__ = ["EventStream", "PendingReply", "PreparedRequest", "whole_answer"]

LARGE = 256  # tokens told at once from which on they are written down in a thread


@dataclass(frozen=True)
class PreparedRequest:
    """A request ready for the engine: its answers, how each is decoded, and served by whom.

    `experts` are those that a router which looks prompts up has found; None for other routers.
    """

    answers: ResponseBuilder
    decodings: Sequence[Decoding]
    experts: Sequence[int | None]


class PendingReply:
    """The answers to one request, on their way."""

    def __init__(
        self,
        engine: GenerationEngine,
        runner: ModelRunner,
        prepared: PreparedRequest,
        client: str,
        seconds: float,
        done: Callable[[], None],
    ) -> None:
        """Put everything into the queue; `done` is called once when the job is closed.

        Must be made in the event loop's thread. Raises ApiError when there is no place.
        """
        answers = self.answers = prepared.answers
        self._engine, self._done = engine, done
        loop = asyncio.get_running_loop()
        self._deadline, self._seconds = loop.time() + seconds, seconds
        self._told: asyncio.Queue[Progress | Failure] = asyncio.Queue()

        def deliver(event: Progress | Failure) -> None:
            loop.call_soon_threadsafe(self._told.put_nowait, event)

        self._rows = [
            ActiveSequence(
                answers.prompt_of(choice).tokens, decoding, deliver, choice, client, expert
            )
            for choice, (decoding, expert) in enumerate(
                zip(prepared.decodings, prepared.experts, strict=True)
            )
        ]
        engine.submit(runner, self._rows)

    async def progress(self) -> AsyncIterator[Progress]:
        """What is new, until all answers are finished.

        Raises ApiError when the time is over or the engine failed.
        """
        left = len(self._rows)
        while left:
            seconds = self._deadline - asyncio.get_running_loop().time()
            try:
                event = await asyncio.wait_for(self._told.get(), max(0, seconds))
            except asyncio.TimeoutError:
                raise ApiError(
                    504, f"The answer took longer than {self._seconds:g} seconds.", code="timeout"
                ) from None
            if isinstance(event, Failure):
                raise ApiError(500, event.message)
            left -= event.finish is not None
            yield event

    def close(self) -> None:
        """Free the places of answers that are not finished; call it whatever happened."""
        self._engine.cancel([row for row in self._rows if row.finish is None])
        done, self._done = self._done, lambda: None
        done()


async def whole_answer(job: PendingReply, request: Request) -> str:
    """All answers at once, as JSON. Whoever goes away meanwhile frees the job's places."""
    gone = asyncio.ensure_future(_gone(request))
    work = asyncio.ensure_future(_everything(job))
    try:
        await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ApiError(CLIENT_GONE, "The client went away.")
        return work.result()
    finally:
        for task in (gone, work):
            task.cancel()
        job.close()


async def _everything(job: PendingReply) -> str:
    told: list[list[Progress]] = [[] for _ in range(job.answers.number)]
    async for progress in job.progress():
        told[progress.choice].append(progress)
    size = sum(progress.size for each in told for progress in each)
    return await _in_thread_if(size > LARGE, lambda: job.answers.whole(told).model_dump_json())


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """All answers as they come, in server-sent events."""

    def __init__(self, job: PendingReply) -> None:
        super().__init__(_events(job), media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-store"
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything; the job is closed when the client has it, or is gone."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.close()


async def _events(job: PendingReply) -> AsyncIterator[str]:
    answers = job.answers
    options = answers.request.stream_options
    try:
        for chunk in answers.opening():
            yield _event(chunk)
        async for progress in job.progress():
            write = partial(_chunk, answers, progress)
            yield await _in_thread_if(progress.size > LARGE, write)
        if options is not None and options.include_usage:
            yield _event(answers.closing())
        yield "data: [DONE]\n\n"
    except ApiError as refusal:
        yield _event(refusal.body)


def _chunk(answers: ResponseBuilder, progress: Progress) -> str:
    return _event(answers.chunk(progress))


async def _in_thread_if(large: bool, write: Callable[[], str]) -> str:
    """What `write` makes, in a thread if it is large: the event loop has others to serve."""
    return await run_in_threadpool(write) if large else write()


def _event(content: BaseModel | dict[str, Any]) -> str:
    if isinstance(content, BaseModel):
        return f"data: {content.model_dump_json(exclude_none=False)}\n\n"
    return f"data: {json.dumps(content)}\n\n"
