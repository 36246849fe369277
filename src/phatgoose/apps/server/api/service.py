"""What the routes ask for: models by name, and requests turned into jobs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import anyio
from fastapi import Request
from starlette.responses import Response

from ....analysis.places import place_of
from ....config import Serving
from ....errors import PhatgooseError
from ....files.quoting import shortened
from ..api_errors import ApiError, bad_request, for_clients, without_paths
from ..engine.background_composer import BackgroundComposer
from ..engine.generation_engine import GenerationEngine
from ..engine.loaded_models import LoadedModel, LoadedModels, ModelUse, RoutingOverride
from ..engine.model_runner import ModelRunner
from ..guards.request_guard import BODY, CLIENT
from ..metrics import Metrics
from .pending_reply import EventStream, PendingReply, PreparedRequest, whole_answer
from .request_parsing import parsed
from .request_prompts import chat_prompt, completion_prompts, decoding_of
from .request_schema import ChatRequest, CompletionRequest, RoutingDetail
from .response_builders import ChatResponseBuilder, CompletionResponseBuilder, ResponseBuilder
from .response_schema import ModelCard, Sites

__all__ = ["Service"]

PARSERS = 1  # bodies parsed at once: each keeps Python to itself, so that others would only wait
SMALL = 1 << 14  # bytes of a body up to which a thread would take longer to be asked
READERS = 2  # requests turned into tokens at once
SHOWN = 80  # characters of a name that an error repeats

Asked = TypeVar("Asked", CompletionRequest, ChatRequest)


class Service:
    """Models, the engine that computes them, and the limits for both."""

    def __init__(self, models: LoadedModels, limits: Serving) -> None:
        self.models, self.limits = models, limits
        self.metrics = Metrics()
        self.engine = GenerationEngine(limits, self.metrics)
        self.begun = int(time.time())
        self._composer = BackgroundComposer(models, limits.max_routings)
        self._parsers = anyio.CapacityLimiter(PARSERS)
        self._readers = anyio.CapacityLimiter(READERS)

    def start(self) -> None:
        """Begin to compute answers."""
        self.engine.start()

    def stop(self) -> None:
        """Stop computing, and wait a while for what is being composed."""
        self.engine.stop()
        self._composer.stop(self.limits.shutdown_timeout)

    def cards(self) -> list[ModelCard]:
        """What is told of every model."""
        return [self.card(served) for served in self.models]

    def card(self, served: LoadedModel) -> ModelCard:
        """What is told of a model."""
        parts, runner = served.parts, served.runner
        return ModelCard(
            id=served.settings.name,
            created=self.begun,
            base=without_paths(served.base.id),
            router=parts.routing.router if parts else None,
            k=parts.routing.k if parts else None,
            experts=list(parts.experts) if parts else [],
            sites=_sites_of(served),
            context=runner.context,
            chat=bool(runner.tokenizer.chat_template),
        )

    def find(self, name: str) -> LoadedModel:
        """The model called `name`. Raises ApiError when there is none."""
        served = self.models.get(name)
        if served is None:
            known = ", ".join(each.settings.name for each in self.models)
            raise ApiError(
                404,
                f"There is no model {shortened(name, SHOWN)}; there are {known}.",
                code="model_not_found",
                param="model",
            )
        return served

    async def answer(self, wanted: type[Asked], request: Request) -> Response:
        """The answer to a request, whole or as a stream. Raises ApiError when there is none.

        The event loop only waits here: what takes time is done in threads, some at a time.
        """
        body, client = request.scope[BODY], request.scope[CLIENT]
        content = body.content
        if len(content) > SMALL:
            asked = await anyio.to_thread.run_sync(parsed, wanted, content, limiter=self._parsers)
        else:
            asked = parsed(wanted, content)
        body.release()
        served = self.find(asked.model)
        _check_routing(asked, served)
        use = await self._acquire(served, asked, client)
        try:
            prepared = await anyio.to_thread.run_sync(
                self._prepared, asked, use.runner, limiter=self._readers
            )
            done = self._finisher(use, prepared.answers)
            job = PendingReply(self.engine, use.runner, prepared, client, self.limits.timeout, done)
        except BaseException:
            self.models.release(use)
            raise
        if asked.stream:
            return EventStream(job)
        return Response(await whole_answer(job, request), media_type="application/json")

    async def _acquire(
        self, served: LoadedModel, asked: CompletionRequest | ChatRequest, client: str
    ) -> ModelUse:
        wish = RoutingOverride(
            asked.router,
            asked.k,
            None if asked.keep is None else tuple(asked.keep),
            None if asked.leave_out is None else tuple(asked.leave_out),
        )
        try:
            return await self._composer.acquire(served, wish, client, self.limits.timeout)
        except PhatgooseError as error:
            raise bad_request(for_clients(error), "router") from error

    def _prepared(
        self, asked: CompletionRequest | ChatRequest, runner: ModelRunner
    ) -> PreparedRequest:
        answers: ResponseBuilder
        if isinstance(asked, ChatRequest):
            prompt = chat_prompt(asked, runner, self.limits)
            answers = ChatResponseBuilder(asked, runner, [prompt])
        else:
            prompts = completion_prompts(asked, runner, self.limits)
            answers = CompletionResponseBuilder(asked, runner, prompts)
        choices = range(answers.number)
        decodings = [
            decoding_of(asked, answers.prompt_of(choice), runner, self.limits, choice)
            for choice in choices
        ]
        try:
            experts = runner.experts_of([prompt.tokens for prompt in answers.prompts])
        except PhatgooseError as error:
            raise ApiError(500, for_clients(error)) from error
        each = len(decodings) // len(experts)
        return PreparedRequest(answers, decodings, [experts[choice // each] for choice in choices])

    def _finisher(self, use: ModelUse, answers: ResponseBuilder) -> Callable[[], None]:
        def finish() -> None:
            self.models.release(use)
            usage = answers.usage
            self.metrics.used(answers.request.model, usage.prompt_tokens, usage.completion_tokens)

        return finish


def _sites_of(served: LoadedModel) -> Sites | None:
    if served.parts is None:
        return None
    places = [place_of(site) for site in served.parts.layers]
    return Sites(
        layers=list(dict.fromkeys(place.layer_name for place in places)),
        kinds=list(dict.fromkeys(place.kind for place in places)),
    )


def _check_routing(asked: CompletionRequest | ChatRequest, served: LoadedModel) -> None:
    """Raise ApiError for a routing that can't be told: of a base alone, or of unknown sites."""
    if not asked.routing:
        return
    sites = _sites_of(served)
    if sites is None:
        raise bad_request(f"{asked.model!r} is a base model alone; it has no routing.", "routing")
    wish = asked.routing if isinstance(asked.routing, RoutingDetail) else RoutingDetail()
    if wish.layer is not None and wish.layer not in sites.layers:
        layer, layers = shortened(wish.layer, SHOWN), ", ".join(sites.layers)
        raise bad_request(f"There is no layer {layer}; layers are {layers}.", "routing")
    if wish.kind is not None and not any(f".{k}".endswith(f".{wish.kind}") for k in sites.kinds):
        kind, kinds = shortened(wish.kind, SHOWN), ", ".join(sites.kinds)
        raise bad_request(f"There is no kind {kind}; kinds are {kinds}.", "routing")
