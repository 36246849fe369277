"""What the routes call: finds the model, starts a request, follows it to its reply.

One request while its answers are computed: whole or as a stream.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple, TypeVar

import anyio
from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ...analysis.routing_distribution import layers_and_kinds, site_label
from ...base.untrusted_text import UntrustedText
from ...config import Serving
from ...errors import PhatgooseError
from ...files.strict import shortened
from .api_errors import CLIENT_GONE, ApiError, Deadline, bad_request, for_clients, without_paths
from .engine import GenerationEngine
from .guards import CLIENT
from .guards import REQUEST_BODY as BODY
from .metrics import Metrics
from .models import LoadedModel, ModelRunner, RoutingOverride
from .readers import Readers
from .requests import PreparedRequest, RequestPreparer, parsed
from .responses import ResponseBuilder, builder_of
from .routing_cache import RoutingCache
from .schema import ChatRequest, CompletionRequest, Health, ModelCard, Sites
from .sequences import ActiveSequence, Failure, Progress

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


# -------------------------------------------------------------------------------------------------
# What the routes call: finds the model, prepares the request, starts it.
# -------------------------------------------------------------------------------------------------

PARSERS = 1  # bodies parsed at once: parsing holds Python's lock, so more threads would only wait
SMALL = 1 << 14  # bytes of a body that is parsed sooner than a thread is started
READERS = 2  # requests for which experts are looked up at once
STUCK = 30.0  # seconds after which a reader won't come back: three times what its limits allow
SHOWN = 80  # characters of a name that an error repeats

Wanted = TypeVar("Wanted", CompletionRequest, ChatRequest)


class Service:
    """The models, the engine that computes their answers, and the limits for both."""

    def __init__(self, models: Mapping[str, LoadedModel], limits: Serving) -> None:
        self.models, self.limits = models, limits
        self.metrics = Metrics()
        self.engine = GenerationEngine(limits, self.metrics)
        self.begun = int(time.time())
        self.routings = RoutingCache(models, limits.max_routings)
        self._parsers = anyio.CapacityLimiter(PARSERS)
        self._lookups = Readers(READERS)
        tokenizers = [loaded.runner.tokenizer for loaded in models.values()]
        # One for each base: a template that takes long keeps nobody else's requests waiting.
        self._texts = {id(each): _Texts(UntrustedText(each), Readers(1)) for each in tokenizers}

    def start(self) -> None:
        """Begin to compute answers."""
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
        """Whether answers are computed, and what is going on."""
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
        """The cards of all models."""
        return [self.card(loaded) for loaded in self.models.values()]

    def card(self, loaded: LoadedModel) -> ModelCard:
        """What clients can read about a model."""
        parts, runner = loaded.parts, loaded.runner
        return ModelCard(
            id=loaded.settings.name,
            created=self.begun,
            base=without_paths(loaded.base.id),
            router=parts.routing.router if parts else None,
            k=(parts.router.k or None) if parts else None,
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
        """The answer to a request, whole or as a stream. Raises ApiError when there is none.

        The event loop only waits here: slow work is done in threads, a few at a time.
        """
        deadline = Deadline.after(self.limits.timeout)
        body, client = http.scope[BODY], http.scope[CLIENT]
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
                self.metrics.count_tokens(
                    request.model, usage.prompt_tokens, usage.completion_tokens
                )

            reply = PendingReply(self.engine, builder, client, deadline, done)
        except BaseException:
            found.release()
            raise
        if request.stream:
            return EventStream(reply)
        return Response(await whole_answer(reply, http), media_type="application/json")

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
        read = partial(preparer.prompts, request)
        prompts = await texts.readers.run(client, deadline, read)
        if not runner.looks_prompts_up:
            return preparer.prepare(request, prompts)
        prepare = partial(preparer.prepare, request, prompts)
        return await self._lookups.run(client, deadline, lambda _: prepare())


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
