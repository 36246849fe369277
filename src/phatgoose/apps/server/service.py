"""What the routes ask for: models by name, and requests turned into jobs."""

from __future__ import annotations

import time
from collections.abc import Callable

import anyio
from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from ...analysis import place_of
from ...config import Serving
from ...errors import PhatgooseError
from .answers import Answers, ChatAnswers, CompletionAnswers
from .decoding import Decoding
from .engine import Engine
from .jobs import EventStream, Job, whole_answer
from .metrics import Metrics
from .prompts import chat_prompt, completion_prompts, decoding_of
from .protocol import ChatRequest, CompletionRequest, RoutingWish
from .refusals import Refusal, bad_request, busy
from .replies import ModelCard, Sites
from .runner import Runner
from .variants import Models, Rerouting, Served, Use

__all__ = ["Service"]


class Service:
    """Models, the engine that computes them, and the limits for both."""

    def __init__(self, models: Models, limits: Serving) -> None:
        self.models, self.limits = models, limits
        self.metrics = Metrics()
        self.engine = Engine(limits.max_queue, limits.max_batch_tokens, self.metrics)
        self.begun = int(time.time())
        self._composers = anyio.CapacityLimiter(1)  # composing takes all cores anyway

    def cards(self) -> list[ModelCard]:
        """What is told of every model."""
        return [self.card(served) for served in self.models]

    def card(self, served: Served) -> ModelCard:
        """What is told of a model."""
        parts, runner = served.parts, served.runner
        return ModelCard(
            id=served.settings.name,
            created=self.begun,
            base=served.base.id,
            router=parts.routing.router if parts else None,
            k=parts.routing.k if parts else None,
            experts=list(parts.experts) if parts else [],
            sites=_sites_of(served),
            context=runner.context,
            chat=bool(runner.tokenizer.chat_template),
        )

    def find(self, name: str) -> Served:
        """The model called `name`. Raises Refusal when there is none."""
        served = self.models.get(name)
        if served is None:
            known = ", ".join(each.settings.name for each in self.models)
            raise Refusal(
                404,
                f"There is no model {name!r}; there are {known}.",
                code="model_not_found",
                param="model",
            )
        return served

    async def answer(self, asked: CompletionRequest | ChatRequest, request: Request) -> Response:
        """The answer to a request, whole or as a stream. Raises Refusal when there is none."""
        served = self.find(asked.model)
        _check_routing(asked, served)
        use = await self._acquire(served, asked)
        try:
            answers, decodings = await run_in_threadpool(self._prepared, asked, use.runner)
            job = Job(
                self.engine,
                use.runner,
                answers,
                decodings,
                self.limits.timeout,
                self._finisher(use, answers),
            )
        except BaseException:
            self.models.release(use)
            raise
        if asked.stream:
            return EventStream(job)
        reply = await whole_answer(job, request)
        return Response(reply.model_dump_json(), media_type="application/json")

    async def _acquire(self, served: Served, asked: CompletionRequest | ChatRequest) -> Use:
        wish = Rerouting(
            asked.router,
            asked.k,
            None if asked.keep is None else tuple(asked.keep),
            None if asked.leave_out is None else tuple(asked.leave_out),
        )
        try:
            ready = await run_in_threadpool(self.models.ready, served, wish)
            if ready is not None:
                return ready
            if self._composers.statistics().tasks_waiting >= self.limits.max_routings:
                raise busy("Too many routings are to be composed; try again in a while.", 5)
            return await anyio.to_thread.run_sync(
                self.models.acquire, served, wish, limiter=self._composers
            )
        except PhatgooseError as error:
            raise bad_request(str(error), "router") from error

    def _prepared(
        self, asked: CompletionRequest | ChatRequest, runner: Runner
    ) -> tuple[Answers, list[Decoding]]:
        answers: Answers
        if isinstance(asked, ChatRequest):
            prompt = chat_prompt(asked, runner, self.limits.max_choices)
            answers = ChatAnswers(asked, runner, [prompt])
        else:
            prompts = completion_prompts(asked, runner, self.limits.max_choices)
            answers = CompletionAnswers(asked, runner, prompts)
        return answers, [
            decoding_of(asked, answers.prompt_of(choice), runner, self.limits, choice)
            for choice in range(answers.number)
        ]

    def _finisher(self, use: Use, answers: Answers) -> Callable[[], None]:
        def finish() -> None:
            self.models.release(use)
            usage = answers.usage
            self.metrics.used(answers.request.model, usage.prompt_tokens, usage.completion_tokens)

        return finish


def _sites_of(served: Served) -> Sites | None:
    if served.parts is None:
        return None
    places = [place_of(site) for site in served.parts.layers]
    return Sites(
        layers=list(dict.fromkeys(place.layer_name for place in places)),
        kinds=list(dict.fromkeys(place.kind for place in places)),
    )


def _check_routing(asked: CompletionRequest | ChatRequest, served: Served) -> None:
    """Raise Refusal for a routing that can't be told: of a base alone, or of unknown sites."""
    if not asked.routing:
        return
    sites = _sites_of(served)
    if sites is None:
        raise bad_request(f"{asked.model!r} is a base model alone; it has no routing.", "routing")
    wish = asked.routing if isinstance(asked.routing, RoutingWish) else RoutingWish()
    if wish.layer is not None and wish.layer not in sites.layers:
        raise bad_request(
            f"There is no layer {wish.layer!r}; layers are {', '.join(sites.layers)}.", "routing"
        )
    if wish.kind is not None and not any(f".{k}".endswith(f".{wish.kind}") for k in sites.kinds):
        raise bad_request(
            f"There is no kind {wish.kind!r}; kinds are {', '.join(sites.kinds)}.", "routing"
        )
