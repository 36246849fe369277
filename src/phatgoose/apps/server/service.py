"""What the routes call: it finds the model and its routing, has the request read, and starts it."""

from __future__ import annotations

import asyncio
import glob
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import anyio
from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from transformers import PreTrainedTokenizerBase

from ...analysis.routing_distribution import layers_and_kinds, site_label
from ...untrusted_text import UntrustedText
from ...config import Routing, Serving, closest
from ...errors import PhatgooseError
from ...experts.pool import Pool
from ...files import one_line, shortened
from ...routing.routers.registry import WEIGHTS
from ...tasks.embeddings import without_downloads
from ...untrusted_text import UntrustedText
from . import protocol
from .guards import CLIENT, REQUEST_BODY, Metrics
from .local.engine import GenerationEngine
from .local.runner import LoadedModel, ModelRunner
from .protocol import (
    AnyRequest,
    ApiError,
    Deadline,
    RoutingOverride,
    bad_request,
    busy,
    for_clients,
)
from .replies import EventStream, PendingReply, builder_of
from .requests import PreparedRequest, RequestPreparer, parsed
from .settings import ServedModel

PARSERS = 1  # bodies parsed at once: parsing holds Python's lock, so more threads would only wait
SMALL = 1 << 14  # bytes of a body that is parsed sooner than a thread is started
READERS = 2  # requests for which experts are looked up at once
STUCK = 30.0  # seconds after which a reader won't come back: three times what its limits allow
SHOWN = 80  # characters of a name that an error repeats

log = logging.getLogger(__name__)

Wanted = TypeVar("Wanted", protocol.CompletionRequest, protocol.ChatRequest)
Found = TypeVar("Found")


class RequestParser:
    """Parses bodies: small ones at once, large ones in a thread, a few at a time."""

    def __init__(self) -> None:
        self._limiter = anyio.CapacityLimiter(PARSERS)

    async def read(self, wanted: type[Wanted], http: Request) -> Wanted:
        body = http.scope[REQUEST_BODY]
        content = body.content
        if len(content) > SMALL:
            request = await anyio.to_thread.run_sync(parsed, wanted, content, limiter=self._limiter)
        else:
            request = parsed(wanted, content)
        body.release()
        return request


