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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...config import Formatting, Routing
from ...errors import ConfigError, PoolError, TaskError
from ...experts.expert import Expert, recorded_formatting
from ...experts.kind import ModifiedLinear, applied
from ...experts.pool import Pool
from ...sites import input_device
from ...tasks.batching import IGNORED, Collator, batches_of_tokens, target_logits
from ...tasks.encoding import Encoder, TokenPair
from ...tasks.loading import load_task
from ...tasks.prompt_passes import PAIR_TOKENS
from ...tasks.task import Example
from .prompt_router import ByPrompt
from .registry import RouterChoice, spec_of
from .router import Router, RouterSite, RoutingDecision, SiteRouter, highest

BY = ("discriminant", "centroid")  # the first whose needs the pool has
SHARE = "share"  # the name of weights in files

logger = logging.getLogger(__name__)


class FewShot(Router):
    """Router few-shot."""

    chosen: str | None = None  # None: the base alone

    @property
    def form(self) -> Mapping[str, str]:
        return {SHARE: "E"}

    @cached_property
    def examples(self) -> tuple[Example, ...]:
        """The file's examples of split train. Raises ConfigError and TaskError."""
        if self.config.examples is None:
            raise ConfigError("Router few-shot needs few-shot:examples=FILE of the task.")
        found = load_task(self.config.examples, targets=False).train
        if not found:
            raise TaskError(f"{self.config.examples} has no examples of split train.")
        return found

    @property
    def has_targets(self) -> bool:
        """True where every example has a target; else no target and no choice counts."""
        return all(example.target for example in self.examples)

    @property
    def recorded(self) -> Routing:
        # The choice is in the model, and the file's place is the user's own business.
        choice = RouterChoice(self.spec, replace(self.config, examples=None))
        return replace(self.routing, router=choice.text)

    def check(self, pool: Pool) -> None:
        super().check(pool)
        self.by(pool)

    def used(self, pool: Pool) -> tuple[str, ...]:
        by = self.by(pool)
        return () if by is None else by.spec.needs

    @property
    def file_digest(self) -> str:
        kept = ("input", "target", "choices") if self.has_targets else ("input",)
        rows = [{name: getattr(example, name) for name in kept} for example in self.examples]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    def by(self, pool: Pool) -> ByPrompt | None:
        """The router that scores prompts; None if the pool allows none, and targets decide alone.

        Raises PoolError without any and without targets.
        """
        fit = (name for name in BY if not any(map(pool.lacking, spec_of(name).needs)))
        name = self.config.by or next(fit, None)
        if name is None and not self.has_targets:
            raise PoolError(
                "Router few-shot chooses by statistics of prompts or by targets, and there is "
                "neither: run 'phatgoose stats' on each expert, or give examples with targets."
            )
        if name is None:
            return None
        found: ByPrompt = spec_of(name).router(Routing(name, embedder=self.routing.embedder))
        found.check(pool)
        return found

    def read_base(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, pool: Pool
    ) -> None:
        if tokenizer is None:
            raise ConfigError("Router few-shot reads prompts; hand over the base with a tokenizer.")
        examples = self.examples
        form = recorded_formatting(pool.records()[0].get("formatting") or {}, "formatting")
        encoder = Encoder.for_model(model, tokenizer, form or Formatting())
        listed, by = list(pool.experts), self.by(pool)
        if by is not None:
            prompts = [encoder.prompt(row.input) for row in examples]
            scores = by.prompt_router(by.tables(pool), tokenizer).score(prompts, model).mean(dim=0)
            best = highest(scores[None], min(self.config.shortlist, len(pool)))[0]
            listed = [pool.experts[z] for z in best.tolist()]
        self.chosen = listed[0].name
        if self.has_targets:
            found = {each.name: solved(model, encoder, examples, each) for each in listed}
            best_name = max(found, key=found.__getitem__)
            alone = solved(model, encoder, examples, None)
            self.chosen = best_name if found[best_name] > alone else None
        logger.info("few-shot: %s, by %d examples", self.chosen or "no expert", len(examples))

    def state_at(self, pool: Pool, site: str) -> dict[str, Tensor]:
        acting = [expert.name for expert in pool.experts if site in expert.modules]
        return {SHARE: torch.tensor([float(name == self.chosen) for name in acting])}

    def at(self, site: RouterSite) -> SiteRouter:
        return OneExpert(site.state[SHARE])


class OneExpert(SiteRouter):
    """The expert of the highest `share` [E] for every token, with its share as the weight."""

    kept = (SHARE,)
    share: Tensor

    def __init__(self, share: Tensor) -> None:
        super().__init__()
        self.register_buffer(SHARE, share, persistent=False)

    def forward(self, u: Tensor) -> RoutingDecision:
        weights, experts = self.share.float().max(dim=0, keepdim=True)
        return RoutingDecision(experts.expand(len(u), 1), weights.expand(len(u), 1))

    def distribution(self, u: Tensor) -> Tensor:
        return self.share.float().expand(len(u), -1)


def solved(
    model: PreTrainedModel, encoder: Encoder, examples: Sequence[Example], expert: Expert | None
) -> tuple[float, float]:
    """(share of examples solved, mean log-likelihood per token of targets), under one expert.

    An example is solved where no choice is likelier than its target; so it is without choices.
    """
    answers = [list(dict.fromkeys((each.target, *each.choices))) for each in examples]
    pairs = [
        encoder.pair(each.input, answer, each.passage)
        for each, listed in zip(examples, answers, strict=True)
        for answer in listed
    ]
    found = iter(likelihoods(model, encoder, pairs, expert))
    likely = [[next(found) for _ in listed] for listed in answers]
    return fmean(each[0] == max(each) for each in likely), fmean(each[0] for each in likely)


def likelihoods(
    model: PreTrainedModel, encoder: Encoder, pairs: Sequence[TokenPair], expert: Expert | None
) -> list[float]:
    """The targets' mean log-likelihoods per token, in the order of `pairs`, under one expert."""
    modules, acting = (expert.modules, expert.acts_on) if expert else ({}, None)
    collator = Collator(model, encoder.tokenizer.pad_token_id, acting=acting)
    found = [0.0] * len(pairs)
    with applied(model, modules, ModifiedLinear), torch.inference_mode():
        for rows in batches_of_tokens([pair.length for pair in pairs], PAIR_TOKENS):
            batch = collator([pairs[row] for row in rows])
            batch = {name: tensor.to(input_device(model)) for name, tensor in batch.items()}
            logits, labels = target_logits(model, batch).float().transpose(1, 2), batch["labels"]
            losses = functional.cross_entropy(logits, labels, reduction="none")  # 0 if IGNORED
            means = -losses.sum(dim=1) / labels.ne(IGNORED).sum(dim=1)
            for row, mean in zip(rows, means.tolist(), strict=True):
                found[row] = mean
    return found
