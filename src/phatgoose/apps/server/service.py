"""What the routes call: it finds the model and its routing, has the request read, and starts it.

A `Backend` computes the answers: models here (`local`), or an engine behind a gateway (`upstream`).
"""

from __future__ import annotations

import asyncio
import glob
import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import anyio
from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from transformers import PreTrainedTokenizerBase

from ...config import Routing, Serving, closest
from ...errors import PhatgooseError
from ...experts.pool import Pool
from ...files import one_line, shortened
from ...routing.routers.fixed import mixture_of
from ...routing.routers.registry import AUTO, WEIGHTS, router_of
from ...routing.routers.router import check_served
from ...tasks.embeddings import without_downloads
from ...untrusted_text import UntrustedText
from . import protocol
from .guards import CLIENT, REQUEST_BODY, Metrics
from .protocol import (
    AnyRequest,
    ApiError,
    Deadline,
    RoutingOverride,
    bad_request,
    busy,
    for_clients,
)
from .replies import EventStream, Reply, unless_gone
from .requests import Answer, Asked, RequestReader, parsed

PARSERS = 1  # bodies parsed at once: parsing holds Python's lock, so more threads would only wait
SMALL = 1 << 14  # bytes of a body that is parsed sooner than a thread is started
STUCK = 30.0  # seconds after which a reader won't come back: three times what its limits allow
SHOWN = 80  # characters of a name that an error repeats
LOOKING = 1.0  # seconds between two looks at whether a pool has changed

log = logging.getLogger(__name__)

Kind = TypeVar("Kind", protocol.CompletionRequest, protocol.ChatRequest)
Result = TypeVar("Result")


class State(NamedTuple):
    """Whether a backend works, and how many answers wait for it and are computed."""

    is_well: bool
    waiting: int
    running: int


class Backend(ABC):
    """Who computes the answers of `models`; its methods are called in the event loop.

    A model has `settings`, a `pool`, a `routing` and its `runner`, which has a `frame`; the names
    of its `experts`, and the `names` that may stand before one, as in MODEL:EXPERT, its base's
    last; a `usual` router, and it is `composed` again for requests.
    """

    models: dict[str, Any]
    upstream = False  # another program computes

    @property
    @abstractmethod
    def state(self) -> State: ...

    @property
    def readers(self) -> list[Readers]:
        return []

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    async def close(self) -> None: ...

    def limits_of(self, limits: Serving) -> Serving:
        return limits

    @abstractmethod
    def check(self, request: AnyRequest, model: Any) -> None:
        """Raise ApiError for what can't be answered."""

    def prepare(self, request: AnyRequest, runner: Any) -> Any:
        """What takes as long as reading a prompt; done in its thread, and handed to `begin`."""
        return None

    @abstractmethod
    async def begin(self, asked: Asked, runner: Any, prepared: Any) -> tuple[Reply, dict[str, str]]:
        """The answers, begun, and headers for their client. Raises ApiError."""

    @abstractmethod
    async def reopened(self, name: str) -> Any:
        """The model of that name as its place has it now."""


class Target(NamedTuple):
    """What a request's `model` means: a model, or `fixed` experts of it."""

    model: Any
    fixed: Mapping[str, float] | None = None


