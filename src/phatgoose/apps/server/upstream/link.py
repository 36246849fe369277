"""The way to an engine: requests to it, what its answers bring, and whether it is well.

Each answer is one request to the engine, so that prompts of one request may have different experts.
It is sent again only while nothing of it was sent. What an engine that breaks off has said so far
is not taken back: the stream ends with the error.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Annotated, Any

import httpx2
from prometheus_client import Counter
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import from_json

from ....errors import EngineAwayError
from ....files import one_line
from ..protocol import ApiError, ChatRequest, Deadline, Finish, bad_request, for_clients
from ..replies import Progress, ScoredToken
from ..requests import Asked
from .engines import Adapter, Engine, TooMuchError, client_of, content_of, is_well, said_by

PATHS = {False: "/v1/completions", True: "/v1/chat/completions"}  # by whether it is a chat
CHECKING = 2.0  # seconds between two looks at whether the engine is well
RETRYING = 3.0  # seconds in which a request that couldn't be sent is tried again
PAUSES = (0.1, 0.3, 0.8)  # seconds between these tries, the last one again and again
BROKEN, FAILED, AWAY = "upstream_broken", "upstream_failed", "upstream_unavailable"
CUT = ("abort", "error")  # reasons that end an answer before its end
DONE = b"[DONE]"
MOST_EVENT = 1 << 20  # bytes of an event in a stream, or of an error
MOST_TOKEN = 256  # bytes that a token, or one of its alternatives, may take in a whole answer

log = logging.getLogger(__name__)


# What is read of an engine's answers; anything may stand beside it.


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Token(_Form):
    token: str
    logprob: float


class _ScoredToken(_Token):
    top_logprobs: list[_Token] = []


class _Logprobs(_Form):
    content: list[_ScoredToken] | None = None  # of chats, and of all of llama.cpp's answers
    tokens: list[str] = []  # of other completions, as what follows
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None

    def rows(self) -> list[tuple[str, float | None, list[tuple[str, float]]]]:
        """Each token with its log-probability and its alternatives, best first."""
        if self.content is not None:
            return [
                (each.token, each.logprob, [(top.token, top.logprob) for top in each.top_logprobs])
                for each in self.content
            ]
        tops = [list((each or {}).items()) for each in self.top_logprobs or [{}] * len(self.tokens)]
        return list(zip(self.tokens, self.token_logprobs, tops, strict=True))


class _Message(_Form):
    role: Any = None
    content: str | None = None


class _Choice(_Form):
    text: str | None = None
    message: _Message | None = None
    delta: _Message | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Usage(_Form):
    completion_tokens: Annotated[int, Field(ge=0, le=1 << 40)] | None = None


class _Answer(_Form):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None


class Written:
    """How far answer `number` has come, of which an engine's pieces make `Progress`."""

    def __init__(self, number: int, logprobs: int | None) -> None:
        self._number, self._logprobs = number, logprobs
        self._place, self.pieces, self._generated = 0, 0, 0
        self.finish: Finish | None = None

    def progress(self, answer: _Answer) -> Progress | None:
        """What is new, without the answer's end; None where that is nothing. Raises ApiError."""
        choice = answer.choices[0] if answer.choices else None
        if answer.usage is not None and answer.usage.completion_tokens is not None:
            self._generated = answer.usage.completion_tokens
        if choice is None:
            return None
        if choice.finish_reason in CUT:
            raise broken("in the middle of its answer")
        if choice.finish_reason is not None:
            self.finish = "length" if choice.finish_reason == "length" else "stop"
        message = choice.delta or choice.message
        text = (choice.text if message is None else message.content) or ""
        more = {key: value for key, value in ((message and message.model_extra) or {}).items()}
        more = {key: value for key, value in more.items() if value is not None and value != []}
        tokens, place = [], self._place
        if self._logprobs is not None and choice.logprobs is not None:
            for token, logprob, top in choice.logprobs.rows():
                tokens.append(ScoredToken(token, place, logprob, tuple(top[: self._logprobs])))
                place += len(token)
        self._place += len(text)
        self.pieces += bool(text)
        if not (text or tokens or more):
            return None
        return Progress(self._number, text, tuple(tokens), (), None, self.pieces, more)

    @property
    def end(self) -> Progress:
        generated = self._generated or self.pieces
        return Progress(self._number, "", finish=self.finish or "stop", generated=generated)


