"""What the routes call: it finds the model and its routing, has the request read, and starts it.

A `Backend` computes the answers (`backend`).
"""

from __future__ import annotations

import asyncio
import glob
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Generic, Self, TypeVar

from fastapi import Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response
from transformers import PreTrainedTokenizerBase

from ...config import Routing, closest
from ...errors import ConfigError, PhatgooseError
from ...experts.pool import Pool
from ...files import one_line, shortened
from ...routing.routers.fixed import mixture_of
from ...routing.routers.registry import AUTO, WEIGHTS
from ...routing.routers.router import check_served, router_of
from ...tasks.embeddings import without_downloads
from ...untrusted_text import UntrustedText
from . import protocol
from .backend import Backend, R, Seen, Served
from .guards import ALLOWED, CLIENT, Metrics
from .protocol import AnyRequest, ApiError, Deadline, RoutingOverride, bad_request, busy
from .replies import Builder, EventStream, Reply, headers_of, unless_gone
from .requests import Asked, RequestReader
from .responses import ResponseBuilder, ResponsesRequest
from .settings import API_KEYS

MOST_NAME = 80  # characters of a name that an error repeats
SHOWN = 3  # example prompts
LOOKING = 1.0  # seconds between two looks at whether files have changed
AGAIN = 30.0  # seconds until a change that couldn't be taken over is tried again

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class Service(Generic[R]):
    """Public methods that take a request are the routes'."""

    def __init__(self, backend: Backend[R], metrics: Metrics) -> None:
        self.backend = backend
        self.metrics = metrics
        metrics.waiting.set_function(lambda: backend.state.waiting)
        metrics.running.set_function(lambda: backend.state.running)
        self.begun = int(time.time())
        self.routings = RoutingCache(backend)
        # One for each base: a template that takes long keeps nobody else's requests waiting.
        self._texts: dict[PreTrainedTokenizerBase | None, tuple[UntrustedText | None, Turns]] = {}
        for model in self.models.values():
            self._texts_of(model)

    @property
    def models(self) -> Mapping[str, Served[R]]:
        return self.backend.models

    def check_allowed(self, by_key: Collection[frozenset[str]]) -> None:
        """Raise PhatgooseError where the experts that keys may use can't be kept to."""
        models = [each for each in self.models.values() if by_key and each.experts]
        names = sorted({name for model in models for name in model.experts})
        for each in models:
            if not each.runner.frame.looks_prompts_up:  # it is composed of some of its experts
                overridden(each, RoutingOverride(allowed=each.experts))
        if not all(allowed.issubset(names) for allowed in by_key):
            message = f"A key in {API_KEYS} (KEY=EXPERT+EXPERT) names an expert that isn't served"
            # Without the name, which may be the end of a key.
            raise ConfigError(f"{message}; there are {', '.join(names)}.")

    @property
    def texts(self) -> list[UntrustedText]:
        return [process for process, _ in self._texts.values() if process is not None]

    def start(self) -> None:
        self.backend.start()
        for process in self.texts:
            process.start()

    async def close(self) -> None:
        for process in self.texts:
            process.close()
        await self.backend.close()

    async def health(self) -> JSONResponse:
        state, turns = self.backend.state, [turns for _, turns in self._texts.values()]
        reading = sum(each.most - each.free + len(each) for each in turns)  # prompts
        health: dict[str, Any] = {"status": "ok" if state.is_well else "failing"}
        health |= {"reading": reading, "waiting": state.waiting, "running": state.running}
        if self.backend.upstream:
            health |= {"upstream": "ok" if state.is_well else "away", "upstreams": state.upstreams}
        return JSONResponse(health, 200 if state.is_well else 503)

    async def numbers(self, http: Request) -> Response:
        if http.scope[ALLOWED] is not None:
            raise ApiError(403, "This key may not read metrics, which name what others ask for.")
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def completions(self, body: protocol.CompletionRequest, http: Request) -> Response:
        return await self._answer(body, http)

    async def chats(self, body: protocol.ChatRequest, http: Request) -> Response:
        return await self._answer(body, http)

    async def responses(self, body: ResponsesRequest, http: Request) -> Response:
        return await self._answer(body, http, partial(ResponseBuilder, await http.json()))

    async def cards(self, http: Request) -> dict[str, Any]:
        data = [await self.card(name, http) for name in self._all_names(http)]
        return {"object": "list", "data": data}

    async def card(self, name: str, http: Request) -> dict[str, Any]:
        """What is told of a model, or of one expert. Raises ApiError."""
        model, fixed = self._find(name, http)
        frame, is_whole = model.runner.frame, fixed is None and bool(model.experts)
        experts = list(usable(model.experts, http) if fixed is None else fixed)
        return {
            "id": name,
            "object": "model",
            "created": self.begun,
            "owned_by": "phatgoose",
            "base": protocol.without_paths(model.bases[-1]),
            "router": model.routing.router if is_whole else None,  # None for a base alone
            "k": model.routing.k if is_whole else None,
            "experts": experts,
            "prompts": [model.prompts[each] for each in experts if each in model.prompts][:SHOWN],
            "traces": is_whole and not self.backend.upstream,  # they can be asked for
            "context": frame.context,
            "chat": frame.tokenizer is None or bool(frame.tokenizer.chat_template),
        }

    def _models_for(self, http: Request) -> dict[str, Served[R]]:
        """The models without those of whose experts the client may use none."""
        pairs = self.models.items()
        return {n: each for n, each in pairs if not each.experts or usable(each.experts, http)}

    def _all_names(self, http: Request) -> list[str]:
        models = self._models_for(http)
        if not self.backend.upstream:
            return list(models)
        experts = (name for each in models.values() for name in usable(each.experts, http))
        return [protocol.ANY_MODEL, *models, *dict.fromkeys(experts)]

    def _find(self, name: str, http: Request) -> tuple[Served[R], Mapping[str, float] | None]:
        """The model that a request names, and where it names one expert, its mixture.

        An expert is EXPERT or MODEL:EXPERT. In front of an engine there are also its base alone,
        and "auto", the first model. Raises ApiError.
        """
        models = self._models_for(http)
        if self.backend.upstream and name == protocol.ANY_MODEL and name not in models:
            name = next(iter(models), name)
        if name in models:
            return models[name], None
        for model in models.values():
            expert = name.removeprefix(f"{model.settings.name}:")
            if expert in usable(model.experts, http):
                return model, {expert: 1.0}
            if self.backend.upstream and name in model.bases:
                return model, {}
        names_here = self._all_names(http)
        listed = shortened(", ".join(names_here), 300)[1:-1]
        message = f"There is no model {shortened(name, MOST_NAME)}; there are {listed}."
        hint = closest(name[:MOST_NAME], names_here)  # bounded: it compares the name with each
        raise ApiError(404, f"{message}{hint}", code="model_not_found", param="model")

    async def _answer(
        self, request: AnyRequest, http: Request, builder: Callable[..., Builder] = Builder
    ) -> Response:
        """The answer to a request, whole or as a stream. Raises ApiError when there is none."""
        # The event loop only waits here: slow work is done in threads, a few at a time.
        deadline, client = Deadline(self.backend.limits.timeout), http.scope[CLIENT]
        model, expert = self._find(request.model, http)
        mixtures = [each for each in (expert, request.weights) if each is not None]
        if len(mixtures) + (request.override != RoutingOverride()) > 1:
            message = "An expert's name, weights, and other fields of routing exclude each other."
            raise bad_request(message, request.changed)
        self.backend.check(request, model)
        mixture = mixtures[0] if mixtures else None
        with ExitStack() as at_end:
            cached = await self._routing(request, model, mixture, http, deadline)
            runner = at_end.enter_context(cached).runner
            process, turns = self._texts_of(model)
            routed = runner.frame.looks_prompts_up and mixture is None
            frame = replace(runner.frame, looks_prompts_up=routed)
            reader = RequestReader(frame, self.backend.limits, process)
            prompts = await turns.run(client, deadline, partial(reader.prompts, request))
            answers, experts = reader.answers(request, prompts), usable(model.experts, http)
            asked = Asked(request, mixture, prompts, answers, client, deadline, experts, builder)
            reply, chosen = await self.backend.begin(asked, runner)
            at_end.callback(self._count, reply)
            at_end.push(reply.at_end)
            by_base = [each for each in answers if chosen is not None and not chosen[each.row]]
            self.metrics.by_base.labels(request.model).inc(len(by_base))
            headers = headers_of(asked, chosen)
            if request.stream:
                await reply.begun(http)
                return EventStream(reply, headers, at_end.pop_all())
            content = await unless_gone(http, reply.whole())
        return Response(content, media_type="application/json", headers=headers)

    async def _routing(
        self,
        request: AnyRequest,
        model: Served[R],
        mixture: Mapping[str, float] | None,
        http: Request,
        deadline: Deadline,
    ) -> CachedRouting[R]:
        """How `model` routes for a request, by experts that its client may use. Raises ApiError."""
        override, experts = request.override, usable(model.experts, http)
        chooses = override == RoutingOverride() and model.runner.frame.looks_prompts_up
        try:
            if mixture is not None:  # which an engine is sent as it is
                mixture_of(mixture, usable(model.pool.names, http))
                override = RoutingOverride(None if self.backend.upstream else WEIGHTS)
            elif experts != model.experts and not chooses:  # a router by prompt, among these
                override = replace(override, allowed=experts)
            return await self.routings.acquire(model, override, http.scope[CLIENT], deadline)
        except PhatgooseError as error:
            raise bad_request(protocol.for_clients(error), request.changed) from error

    def _texts_of(self, model: Served[R]) -> tuple[UntrustedText | None, Turns]:
        """What runs the chat template and tokenizer of a model's base, and turns to use it.

        None where an engine does.
        """
        tokenizer = model.runner.frame.tokenizer
        if tokenizer not in self._texts:
            turns = Turns(1, self.backend.limits.max_queue)
            process = None if tokenizer is None else UntrustedText(tokenizer)
            self._texts[tokenizer] = process, turns
        return self._texts[tokenizer]

    async def follow(self) -> None:
        """Open a model again when the files at its place have changed, and have stopped to.

        The new one takes the old one's place when it is complete: requests that run finish on the
        old one. One that can't be opened leaves it where it is, and is tried again.
        """
        last = {name: model.seen for name, model in self.models.items()}
        again = dict.fromkeys(last, 0.0)
        while True:
            await asyncio.sleep(LOOKING)
            for name, model in self.models.items():
                try:
                    now = await in_thread(partial(seen_at, model.settings.place))
                    before, last[name] = last[name], now
                    if before != now:
                        again[name] = 0.0
                    elif now != model.seen and time.monotonic() >= again[name]:
                        again[name] = time.monotonic() + AGAIN
                        new = await in_thread(partial(model.reopened, self.models.values()))
                        await self.backend.take({**self.models, name: new})
                        self.routings.cached.clear()
                        log.warning("%s has changed, and is served as it is now", name)
                except Exception as error:  # also where there are too many threads
                    words = "%s has changed, and is served as it was: %s"
                    log.warning(words, name, one_line(error))

    def _count(self, reply: Reply) -> None:
        usage, name = reply.builder.usage, reply.builder.request.model
        self.metrics.prompt.labels(name).inc(usage["prompt_tokens"])
        self.metrics.generated.labels(name).inc(usage["completion_tokens"])


