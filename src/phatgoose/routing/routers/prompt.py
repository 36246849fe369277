"""Routers that choose for a whole prompt: features of it, scores of them, experts and weights.

A `PromptRouter` needs no composed model (`compose.open_prompt_router` makes one of a pool). In a
routed model the sites follow it through a `RoutingContext`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import PoolError, RoutingError
from ...experts.kind import dense_weights
from ...experts.pool import Pool
from ...tasks.batching import PromptReading, read_prompts
from ...tasks.embeddings import prompt_texts
from ..context import Choice, base_alone
from .router import Router, RoutingDecision, Scores, SiteRouter, highest

OWNERS = "owners"  # among tables, whose experts the rows of the others are

Prompts = Sequence[str | Sequence[int]]  # text, or tokens as the model reads them
Tokenizer: TypeAlias = "PreTrainedTokenizerBase | None"
Then: TypeAlias = "Callable[[Tensor], Tensor] | None"
Base: TypeAlias = "PreTrainedModel | None"
Known = Mapping[str, Any]  # what an evaluation says of prompts: their task and examples


@dataclass(frozen=True)
class Tables:
    """What a prompt router knows of its experts, as it is saved with a model (docs/format.md).

    `names` are the pool's in order. `tensors` have a row for each expert, or any number of rows
    whose experts are `owners` among them; `info` is JSON.
    """

    names: tuple[str, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    def saved(self) -> dict[str, Tensor]:
        return {f"lookup.{name}": tensor for name, tensor in self.tensors.items()}

    def grown(self, more: Tables) -> Tables:
        """These experts and `more`, in order. Raises PoolError when they can't be compared."""
        forms = [
            {n: [*t.shape[1:]] for n, t in each.tensors.items()} | {"by": each.info.get("embedder")}
            for each in (more, self)
        ]
        if forms[0] != forms[1]:
            raise PoolError(
                f"The new experts' statistics are {forms[0]}, those there {forms[1]}; measure them "
                f"again."
            )
        # Owners are indices, which go on from the experts before.
        owners = {OWNERS: len(self.names)}
        tensors = {
            name: torch.cat([rows, more.tensors[name] + owners.get(name, 0)])
            for name, rows in self.tensors.items()
        }
        return Tables((*self.names, *more.names), tensors, self.info)

    def shrunk(self, place: Tensor) -> Tables:
        """The tables with experts at their new index in `place` [E]; -1 if an expert leaves."""
        names = tuple(name for name, z in zip(self.names, place.tolist(), strict=True) if z >= 0)
        owners = place[self.tensors[OWNERS]] if OWNERS in self.tensors else place
        tensors = {name: rows[owners >= 0] for name, rows in self.tensors.items()}
        if OWNERS in tensors:
            tensors[OWNERS] = owners[owners >= 0]
        return Tables(names, tensors, self.info)


@dataclass(frozen=True)
class ByPrompt(Router):
    """The base of routers that choose experts for a whole prompt.

    They make `tables` of a pool, which are saved with a model; `ready` turns them into whatever
    scores are made with. Of prompts they make `features`, and of these `prompt_scores`. The k best
    act, weighted by the softmax of their scores over the setting `temperature`, if there is one.
    """

    per_input, by_token = True, False
    prompt_sizes: ClassVar[Mapping[str, str]] = {}  # of the tables, as `sizes`; M if by "owners"
    reads_base: ClassVar[bool] = False  # True where `features` need the base
    chooses: ClassVar[bool] = True  # False where weights are scores of all experts

    @property
    def prompt_k(self) -> int:
        """How many experts a prompt gets."""
        return self.k

    def tables(self, pool: Pool, scores: Scores | None = None) -> Tables:
        """What there is to know of the experts of `pool`.

        Raises PoolError when an expert lacks what it needs, ConfigError without `scores` where they
        are needed.
        """
        return Tables(pool.names)

    def ready(self, tables: Tables) -> Any:
        """What to score with. Raises RoutingError and ConfigError for tables that are no use."""
        return tables

    def features(self, chooser: PromptRouter, prompts: Prompts, base: Base) -> Any:
        """What scores go by: a tensor [prompts, ..], or a pair of them."""
        raise NotImplementedError

    def prompt_scores(self, features: Any, ready: Any) -> Tensor:
        """The score of each prompt and expert, float32 [prompts, E], or [prompts, blocks, E]."""
        raise NotImplementedError

    def score(self, chooser: PromptRouter, prompts: Prompts, base: Base) -> Tensor:
        return self.prompt_scores(self.features(chooser, prompts, base), chooser.ready)

    def choice(self, scores: Tensor) -> Choice:
        """The k best of each of `scores` [.., E]; k is lowered to E. One has weight 1 exactly."""
        return best_of(scores, self.prompt_k, getattr(self, "temperature", 1.0))

    def choose(self, chooser: PromptRouter, prompts: Prompts, base: Base, known: Known) -> Choice:
        """The choice for each prompt; evaluations say what else is `known` of them."""
        return self.choice(self.score(chooser, prompts, base))

    # At a site: the experts that the context has for each row, as it weighs them.

    def decision(
        self, u: Tensor, table: SiteRouter, active: Tensor | None = None
    ) -> RoutingDecision:
        choice = choice_at(u, table)
        experts = table.position[choice.experts]
        # Absent here, or NOBODY (the base): row 0 with weight 0.
        weights, experts = choice.weights * (experts >= 0), experts.clamp(min=0)
        if active is not None:
            weights = weights * active.gather(1, experts)
        return RoutingDecision(experts, weights)

    def distribution(self, u: Tensor, table: SiteRouter) -> Tensor:
        decision = self.decision(u, table)
        return dense_weights(decision.experts, decision.weights, table.E)


