"""Routers that choose for a whole prompt: features of it, scores of them, experts and weights.

A `PromptRouter` needs no composed model (`open_model.open_prompt_router` makes one of a pool or a
saved model). In a routed model the sites follow it through a `RoutingContext`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import ConfigError, PoolError, RoutingError
from ...experts.expert import Expert
from ...experts.kind import dense_weights
from ...experts.pool import Pool
from ...tasks.embeddings import (
    PAPER_TEXT,
    PROMPT,
    TEXTS,
    embed_texts,
    load_embedder,
    prompt_texts,
    usable_embedder,
)
from ...tasks.prompt_passes import PromptReading, read_prompts
from ..choices import NOBODY, Choice
from ..context import RoutingContext, base_alone
from .router import Router, RouterSite, RoutingDecision, Scores, SiteRouter, highest

OWNERS = "owners"  # among tables, whose experts the rows of the others are
MOST_CHARACTERS = 1 << 20  # a model of 100,000 tokens of context is given fewer

Prompt = str | Sequence[int]  # text, or tokens as the model reads them


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
        """These experts and `more`, in order. Raises PoolError when sizes differ."""
        tensors = {}
        for name, old in self.tensors.items():
            new = more.tensors[name]
            if old.shape[1:] != new.shape[1:]:
                raise PoolError(
                    f"The new experts' {name} have shape {tuple(new.shape[1:])}, those of the "
                    f"pool {tuple(old.shape[1:])}; measure them again."
                )
            # Owners are indices, which go on from the experts before.
            tensors[name] = torch.cat([old, new + len(self.names) if name == OWNERS else new])
        return Tables((*self.names, *more.names), tensors, self.info)

    def shrunk(self, place: Tensor) -> Tables:
        """The tables with experts at their new index in `place` [E]; -1 if an expert leaves."""
        names = tuple(name for name, z in zip(self.names, place.tolist(), strict=True) if z >= 0)
        owners = place[self.tensors[OWNERS]] if OWNERS in self.tensors else place
        tensors = {name: rows[owners >= 0] for name, rows in self.tensors.items()}
        if OWNERS in tensors:
            tensors[OWNERS] = owners[owners >= 0]
        return Tables(names, tensors, self.info)


class PromptRouter:
    """Chooses experts for prompts: `features`, `scores` of these, and of the k best the softmax.

    Some features are of a prompt's text, others what the base makes of it; only these need `base`,
    a model, which may be routed by this router. Prompts are tokens as the model reads them; text is
    tokenised plainly, or where there is no `tokenizer` embedded as it is.
    """

    name: str = "this router"
    chooses = True  # False where its weights are scores of all experts, not a choice among them
    reads_base = False  # True where `features` need the base
    tokenizer: PreTrainedTokenizerBase | None = None
    k = 1  # experts act on a prompt
    temperature = 1.0  # divides scores before the softmax
    unserved: str | None = None  # as `Router.unserved`

    def __init__(self, tables: Tables) -> None:
        self.tables = tables

    @property
    def experts(self) -> tuple[str, ...]:
        """The names of the experts whose indices a choice has."""
        return self.tables.names

    def features(self, prompts: Sequence[Prompt], base: PreTrainedModel | None = None) -> Any:
        """What `scores` goes by: a tensor [prompts, ..], or a pair of them."""
        raise NotImplementedError

    def scores(self, features: Any) -> Tensor:
        """The score of each prompt and expert, float32 [prompts, E], or [prompts, blocks, E]."""
        raise NotImplementedError

    def score(self, prompts: Sequence[Prompt], base: PreTrainedModel | None = None) -> Tensor:
        """The score of each prompt and expert, float32 [prompts, E]."""
        return self.scores(self.features(prompts, base))

    def choice(self, scores: Tensor) -> Choice:
        """The k best of each of `scores` [.., E]; k is lowered to E. One has weight 1 exactly."""
        experts = highest(scores, min(self.k, scores.shape[-1]))
        weights = (scores.gather(-1, experts).float() / self.temperature).softmax(dim=-1)
        return Choice(experts, weights)

    def choose(
        self, prompts: Sequence[Prompt], base: PreTrainedModel | None = None, **known: Any
    ) -> Choice:
        """The experts of each prompt and their weights, [prompts, k]; `Choice.named` names them.

        Evaluations hand over what else is `known`: the `task` and its `examples`. Raises
        RoutingError where `base` is needed and missing or another one than the experts read, or
        where it has nothing to read, ConfigError where a `tokenizer` is needed and missing.
        """
        return self.choice(self.score(prompts, base))

    def remember(self, states: dict[tuple[int, ...], Tensor]) -> None:
        """Share with others what the base makes of prompts, if the router goes by that."""

    def tokens(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The prompts' tokens. Raises ConfigError for text without a tokenizer."""
        return [
            list(self._needed(prompt)["input_ids"] if isinstance(prompt, str) else prompt)
            for prompt in prompts
        ]

    def texts(self, prompts: Sequence[Prompt]) -> list[str]:
        """The prompts as text without special tokens, which is what was embedded of experts'."""
        if self.tokenizer is None and all(isinstance(prompt, str) for prompt in prompts):
            return [str(prompt) for prompt in prompts]
        return prompt_texts(self._needed(), self.tokens(prompts))

    def _needed(self, text: str | None = None) -> Any:
        if self.tokenizer is None:
            raise ConfigError(f"Router {self.name} needs the base's tokenizer for these prompts.")
        return self.tokenizer if text is None else self.tokenizer(text)