class Link:
    """Connections to an engine, whether it is well, and what it holds when it comes back."""

    def __init__(self, engine: Engine, experts: Mapping[str, Adapter], failures: Counter) -> None:
        self.engine, self.experts, self._failures = engine, dict(experts), failures
        self.is_well = True
        self._problem: str | None = None  # why the engine can't be used although it is well
        self._is_known = True  # what it holds: not since it was away
        self._timer: asyncio.Task[None] | None = None

    def open(self) -> None:
        self.client = client_of(self.engine.upstream)
        self._timer = asyncio.ensure_future(self._watch())

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            await self.client.aclose()

    async def answer(
        self, fields: Callable[[], dict[str, Any]], number: int, asked: Asked
    ) -> AsyncGenerator[Progress, None]:
        """Answer `number` to a request, whose body `fields` makes once the engine is known.

        Raises ApiError when the engine is away, refuses the request, or fails.
        """
        answer, is_chat = asked.answers[number], isinstance(asked.request, ChatRequest)
        logprobs = answer.decoding.logprobs
        written = Written(number, logprobs)
        most = MOST_EVENT + MOST_TOKEN * answer.decoding.max_tokens * (2 + (logprobs or 0))
        response = await self._asked(fields, is_chat, asked.deadline)
        kind = response.headers.get("content-type", "")
        is_stream = asked.request.stream and kind.startswith("text/event-stream")
        try:
            async with aclosing(_events(response) if is_stream else _one(response, most)) as events:
                async for event in events:
                    if event == DONE:
                        break
                    if (progress := written.progress(self._read(event))) is not None:
                        yield progress
        except httpx2.HTTPError as error:
            raise self._broke_off() from error
        except TooMuchError as error:
            number = MOST_EVENT if is_stream else most
            message = f"The engine answers more than {number} bytes."
            raise ApiError(502, message, code=FAILED) from error
        except ValueError as error:  # also log-probabilities for fewer tokens
            message = "The engine's answer is no JSON, or has not the form of OpenAI's."
            raise ApiError(502, message, code=BROKEN) from error
        # It was ended, but not its answer; or it holds none.
        if written.finish is None and (is_stream or not written.pieces):
            raise self._broke_off()
        yield written.end

    async def _asked(
        self, fields: Callable[[], dict[str, Any]], is_chat: bool, deadline: Deadline
    ) -> httpx2.Response:
        loop = asyncio.get_running_loop()
        end, tries = loop.time() + RETRYING, 0
        while True:
            try:
                if not self._is_known:
                    # One that was restarted may hold other adapters, or number them otherwise.
                    await self.look()
                request = self.client.build_request("POST", PATHS[is_chat], json=fields())
                response = await self.client.send(request, stream=True)
                break
            except (httpx2.ConnectError, httpx2.ConnectTimeout, EngineAwayError, KeyError) as error:
                # Nothing was sent. KeyError: a change of a pool that failed has lost an expert.
                self._is_known = False
                pause = PAUSES[min(tries, len(PAUSES) - 1)]
                if loop.time() + pause > min(end, deadline.end):
                    self._failures.labels("away").inc()
                    raise away() from error
                tries += 1
                await asyncio.sleep(pause)
            except httpx2.HTTPError as error:
                raise self._broke_off("before its answer began") from error
        if response.is_error:
            raise await self._refused(response)
        return response

    async def look(self) -> None:
        """Look at what the engine holds, load what it lacks. Raises EngineAwayError."""
        try:
            async with self.engine.lock:  # what is wanted may change with what is being loaded
                if not self._is_known or not self.is_well:
                    await self.engine.prepare(self.client, self.experts)
        except EngineAwayError:
            self.is_well = False
            raise
        except Exception as error:
            said = one_line(error)
            if said != self._problem:  # once, not with every look
                log.warning("The engine can't be used: %s", said)
            self.is_well, self._problem = False, said
            raise EngineAwayError(said) from error
        self.is_well, self._problem, self._is_known = True, None, True

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(CHECKING)
            if not await is_well(self.client):
                self.is_well = self._is_known = False
            elif not self._is_known or not self.is_well:
                with suppress(EngineAwayError):
                    await self.look()

    def _broke_off(self, when: str = "in the middle of its answer") -> ApiError:
        self._is_known = False
        self._failures.labels("broken").inc()
        return broken(when)

    async def _refused(self, response: httpx2.Response) -> ApiError:
        content = b""
        with suppress(httpx2.HTTPError, TooMuchError):  # broken off, or more than can be read
            content = await content_of(response, MOST_EVENT)
        status, said = response.status_code, self._said(content)
        if status in (400, 413, 422):
            return bad_request(f"The engine refuses the request: {said}.", code="upstream_refused")
        if status in (429, 503):
            self._failures.labels("busy").inc()
            seconds = response.headers.get("retry-after", "")[:20]
            headers = {"Retry-After": seconds if seconds.isdecimal() else "1"}
            message = f"The engine can't take the request now: {said}."
            return ApiError(status, message, code=AWAY, headers=headers)
        self._failures.labels("failed").inc()
        if status == 404:  # it doesn't know the adapter any more
            self._is_known = False
            return away(f"The engine doesn't know the expert now: {said}.")
        if status in (401, 403):
            return ApiError(502, "The engine refuses this server's key.", code="upstream_key")
        return ApiError(502, f"The engine failed by {status}: {said}.", code=FAILED)

    def _said(self, content: bytes) -> str:
        return for_clients(said_by(content, self.engine.upstream.key)).rstrip(".")

    def _read(self, content: bytes) -> _Answer:
        value = from_json(content, allow_inf_nan=False)
        if isinstance(value, dict) and "error" in value:
            raise ApiError(502, f"The engine failed: {self._said(content)}.", code=FAILED)
        return _Answer.model_validate(value)


def away(message: str = "The engine behind this server is away; try again.") -> ApiError:
    """The error 503 for an engine that answers nothing; clients may try again."""
    return ApiError(503, message, code=AWAY, headers={"Retry-After": "1"})


def broken(when: str) -> ApiError:
    """The error 502 for an engine that stopped in the middle, `when` in words."""
    return ApiError(502, f"The engine broke off {when}.", code=BROKEN)


async def _one(response: httpx2.Response, most: int) -> AsyncGenerator[bytes, None]:
    yield await content_of(response, most)


async def _events(response: httpx2.Response) -> AsyncGenerator[bytes, None]:
    """The data of server-sent events; comments and other fields are left out."""
    left = b""
    try:
        # By hand: httpx2 would end lines at U+2028 too, which JSON may hold.
        async for content in response.aiter_bytes():
            *lines, left = (left + content).split(b"\n")
            if len(left) > MOST_EVENT:
                raise TooMuchError
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip()
    finally:
        with suppress(httpx2.HTTPError):
            await response.aclose()