def usable(experts: Sequence[str], http: Request) -> tuple[str, ...]:
    """Those of `experts` that the client of a request may use."""
    allowed = http.scope[ALLOWED]
    return tuple(experts if allowed is None else (each for each in experts if each in allowed))


def seen_at(place: str) -> Seen:
    """The files of a pool or a model with their sizes and times; nothing for one on the Hub."""
    inside, files = glob.escape(place), []
    for path in sorted(glob.glob(f"{inside}/*") + glob.glob(f"{inside}/*/*")):  # links may loop
        with suppress(OSError):  # it went away since it was listed
            if os.path.isfile(path):
                stat = os.stat(path)
                files.append((path, stat.st_size, stat.st_mtime_ns))
    return files


def overridden(model: Served[R], override: RoutingOverride) -> tuple[Routing, Pool]:
    """A model's routing and experts with `override` applied. Raises PhatgooseError."""
    pool = model.pool.select(override.allowed).select(override.keep, override.leave_out)
    routing = model.routing
    router = model.usual(pool) if override.router == AUTO else override.router
    if router not in (None, routing.router):  # whose k needn't suit another router
        routing = replace(routing, router=router, k=model.settings.routing.k)
    if override.k is not None:
        routing = replace(routing, k=override.k)
    check_served(router_of(routing))
    return numbered(routing, len(pool)), pool