class Service:
    def __init__(self, backend: Backend, limits: Serving, metrics: Metrics) -> None:
        self.backend, self.limits, self.metrics = backend, limits, metrics
        metrics.waiting.set_function(lambda: backend.state.waiting)
        metrics.running.set_function(lambda: backend.state.running)
        self.begun = int(time.time())
        self.routings = RoutingCache(backend.models)
        self._parsing = anyio.CapacityLimiter(PARSERS)
        # One for each base: a template that takes long keeps nobody else's requests waiting.
        self._texts: dict[int, Texts] = {}
        for model in self.models.values():
            self._texts_of(model.runner.frame.tokenizer)

    @property
    def models(self) -> dict[str, Any]:
        return self.backend.models

    def start(self) -> None:
        self.backend.start()
        for each in self._texts.values():
            each.process.start()

    async def close(self) -> None:
        for each in self._texts.values():
            each.process.close()
        await self.backend.close()

    def health(self) -> protocol.Health:
        readers = [*self.backend.readers, *(each.readers for each in self._texts.values())]
        running = [seconds for each in readers for seconds in each.running()]
        stuck, state = sum(seconds > STUCK for seconds in running), self.backend.state
        return protocol.Health(
            status="ok" if state.is_well and not stuck else "failing",
            waiting=state.waiting,
            running=state.running,
            reading=len(running) + sum(each.waiting for each in readers),
            longest_reading=round(max(running, default=0.0), 1),
            readers_stuck=stuck,
            readers_ended=sum(each.process.ended for each in self._texts.values()),
            upstream=("ok" if state.is_well else "away") if self.backend.upstream else None,
        )

    def cards(self) -> list[protocol.ModelCard]:
        return [self.card(name) for name in self._all_names()]

    def card(self, name: str) -> protocol.ModelCard:
        """What is told of a model, or of one expert. Raises ApiError."""
        model, fixed = self.find(name)
        frame, is_whole = model.runner.frame, fixed is None and bool(model.experts)
        return protocol.ModelCard(
            id=name,
            created=self.begun,
            base=protocol.without_paths(model.names[-1]),
            router=model.routing.router if is_whole else None,
            k=model.routing.k if is_whole else None,
            experts=list(model.experts if fixed is None else fixed),
            traces=is_whole and not self.backend.upstream,
            context=frame.context,
            chat=bool(frame.tokenizer.chat_template),
        )

    def _all_names(self) -> list[str]:
        if not self.backend.upstream:
            return list(self.models)
        experts = dict.fromkeys(name for each in self.models.values() for name in each.experts)
        return [protocol.ANY_MODEL, *self.models, *experts]

    def find(self, name: str) -> Target:
        """The model that a request names, or some of its experts. Raises ApiError.

        An expert is EXPERT or, as SGLang has it, MODEL:EXPERT, with the name of a model or its
        base. In front of an engine there are also its base alone, and "auto", the first model.
        """
        if name in self.models:
            return Target(self.models[name])
        if self.backend.upstream and name == protocol.ANY_MODEL:
            return Target(next(iter(self.models.values())))
        for model in self.models.values():
            names = {name, *(name.removeprefix(f"{each}:") for each in model.names)}
            for expert in names & {*model.experts}:
                return Target(model, {expert: 1.0})
            if self.backend.upstream and name in model.names[1:]:
                return Target(model, {})
        names_here = self._all_names()
        listed = shortened(", ".join(names_here), 300)[1:-1]
        message = f"There is no model {shortened(name, SHOWN)}; there are {listed}."
        hint = closest(name[:SHOWN], names_here)  # bounded: it compares the name with each
        raise ApiError(404, f"{message}{hint}", code="model_not_found", param="model")

    async def answer(self, kind: type[Kind], http: Request) -> Response:
        """The answer to a request, whole or as a stream. Raises ApiError when there is none."""
        # The event loop only waits here: slow work is done in threads, a few at a time.
        deadline, client = Deadline.after(self.limits.timeout), http.scope[CLIENT]
        request = await self._parsed(kind, http)
        model, fixed = self.find(request.model)
        override = request.override
        if fixed is not None and (request.weights or override != RoutingOverride()):
            message = f"{shortened(request.model, SHOWN)} is one expert; ask for its model to have"
            raise bad_request(f"{message} others chosen.", only_override(request))
        self.backend.check(request, model)
        mixture = request.weights if fixed is None else fixed
        try:
            if mixture is not None:  # which an engine is sent as it is
                mixture_of(mixture, model.pool.names)
                override = RoutingOverride(None if self.backend.upstream else WEIGHTS)
            runner, release = await self.routings.acquire(model, override, client, deadline)
        except PhatgooseError as error:
            raise bad_request(for_clients(error), only_override(request)) from error
        try:
            texts = self._texts_of(runner.frame.tokenizer)
            limits = self.backend.limits_of(self.limits)
            reader = RequestReader(runner.frame, limits, texts.process)

            def read(seconds: float) -> tuple[Any, Any]:
                return self.backend.prepare(request, runner), reader.prompts(request, seconds)

            prepared, prompts = await texts.readers.run(client, deadline, read)
            rows = [row for row in range(len(prompts)) for _ in range(request.n or 1)]
            answers = [
                Answer(number, row, prompts[row], reader.decoding(request, number, prompts[row]))
                for number, row in enumerate(rows)
            ]
            asked = Asked(request, mixture, prompts, answers, client, deadline)
            reply, headers = await self.backend.begin(asked, runner, prepared)
        except BaseException:
            release()
            raise
        reply.on_close.append(lambda: self._count(reply))
        if self.backend.upstream:  # the experts are chosen
            release()
        else:
            reply.on_close.append(release)
        try:
            if request.stream:
                await reply.begun(http)
                return EventStream(reply, headers)
            content = await unless_gone(http, reply.whole())
        except BaseException:
            reply.close()
            raise
        reply.close()
        return Response(content, media_type="application/json", headers=headers)

    async def _parsed(self, kind: type[Kind], http: Request) -> Kind:
        """The request in a body: small ones at once, large ones in a thread, a few at a time."""
        body = http.scope[REQUEST_BODY]
        content = body.content
        if len(content) > SMALL:
            request = await anyio.to_thread.run_sync(parsed, kind, content, limiter=self._parsing)
        else:
            request = parsed(kind, content)
        body.release()
        return request

    def _count(self, reply: Reply) -> None:
        usage, name = reply.builder.usage, reply.builder.request.model
        self.metrics.prompt.labels(name).inc(usage.prompt_tokens)
        self.metrics.generated.labels(name).inc(usage.completion_tokens)

    def _texts_of(self, tokenizer: PreTrainedTokenizerBase) -> Texts:
        if id(tokenizer) not in self._texts:
            self._texts[id(tokenizer)] = Texts(UntrustedText(tokenizer), Readers(1))
        return self._texts[id(tokenizer)]

    async def follow(self) -> None:
        """Open each model again when the files at its place have changed, and have stopped to.

        The new one takes the old one's place when it is complete: requests that run finish on the
        old one, and a pool that can't be opened leaves it where it is.
        """
        places = {name: model.settings.place for name, model in self.models.items()}
        opened = {name: seen_at(place) for name, place in places.items()}
        last = dict(opened)
        while True:
            await asyncio.sleep(LOOKING)
            for name, place in places.items():
                try:
                    before, last[name] = last[name], await asyncio.to_thread(seen_at, place)
                    if before == last[name] != opened[name]:
                        opened[name] = before  # also where it fails: another change is awaited
                        await self._reopen(name)
                except Exception as error:  # such as too many threads: it is looked at again
                    log.warning("%s can't be watched now: %s", name, one_line(error))

    async def _reopen(self, name: str) -> None:
        try:
            opened = await self.backend.reopened(name)
            self._texts_of(opened.runner.frame.tokenizer)
        except Exception as error:
            is_ours = isinstance(error, (PhatgooseError, OSError))
            words = "%s has changed, and is served as it was: %s"
            log.warning(words, name, one_line(error), exc_info=not is_ours)
            self.metrics.reopened.labels("kept").inc()
        else:
            self.models[name] = opened
            self.routings.forget(name)
            log.warning("%s has changed, and is served as it is now", name)
            self.metrics.reopened.labels("reopened").inc()