class Service:
    def __init__(self, models: dict[str, LoadedModel], limits: Serving) -> None:
        self.models, self.limits = models, limits
        self.metrics = Metrics()
        self.engine = engine = GenerationEngine(limits, self.metrics.batch.observe)
        self.metrics.waiting.set_function(lambda: engine.waiting)
        self.metrics.running.set_function(lambda: engine.running)
        # Rounded: the exact number would tell how much of a prompt was known.
        self.metrics.reused.set_function(lambda: engine.prefixes.tokens_reused // 1000 * 1000)
        self.metrics.prefixes.set_function(lambda: engine.prefixes.bytes)
        self.begun = int(time.time())
        self.routings: RoutingCache[ModelRunner] = RoutingCache(models, limits.max_routings)
        self._parser = RequestParser()
        self._lookups = Readers(READERS)
        tokenizers = [loaded.runner.tokenizer for loaded in models.values()]
        # One for each base: a template that takes long keeps nobody else's requests waiting.
        self._texts = {id(each): texts_of(each) for each in tokenizers}

    def start(self) -> None:
        self.engine.start()
        for each in self._texts.values():
            each.process.start()

    async def close(self) -> None:
        self.stop()

    def stop(self) -> None:
        for each in self._texts.values():
            each.process.close()
        self.engine.stop()
        self.routings.stop(self.limits.shutdown_timeout)

    def health(self) -> protocol.Health:
        readers = [self._lookups, *(each.readers for each in self._texts.values())]
        running = [seconds for each in readers for seconds in each.running()]
        stuck = sum(seconds > STUCK for seconds in running)
        return protocol.Health(
            status="ok" if self.engine.is_alive and not stuck else "failing",
            waiting=self.engine.waiting,
            running=self.engine.running,
            reading=len(running) + sum(each.waiting for each in readers),
            longest_reading=round(max(running, default=0.0), 1),
            readers_stuck=stuck,
            readers_ended=sum(each.process.ended for each in self._texts.values()),
        )

    def reopened(self, name: str) -> LoadedModel:
        """The model of that name as its place has it now."""
        opened = self.models[name].reopened()
        opened.find_experts(self.models.values())
        return opened

    def swap(self, name: str, opened: LoadedModel) -> None:
        """Serve `opened` by that name; requests that run finish on the one before."""
        self._texts.setdefault(id(opened.runner.tokenizer), texts_of(opened.runner.tokenizer))
        self.models[name] = opened
        self.routings.forget(name)

    def cards(self) -> list[protocol.ModelCard]:
        return [self.card(loaded) for loaded in self.models.values()]

    def card(self, loaded: LoadedModel) -> protocol.ModelCard:
        parts, runner = loaded.parts, loaded.runner
        return protocol.ModelCard(
            id=loaded.settings.name,
            created=self.begun,
            base=protocol.without_paths(loaded.base.id),
            router=parts.router.recorded.router if parts else None,
            k=(parts.router.k or None) if parts else None,
            experts=list(parts.experts) if parts else [],
            sites=_sites_of(loaded),
            context=runner.context,
            chat=bool(runner.tokenizer.chat_template),
        )

    def find(self, name: str) -> LoadedModel:
        loaded = self.models.get(name)
        if loaded is None:
            raise no_such_model(name, list(self.models))
        return loaded

    def _named(self, request: AnyRequest) -> tuple[LoadedModel, Mapping[str, float] | None]:
        """The model that a request names, and the mixture where it names one of its experts.

        As SGLang has it: MODEL:EXPERT, with the name of a model here or of its base.
        """
        before, sign, expert = request.model.rpartition(":")
        if request.model not in self.models and sign:
            for name, loaded in self.models.items():
                if before in (name, loaded.base.id) and expert in loaded.experts:
                    if request.override != RoutingOverride():
                        message = f"{shortened(request.model, SHOWN)} is one expert; ask for {name}"
                        raise bad_request(f"{message} to have others chosen.", "model")
                    return loaded, {expert: 1.0}
        return self.find(request.model), request.mixture

    async def answer(self, wanted: type[Wanted], http: Request) -> Response:
        """The answer to a request, whole or as a stream. Raises ApiError when there is none."""
        # The event loop only waits here: slow work is done in threads, a few at a time.
        deadline, client = Deadline.after(self.limits.timeout), http.scope[CLIENT]
        request = await self._parser.read(wanted, http)
        loaded, mixture = self._named(request)
        _check_routing(request, loaded)
        override = request.override if mixture is None else RoutingOverride(WEIGHTS)
        try:
            found = await self.routings.acquire(loaded, override, client, deadline)
        except PhatgooseError as error:
            raise bad_request(for_clients(error), only_override(request)) from error
        try:
            prepared = await self._prepared(request, found.runner, mixture, client, deadline)
            builder = builder_of(prepared)

            def done() -> None:
                found.release()
                usage = builder.usage
                self.metrics.prompt.labels(request.model).inc(usage.prompt_tokens)
                self.metrics.generated.labels(request.model).inc(usage.completion_tokens)

            reply = PendingReply(self.engine, builder, client, deadline, done)
        except BaseException:
            found.release()
            raise
        if request.stream:
            return EventStream(reply)
        return Response(await reply.whole(http), media_type="application/json")

    async def _prepared(
        self,
        request: AnyRequest,
        runner: ModelRunner,
        mixture: Mapping[str, float] | None,
        client: str,
        deadline: Deadline,
    ) -> PreparedRequest:
        texts = self._texts[id(runner.tokenizer)]
        kept = self.engine.prefixes
        preparer = RequestPreparer(runner, self.limits, texts.process, kept, client)
        prompts = await texts.readers.run(
            client, deadline, lambda seconds: preparer.prompts(request, seconds)
        )
        if mixture is not None or not runner.looks_prompts_up:
            return preparer.prepare(request, prompts, mixture)
        return await self._lookups.run(
            client, deadline, lambda _: preparer.prepare(request, prompts)
        )


def no_such_model(name: str, known: Sequence[str]) -> ApiError:
    """The error 404, with the names that are there and the closest of them."""
    there = shortened(", ".join(known), 300)[1:-1]
    message = f"There is no model {shortened(name, SHOWN)}; there are {there}."
    hint = closest(name[:SHOWN], known)  # bounded: it compares the name with each
    return ApiError(404, f"{message}{hint}", code="model_not_found", param="model")


class Texts(NamedTuple):
    """A base's chat template and tokenizer, and the thread that waits for them."""

    process: UntrustedText
    readers: Readers


def texts_of(tokenizer: PreTrainedTokenizerBase) -> Texts:
    """A service's only reader of clients' texts: a process with limits."""
    return Texts(UntrustedText(tokenizer), Readers(1))


def _sites_of(loaded: LoadedModel) -> protocol.Sites | None:
    if loaded.parts is None:
        return None
    layers, kinds = layers_and_kinds(map(site_label, loaded.parts.layers))
    return protocol.Sites(layers=layers, kinds=kinds)


def only_override(request: AnyRequest) -> str | None:
    """The one field with which a request changes the routing, None where there are several."""
    changes = [field.name for field in fields(RoutingOverride)]
    given = [name for name in changes if getattr(request, name) is not None]
    return given[0] if len(given) == 1 else None


def _check_routing(request: AnyRequest, loaded: LoadedModel) -> None:
    if not request.routing:
        return
    sites, detail = _sites_of(loaded), request.routing_detail
    if sites is None:
        raise bad_request(f"{request.model!r} is a base model alone; it has no routing.", "routing")
    if detail.layer is not None and detail.layer not in sites.layers:
        layer, layers = shortened(detail.layer, SHOWN), ", ".join(sites.layers)
        raise bad_request(f"There is no layer {layer}; layers are {layers}.", "routing")
    if detail.kind is not None and not any(
        f".{kind}".endswith(f".{detail.kind}") for kind in sites.kinds
    ):
        kind, kinds = shortened(detail.kind, SHOWN), ", ".join(sites.kinds)
        raise bad_request(f"There is no kind {kind}; kinds are {kinds}.", "routing")


FOR_EACH = 2  # routings composed at once for one client: as many as the page shows side by side

Key = tuple[str, Routing, tuple[str, ...], int]  # model, routing, experts, which opening of it


@dataclass(frozen=True)
class Acquired(Generic[Found]):
    """A model for one request, which calls `release` when it is done."""

    runner: Found
    release: Callable[[], None] = lambda: None


@dataclass(eq=False)
class CachedRouting(Generic[Found]):
    """A routing, composed or being composed for `client`, and how many `requests` need it."""

    client: str
    runner: asyncio.Future[Found]
    requests: int = 0

    @property
    def is_ready(self) -> bool:
        return self.runner.done() and self.runner.exception() is None

    def release(self) -> None:
        self.requests -= 1


Runner = TypeVar("Runner")


class Composable(Protocol[Runner]):
    """A served model whose routing a request can change."""

    settings: ServedModel
    routing: Routing
    runner: Runner

    @property
    def experts(self) -> tuple[str, ...]: ...

    def overridden(self, override: RoutingOverride) -> tuple[Routing, Pool]: ...

    def composed(self, pool: Pool, routing: Routing, others: Sequence[Runner]) -> Runner: ...


class RoutingCache(Generic[Runner]):
    """At most `most` routings of `models`, composed off the engine's thread.

    A request waits for its own routing while others are served. The least recently used one that no
    request needs makes room. Methods but `_compose` run in the event loop's thread.
    """

    def __init__(self, models: Mapping[str, Composable[Runner]], most: int) -> None:
        self._models, self._most = models, most
        self._cached: dict[Key, CachedRouting[Runner]] = {}
        self._composing = threading.Lock()  # one at a time: it takes all cores anyway
        self._threads: list[threading.Thread] = []

    @property
    def composed(self) -> list[Runner]:
        return [each.runner.result() for each in list(self._cached.values()) if each.is_ready]

    @property
    def unfinished(self) -> int:
        return len(self._cached) - len(self.composed)

    @property
    def requests(self) -> int:
        return sum(each.requests for each in self._cached.values())

    async def acquire(
        self, loaded: Composable[Runner], override: RoutingOverride, client: str, deadline: Deadline
    ) -> Acquired[Runner]:
        """`loaded` with `override` applied, composed if it isn't cached.

        Raises PhatgooseError for an impossible override, ApiError when too much is asked for at
        once or it isn't there by the `deadline`.
        """
        if override == RoutingOverride():
            return Acquired(loaded.runner)
        routing, pool = await run_in_threadpool(loaded.overridden, override)
        if (routing, pool.names) == (loaded.routing, loaded.experts):
            return Acquired(loaded.runner)
        key = (loaded.settings.name, routing, pool.names, id(loaded))
        if key not in self._cached:
            self._begin(key, loaded, pool, client)
        cached = self._cached[key] = self._cached.pop(key)  # now the last
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
        return Acquired(runner, cached.release)

    def forget(self, model: str) -> None:
        """Drop the routings of a model that was opened again."""
        for key in [key for key in self._cached if key[0] == model]:
            del self._cached[key]

    def stop(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _begin(self, key: Key, loaded: Composable[Runner], pool: Pool, client: str) -> None:
        clients = [each.client for each in self._cached.values() if not each.is_ready]
        if len(clients) >= self._most or clients.count(client) >= FOR_EACH:
            raise busy("Too many routings are being composed; try again in a while.", 5)
        if len(self._cached) >= self._most:
            unused = (k for k, each in self._cached.items() if each.is_ready and not each.requests)
            if (oldest := next(unused, None)) is None:
                raise busy("Too many different routings are in use; try again in a while.", 5)
            del self._cached[oldest]
        thread, runner = in_thread(lambda: self._compose(loaded, pool, key[1]))
        self._threads = [each for each in self._threads if each.is_alive()] + [thread]
        # One that failed may be tried again.
        runner.add_done_callback(lambda done: done.exception() and self._cached.pop(key, None))
        self._cached[key] = CachedRouting(client, runner)

    def _compose(self, loaded: Composable[Runner], pool: Pool, routing: Routing) -> Runner:
        with self._composing, without_downloads():  # a client must not start downloads
            runners = [*(each.runner for each in self._models.values()), *self.composed]
            return loaded.composed(pool, routing, runners)


class Turns:
    """Up to `most` works at once; the client served longest ago is next."""

    def __init__(self, most: int) -> None:
        self.free = most
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

    async def run(self, client: str, deadline: Deadline, work: Callable[[float], Found]) -> Found:
        """What `work(seconds left)` returns; ApiError at the deadline, while the work keeps its
        place.
        """
        await self.take(client, deadline)
        try:
            if not (seconds := deadline.left):
                raise deadline.missed()
            _, result = in_thread(lambda: work(seconds))
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


def in_thread(work: Callable[[], Found]) -> tuple[threading.Thread, asyncio.Future[Found]]:
    """A daemon thread that does `work`, and what comes of it. For the event loop's thread."""
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
    thread = threading.Thread(target=run, name="phatgoose-work", daemon=True)
    thread.start()
    return thread, result


# Following pools: what has changed on the disk is opened beside what is served, and takes its place
# when it is complete. A pool that can't be opened leaves the old one where it is.

LOOKING = 1.0  # seconds between two looks at whether something changed

Seen = tuple[tuple[str, int, int], ...]  # files, their sizes and times


async def follow(service: Any) -> None:
    """Open each model again when the files at its place have changed, and have stopped to."""
    places = {name: model.settings.place for name, model in service.models.items()}
    opened = {name: seen_at(place) for name, place in places.items()}
    last = dict(opened)
    while True:
        await asyncio.sleep(LOOKING)
        for name, place in places.items():
            try:
                before, last[name] = last[name], await asyncio.to_thread(seen_at, place)
                if before == last[name] != opened[name]:
                    opened[name] = before  # also where it fails: another change is awaited
                    await _reopen(service, name)
            except Exception as error:  # such as too many threads: it is looked at again
                log.warning("%s can't be watched now: %s", name, one_line(error))


async def _reopen(service: Any, name: str) -> None:
    try:
        _, opening = in_thread(lambda: service.reopened(name))
        opened: Any = await opening
        service.swap(name, opened)
    except Exception as error:
        known = isinstance(error, (PhatgooseError, OSError))
        words = "%s has changed, and is served as it was: %s"
        log.warning(words, name, one_line(error), exc_info=not known)
        service.metrics.reopened.labels("kept").inc()
    else:
        log.warning("%s has changed, and is served as it is now", name)
        service.metrics.reopened.labels("reopened").inc()


def seen_at(place: str) -> Seen:
    """The files of a pool or a model, by which a change is noticed; nothing for one on the Hub."""
    inside, found = glob.escape(place), []
    for path in sorted([place, *glob.glob(f"{inside}/*"), *glob.glob(f"{inside}/*/*")]):
        with suppress(OSError):  # it went away since it was listed
            if os.path.isfile(path):
                stat = os.stat(path)
                found.append((path, stat.st_size, stat.st_mtime_ns))
    return tuple(found)
