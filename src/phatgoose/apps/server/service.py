"""What the routes call: it finds the model and its routing, has the request read, and starts it.

A `Backend` computes the answers (`backend`).
"""

from __future__ import annotations

import asyncio
import glob
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, Self

from fastapi import Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from ...analysis.confusions import Confusions, confusions
from ...config import Routing, closest
from ...errors import ConfigError, PhatgooseError, PoolError
from ...experts.corrections import Correction, correct
from ...experts.pool import Pool
from ...files import one_line, shortened
from ...routing.choice import Chosen
from ...routing.chooser import with_nearest
from ...routing.routers.fixed import mixture_of
from ...routing.routers.registry import AUTO, WEIGHTS
from ...routing.routers.router import check_served, router_of
from ...tasks.embeddings import without_downloads
from ...untrusted_text import UntrustedText
from . import protocol
from .backend import Backend, R, Seen, Served
from .guards import ALLOWED, CLIENT, Metrics
from .protocol import (
    AnyRequest,
    ApiError,
    Fields,
    RoutingOverride,
    Weights,
    bad_request,
    busy,
)
from .replies import Builder, EventStream, Reply, headers_of, in_a_line, unless_gone
from .requests import PreparedRequest, RequestReader
from .responses import ResponseBuilder, ResponsesRequest
from .settings import API_KEYS, ServedModel
from .turns import Deadline, Turns, in_thread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_NAME = 80  # characters of a name that an error repeats
SHOWN = 3  # example prompts
TRACE = ("traceparent", "tracestate")  # headers of W3C's, which engines get
PLAIN = "[ -~]{1,512}"
MOST_ROUTINGS = 8  # that requests asked for are kept
DISCRIMINANT = "discriminant"  # by which example prompts are checked

log = logging.getLogger(__name__)


class Texts(NamedTuple):
    """What runs a base's chat template and tokenizer, and turns to use it; None in an engine."""

    process: UntrustedText | None
    turns: Turns


