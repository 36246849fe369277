"""A gateway's answers: asked of the engine, and written as they come.

Each answer is one request to the engine, so that prompts of one request may have different experts.
It is sent again only while nothing of it was sent. What an engine that breaks off has said so far
is not taken back: the stream ends with the error.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any

import httpx2
from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import from_json

from ....errors import EngineAwayError
from ....files import one_line
from ..guards import GatewayMetrics
from ..local.sequences import Decoding
from ..protocol import AnyRequest, ApiError, ChatRequest, Deadline, bad_request, for_clients
from ..replies import OpenReply, unless_gone
from ..requests import RequestPrompt
from ..service import Turns, in_thread
from .engines import Adapter, Engine, client_of, is_well, said_by

PATHS = {False: "/v1/completions", True: "/v1/chat/completions"}  # by whether it is a chat
CHECKING = 2.0  # seconds between two looks at whether the engine is well
CONNECTING = 5.0  # seconds for a connection to it
RETRYING = 3.0  # seconds in which a request that couldn't be sent is tried again
PAUSES = (0.1, 0.3, 0.8)  # seconds between these tries, the last one again and again
BROKEN, AWAY = "upstream_broken", "upstream_unavailable"
FINISHED = {"eos_token": "stop", "stop_sequence": "stop"}  # LoRAX's names
CUT = ("abort", "error")  # reasons that end an answer before its end
DONE = b"[DONE]"
MOST_EVENT = 1 << 20  # bytes of an event in a stream, or of an error
MOST_TOKEN = 256  # bytes that a token, or one of its alternatives, may take in a whole answer
WAITING = 64  # pieces that are held for a client that reads slowly

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned:
    """One answer to ask for: `weights` are the experts that are sent, `chosen` those chosen."""

    prompt: RequestPrompt
    decoding: Decoding
    weights: Mapping[str, float]
    chosen: Mapping[str, float]
    router: str | None


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
    tokens: list[str] | None = None  # of other completions, as what follows
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int] | None = None


class _Message(_Form):
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


@dataclass
class Piece:
    """What is new of an answer: a choice of the engine's, and its count of tokens if it told."""

    choice: _Choice | None
    generated: int | None = None


