"""The backend that chooses experts for prompts, and has another engine answer with them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from ....config import Serving
from ....errors import PhatgooseError
from ....routing.routers.registry import WEIGHTS
from ..guards import Metrics
from ..protocol import (
    AnyRequest,
    ApiError,
    ChatRequest,
    RoutingReport,
    TokenRouting,
    bad_request,
    for_clients,
)
from ..replies import Builder, Progress, Reply
from ..requests import Asked
from ..service import Backend, State, Turns, in_thread
from ..settings import ServedModel, Upstream
from .choosing import Choosing, ChosenPool, PromptChooser, ReadingBases, Weights, adapters_of
from .engines import Engine, connected
from .link import Link

EXPERTS, CHOSEN = "X-Phatgoose-Experts", "X-Phatgoose-Chosen"
MOST_OF_A_HEADER = 4000  # characters
MOST_FORWARDED = 256  # answers that the engine computes at once
WAITING = 64  # pieces that are held for a client that reads slowly
SECONDS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.2, 0.5, 1, 5)

log = logging.getLogger(__name__)


def open_gateway(
    models: Sequence[ServedModel], upstream: Upstream, limits: Serving, metrics: Metrics
) -> EngineBackend:
    """The backend of these pools, whose experts the engine at `upstream` holds from now on.

    Raises ConfigError for models that are no pools, routers that don't choose by a prompt alone,
    and what `connected` does.
    """
    bases = ReadingBases()
    pools = {settings.name: ChosenPool(settings, bases) for settings in models}
    return EngineBackend(pools, connected(upstream, adapters_of(pools.values())), limits, metrics)


class EngineBackend(Backend):
    """The pools, and the engine that has their experts."""

    upstream = True

    def __init__(
        self, models: dict[str, ChosenPool], engine: Engine, limits: Serving, metrics: Metrics
    ) -> None:
        self.models, self.engine, self._limits = models, engine, limits
        for each in models.values():
            each.engine = engine
        words = "Requests that the engine didn't answer: away, broken (off), busy or failed."
        failures = metrics.counter("upstream_failures", words, "how")
        words = "Seconds for the choice of experts, waiting included."
        self._seconds = metrics.histogram("choice_seconds", words, SECONDS)
        words = "Answers by the expert that counts most."
        self._chosen = metrics.counter("chosen", words, "expert")
        self.link = Link(engine, adapters_of(models.values()), failures)
        self.turns, self._choosing = Turns(MOST_FORWARDED), Choosing()

    def start(self) -> None:
        self.link.open()

    async def close(self) -> None:
        await self.link.close()

    @property
    def state(self) -> State:
        return State(self.link.is_well, self.turns.waiting, self.turns.running)

    def limits_of(self, limits: Serving) -> Serving:
        context = self.engine.adapters.context
        return replace(limits, max_batch_tokens=context) if context else limits

    async def reopened(self, name: str) -> ChosenPool:
        """The pool as its place has it now, its experts in the engine. Raises ConfigError."""
        opened: ChosenPool = await in_thread(self.models[name].reopened)
        experts = adapters_of([opened, *(e for key, e in self.models.items() if key != name)])
        async with self.engine.lock:
            await self.engine.prepare(self.link.client, experts)
            self.link.experts = experts
        opened.engine = self.engine
        return opened

    def check(self, request: AnyRequest, model: ChosenPool) -> None:
        """Raise ApiError for what engines don't do."""
        if request.wants_trace:
            raise bad_request("An engine behind a gateway doesn't report layers.", "routing")
        weights = [weight for weight in (request.weights or {}).values() if weight]
        if not self.engine.mixes and weights not in ([], [1.0]):
            message = f"{self.engine.label} applies one expert with the weight 1; it can't mix."
            raise bad_request(message, "weights")

    async def begin(
        self, asked: Asked, runner: PromptChooser, prepared: None
    ) -> tuple[Reply, dict[str, str]]:
        chosen = await self._chosen_for(asked, runner)
        sent = chosen if self.engine.mixes else [w if len(w) == 1 else first_of(w) for w in chosen]
        for weights in map(first_of, chosen):
            for name in weights:
                self._chosen.labels(name).inc()
        if (waiting := len(asked.answers) - self.turns.free) > 0:
            self.turns.queue.check_room(asked.client, waiting, self._limits.max_queue)
        router = runner.router.name
        if asked.mixture is not None:
            router = "" if asked.request.weights is None else WEIGHTS
        report = _reporter(asked, sent, chosen, router)
        reply = Reply(Builder(asked, report), asked.deadline, WAITING)
        for number, answer in enumerate(asked.answers):
            bringing = self._bring(number, asked, sent[answer.row], reply)
            reply.on_close.append(asyncio.ensure_future(bringing).cancel)
        headers = {EXPERTS: "; ".join(map(named, sent))}
        if chosen != sent:
            headers[CHOSEN] = "; ".join(map(named, chosen))
        return reply, {name: value[:MOST_OF_A_HEADER] for name, value in headers.items()}

    async def _chosen_for(self, asked: Asked, runner: PromptChooser) -> list[Weights]:
        """Each prompt's experts with their weights."""
        if asked.mixture is not None:
            weights = {name: weight for name, weight in asked.mixture.items() if weight}
            return [weights] * len(asked.prompts)
        begun = time.perf_counter()
        questions = [prompt.asked for prompt in asked.prompts]
        try:
            chosen = await self._choosing.choose(runner, questions, asked.client, asked.deadline)
        except PhatgooseError as error:
            raise ApiError(500, for_clients(error)) from error
        self._seconds.observe(time.perf_counter() - begun)
        return chosen

    async def _bring(self, number: int, asked: Asked, sent: Weights, reply: Reply) -> None:
        """Put what the engine answers into the reply's events, and an error at the end."""
        try:
            await self.turns.take(asked.client, asked.deadline)
            try:
                pieces = self.link.answer(lambda: self._body(number, asked, sent), number, asked)
                async with aclosing(pieces):
                    async for progress in pieces:
                        await reply.events.put(progress)
            finally:
                self.turns.pass_on()
        except ApiError as error:
            await reply.events.put(error)
        except Exception:
            log.exception("An answer could not be brought.")
            await reply.events.put(ApiError(500, "The server failed; its log says more."))

    def _body(self, number: int, asked: Asked, sent: Weights) -> dict[str, Any]:
        """What the engine is asked for an answer."""
        request, (*_, prompt, decoding) = asked.request, asked.answers[number]
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
            form = request.response_format.model_dump(by_alias=True, exclude_unset=True)
            body["response_format"] = form
        if isinstance(request, ChatRequest):
            body["messages"] = request.plain_messages
            if decoding.logprobs is not None:
                body |= {"logprobs": True, "top_logprobs": decoding.logprobs}
        else:
            body["prompt"] = prompt.text
            if decoding.logprobs is not None:
                body["logprobs"] = decoding.logprobs
        return self.engine.adapted(body | self.engine.fields(sent), is_chat="messages" in body)


