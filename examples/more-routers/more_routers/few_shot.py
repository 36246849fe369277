"""Few-shot: one expert for a whole task, chosen by a few of the task's inputs at composing.

Not in the paper, and no published rule: the expert of the highest mean score over the inputs, by a
router that scores prompts. The choice is kept in the routed model, the examples aren't.
A comparison goes by the file's name: call a changed file otherwise.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phatgoose.errors import ConfigError
from phatgoose.experts.pool import Pool
from phatgoose.routing.routers.discriminant import Discriminant
from phatgoose.routing.routers.prompt import ByPrompt, PromptChooser
from phatgoose.routing.routers.retrieval import Centroid, Retrieval
from phatgoose.routing.routers.router import Router, RouterAtSite, RoutingDecision, highest
from phatgoose.tasks.loading import load_task
from phatgoose.tasks.task import request_in

BY: dict[str, type[ByPrompt]] = {each.name: each for each in (Discriminant, Centroid, Retrieval)}
SHARE = "share"  # the name of weights in files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FewShot(Router):
    """Router few-shot: `chosen` is the expert's name."""

    name, label, given = "few-shot", "Few-shot", ("examples",)
    sizes, grows = {SHARE: "E"}, False

    examples: Annotated[
        str | None, "A task file (.jsonl, .json, .csv, .parquet) of five or more inputs."
    ] = None
    by: Annotated[
        Literal["discriminant", "centroid", "retrieval"] | None,
        "The router that scores its prompts: discriminant, retrieval or centroid; default: "
        "discriminant or centroid, as experts allow.",
    ] = None
    chosen: str = ""

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """What is asked in the file's split train. Raises ConfigError and TaskError."""
        rows = load_task(self.examples, targets=False).train if self.examples else ()
        if not rows:
            raise ConfigError(
                "Router few-shot needs few-shot:examples=FILE of the task, with rows to train on."
            )
        return tuple(request_in(example.input) for example in rows)

    def check(self, pool: Pool) -> None:
        super().check(pool)
        self.scoring(pool)

    def used(self, pool: Pool) -> tuple[str, ...]:
        return self.scoring(pool).needs

    def scoring(self, pool: Pool) -> ByPrompt:
        """The router that scores prompts. Raises PoolError if the pool allows none."""
        embedded = any(map(pool.lacking, Discriminant.needs)) and not pool.lacking("embeddings")
        usual = Centroid.name if embedded else Discriminant.name
        how = {
            "embedder": self.embedder,
            "reader": self.reader,
            "reader_device": self.reader_device,
        }
        by = BY[self.by or usual](**how)
        by.check(pool)
        return by

    def fitted(
        self, pool: Pool, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
    ) -> Self:
        by = self.scoring(pool)
        scores = PromptChooser(by, by.tables(pool)).score(self.inputs)
        chosen = pool.names[int(highest(scores.mean(dim=0, keepdim=True), 1))]
        logger.info("few-shot: %s, by %d examples", chosen, len(self.inputs))
        # The file's place is no one else's business, and a loaded model has no need of it.
        return replace(self, examples=None, chosen=chosen)

    def table(self, pool: Pool, site: str) -> dict[str, Tensor]:
        acting = [expert.name for expert in pool.experts if site in expert.modules]
        return {SHARE: torch.tensor([float(name == self.chosen) for name in acting])}

    def constant(self, at_site: RouterAtSite) -> Tensor:
        return at_site.get_buffer(SHARE).float().clamp(0, 1)  # a stranger's file may hold anything

    def decision(
        self, u: Tensor, at_site: RouterAtSite, active: Tensor | None = None
    ) -> RoutingDecision:
        weight, expert = self.constant(at_site).max(dim=0, keepdim=True)
        experts, weights = expert.expand(len(u), 1), weight.expand(len(u), 1)
        return RoutingDecision(experts, weights if active is None else weights * active[:, expert])