class Link:
    """The way to an engine: connections, whether it is well, and what it holds when it comes back.

    All but the looks, which are threads, is in the event loop.
    """

    def __init__(
        self, engine: Engine, wanted: Mapping[str, Adapter], most: int, metrics: GatewayMetrics
    ) -> None:
        self.engine, self.wanted, self._metrics = engine, dict(wanted), metrics
        self._limits = httpx2.Limits(max_connections=None, max_keepalive_connections=most)
        self.is_well = True
        self.problem: str | None = None  # why the engine can't be used although it is well
        self._is_known = True  # what it holds: not since it was away
        self._looking: asyncio.Future[None] | None = None
        self._timer: asyncio.Task[None] | None = None

    def open(self) -> None:
        upstream = self.engine.upstream
        timeout = httpx2.Timeout(None, connect=CONNECTING)
        self._client = httpx2.AsyncClient(
            base_url=upstream.root,
            headers=upstream.headers,
            timeout=timeout,
            limits=self._limits,
            trust_env=False,
            follow_redirects=False,
        )
        self._timer = asyncio.ensure_future(self._watch())

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            await self._client.aclose()

    async def ask(
        self, fields: Callable[[], dict[str, Any]], is_chat: bool, deadline: Deadline
    ) -> httpx2.Response:
        """The response to a request, whose body `fields` makes once the engine is known; unread.

        Raises ApiError when it is away, refuses the request, or fails.
        """
        loop = asyncio.get_running_loop()
        end, tries = loop.time() + RETRYING, 0
        while True:
            try:
                await self._known()
                request = self._client.build_request("POST", PATHS[is_chat], json=fields())
                response = await self._client.send(request, stream=True)
                break
            except (httpx2.ConnectError, httpx2.ConnectTimeout, EngineAwayError) as error:
                # Nothing was sent.
                self._lost()
                pause = PAUSES[min(tries, len(PAUSES) - 1)]
                if loop.time() + pause > min(end, deadline.end):
                    self._failed("away")
                    raise away() from error
                tries += 1
                await asyncio.sleep(pause)
            except httpx2.HTTPError as error:
                self._lost()
                self._failed("broken")
                raise broken("before its answer began") from error
        if response.is_error:
            raise await self._refused(response)
        return response

    async def pieces(self, response: httpx2.Response) -> AsyncIterator[Piece]:
        """What a stream of the engine brings. Raises ApiError where it breaks off."""
        finished = False
        try:
            async for event in _events(response):
                if event == DONE:
                    return
                piece = self._piece(event)
                finished = finished or bool(piece.choice and piece.choice.finish_reason)
                yield piece
        except httpx2.HTTPError as error:
            raise self._broke_off() from error
        finally:
            with suppress(httpx2.HTTPError):
                await response.aclose()
        if not finished:  # it was ended in good order, but without an end of its answer
            raise self._broke_off()

    async def whole(self, response: httpx2.Response, most: int) -> Piece:
        """A whole answer of at most `most` bytes. Raises ApiError."""
        try:
            content = await _read(response, most)
        except httpx2.HTTPError as error:
            raise self._broke_off() from error
        piece = self._piece(content)
        if piece.choice is None:
            raise ApiError(502, "The engine's answer holds no choice.", code=BROKEN)
        return piece

    async def look(self) -> None:
        """Look at what the engine holds, load what it lacks. Raises EngineAwayError."""
        if self._looking is None or self._looking.done():
            _, self._looking = in_thread(self._prepare)
        try:
            await asyncio.shield(self._looking)
        except EngineAwayError:
            self.is_well = False
            raise
        except Exception as error:
            said = one_line(error)
            if said != self.problem:  # once, not with every look
                log.warning("The engine can't be used: %s", said)
            self.is_well, self.problem = False, said
            raise EngineAwayError(said) from error
        self.is_well, self.problem, self._is_known = True, None, True

    def _prepare(self) -> None:
        with self.engine.lock:  # first: what is wanted may change with what is being loaded
            self.engine.prepare(self.wanted)

    async def _known(self) -> None:
        # An engine that was restarted may hold other adapters, or number them otherwise.
        if not self._is_known:
            await self.look()

    def _lost(self) -> None:
        self._is_known = False

    def _broke_off(self) -> ApiError:
        self._lost()
        self._failed("broken")
        return broken("in the middle of its answer")

    def _failed(self, how: str) -> None:
        self._metrics.failures.labels(how).inc()

    async def _refused(self, response: httpx2.Response) -> ApiError:
        content = b""
        with suppress(httpx2.HTTPError, ApiError):  # broken off, or more than anybody would read
            content = await _read(response, MOST_EVENT)
        status, said = response.status_code, self._said(content)
        if status in (400, 413, 422):
            return bad_request(f"The engine refuses the request: {said}.", code="upstream_refused")
        if status in (429, 503):
            self._failed("busy")
            seconds = response.headers.get("retry-after", "")[:20]
            headers = {"Retry-After": seconds if seconds.isdecimal() else "1"}
            message = f"The engine can't take the request now: {said}."
            return ApiError(status, message, code=AWAY, headers=headers)
        self._failed("failed")
        if status == 404:  # it doesn't know the adapter any more
            self._lost()
            return away(f"The engine doesn't know the expert now: {said}.")
        if status in (401, 403):
            return ApiError(502, "The engine refuses this server's key.", code="upstream_key")
        return ApiError(502, f"The engine failed by {status}: {said}.", code="upstream_failed")

    def _said(self, content: bytes) -> str:
        return for_clients(said_by(content, self.engine.upstream.key)).rstrip(".")

    def _piece(self, content: bytes) -> Piece:
        try:
            found = from_json(content, allow_inf_nan=False)
            if isinstance(found, dict) and "error" in found:
                raise ApiError(
                    502, f"The engine failed: {self._said(content)}.", code="upstream_failed"
                )
            answer = _Answer.model_validate(found)
        except ValueError as error:
            message = "The engine's answer is no JSON, or has not the form of OpenAI's."
            raise ApiError(502, message, code=BROKEN) from error
        choice = answer.choices[0] if answer.choices else None
        if choice and choice.finish_reason in CUT:
            raise broken("in the middle of its answer")
        return Piece(choice, answer.usage.completion_tokens if answer.usage else None)

    async def _watch(self) -> None:
        with client_of(self.engine.upstream) as client:
            while True:
                await asyncio.sleep(CHECKING)
                _, found = in_thread(lambda: is_well(client))
                if not await found:
                    self.is_well = self._is_known = False
                elif not self._is_known or not self.is_well:
                    with suppress(EngineAwayError):
                        await self.look()


def away(message: str = "The engine behind this server is away; try again.") -> ApiError:
    """The error 503 for an engine that answers nothing; clients may try again."""
    return ApiError(503, message, code=AWAY, headers={"Retry-After": "1"})


def broken(when: str) -> ApiError:
    """The error 502 for an engine that stopped in the middle, `when` in words."""
    return ApiError(502, f"The engine broke off {when}.", code=BROKEN)


async def _read(response: httpx2.Response, most: int) -> bytes:
    """What an engine answers, if it is at most `most` bytes. Raises ApiError, HTTPError."""
    content = bytearray()
    try:
        async for piece in response.aiter_bytes():
            content += piece
            if len(content) > most:
                raise too_much(most)
    finally:
        with suppress(httpx2.HTTPError):
            await response.aclose()
    return bytes(content)