Seen = tuple[tuple[str, int, int], ...]  # files, their sizes and times


def seen_at(place: str) -> Seen:
    """The files of a pool or a model, by which a change is noticed; nothing for one on the Hub."""
    inside, files = glob.escape(place), []
    for path in sorted([place, *glob.glob(f"{inside}/*"), *glob.glob(f"{inside}/*/*")]):
        with suppress(OSError):  # it went away since it was listed
            if os.path.isfile(path):
                stat = os.stat(path)
                files.append((path, stat.st_size, stat.st_mtime_ns))
    return tuple(files)


class Texts(NamedTuple):
    """A base's chat template and tokenizer, in a process with limits, and who waits for them."""

    process: UntrustedText
    readers: Readers


def only_override(request: AnyRequest) -> str | None:
    """The one field with which a request changes the routing, None where there are several."""
    names = [field.name for field in fields(RoutingOverride)]
    changed = [name for name in [*names, "weights"] if getattr(request, name) is not None]
    return changed[0] if len(changed) == 1 else None


def overridden(model: Any, override: RoutingOverride) -> tuple[Routing, Pool]:
    """A model's routing and experts with `override` applied. Raises PhatgooseError."""
    pool, routing = model.pool.select(override.keep, override.leave_out), model.routing
    router = model.usual(pool) if override.router == AUTO else override.router
    if router not in (None, routing.router):  # whose k needn't suit another router
        asked = model.settings.routing.k if model.settings.routing else None
        routing = replace(routing, router=router, k=asked)
    if override.k is not None:
        routing = replace(routing, k=override.k)
    check_served(router_of(routing))
    return numbered(routing, len(pool)), pool