def numbered(routing: Routing, experts: int) -> Routing:
    """`routing` with the k that results among this many experts; equal ones compare equal."""
    router = router_of(routing)
    return replace(router.routing, k=min(router.k, experts) or None)


MOST_ROUTINGS = 8  # that requests asked for are kept
MOST_TURNS = 256  # that may wait whatever --max-queue says, a half of them one client's


class CachedRouting(Generic[R]):
    """A `runner`, once it is composed; as a context it is needed by one of its `requests`."""

    runner: R

    def __init__(self, runner: R | None = None) -> None:
        self.requests = 0
        if runner is not None:
            self.runner = runner

    @property
    def is_composed(self) -> bool:
        return hasattr(self, "runner")

    def __enter__(self) -> Self:
        self.requests += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.requests -= 1


class RoutingCache(Generic[R]):
    """At most `most` routings of a backend's models, composed in turns, off the engine's thread.

    A request waits for its own routing while others are served. The least recently used one that no
    request needs makes room.
    """

    def __init__(self, backend: Backend[R]) -> None:
        self._backend = backend
        self.most = MOST_ROUTINGS
        # By model, routing and experts.
        self.cached: dict[tuple[Served[R], Routing, tuple[str, ...]], CachedRouting[R]] = {}
        self.turns = Turns(1)  # composing takes all cores anyway

    async def acquire(
        self, model: Served[R], override: RoutingOverride, client: str, deadline: Deadline
    ) -> CachedRouting[R]:
        """The runner of `model` with `override` applied.

        Raises PhatgooseError for an impossible override, ApiError when too many are needed, or it
        isn't composed by the `deadline`.
        """
        if override == RoutingOverride():
            return CachedRouting(model.runner)
        routing, pool = await run_in_threadpool(overridden, model, override)
        if (routing, pool.names) == (model.routing, model.experts):
            return CachedRouting(model.runner)
        key = (model, routing, pool.names)
        cached = self.cached.pop(key, None) or CachedRouting[R]()
        if len(self.cached) >= self.most:
            unused = (each for each, other in self.cached.items() if not other.requests)
            if (oldest := next(unused, None)) is None:
                raise busy("Too many different routings are in use; try again in a while.", 5)
            del self.cached[oldest]
        self.cached[key] = cached  # now the last
        with cached:  # from now on, so that those asked for at once are no more than fit
            if not cached.is_composed:
                compose = partial(self._compose, cached, model, routing, pool)
                await self.turns.run(client, deadline, compose)
        return cached

    def _compose(
        self, cached: CachedRouting[R], model: Served[R], routing: Routing, pool: Pool, _: float
    ) -> None:
        runners = [served.runner for served in self._backend.models.values()]
        runners += [other.runner for other in self.cached.values() if other.is_composed]
        with without_downloads():  # a client must not start downloads
            if not cached.is_composed:  # while this one waited for its turn
                cached.runner = model.composed(pool, routing, runners)