def _reporter(
    asked: Asked, sent: Sequence[Weights], chosen: Sequence[Weights], router: str
) -> Callable[[Progress], RoutingReport | None]:
    """What is reported of the routing: an engine's pieces stand for tokens."""

    def report(progress: Progress) -> RoutingReport | None:
        if not asked.request.routing:
            return None
        row = asked.answers[progress.choice].row
        weights, all_weights = (
            {name: round(weight, 4) for name, weight in each[row].items()}
            for each in (sent, chosen)
        )
        token = TokenRouting(token=progress.text, part="answer", stream="decoder", experts=weights)
        return RoutingReport(
            router=router,
            k=len(all_weights) or None,
            experts=list(all_weights),
            tokens=[token] if progress.text else [],
            summary=weights,
            chosen=all_weights if chosen[row] != sent[row] else None,
        )

    return report


def first_of(weights: Mapping[str, float]) -> Weights:
    """The heaviest expert alone, with the weight 1; nothing of nothing."""
    return {max(weights, key=lambda name: weights[name]): 1.0} if weights else {}


def named(weights: Mapping[str, float]) -> str:
    """Experts and weights as a header has them: reviews=0.71, trivia=0.29."""
    ordered = sorted(weights.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{name}={weight:.4g}" for name, weight in ordered)