class Embedder:
    """Embeds prompts as the training inputs of experts were."""

    def __init__(self, name: str, columns: int) -> None:
        """Loads the embedder at once, not with the first prompt. Raises ConfigError."""
        load_embedder(name)
        self.name, self.columns = name, columns

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [texts, columns]; RoutingError for too long texts, other columns."""
        longest = max(map(len, texts), default=0)
        if longest > MOST_CHARACTERS:
            raise RoutingError(
                f"The base's tokenizer makes {longest} characters of a prompt's tokens, more than "
                f"the {MOST_CHARACTERS} that are embedded; use a router without an embedder."
            )
        found = embed_texts(texts, self.name)
        if found.shape[1] != self.columns:
            raise RoutingError(
                f"The experts' embeddings have {self.columns} columns, those of {self.name} "
                f"{found.shape[1]}; they are another embedder's."
            )
        return found


class EmbeddingRouter(PromptRouter):
    """A prompt router whose features are embeddings of text; `rows` [.., columns] are experts'."""

    def __init__(self, tables: Tables, rows: Tensor, embedder: str) -> None:
        super().__init__(tables)
        self.rows, self.embedder = rows, Embedder(embedder, rows.shape[-1])

    def features(self, prompts: Sequence[Prompt], base: PreTrainedModel | None = None) -> Tensor:
        return self.embedder.vectors(self.texts(prompts))


