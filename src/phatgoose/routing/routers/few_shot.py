"""Few-shot: one expert for a whole task, chosen by a few of the task's inputs at composing.

Not in the paper, and no published rule: the expert of the highest mean score over the inputs, by a
router that scores prompts. The choice is kept in the routed model.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...config import Formatting
from ...errors import ConfigError
from ...experts.expert import recorded_formatting, trained_in_chats
from ...experts.pool import Pool
from ...tasks.encoding import Encoder
from ...tasks.loading import load_task
from .discriminant import Discriminant
from .prompt import ByPrompt, PromptChooser
from .retrieval import Centroid, Retrieval
from .router import Router, RouterAtSite, RoutingDecision, highest

BY: dict[str, type[ByPrompt]] = {each.name: each for each in (Discriminant, Centroid, Retrieval)}
SHARE = "share"  # the name of weights in files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FewShot(Router):
    """Router few-shot: `chosen` is the expert's name."""

    name, label, given = "few-shot", "Few-shot", ("examples",)
    sizes, grows, private = {SHARE: "E"}, False, ("examples",)

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
        """The inputs of the file's split train. Raises ConfigError and TaskError."""
        rows = load_task(self.examples, targets=False).train if self.examples else ()
        if not rows:
            raise ConfigError(
                "Router few-shot needs few-shot:examples=FILE of the task, with rows to train on."
            )
        return tuple(example.input for example in rows)

    @property
    def file_digest(self) -> str:
        return hashlib.sha256(json.dumps(self.inputs).encode()).hexdigest()[:16]

    def check(self, pool: Pool) -> None:
        super().check(pool)
        self.scoring(pool)

    def used(self, pool: Pool) -> tuple[str, ...]:
        return self.scoring(pool).needs

    def scoring(self, pool: Pool) -> ByPrompt:
        """The router that scores prompts. Raises PoolError if the pool allows none."""
        embedded = any(map(pool.lacking, Discriminant.needs)) and not pool.lacking("embeddings")
        usual = Centroid.name if embedded else Discriminant.name
        by = BY[self.by or usual](embedder=self.embedder)
        by.check(pool)
        return by

    def fitted(
        self, pool: Pool, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
    ) -> Self:
        records, by = pool.records(), self.scoring(pool)
        form = recorded_formatting(records[0].get("formatting") or {}, "formatting")
        # In the template as prompts are to come: where all experts were trained in it.
        form = replace(form or Formatting(), chat=trained_in_chats(records))
        encoder = Encoder.for_model(model, tokenizer, form)
        chooser = PromptChooser(by, by.tables(pool), tokenizer, form.chat)
        scores = chooser.score([encoder.prompt(each) for each in self.inputs], model)
        chosen = pool.names[int(highest(scores.mean(dim=0, keepdim=True), 1))]
        logger.info("few-shot: %s, by %d examples", chosen, len(self.inputs))
        return replace(self, chosen=chosen)

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