def numbered(routing: Routing, experts: int) -> Routing:
    """`routing` with the k that results among this many experts; equal ones compare equal."""
    router = router_of(routing)
    return replace(router.routing, k=min(router.k, experts) or None)


MOST_ROUTINGS = 8  # that requests asked for are kept
FOR_EACH = 2  # routings composed at once for one client: as many as the page shows side by side

Key = tuple[str, Routing, tuple[str, ...], int]  # model, routing, experts, which opening of it


@dataclass(eq=False)
class CachedRouting:
    """A routing, composed or being composed for `client`, and how many `requests` need it."""

    client: str
    runner: asyncio.Future[Any]
    requests: int = 0

    @property
    def is_ready(self) -> bool:
        return self.runner.done() and self.runner.exception() is None

    def release(self) -> None:
        self.requests -= 1


class RoutingCache:
    """At most `most` routings of `models`, composed off the engine's thread.

    A request waits for its own routing while others are served. The least recently used one that no
    request needs makes room. Methods but `_compose` run in the event loop's thread.
    """

    def __init__(self, models: Mapping[str, Any], most: int = MOST_ROUTINGS) -> None:
        self._models, self.most = models, most
        self.cached: dict[Key, CachedRouting] = {}
        self._composing = threading.Lock()  # one at a time: it takes all cores anyway

    @property
    def composed(self) -> list[Any]:
        return [each.runner.result() for each in list(self.cached.values()) if each.is_ready]

    async def acquire(
        self, model: Any, override: RoutingOverride, client: str, deadline: Deadline
    ) -> tuple[Any, Callable[[], None]]:
        """The runner of `model` with `override` applied, and what to call when it isn't needed.

        It is composed if it isn't cached.
        Raises PhatgooseError for an impossible override, ApiError when too much is asked for at
        once or it isn't there by the `deadline`.
        """
        if override == RoutingOverride():
            return model.runner, lambda: None
        routing, pool = await run_in_threadpool(overridden, model, override)
        if (routing, pool.names) == (model.routing, model.experts):
            return model.runner, lambda: None
        key = (model.settings.name, routing, pool.names, id(model))
        if key not in self.cached:
            self._begin(key, model, pool, client)
        cached = self.cached[key] = self.cached.pop(key)  # now the last
        cached.requests += 1
        try:
            # Shielded, since other requests may wait for the same routing.
            async with asyncio.timeout(deadline.left):
                runner = await asyncio.shield(cached.runner)
        except BaseException as error:
            cached.release()
            if isinstance(error, asyncio.TimeoutError):
                seconds = f"{deadline.seconds:g} seconds"
                message = f"The routing wasn't composed in {seconds}; it goes on."
                raise ApiError(504, message, code="timeout") from None
            raise
        return runner, cached.release

    def forget(self, model: str) -> None:
        """Drop the routings of a model that was opened again."""
        for key in [key for key in self.cached if key[0] == model]:
            del self.cached[key]

    def _begin(self, key: Key, model: Any, pool: Pool, client: str) -> None:
        clients = [each.client for each in self.cached.values() if not each.is_ready]
        if len(clients) >= self.most or clients.count(client) >= FOR_EACH:
            raise busy("Too many routings are being composed; try again in a while.", 5)
        if len(self.cached) >= self.most:
            unused = (k for k, each in self.cached.items() if each.is_ready and not each.requests)
            if (oldest := next(unused, None)) is None:
                raise busy("Too many different routings are in use; try again in a while.", 5)
            del self.cached[oldest]
        runner = in_thread(lambda: self._compose(model, pool, key[1]))
        # One that failed may be tried again.
        runner.add_done_callback(lambda done: done.exception() and self.cached.pop(key, None))
        self.cached[key] = CachedRouting(client, runner)

    def _compose(self, model: Any, pool: Pool, routing: Routing) -> Any:
        with self._composing, without_downloads():  # a client must not start downloads
            runners = [*(each.runner for each in self._models.values()), *self.composed]
            return model.composed(pool, routing, runners)