class Service(Generic[R]):
    """Public methods that take a request are the routes', which `app.routes_of` lists.

    The OpenAPI schema shows their names and docstrings.

    A key may be for some experts only (`guards.ALLOWED`). So whatever names experts or depends on
    them goes through `usable`, and models are found by `_find` and `_models_for`.
    `looking` is how many seconds are between two looks at whether files have changed, and `again`
    after how many a change that couldn't be taken over is tried again.
    """

    looking = 1.0
    again = 30.0

    def __init__(self, backend: Backend[R], metrics: Metrics) -> None:
        self.backend = backend
        self.metrics = metrics
        metrics.waiting.set_function(lambda: backend.state.waiting)
        metrics.running.set_function(lambda: backend.state.running)
        self.started = int(time.time())
        self.routings = RoutingCache(backend)
        self.checked: dict[str, tuple[Pool, Confusions]] = {}  # models whose prompts were checked
        # One for each base: a template that takes long keeps nobody else's requests waiting.
        self._texts: dict[PreTrainedTokenizerBase | None, Texts] = {}
        for model in self.models.values():
            self._texts_of(model)
            if backend.limits.shadow and model.experts:
                check_shadow(model)

    @property
    def models(self) -> Mapping[str, Served[R]]:
        return self.backend.models

    def check_allowed(self, by_key: Collection[frozenset[str]]) -> None:
        """Raise PhatgooseError where the experts that keys may use can't be kept to."""
        if not by_key:
            return
        names = set[str]()
        for model in self.models.values():
            names.update(model.experts)
            if model.experts and not model.runner.frame.looks_prompts_up:
                # It is composed of some of its experts.
                overridden(model, RoutingOverride(allowed=model.experts))
        if not names.issuperset(frozenset[str]().union(*by_key)):
            # Without the name, which may be the end of a key.
            raise ConfigError(
                f"A key in {API_KEYS} (KEY=EXPERT+EXPERT) names an expert that isn't served; "
                f"there are {', '.join(sorted(names))}."
            )

    @property
    def text_processes(self) -> list[UntrustedText]:
        return [texts.process for texts in self._texts.values() if texts.process is not None]

    def start(self) -> None:
        self.backend.start()
        for process in self.text_processes:
            process.start()

    async def close(self) -> None:
        for process in self.text_processes:
            process.close()
        await self.backend.close()

    async def health(self) -> JSONResponse:
        state = self.backend.state
        reading = 0  # prompts
        for _, turns in self._texts.values():
            reading += turns.most - turns.free + len(turns)
        health: Fields = {
            "status": "ok" if state.is_well else "failing",
            "reading": reading,
            "waiting": state.waiting,
            "running": state.running,
        }
        if self.backend.upstream:
            health["upstream"] = "ok" if state.is_well else "away"
            health["upstreams"] = state.upstreams
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

    async def route(
        self, body: protocol.RouteRequest, http: Request, explain: bool = False
    ) -> Fields:
        """What would be chosen for a request's prompts, and nothing more. Raises ApiError."""
        async with self._prepared(body, http) as (model, cached, prepared):
            runner = cached.runner
            if not runner.chooser:
                message = (
                    f"{body.model!r} makes no choice for a prompt: router "
                    f"{body.router or model.routing.router} chooses for every token, or always "
                    f"the same."
                )
                raise bad_request(message, body.changed or "model")
            chooser = runner.chooser

            def choose(_: float) -> list[Chosen]:
                choices = runner.choose(prepared)
                if not (explain and model.prompts):
                    return choices
                return [with_nearest(chosen, chooser, model.pool) for chosen in choices]

            choices = await self.backend.choosing.run(prepared.client, prepared.deadline, choose)
        rows = [self.backend.applied(chosen).to_dict() for chosen in choices]
        self.metrics.count(model.settings.name, choices)
        return {
            "object": "route",
            "model": body.model,
            "router": chooser.name,
            "choices": [{"index": number, **row} for number, row in enumerate(rows)],
        }

    async def cards(self, http: Request) -> Fields:
        data = [await self.card(name, http) for name in self._all_names(http)]
        return {"object": "list", "data": data}

    async def card(self, name: str, http: Request) -> Fields:
        """What is told of a model, or of one expert. Raises ApiError."""
        model, mixture = self._find(name, http)
        frame = model.runner.frame
        experts = list(usable(model.experts, http) if mixture is None else mixture)
        prompts = [model.prompts[expert] for expert in experts if expert in model.prompts]
        is_routed = mixture is None and bool(model.experts)
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "phatgoose",
            "base": protocol.without_paths(model.bases[-1]),
            "router": model.routing.router if is_routed else None,  # None for a base alone
            "k": model.routing.k if is_routed else None,
            "experts": experts,
            "learns": self.backend.limits.learn,
            "prompts": prompts[:SHOWN],
            "traces": is_routed and not self.backend.upstream,  # they can be asked for
            "context": frame.context,
            "chat": frame.tokenizer is None or bool(frame.tokenizer.chat_template),
        }

    def _models_for(self, http: Request) -> dict[str, Served[R]]:
        """The models without those of whose experts the client may use none."""
        models = {}
        for name, model in self.models.items():
            if not model.experts or usable(model.experts, http):
                models[name] = model
        return models

    def _all_names(self, http: Request) -> list[str]:
        models = self._models_for(http)
        if not self.backend.upstream:
            return list(models)
        experts = dict[str, None]()
        for model in models.values():
            experts |= dict.fromkeys(usable(model.experts, http))
        return [protocol.ANY_MODEL, *models, *experts]

    def _find(self, name: str, http: Request) -> tuple[Served[R], Weights | None]:
        """The model that a request names, and where it names one expert, its mixture.

        An expert is EXPERT or MODEL:EXPERT. In front of an engine there are also its base alone,
        and "auto", the first model. Raises ApiError.
        """
        models = self._models_for(http)
        if name in models:
            return models[name], None
        if self.backend.upstream and name == protocol.ANY_MODEL:
            for model in models.values():
                return model, None
        for model in models.values():
            expert = name.removeprefix(f"{model.settings.name}:")
            if expert in usable(model.experts, http):
                return model, {expert: 1.0}
            if self.backend.upstream and name in model.bases:
                return model, {}
        names = self._all_names(http)
        listed = shortened(", ".join(names), 300)[1:-1]
        message = f"There is no model {shortened(name, MOST_NAME)}; there are {listed}."
        hint = closest(name[:MOST_NAME], names)  # bounded: it compares the name with each
        raise ApiError(404, f"{message}{hint}", code="model_not_found", param="model")

    async def _answer(
        self, request: AnyRequest, http: Request, builder: Callable[..., Builder] = Builder
    ) -> Response:
        """The answer to a request, whole or as a stream. Raises ApiError when there is none."""
        # The event loop only waits here: slow work is done in threads, a few at a time.
        reply, headers = await self._begin(request, http, builder)
        if request.stream:
            await reply.wait_for_first(http)
            return EventStream(reply, headers)  # which closes the reply
        with closing(reply):
            content = await unless_gone(http, reply.whole())
        return Response(content, media_type="application/json", headers=headers)

    async def _begin(
        self, request: AnyRequest, http: Request, builder: Callable[..., Builder]
    ) -> tuple[Reply, dict[str, str]]:
        """A reply whose answers are being computed, to be closed, and what is told before them."""
        is_shadowed = self.backend.limits.shadow
        async with self._prepared(request, http, builder, is_shadowed) as (model, cached, prepared):
            shadow = None
            if is_shadowed and model.experts:
                shadow = await self._would_choose(model, prepared)
            reply, chosen = await self.backend.begin(prepared, cached.runner)
            cached.requests += 1  # and it is until the reply is closed
        name = model.settings.name
        reply.at_end += [partial(self._count, name, reply), cached.release]
        by_base = [a for a in prepared.answers if chosen is not None and not chosen[a.row].weights]
        self.metrics.by_base.labels(name).inc(len(by_base))
        if is_shadowed:
            self.metrics.count(name, shadow or ())
        elif prepared.mixture is None:
            self.metrics.count(name, chosen or ())
        return reply, headers_of(prepared, chosen, shadow)

    async def correct(self, body: protocol.CorrectionRequest, http: Request) -> Fields:
        """Keep a correction in the pool's folder, of which later choices know. Raises ApiError."""
        if not self.backend.limits.learn:
            raise ApiError(403, "This server takes no corrections: it wasn't started with --learn.")
        if http.scope[ALLOWED] is not None:
            raise ApiError(403, "This key is for some experts only, and may not correct choices.")
        model, _ = self._find(body.model, http)
        if body.expert not in model.experts:
            hint = closest(body.expert[:MOST_NAME], model.experts)
            message = f"{body.model!r} has no expert {shortened(body.expert)}.{hint}"
            raise bad_request(message, "expert")
        correction = Correction(body.expert, body.prompt)
        await in_thread(partial(correct, Path(model.settings.place), correction))
        return {"object": "correction", **body.model_dump()}

    async def check(self, model: str, http: Request) -> Fields:
        """Whose example prompts become once they are left out of their experts. Raises ApiError."""
        if http.scope[ALLOWED] is not None:
            raise ApiError(403, "This key is for some experts only, and may not see all prompts.")
        served, _ = self._find(model, http)
        if not is_checkable(served):
            raise bad_request(f"{model!r} isn't routed by {DISCRIMINANT}.", "model")
        deadline = Deadline(self.backend.limits.timeout)
        work = partial(self._checked, served)
        try:
            checked = await self.routings.turns.run(http.scope[CLIENT], deadline, lambda _: work())
        except PhatgooseError as error:
            raise bad_request(protocol.for_clients(error), "model") from error
        return {
            "object": "check",
            "model": model,
            "summary": checked.summary,
            **checked.to_dict(),
        }

    def _checked(self, model: Served[R]) -> Confusions:
        name = model.settings.name
        pool, checked = self.checked.get(name, (None, None))
        if checked is None or pool is not model.pool:
            checked = confusions(model.pool, model.settings.routing.reader)
            self.checked[name] = model.pool, checked
        return checked

    async def check_new(self) -> None:
        """Log what comes of checks of pools whose prompts were read at start, which is slow."""
        for name, model in self.models.items():
            if model.prompts and is_checkable(model) and model.pool.was_read:
                with suppress(PoolError):  # too few prompts
                    checked = await in_thread(partial(self._checked, model))
                    log.warning("%s: %s (its page tells more)", name, checked.summary)

    async def _would_choose(
        self, model: Served[R], prepared: PreparedRequest
    ) -> list[Chosen] | None:
        """What the router of `model` chooses; None where it can't now, which harms no answer."""
        chosen_for = replace(prepared, mixture=None)
        name = prepared.request.model
        try:
            chosen = await self.backend.choosing.run(
                prepared.client, prepared.deadline, lambda _: model.runner.choose(chosen_for)
            )
        except Exception as error:
            log.warning("shadow: nothing was chosen for a request to %s: %s", name, error)
            return None
        for row in chosen:
            margin = "" if row.margin is None else f", {row.margin:+.2f} above {row.runner_up}"
            log.info("shadow: a request to %s would go to %s%s", name, in_a_line([row]), margin)
        return chosen

    @asynccontextmanager
    async def _prepared(
        self,
        request: AnyRequest,
        http: Request,
        builder: Callable[..., Builder] = Builder,
        is_shadowed: bool = False,
    ) -> AsyncIterator[tuple[Served[R], CachedRouting[R], PreparedRequest]]:
        """The model of a request, its routing, which is needed inside, and the request, read.

        If it `is_shadowed`, the base answers what names no expert, and routers read it anyway.
        """
        deadline = Deadline(self.backend.limits.timeout)
        client = http.scope[CLIENT]
        model, expert = self._find(request.model, http)
        mixtures = [mixture for mixture in (expert, request.weights) if mixture is not None]
        if len(mixtures) + (request.override != RoutingOverride()) > 1:
            message = "An expert's name, weights, and other fields of routing exclude each other."
            raise bad_request(message, request.changed)
        self.backend.check(request, model)
        mixture = mixtures[0] if mixtures else None
        if is_shadowed and model.experts and request.override == RoutingOverride():
            mixture = mixture or {}
        cached = await self._routing(request, model, mixture, http, deadline)
        with cached:  # it is needed while prompts are read
            process, turns = self._texts_of(model)
            frame = cached.runner.frame
            reads = frame.looks_prompts_up and mixture is None
            frame = replace(frame, looks_prompts_up=reads or is_shadowed)
            reader = RequestReader(frame, self.backend.limits, process)
            prompts = await turns.run(client, deadline, partial(reader.prompts, request))
            answers = reader.answers(request, prompts)
            experts = usable(model.experts, http)
            trace = {name: http.headers.get(name, "") for name in TRACE}
            trace = {name: text for name, text in trace.items() if re.fullmatch(PLAIN, text)}
            yield (
                model,
                cached,
                PreparedRequest(
                    request, mixture, prompts, answers, client, deadline, experts, builder, trace
                ),
            )

    async def _routing(
        self,
        request: AnyRequest,
        model: Served[R],
        mixture: Weights | None,
        http: Request,
        deadline: Deadline,
    ) -> CachedRouting[R]:
        """How `model` routes for a request, by experts that its client may use. Raises ApiError."""
        override = request.override
        experts = usable(model.experts, http)
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

    def _texts_of(self, model: Served[R]) -> Texts:
        tokenizer = model.runner.frame.tokenizer
        if tokenizer not in self._texts:
            process = None if tokenizer is None else UntrustedText(tokenizer)
            self._texts[tokenizer] = Texts(process, Turns(1, self.backend.limits.max_queue))
        return self._texts[tokenizer]

    async def follow(self) -> None:
        """Open a model again when the files at its place have changed, and have stopped to.

        The new one takes the old one's place when it is complete: requests that run finish on the
        old one. One that can't be opened leaves it where it is, and is tried again.
        """
        last = {name: model.seen for name, model in self.models.items()}
        earliest = dict.fromkeys(last, 0.0)  # when one is tried again
        while True:
            await asyncio.sleep(self.looking)
            for name, model in self.models.items():
                try:
                    before = last[name]
                    last[name] = now = await in_thread(partial(seen_at, model.settings.place))
                    if before != now:
                        earliest[name] = 0.0
                    elif now != model.seen and time.monotonic() >= earliest[name]:
                        earliest[name] = time.monotonic() + self.again
                        new = await in_thread(partial(model.reopened, self.models.values()))
                        await self.backend.take({**self.models, name: new})
                        self.routings.cached.clear()
                        log.warning("%s has changed, and is served as it is now", name)
                except Exception as error:  # also where there are too many threads
                    words = "%s has changed, and is served as it was: %s"
                    log.warning(words, name, one_line(error))

    def _count(self, name: str, reply: Reply) -> None:
        usage = reply.builder.usage
        self.metrics.prompt.labels(name).inc(usage["prompt_tokens"])
        self.metrics.generated.labels(name).inc(usage["completion_tokens"])


