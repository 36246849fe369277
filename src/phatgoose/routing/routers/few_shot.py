"""Few-shot: one expert for a whole task, chosen by a few of the task's examples at composing.

Not in the paper, and no published rule. Without targets it is the expert of the highest mean score
over the examples, by a router that scores prompts. With targets these scores make a shortlist. An
example is solved if no other choice is likelier than its target. Of the shortlist and the base
alone, the one that solves most is chosen. Ties, and examples without choices, go by the likelihood
of targets: the mean over examples of the mean log-likelihood per token. The choice is kept in the
routed model.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Annotated, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...config import Formatting
from ...errors import ConfigError, PoolError, TaskError
from ...experts.expert import Expert, recorded_formatting
from ...experts.kind import ModifiedLinear, applied
from ...experts.pool import Pool
from ...tasks.batching import IGNORED, Collator, batches_of_tokens, target_logits
from ...tasks.encoding import Encoder, TokenPair
from ...tasks.loading import load_task
from ...tasks.prompt_passes import PAIR_TOKENS
from ...tasks.task import Example
from .discriminant import Discriminant
from .prompt import ByPrompt, PromptRouter
from .retrieval import Centroid, Retrieval
from .router import Router, RoutingDecision, SiteRouter, check_tokenizer, highest

BY: dict[str, type[ByPrompt]] = {each.name: each for each in (Discriminant, Centroid, Retrieval)}
SHORTLIST = 5  # experts compared by targets, in addition to the base
SHARE = "share"  # the name of weights in files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FewShot(Router):
    """Router few-shot: `chosen` is the expert's name, "" the base alone."""

    name, label, given = "few-shot", "Few-shot", ("examples",)
    sizes, grows, private = {SHARE: "E"}, False, ("examples",)

    examples: Annotated[
        str | None,
        "A task file (.jsonl, .json, .csv, .parquet) of five or more inputs, with or without "
        "targets and choices.",
    ] = None
    by: Annotated[
        Literal["discriminant", "centroid", "retrieval"] | None,
        "The router that scores its prompts: discriminant, retrieval or centroid; default: "
        "discriminant or centroid, as experts allow.",
    ] = None
    chosen: str = ""

    @cached_property
    def rows(self) -> tuple[Example, ...]:
        """The file's examples of split train. Raises ConfigError and TaskError."""
        if self.examples is None:
            raise ConfigError("Router few-shot needs few-shot:examples=FILE of the task.")
        rows = load_task(self.examples, targets=False).train
        if not rows:
            raise TaskError(f"{self.examples} has no examples of split train.")
        return rows

    @property
    def has_targets(self) -> bool:
        """True where every example has a target; else no target and no choice counts."""
        return all(example.target for example in self.rows)

    @property
    def file_digest(self) -> str:
        kept = ("input", "target", "choices") if self.has_targets else ("input",)
        rows = [{name: getattr(example, name) for name in kept} for example in self.rows]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    def check(self, pool: Pool) -> None:
        super().check(pool)
        self.scoring(pool)

    def used(self, pool: Pool) -> tuple[str, ...]:
        by = self.scoring(pool)
        return () if by is None else by.needs

    def scoring(self, pool: Pool) -> ByPrompt | None:
        """The router that scores prompts; None if the pool allows none, and targets decide alone.

        Raises PoolError without any and without targets.
        """
        usual = (Discriminant.name, Centroid.name)
        fit = (name for name in usual if not any(map(pool.lacking, BY[name].needs)))
        name: str | None = self.by or next(fit, None)
        if name is None and not self.has_targets:
            raise PoolError(
                "Router few-shot chooses by statistics of prompts or by targets, and there is "
                "neither: run 'phatgoose stats' on each expert, or give examples with targets."
            )
        if name is None:
            return None
        by = BY[name](embedder=self.embedder)
        by.check(pool)
        return by

    def settled(
        self, pool: Pool, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
    ) -> Self:
        tokenizer = check_tokenizer(self, tokenizer)
        form = recorded_formatting(pool.records()[0].get("formatting") or {}, "formatting")
        encoder = Encoder.for_model(model, tokenizer, form or Formatting())
        listed, by = list(pool.experts), self.scoring(pool)
        if by is not None:
            prompts = [encoder.prompt(row.input) for row in self.rows]
            chooser = PromptRouter(by, by.tables(pool), tokenizer)
            scores = chooser.score(prompts, model).mean(dim=0)
            best = highest(scores[None], min(SHORTLIST, len(pool)))[0]
            listed = [pool.experts[z] for z in best.tolist()]
        chosen = listed[0].name
        if self.has_targets:
            by_expert = {each.name: solved(model, encoder, self.rows, each) for each in listed}
            chosen = max(by_expert, key=by_expert.__getitem__)
            alone = solved(model, encoder, self.rows, None)
            chosen = chosen if by_expert[chosen] > alone else ""
        logger.info("few-shot: %s, by %d examples", chosen or "no expert", len(self.rows))
        return replace(self, chosen=chosen)

    def table(self, pool: Pool, site: str) -> dict[str, Tensor]:
        acting = [expert.name for expert in pool.experts if site in expert.modules]
        return {SHARE: torch.tensor([float(name == self.chosen) for name in acting])}

    def constant(self, table: SiteRouter) -> Tensor:
        share: Tensor = getattr(table, SHARE)
        return share.float().clamp(0, 1)  # a stranger's file may hold anything

    def decision(
        self, u: Tensor, table: SiteRouter, active: Tensor | None = None
    ) -> RoutingDecision:
        weight, expert = self.constant(table).max(dim=0, keepdim=True)
        experts, weights = expert.expand(len(u), 1), weight.expand(len(u), 1)
        return RoutingDecision(experts, weights if active is None else weights * active[:, expert])


def solved(
    model: PreTrainedModel, encoder: Encoder, examples: Sequence[Example], expert: Expert | None
) -> tuple[float, float]:
    """(share of examples solved, mean log-likelihood per token of targets), under one expert.

    An example is solved where no choice is likelier than its target; so it is without choices.
    """
    answers = [list(dict.fromkeys((each.target, *each.choices))) for each in examples]
    pairs = [
        encoder.pair(each.input, answer)
        for each, listed in zip(examples, answers, strict=True)
        for answer in listed
    ]
    numbers = iter(likelihoods(model, encoder, pairs, expert))
    likely = [[next(numbers) for _ in listed] for listed in answers]
    return fmean(each[0] == max(each) for each in likely), fmean(each[0] for each in likely)


def likelihoods(
    model: PreTrainedModel, encoder: Encoder, pairs: Sequence[TokenPair], expert: Expert | None
) -> list[float]:
    """The targets' mean log-likelihoods per token, in the order of `pairs`, under one expert."""
    modules, acting = (expert.modules, expert.acts_on) if expert else ({}, None)
    collator = Collator(model, encoder.tokenizer.pad_token_id, acting=acting)
    numbers = [0.0] * len(pairs)
    with applied(model, modules, ModifiedLinear), torch.inference_mode():
        for rows in batches_of_tokens([pair.length for pair in pairs], PAIR_TOKENS):
            batch = collator([pairs[row] for row in rows])
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            logits, labels = target_logits(model, batch).float().transpose(1, 2), batch["labels"]
            losses = functional.cross_entropy(logits, labels, reduction="none")  # 0 if IGNORED
            means = -losses.sum(dim=1) / labels.ne(IGNORED).sum(dim=1)
            for row, mean in zip(rows, means.tolist(), strict=True):
                numbers[row] = mean
    return numbers