class FairQueue(Generic[Item]):
    """Clients' items in their order; the next turn is the client's served longest ago."""

    def __init__(self) -> None:
        self._lines: dict[str, list[Item]] = {}  # in the order of turns

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Item]:
        return (each for line in self._lines.values() for each in line)

    def heads(self) -> list[tuple[str, Item]]:
        """Each client with its first item, in the order of turns."""
        return [(client, line[0]) for client, line in self._lines.items()]

    def add(self, client: str, item: Item) -> None:
        self._lines.setdefault(client, []).append(item)

    def take(self, client: str) -> None:
        """Remove the first item of a client, who is the last from now on."""
        line = self._lines.pop(client)
        if line[1:]:
            self._lines[client] = line[1:]

    def remove(self, client: str, item: Item) -> None:
        """Remove an item, wherever it is, if it is there."""
        self._lines[client] = [x for x in self._lines.get(client, ()) if x is not item]
        if not self._lines[client]:
            del self._lines[client]

    def check_room(self, client: str, new: int, most: int) -> None:
        """Raise ApiError where `new` ones are more than may wait, of all or of one client."""
        mine = len(self._lines.get(client, ()))
        if len(self) + new > most or mine + new > (most + 1) // 2:
            message = f"{len(self)} answers are waiting already, {mine} of them yours"
            raise busy(f"{message}; {new} more are too many now.")


