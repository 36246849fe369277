"""Pools whose experts are chosen for prompts, here, while an engine answers with them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ....base import Base, check_base, load_tokenizer
from ....config import Routing
from ....errors import ConfigError
from ....experts.expert import trained_in_chats
from ....experts.pool import Pool
from ....routing.compose import open_prompt_router, require_pool
from ....routing.composition import resolve_base
from ....routing.routers.auto import BY_PROMPT, first_allowed
from ....routing.routers.prompt import PromptRouter
from ....routing.routers.registry import AUTO, WEIGHTS
from ....tasks.encoding import added_tokens
from ..protocol import Deadline
from ..requests import Frame
from ..service import in_thread, numbered
from ..settings import ServedModel
from .engines import Adapter, Engine

TOGETHER = 32  # prompts for which experts are chosen at once

Weights = dict[str, float]  # of experts by name, best first


@dataclass(frozen=True)
class PromptChooser:
    """A prompt router, with the base's weights where it reads prompts with them."""

    router: PromptRouter
    base: PreTrainedModel | None
    pool: ChosenPool

    @property
    def frame(self) -> Frame:
        return self.pool.frame

    def choose(self, prompts: Sequence[Sequence[int]]) -> list[Weights]:
        return self.router.choose(prompts, self.base).named(self.router.experts)


class ChosenPool:
    """A pool whose experts are chosen for prompts, and what it takes to choose otherwise.

    `engine` is known once the pool is served.
    """

    def __init__(self, settings: ServedModel, bases: ReadingBases) -> None:
        require_pool(settings.place)
        self.settings, self._bases = settings, bases
        self.pool = Pool.open(settings.place).select(settings.keep, settings.leave_out)
        others = [each.name for each in self.pool.experts if each.kind != "lora"]
        if others:
            raise ConfigError(
                f"Engines apply LoRAs, and {', '.join(others)} are none; leave these experts out "
                f"(--leave-out)."
            )
        self.tokenizer = bases.tokenizer(settings, self.pool)
        self.in_chats = trained_in_chats(self.pool.records())
        self.engine: Engine | None = None
        routing = first_allowed(settings.routing or Routing(), self.pool, BY_PROMPT)
        self.routing = numbered(routing, len(self.pool))
        self.runner = self.composed(self.pool, self.routing)

    def reopened(self) -> ChosenPool:
        """The pool as its place has it now."""
        return ChosenPool(self.settings, self._bases)

    @property
    def frame(self) -> Frame:
        context = self.engine.adapters.context if self.engine else None
        added = added_tokens(self.tokenizer, is_encoder_decoder=False)
        return Frame(
            self.tokenizer,
            context,
            added,
            looks_prompts_up=True,
            in_chats=self.in_chats,
        )

    @property
    def experts(self) -> tuple[str, ...]:
        return self.pool.names

    @property
    def names(self) -> tuple[str, ...]:
        bases = (self.engine.adapters.base,) if self.engine else ()
        return self.settings.name, self.pool.base.id, *bases

    def composed(self, pool: Pool, routing: Routing, others: Sequence[Any] = ()) -> PromptChooser:
        router = open_prompt_router(pool, self.tokenizer, routing=routing)
        if router.name != WEIGHTS and not router.router.per_input:
            raise ConfigError(
                f"Router {router.name} also chooses for every token, which engines can't do; use "
                f"discriminant, retrieval or another that chooses by the prompt alone."
            )
        base = self._bases.weights(self.settings, pool) if router.router.reads_base else None
        if base is not None:
            router.choose([[self.tokenizer.eos_token_id or 0]], base)  # it fits, or is refused now
        return PromptChooser(router, base, self)

    def usual(self, pool: Pool) -> str:
        """The router "auto" of these experts."""
        return first_allowed(Routing(AUTO), pool, BY_PROMPT).router


class ReadingBases:
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
            self._bases[key] = resolve_base(settings.base, pool.base, settings.dtype)
        check_base(pool.base, self._bases[key].reference)
        return self._bases[key].model


def _named(settings: ServedModel, pool: Pool) -> tuple[str, str | None]:
    """The base that the operator or else the pool names, and its revision."""
    return (settings.base, None) if settings.base else (pool.base.id, pool.base.revision)


def adapters_of(pools: Iterable[ChosenPool]) -> dict[str, Adapter]:
    """What the engine must have of all pools. Raises ConfigError for two experts of one name."""
    adapters: dict[str, Adapter] = {}
    for expert in (each for pool in pools for each in pool.pool.experts):
        folder = str(expert.directory.resolve())
        other = adapters.setdefault(expert.name, Adapter(folder, expert.info.adapter_sha256))
        if other.folder != folder:
            raise ConfigError(
                f"Two experts are called {expert.name!r}: {other.folder} and {folder}; an engine "
                f"knows them by name, so rename one."
            )
    return adapters


@dataclass(eq=False)
class _Waiting:
    """A request that waits for its experts."""

    chooser: PromptChooser
    prompts: Sequence[Sequence[int]]
    client: str
    weights: asyncio.Future[list[Weights]]


class Choosing:
    """Chooses experts in one thread, for all requests that wait at once; clients take turns."""

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []
        self._is_busy = False

    async def choose(
        self,
        chooser: PromptChooser,
        prompts: Sequence[Sequence[int]],
        client: str,
        deadline: Deadline,
    ) -> list[Weights]:
        """For each prompt its experts' weights. Raises ApiError at the deadline, PhatgooseError."""
        future: asyncio.Future[list[Weights]] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(chooser, prompts, client, future)
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
        # Each client's first, then each one's second; of one turn as they came.
        turns: dict[str, int] = {}
        ranked: list[tuple[int, _Waiting]] = []
        for each in self._waiting:
            turns[each.client] = turn = turns.get(each.client, 0) + 1
            ranked.append((turn, each))
        ordered = [each for _, each in sorted(ranked, key=lambda pair: pair[0])]
        group, count = ordered[:1], len(ordered[0].prompts)
        for each in ordered[1:]:
            count += len(each.prompts)
            if each.chooser is ordered[0].chooser and count <= TOGETHER:
                group.append(each)
        self._waiting = [each for each in self._waiting if each not in group]
        prompts = [list(prompt) for each in group for prompt in each.prompts]
        result = in_thread(lambda: group[0].chooser.choose(prompts))
        self._is_busy = True  # not where no more threads can be started
        result.add_done_callback(lambda done: self._end(group, done))

    def _end(self, group: Sequence[_Waiting], done: asyncio.Future[list[Weights]]) -> None:
        self._is_busy = False
        error = done.exception()
        rows = iter(() if error else done.result())
        for each in group:
            if error is not None and not each.weights.done():
                each.weights.set_exception(error)
            elif error is None:
                weights = [next(rows) for _ in each.prompts]
                if not each.weights.done():
                    each.weights.set_result(weights)
        self._go_on()
