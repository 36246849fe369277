"""What the routes call: it finds the model and its routing, has the request read, and starts it."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from typing import Any, NamedTuple, TypeVar

import anyio
from fastapi import Request
from starlette.responses import Response

from ...analysis.routing_distribution import layers_and_kinds, site_label
from ...base.untrusted_text import UntrustedText
from ...config import Serving
from ...errors import PhatgooseError
from ...files.strict import shortened
from .engine import GenerationEngine
from .guards import CLIENT, REQUEST_BODY, Metrics
from .models import LoadedModel, ModelRunner, RoutingCache
from .protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    Deadline,
    Health,
    ModelCard,
    RoutingOverride,
    Sites,
    bad_request,
    for_clients,
    without_paths,
)
from .requests import PreparedRequest, RequestPreparer, parsed
from .responses import EventStream, PendingReply, builder_of

PARSERS = 1  # bodies parsed at once: parsing holds Python's lock, so more threads would only wait
SMALL = 1 << 14  # bytes of a body that is parsed sooner than a thread is started
READERS = 2  # requests for which experts are looked up at once
STUCK = 30.0  # seconds after which a reader won't come back: three times what its limits allow
SHOWN = 80  # characters of a name that an error repeats

Wanted = TypeVar("Wanted", CompletionRequest, ChatRequest)
Found = TypeVar("Found")


class Service:
    """The models, the engine that computes their answers, and the limits for both."""

    def __init__(self, models: Mapping[str, LoadedModel], limits: Serving) -> None:
        self.models, self.limits = models, limits
        self.metrics = Metrics()
        self.engine = engine = GenerationEngine(limits, self.metrics.batch.observe)
        self.metrics.waiting.set_function(lambda: engine.waiting)
        self.metrics.running.set_function(lambda: engine.running)
        self.begun = int(time.time())
        self.routings = RoutingCache(models, limits.max_routings)
        self._parsers = anyio.CapacityLimiter(PARSERS)
        self._lookups = Readers(READERS)
        tokenizers = [loaded.runner.tokenizer for loaded in models.values()]
        # One for each base: a template that takes long keeps nobody else's requests waiting.
        self._texts = {id(each): _Texts(UntrustedText(each), Readers(1)) for each in tokenizers}

    def start(self) -> None:
        self.engine.start()
        for each in self._texts.values():
            each.process.start()

    def stop(self) -> None:
        """Stop reading and computing, and wait a while for routings being composed."""
        for each in self._texts.values():
            each.process.close()
            each.readers.stop()
        self._lookups.stop()
        self.engine.stop()
        self.routings.stop(self.limits.shutdown_timeout)

    def health(self) -> Health:
        readers = [self._lookups, *(each.readers for each in self._texts.values())]
        running = [seconds for each in readers for seconds in each.running()]
        stuck = sum(seconds > STUCK for seconds in running)
        return Health(
            status="ok" if self.engine.is_alive and not stuck else "failing",
            waiting=self.engine.waiting,
            running=self.engine.running,
            reading=len(running) + sum(each.waiting for each in readers),
            longest_reading=round(max(running, default=0.0), 1),
            readers_stuck=stuck,
            readers_ended=sum(each.process.ended for each in self._texts.values()),
        )

    def cards(self) -> list[ModelCard]:
        return [self.card(loaded) for loaded in self.models.values()]

    def card(self, loaded: LoadedModel) -> ModelCard:
        parts, runner = loaded.parts, loaded.runner
        return ModelCard(
            id=loaded.settings.name,
            created=self.begun,
            base=without_paths(loaded.base.id),
            router=parts.routing.router if parts else None,
            k=parts.routing.k if parts else None,
            experts=list(parts.experts) if parts else [],
            sites=_sites_of(loaded),
            context=runner.context,
            chat=bool(runner.tokenizer.chat_template),
        )

    def find(self, name: str) -> LoadedModel:
        """The model called `name`. Raises ApiError when there is none."""
        loaded = self.models.get(name)
        if loaded is None:
            known = ", ".join(self.models)
            raise ApiError(
                404,
                f"There is no model {shortened(name, SHOWN)}; there are {known}.",
                code="model_not_found",
                param="model",
            )
        return loaded

    async def answer(self, wanted: type[Wanted], http: Request) -> Response:
        """The answer to a request, whole or as a stream. Raises ApiError when there is none."""
        # The event loop only waits here: slow work is done in threads, a few at a time.
        deadline = Deadline.after(self.limits.timeout)
        body, client = http.scope[REQUEST_BODY], http.scope[CLIENT]
        content = body.content
        if len(content) > SMALL:
            request = await anyio.to_thread.run_sync(parsed, wanted, content, limiter=self._parsers)
        else:
            request = parsed(wanted, content)
        body.release()
        loaded = self.find(request.model)
        _check_routing(request, loaded)
        try:
            found = await self.routings.acquire(loaded, request.override, client, deadline)
        except PhatgooseError as error:
            raise bad_request(for_clients(error), _only_override(request)) from error
        try:
            prepared = await self._prepared(request, found.runner, client, deadline)
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
        request: CompletionRequest | ChatRequest,
        runner: ModelRunner,
        client: str,
        deadline: Deadline,
    ) -> PreparedRequest:
        """The request as tokens, with its experts; both are found in threads if that takes long."""
        texts = self._texts[id(runner.tokenizer)]
        preparer = RequestPreparer(runner, self.limits, texts.process)
        prompts = await texts.readers.run(
            client, deadline, lambda seconds: preparer.prompts(request, seconds)
        )
        if not runner.looks_prompts_up:
            return preparer.prepare(request, prompts)
        return await self._lookups.run(
            client, deadline, lambda _: preparer.prepare(request, prompts)
        )


class _Texts(NamedTuple):
    """A base's chat template and tokenizer, and the thread that waits for them."""

    process: UntrustedText
    readers: Readers