class Turns:
    """Up to `most` works at once; the client served longest ago is next."""

    def __init__(self, most: int) -> None:
        self.most = self.free = most
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # in the order of turns

    @property
    def waiting(self) -> int:
        return sum(map(self.count, self._waiting))

    def count(self, client: str) -> int:
        """How many works of a client wait."""
        return sum(not place.done() for place in self._waiting.get(client, ()))

    async def take(self, client: str, deadline: Deadline) -> None:
        """Wait for a turn, to be given back by `pass_on`; ApiError at the deadline."""
        if self.free:
            self.free -= 1
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(place)
        try:
            async with asyncio.timeout(deadline.left):
                await asyncio.shield(place)
        except BaseException as error:
            if place.done():  # the turn came as this one gave up
                self.pass_on()
            place.cancel()
            if isinstance(error, asyncio.TimeoutError):
                raise deadline.missed() from None
            raise

    def pass_on(self) -> None:
        while self._waiting:
            client = next(iter(self._waiting))
            line = self._waiting.pop(client)
            place = line.popleft()
            if line:
                self._waiting[client] = line  # behind the others
            if not place.done():
                place.set_result(None)
                return
        self.free += 1


class Readers(Turns):
    """Works that are done in threads, in turns."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self._begun: dict[object, float] = {}

    def running(self) -> list[float]:
        now = asyncio.get_running_loop().time()
        return [now - begun for begun in self._begun.values()]

    async def run(self, client: str, deadline: Deadline, work: Callable[[float], Result]) -> Result:
        """What `work(seconds left)` returns; ApiError at the deadline, while the work keeps its
        place.
        """
        await self.take(client, deadline)
        try:
            if not (seconds := deadline.left):
                raise deadline.missed()
            result = in_thread(lambda: work(seconds))
        except BaseException:  # also where no more threads can be started
            self.pass_on()
            raise
        self._begun[result] = asyncio.get_running_loop().time()
        result.add_done_callback(self._finished)
        # A thread can't be ended: past the deadline the work keeps its place until it returns.
        await asyncio.wait([result], timeout=deadline.left)
        if not result.done():
            raise deadline.missed()
        return result.result()  # which may raise a TimeoutError of the work's own

    def _finished(self, result: asyncio.Future[Any]) -> None:
        del self._begun[result]
        self.pass_on()


def in_thread(work: Callable[[], Result]) -> asyncio.Future[Result]:
    """What comes of `work` in a daemon thread. For the event loop's thread."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Any] = loop.create_future()
    result.add_done_callback(lambda done: done.cancelled() or done.exception())  # it may be unseen

    def run() -> None:
        try:
            end = partial(result.set_result, work())
        except Exception as error:
            end = partial(result.set_exception, error)
        except BaseException as error:  # a panic in Rust
            end = partial(result.set_exception, RuntimeError(str(error)))
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(end)

    # asyncio and anyio wait for their threads when the process ends, even for a stuck one.
    threading.Thread(target=run, name="phatgoose-work", daemon=True).start()
    return result