def too_much(most: int) -> ApiError:
    """The error 502 for an engine that answers more than was asked for."""
    return ApiError(502, f"The engine answers more than {most} bytes.", code="upstream_failed")


async def _events(response: httpx2.Response) -> AsyncIterator[bytes]:
    """The data of server-sent events; comments and other fields are left out."""
    left = b""
    # By hand: httpx2 would end lines at U+2028 too, which JSON may hold.
    async for content in response.aiter_bytes():
        *lines, left = (left + content).split(b"\n")
        if len(left) > MOST_EVENT:
            raise too_much(MOST_EVENT)
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


@dataclass
class _Written:
    """How far an answer has come: characters of text, and tokens as far as they are known."""

    characters: int = 0
    generated: int = 0
    pieces: int = 0


@dataclass
class ForwardedRequest:
    """A request as it goes to the engine, and its answers as they go to the client."""

    request: AnyRequest
    answers: Sequence[Planned]
    prompts: Sequence[RequestPrompt]
    engine: Engine
    identity: dict[str, Any] = field(init=False)
    written: list[_Written] = field(init=False)

    def __post_init__(self) -> None:
        prefix = "chatcmpl-" if self.is_chat else "cmpl-"
        self.identity = {"id": prefix + secrets.token_hex(12), "created": int(time.time())}
        self.identity["model"] = self.request.model
        self.written = [_Written() for _ in self.answers]

    @property
    def is_chat(self) -> bool:
        return isinstance(self.request, ChatRequest)

    @property
    def usage(self) -> dict[str, int]:
        given = sum(len(prompt.tokens) for prompt in self.prompts)
        made = sum(each.generated for each in self.written)
        return {
            "prompt_tokens": given,
            "completion_tokens": made,
            "total_tokens": given + made,
        }

    def body(self, number: int) -> dict[str, Any]:
        """What the engine is asked for answer `number`."""
        request, answer = self.request, self.answers[number]
        decoding = answer.decoding
        body: dict[str, Any] = {
            "max_tokens": decoding.max_tokens,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "seed": decoding.seed % (1 << 31),  # llama.cpp's have 32 bits, and one stands for none
            "stream": bool(request.stream),
        }
        if request.stream:
            body["stream_options"] = {"include_usage": True}
        if decoding.stop:
            body["stop"] = list(decoding.stop)
        if decoding.ignores_end:
            body["ignore_eos"] = True
        if request.response_format is not None:
            body["response_format"] = request.response_format.model_dump(
                by_alias=True, exclude_unset=True
            )
        if isinstance(request, ChatRequest):
            body["messages"] = request.plain_messages
            if decoding.logprobs is not None:
                body |= {"logprobs": True, "top_logprobs": decoding.logprobs}
        else:
            given = request.prompt
            is_text = isinstance(given, str) or isinstance(given[0], str)
            as_text = is_text or not self.engine.takes_tokens
            body["prompt"] = answer.prompt.text if as_text else list(answer.prompt.tokens)
            if decoding.logprobs is not None:
                body["logprobs"] = decoding.logprobs
        return self.engine.adapted(
            {**body, **self.engine.fields(answer.weights)}, is_chat=self.is_chat
        )

    def most_bytes(self, number: int) -> int:
        """How long the engine's answer `number` may be: what it is asked for, and some more."""
        decoding = self.answers[number].decoding
        return MOST_EVENT + MOST_TOKEN * decoding.max_tokens * (2 + (decoding.logprobs or 0))

    def chunk(self, number: int, piece: Piece) -> dict[str, Any] | None:
        """A chunk with what is new of answer `number`; None where that is nothing."""
        choice = self._choice(number, piece)
        if choice is None:
            return None
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {**self.identity, "object": kind, "choices": [choice]}

    def closing(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {**self.identity, "object": kind, "choices": [], "usage": self.usage}

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        kind = "chat.completion" if self.is_chat else "text_completion"
        choices = [self._choice(number, piece) for number, piece in enumerate(pieces)]
        return {**self.identity, "object": kind, "choices": choices, "usage": self.usage}

    def _choice(self, number: int, piece: Piece) -> dict[str, Any] | None:
        found, written = piece.choice, self.written[number]
        if piece.generated is not None:
            written.generated = piece.generated
        if found is None:
            return None
        text, content = self._content(number, found)
        finish = found.finish_reason
        written.pieces += bool(text)
        if piece.generated is None:
            written.generated = max(written.generated, written.pieces)
        choice: dict[str, Any] = {"index": number, **content, "logprobs": None}
        decoding = self.answers[number].decoding
        if decoding.logprobs is not None and found.logprobs is not None:
            choice["logprobs"] = self.engine.logprobs(
                found.logprobs.model_dump(exclude_unset=True),
                written.characters,
                is_chat=self.is_chat,
                most=decoding.logprobs,
            )
        written.characters += len(text)
        choice["finish_reason"] = FINISHED.get(str(finish), finish)
        if self.request.routing:
            choice["routing"] = self._routing(number, text)
        return choice

    def _content(self, number: int, found: _Choice) -> tuple[str, dict[str, Any]]:
        if self.is_chat:
            key = "delta" if self.request.stream else "message"
            held = found.delta or found.message or _Message()
            said = held.model_dump(exclude_none=True)
            kept = {name: value for name, value in said.items() if value != []}
            if key == "message":
                kept = {"role": "assistant", "content": "", "refusal": None, **kept}
            return held.content or "", {key: kept}
        text = found.text or ""
        written, decoding = self.written[number], self.answers[number].decoding
        if decoding.echo and not written.pieces and not written.characters:
            text = self.answers[number].prompt.text + text
        return text, {"text": text}

    def _routing(self, number: int, text: str) -> dict[str, Any]:
        answer = self.answers[number]
        weights = {name: round(weight, 4) for name, weight in answer.weights.items()}
        token = {"token": text, "part": "answer", "stream": "decoder", "experts": weights}
        report: dict[str, Any] = {
            "router": answer.router or "",
            "k": len(answer.chosen) or None,
            "experts": list(answer.chosen),
            "tokens": [token] if text else [],
            "summary": weights,
        }
        if answer.chosen != answer.weights:
            report["chosen"] = {name: round(w, 4) for name, w in answer.chosen.items()}
        return report


class ForwardedReply(OpenReply):
    """The answers to one request, due by `deadline`; `done` is called once, when it is closed."""

    def __init__(
        self,
        link: Link,
        turns: Turns,
        asked: ForwardedRequest,
        client: str,
        deadline: Deadline,
        done: Callable[[], None],
    ) -> None:
        self.asked, self._link, self._turns = asked, link, turns
        self._client, self._deadline, self._done = client, deadline, done
        self._found: asyncio.Queue[tuple[int, Piece | ApiError | None]] = asyncio.Queue(WAITING)
        self._first: tuple[int, Piece | ApiError | None] | None = None
        self._tasks = [
            asyncio.ensure_future(self._bring(number)) for number in range(len(asked.answers))
        ]

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        done, self._done = self._done, lambda: None
        done()

    async def begun(self, request: Request) -> None:
        """Wait until the engine answers. Raises ApiError when that is an error, or no one waits."""
        self._first = await unless_gone(request, self._next())
        if isinstance(self._first[1], ApiError):
            raise self._first[1]

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """What is new, by the answer's number, until all are finished. Raises ApiError."""
        left = len(self._tasks)
        while left:
            number, found = self._first or await self._next()
            self._first = None
            if isinstance(found, ApiError):
                raise found
            left -= found is None
            if found is not None:
                yield number, found

    async def everything(self) -> str:
        pieces = {number: piece async for number, piece in self.pieces()}
        return _json(self.asked.whole([pieces[number] for number in sorted(pieces)]))

    async def events(self) -> AsyncIterator[str]:
        options = self.asked.request.stream_options
        try:
            async for number, piece in self.pieces():
                chunk = self.asked.chunk(number, piece)
                if chunk is not None:
                    yield f"data: {_json(chunk)}\n\n"
            if options is not None and options.include_usage:
                yield f"data: {_json(self.asked.closing())}\n\n"
            yield f"data: {DONE.decode()}\n\n"
        except ApiError as error:
            yield f"data: {json.dumps(error.body)}\n\n"

    async def _next(self) -> tuple[int, Piece | ApiError | None]:
        if not self._deadline.left:  # also where pieces wait for a slow reader
            raise self._deadline.missed()
        if not self._found.empty():
            return self._found.get_nowait()
        try:
            async with asyncio.timeout(self._deadline.left):
                return await self._found.get()
        except TimeoutError:
            raise self._deadline.missed() from None

    async def _bring(self, number: int) -> None:
        """Put what the engine answers into the queue: pieces, and None or an error at the end."""
        try:
            await self._turns.take(self._client, self._deadline)
            try:
                await self._ask(number)
            finally:
                self._turns.pass_on()
            end: ApiError | None = None
        except ApiError as error:
            end = error
        except Exception:
            log.exception("An answer could not be brought.")
            end = ApiError(500, "The server failed; its log says more.")
        await self._found.put((number, end))

    async def _ask(self, number: int) -> None:
        asked, link = self.asked, self._link
        response = await link.ask(lambda: asked.body(number), asked.is_chat, self._deadline)
        if not asked.request.stream:
            await self._found.put((number, await link.whole(response, asked.most_bytes(number))))
            return
        async for piece in link.pieces(response):
            await self._found.put((number, piece))


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))