def choice_at(u: Tensor, table: SiteRouter) -> Choice:
    """The experts that were chosen for the prompt of each token of u [T, n]."""
    choice: Choice = table.context.of_each(u, table.sees_all, table.block)
    return choice


def best_of(scores: Tensor, k: int, temperature: float = 1.0) -> Choice:
    """The k best of `scores` [.., E], by the softmax of these over the `temperature`."""
    experts = highest(scores, min(k, scores.shape[-1]))
    return Choice(experts, (scores.gather(-1, experts).float() / temperature).softmax(dim=-1))


@dataclass(frozen=True)
class ReadsBase(ByPrompt):
    """The base of routers whose features are what the base alone makes of a prompt.

    In a routed model every prompt passes once with no expert at work, before it passes with its
    experts.
    """

    reads_base = True

    def reading(self, base: PreTrainedModel, ready: Any) -> PromptReading:
        """What takes the features from passes of `base`."""
        raise NotImplementedError

    def features(
        self, chooser: PromptRouter, prompts: Prompts, base: Base, then: Then = None
    ) -> Tensor:
        """What the base makes of `prompts`, and `then` of that, batch by batch."""
        tokens = chooser.tokens(prompts)
        if not tokens or not all(tokens):
            raise RoutingError(f"Router {self.name} can't choose for an empty prompt, or for none.")
        with base_alone(base):
            return read_prompts(base, tokens, self.reading(base, chooser.ready), then=then)

    def score(self, chooser: PromptRouter, prompts: Prompts, base: Base) -> Tensor:
        # Batch by batch: the features of a whole dataset can be gigabytes.
        then = partial(self.prompt_scores, ready=chooser.ready)
        return self.features(chooser, prompts, base, then)


class PromptRouter:
    """Chooses experts for prompts by a `router`, among the experts in `tables`.

    Some features are of a prompt's text, others what the base makes of it; only these need `base`,
    a model, which may be routed by this router. Prompts are tokens as the model reads them; text is
    tokenised plainly, or where there is no `tokenizer` embedded as it is.
    """

    def __init__(self, router: ByPrompt, tables: Tables, tokenizer: Tokenizer = None) -> None:
        self.router, self.tables, self.tokenizer = router, tables, tokenizer
        self.ready = router.ready(tables)
        self.name, self.k, self.unserved = router.name, router.prompt_k, router.unserved

    @property
    def experts(self) -> tuple[str, ...]:
        """The names of the experts whose indices a choice has."""
        return self.tables.names

    def score(self, prompts: Prompts, base: Base = None) -> Tensor:
        """The score of each prompt and expert, float32 [prompts, E]."""
        return self.router.score(self, prompts, base)

    def choose(self, prompts: Prompts, base: Base = None, **known: Any) -> Choice:
        """The experts of each prompt and their weights, [prompts, k]; `Choice.named` names them.

        Evaluations hand over what else is `known`: the `task` and its `examples`. Raises
        RoutingError where `base` is another one than the experts read, or has nothing to read.
        """
        return self.router.choose(self, prompts, base, known)

    def tokens(self, prompts: Prompts) -> list[list[int]]:
        """The prompts' tokens."""
        read: Any = self.tokenizer
        return [
            list(read(prompt)["input_ids"] if isinstance(prompt, str) else prompt)
            for prompt in prompts
        ]

    def texts(self, prompts: Prompts) -> list[str]:
        """The prompts as text without special tokens, which is what was embedded of experts'."""
        if self.tokenizer is None and all(isinstance(prompt, str) for prompt in prompts):
            return [str(prompt) for prompt in prompts]
        return prompt_texts(self.tokenizer, self.tokens(prompts))