class Turns(FairQueue[asyncio.Future[None]]):
    """Up to `most` works at once; the client served longest ago is next.

    As many as `waiting` may wait, and always MOST_TURNS.
    """

    def __init__(self, most: int, waiting: int = 0) -> None:
        super().__init__()
        self.most = self.free = most
        self.waiting = max(waiting, MOST_TURNS)

    async def wait(self, client: str, deadline: Deadline) -> None:
        """Wait for a turn, to be given back by `pass_on`; ApiError at the deadline, or at once."""
        if self.free:
            self.free -= 1
            return
        self.check_room(client, 1, self.waiting)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.add(client, place)
        try:
            async with deadline.kept():
                await place
        except BaseException:
            self.remove(client, place)
            if not place.cancelled():  # the turn came as this one gave up
                self.pass_on()
            raise

    def pass_on(self) -> None:
        while heads := self.heads():
            client, place = heads[0]
            self.take(client)
            if not place.done():  # or it was cancelled
                place.set_result(None)
                return
        self.free += 1

    async def run(self, client: str, deadline: Deadline, work: Callable[[float], Result]) -> Result:
        """What `work(seconds left)` returns, done in a thread; ApiError at the deadline.

        A thread can't be ended: past the deadline the work keeps its place until it returns.
        """
        await self.wait(client, deadline)
        seconds = deadline.left
        result = in_thread(lambda: work(seconds))
        result.add_done_callback(lambda _: self.pass_on())
        await asyncio.wait([result], timeout=seconds)
        if not result.done():
            raise deadline.missed()
        return result.result()  # which may raise a TimeoutError of the work's own


def in_thread(work: Callable[[], Result]) -> asyncio.Future[Result]:
    """What comes of `work` in a daemon thread. For the event loop's thread."""
    done: Future[Result] = Future()
    done.set_running_or_notify_cancel()  # a thread can't be cancelled

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # a panic in Rust is no Exception
            is_plain = isinstance(error, Exception)
            done.set_exception(error if is_plain else RuntimeError(str(error)))

    try:
        # asyncio and anyio wait for their threads when the process ends, even for a stuck one.
        threading.Thread(target=run, name="phatgoose-work", daemon=True).start()
    except RuntimeError as error:  # no more can be started
        done.set_exception(error)
    result = asyncio.wrap_future(done)
    result.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # maybe unseen
    return result