class BaseRouter(PromptRouter):
    """A prompt router whose features are what the base alone makes of a prompt.

    In a routed model every prompt passes once with no expert at work, before it passes with its
    experts.
    """

    reads_base = True

    def reading(self, base: PreTrainedModel) -> PromptReading:
        """What takes the features from passes of `base`."""
        raise NotImplementedError

    def features(self, prompts: Sequence[Prompt], base: PreTrainedModel | None = None) -> Tensor:
        return self.read(self.tokens(prompts), base)

    def score(self, prompts: Sequence[Prompt], base: PreTrainedModel | None = None) -> Tensor:
        # Batch by batch: the features of a whole dataset can be gigabytes.
        return self.read(self.tokens(prompts), base, then=self.scores)

    def read(
        self,
        prompts: Sequence[Sequence[int]],
        base: PreTrainedModel | None,
        then: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        if not prompts or not all(prompts):
            raise RoutingError(f"Router {self.name} can't choose for an empty prompt, or for none.")
        if base is None:
            raise RoutingError(
                f"Router {self.name} reads prompts with a model; hand over the experts' base."
            )
        with base_alone(base):
            return read_prompts(base, prompts, self.reading(base), then=then)


class ByPrompt(Router):
    """The frame of routers that choose experts for a whole prompt."""

    # A letter for each size of `Tables.tensors` (see `checks`), by name. The first is E for those
    # with a row for each expert, M for those with rows that "owners" [M] gives to experts.
    prompt_form: ClassVar[Mapping[str, str]] = {}

    @property
    def input_k(self) -> int:
        return self.k

    @property
    def input_temperature(self) -> float:
        return float(getattr(self.config, "temperature", 1.0))

    def tables(
        self, pool: Pool, scores: Scores | None = None, embedder: str | None = None
    ) -> Tables:
        """What there is to know of the experts of `pool`; their embeddings are by `embedder`.

        Raises PoolError when an expert lacks what it needs, ConfigError without `scores` where they
        are needed.
        """
        return Tables(pool.names)

    def chooser(self, tables: Tables) -> PromptRouter:
        """The prompt router of the experts in `tables`, without tokenizer, k and temperature.

        Raises RoutingError when these aren't whole, ConfigError where an embedder must be named or
        can't be loaded.
        """
        raise NotImplementedError

    def prompt_router(
        self, tables: Tables, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> PromptRouter:
        """The prompt router of the experts in `tables`. Raises as `chooser` does."""
        found = self.chooser(tables)
        found.tokenizer, found.unserved = tokenizer, self.unserved
        found.k, found.temperature = self.input_k, self.input_temperature
        return found

    def for_model(self, tables: Tables, tokenizer: PreTrainedTokenizerBase | None) -> PromptRouter:
        """The same for a routed model, whose prompts are tokens: ConfigError without tokenizer."""
        if tokenizer is None and "task" not in self.spec.given:
            raise ConfigError(
                f"Router {self.spec.name} reads prompts; hand the base over with its tokenizer."
            )
        return self.prompt_router(tables, tokenizer)

    def grown(self, old: PromptRouter, pool: Pool) -> PromptRouter:
        more = self.tables(pool, embedder=old.tables.info.get("embedder"))
        return self.prompt_router(old.tables.grown(more), old.tokenizer)

    def shrunk(self, old: PromptRouter, place: Tensor) -> PromptRouter:
        return self.prompt_router(old.tables.shrunk(place), old.tokenizer)

    def at(self, site: RouterSite) -> SiteRouter:
        return ChosenExperts(site, self.context_of(site))

    def context_of(self, site: RouterSite) -> RoutingContext:
        if site.context is None:
            raise RoutingError(f"Router {self.spec.name} has nothing to choose by at {site.name}.")
        return site.context

    def embedder(self, tables: Tables, form: str = PROMPT) -> str:
        """The embedder to load. Raises RoutingError for other texts than `form`, ConfigError."""
        if "embedder" not in tables.info:
            raise RoutingError(f"Router {self.spec.name} needs lookup.embedder in routed.json.")
        found = tables.info.get("embedding_form", PAPER_TEXT)
        if found != form:
            raise RoutingError(
                f"This model's embeddings are {TEXTS.get(found, found)}, but router "
                f"{self.spec.name} compares {TEXTS[form]}. Measure its experts' embeddings again "
                f"(phatgoose stats), then compose and save the pool again."
            )
        return usable_embedder(tables.info["embedder"], self.routing.embedder)


class ChosenExperts(SiteRouter):
    """At one site: the experts that the context has for each row, as it weighs them."""

    position: Tensor
    context: RoutingContext

    def __init__(self, site: RouterSite, context: RoutingContext) -> None:
        super().__init__()
        position = rows_at(site.experts, site.pool_size)
        self.register_buffer("position", position, persistent=False)
        self.context, self.sees_all, self.block = context, site.sees_all, site.block
        self.experts = len(site.experts)

    def forward(self, u: Tensor) -> RoutingDecision:
        choice = self.context.of_each(u, self.sees_all, self.block)
        experts = self.position[choice.experts]
        # Absent here, or NOBODY (the base): row 0 with weight 0.
        return RoutingDecision(experts.clamp(min=0), choice.weights * (experts >= 0))

    def distribution(self, u: Tensor) -> Tensor:
        decision = self(u)
        return dense_weights(decision.experts, decision.weights, self.experts)


def rows_at(experts: Tensor, pool_size: int) -> Tensor:
    """The row in a site's stack of each index in the pool, NOBODY if absent, [pool_size + 1]."""
    rows = torch.full((pool_size + 1,), NOBODY)
    rows[experts.cpu()] = torch.arange(len(experts))
    return rows


@dataclass(frozen=True)
class Embeddings:
    """Unit vectors of training inputs, `rows` [M, dims], by `embedder`, and their experts [M]."""

    rows: Tensor
    owners: Tensor
    embedder: str

    def info(self, form: str = PROMPT) -> dict[str, str]:
        return {"embedder": self.embedder, "embedding_form": form}


def best_of_each(scores: Tensor, owners: Tensor, experts: int) -> Tensor:
    """The highest of each expert's `scores` [B, M], -inf without any, [B, experts].

    `owners` [M] are the experts that columns belong to.
    """
    best = scores.new_full((len(scores), experts), -torch.inf)
    return best.scatter_reduce(1, owners.expand_as(scores), scores, "amax")


def embeddings_of(pool: Pool, embedder: str | None = None, form: str = PROMPT) -> Embeddings:
    """The embeddings of all experts of `pool`: one embedder's, one `form`'s; else PoolError."""
    rows = [_embeddings(expert, form) for expert in pool.experts]
    kinds = {
        (str(expert.info.embedder), row.shape[1])
        for expert, row in zip(pool.experts, rows, strict=True)
    }
    if len(kinds) > 1:
        told = ", ".join(f"{name} ({width} numbers each)" for name, width in sorted(kinds))
        raise PoolError(f"The experts' embeddings can't be compared, for they are of {told}.")
    found = kinds.pop()[0]
    if embedder not in (None, found):
        raise PoolError(f"The experts' embeddings come from {found}, those there from {embedder}.")
    owners = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(row) for row in rows]))
    unit = torch.nn.functional.normalize(torch.cat(rows).float(), dim=-1)
    return Embeddings(unit, owners, found)


def _embeddings(expert: Expert, form: str) -> Tensor:
    if expert.embeddings is None or expert.info.embedder is None:
        lacks = "embeddings" if expert.embeddings is None else "record of its embedder"
        raise PoolError(
            f"Expert {expert.name!r} has no {lacks}; run 'phatgoose stats' on it, with "
            f"--task its data, or leave it out."
        )
    found = expert.info.embedding_form or PAPER_TEXT  # before it was recorded
    if found != form:
        flag = "" if form == PROMPT else f" --embedding-form {form}"
        raise PoolError(
            f"Expert {expert.name!r} has embeddings of {TEXTS.get(found, found)}, but this router "
            f"compares {TEXTS[form]}; measure them again: phatgoose stats {expert.directory} "
            f"--task ITS-DATA --embeddings --no-means --no-readings{flag}"
        )
    return expert.embeddings