def check_shadow(model: Served[R]) -> None:
    """Raise PhatgooseError for a model whose router makes no choice for prompts."""
    if not model.runner.frame.looks_prompts_up:
        raise ConfigError(
            f"--shadow needs routers that choose for a prompt, and {model.settings.name!r} has "
            f"{model.routing.router}; give another --router."
        )
    _ = model.pool  # a saved model's experts can't be left to the request


def is_checkable(model: Served[R]) -> bool:
    """Whether a model's prompts are routed as the check of example prompts routes them."""
    chooser = model.runner.chooser
    return chooser is not None and chooser.name == DISCRIMINANT


def usable(experts: Sequence[str], http: Request) -> tuple[str, ...]:
    """Those of `experts` that the client of a request may use."""
    allowed = http.scope[ALLOWED]
    if allowed is None:
        return tuple(experts)
    return tuple(expert for expert in experts if expert in allowed)


def seen_at(place: str) -> Seen:
    """The files of a pool or a model with their sizes and times; nothing for one on the Hub."""
    inside = glob.escape(place)
    files = []
    inner = sorted(glob.glob(f"{inside}/*") + glob.glob(f"{inside}/*/*"))  # links may loop
    for path in (place, *inner):
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


def left_to_base(settings: ServedModel, pool: Pool) -> tuple[str, ...]:
    """The experts whose prompts the base answers: those no better than it by their own record.

    They are named in the log, and unless `settings.only_better` they answer all the same.
    """
    gains = {expert.name: expert.info.gain for expert in pool.experts}
    worse = {name: gain for name, gain in gains.items() if gain and not gain.is_sure}
    if worse:
        listed = ", ".join(f"{name} ({gain})" for name, gain in worse.items())
        ending = "the base answers their prompts" if settings.only_better else "see --only-better"
        log.warning("No better than the base by their own records: %s; %s.", listed, ending)
    if not settings.only_better:
        return ()
    unknown = ", ".join(name for name, gain in gains.items() if gain is None)
    if unknown:
        log.warning("No gain over the base is recorded (phatgoose stats) of %s.", unknown)
    return tuple(worse)


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
        self.release()

    def release(self) -> None:
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
            unused = [key for key, other in self.cached.items() if not other.requests]
            if not unused:
                raise busy("Too many different routings are in use; try again in a while.", 5)
            del self.cached[unused[0]]
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