def _sites_of(loaded: LoadedModel) -> Sites | None:
    if loaded.parts is None:
        return None
    layers, kinds = layers_and_kinds(map(site_label, loaded.parts.layers))
    return Sites(layers=layers, kinds=kinds)


def _only_override(request: CompletionRequest | ChatRequest) -> str | None:
    """The one field with which a request changes the routing, None where there are several."""
    changes = [field.name for field in fields(RoutingOverride)]
    given = [name for name in changes if getattr(request, name) is not None]
    return given[0] if len(given) == 1 else None


def _check_routing(request: CompletionRequest | ChatRequest, loaded: LoadedModel) -> None:
    """Raise ApiError for routing that can't be reported: of a base alone, or of unknown sites."""
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


class Readers:
    """Up to `most` threads that turn requests into tokens; the client served longest ago is next.

    All methods are for the event loop's thread. The threads are daemons of their own: those of
    asyncio and anyio are waited for when the process ends, even one that is stuck.
    """

    def __init__(self, most: int) -> None:
        self._most = self._free = most
        self._works: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = 0
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # in the order of turns
        self._begun: dict[object, float] = {}

    @property
    def waiting(self) -> int:
        return sum(not place.done() for line in self._waiting.values() for place in line)

    def running(self) -> list[float]:
        """For how many seconds each running work has run."""
        now = asyncio.get_running_loop().time()
        return [now - begun for begun in self._begun.values()]

    def stop(self) -> None:
        """Let the threads end with what they are at; later works start others."""
        for _ in range(self._threads):
            self._works.put(None)
        self._threads = 0

    async def run(self, client: str, deadline: Deadline, work: Callable[[float], Found]) -> Found:
        """What `work` returns; it is told how many seconds are left, and runs in a thread.

        Raises what it does, and ApiError at the deadline: the work then goes on, in its place,
        until it returns.
        """
        try:
            await self._turn(client, deadline)
        except asyncio.TimeoutError:
            raise deadline.missed() from None
        if not deadline.left:
            self._pass_on()
            raise deadline.missed()
        result = self._start(work, deadline)
        await asyncio.wait([result], timeout=deadline.left)
        if not result.done():
            raise deadline.missed()
        return result.result()  # which may raise a TimeoutError of the work's own

    async def _turn(self, client: str, deadline: Deadline) -> None:
        if self._free:
            self._free -= 1
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(place)
        try:
            await asyncio.wait_for(asyncio.shield(place), deadline.left)
        except BaseException:
            if place.done():  # the turn came as this one gave up
                self._pass_on()
            place.cancel()
            raise

    def _start(self, work: Callable[[float], Found], deadline: Deadline) -> asyncio.Future[Found]:
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Any] = loop.create_future()
        result.add_done_callback(lambda done: done.cancelled() or done.exception())
        seconds = deadline.left
        self._begun[result] = loop.time()

        def finished(found: Any, error: BaseException | None) -> None:
            del self._begun[result]
            self._pass_on()
            if not result.done():
                result.set_result(found) if error is None else result.set_exception(error)

        def run() -> None:
            found, error = None, None
            try:
                found = work(seconds)
            except BaseException as problem:
                error = problem if isinstance(problem, Exception) else RuntimeError(str(problem))
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(finished, found, error)

        if self._threads < self._most:
            try:
                threading.Thread(target=self._serve, name="phatgoose-reader", daemon=True).start()
            except RuntimeError:  # no more threads can be started: the place goes to the next
                del self._begun[result]
                self._pass_on()
                raise
            self._threads += 1
        self._works.put(run)
        return result

    def _serve(self) -> None:
        while (work := self._works.get()) is not None:
            work()

    def _pass_on(self) -> None:
        """Give a thread's place to the next in turn."""
        while self._waiting:
            client = next(iter(self._waiting))
            line = self._waiting.pop(client)
            place = line.popleft()
            if line:
                self._waiting[client] = line  # behind the others
            if not place.done():
                place.set_result(None)
                return
        self._free += 1
