"""PHATGOOSE per input: one expert for a whole input, chosen by gates.

Not in the paper, which chooses for every token at every site anew. In docs/study.md a pool of weak
experts does better with one of them alone, and gates find it without an embedder. The symbols are
those of `per_token.affinities`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ....base.offloading import input_device
from ....base.sites import Site
from ....base.token_masks import watch_inputs
from ....config import Formatting
from ....errors import RoutingError
from ....experts.pool import Pool
from ....tasks.collating import batches_of_tokens, pad_right
from ....tasks.encoding import Encoder
from ....tasks.task import Example
from ...watching import unwatched
from ..lookup import Lookup, SavedLookup
from ..per_token.affinities import CentredRouter, affinity_vectors
from ..scores import Scores
from .looked_up import NOBODY, LookedUp
from .prompt_reader import PromptReader

__all__ = ["VOTES", "GateVote", "PhatgooseInput", "Votes"]

VOTES = "lookup.votes."  # before a site's name, in files

BATCH_TOKENS = 1024  # of a pass that reads prompts, padding included: little padding, few passes
Votes = Mapping[str, tuple[Tensor, Tensor]]  # by site: vectors [E, n + 1], experts [E] (indices)


class PhatgooseInput(LookedUp):
    """Router phatgoose-input."""

    def lookup_of(
        self, pool: Pool, scores: Scores | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> Lookup:
        """The gates' votes. Raises ConfigError without `tokenizer`."""
        votes = GateVote.votes_of(pool)
        return GateVote(votes, len(pool), self.routing.eps, self.needed(tokenizer))

    def saved_lookup(self, saved: SavedLookup, tokenizer: PreTrainedTokenizerBase | None) -> Lookup:
        """The same, from a saved model. Raises RoutingError when a site's votes are missing."""
        votes = {}
        for site, n in saved.inputs.items():
            rows, experts = saved.tensors.get(f"{VOTES}{site}"), saved.tensors[f"experts.{site}"]
            wanted = (len(experts), n + 1)
            if rows is None or rows.shape != wanted:
                got = "none" if rows is None else list(rows.shape)
                raise RoutingError(
                    f"Router {self.spec.name} needs votes at {site} of shape {list(wanted)}, got "
                    f"{got}."
                )
            votes[site] = rows, experts
        return GateVote(votes, saved.experts, self.routing.eps, self.needed(tokenizer))


class GateVote(PromptReader):
    """The expert z with the highest mean of v̄_zᵀ(u - M) / sqrt(var(u) + eps) / √n over an input.

    The mean is over the prompt's tokens, then over the sites where z acts and that the prompt
    passes (those of the encoder, where there is one). u is the base's own activation: the prompt
    passes through the model once with no expert at work.
    """

    name = "phatgoose-input"

    def __init__(
        self, votes: Votes, pool_size: int, eps: float, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """`votes` are made by `votes_of`; `eps` is added to the variance of u."""
        super().__init__(tokenizer)
        self.votes, self.pool_size, self.eps = votes, pool_size, eps
        self._routers = {site: CentredRouter(rows, 1, eps) for site, (rows, _) in votes.items()}

    def tensors(self) -> dict[str, Tensor]:
        """The vectors that each site votes with."""
        return {f"{VOTES}{site}": rows for site, (rows, _) in self.votes.items()}

    @staticmethod
    def votes_of(pool: Pool) -> Votes:
        """What the experts of `pool`, all with gates and means, vote with."""
        return {
            site: (
                affinity_vectors(pool, site, "gates", "centred"),
                torch.tensor([z for z, e in enumerate(pool.experts) if site in e.modules]),
            )
            for site in pool.sites
        }

    def find(self, examples: Sequence[Example], formatting: Formatting | None = None) -> Tensor:
        """The expert of each example, read as `formatting` has it; answer choices play no part."""
        encoder = Encoder.for_model(self._attached, self.tokenizer, formatting)
        prompts = [encoder.fitted(example.input, example.passage).tokens for example in examples]
        return self.of_tokens(prompts)

    def of_prompts(self, texts: Sequence[str]) -> Tensor:
        """The expert of each prompt, int64 [texts]. Raises RoutingError when not attached."""
        return self.means(texts).argmax(dim=-1)

    def of_tokens(self, prompts: Sequence[list[int]]) -> Tensor:
        """The same of prompts given by their tokens, special ones included."""
        return self._means_of(prompts).argmax(dim=-1)

    def means(self, texts: Sequence[str], formatting: Formatting | None = None) -> Tensor:
        """The mean affinity of each prompt and expert, float32 [texts, pool_size]."""
        encoder = Encoder.for_model(self._attached, self.tokenizer, formatting)
        return self._means_of([encoder.prompt(text) for text in texts])

    @property
    def _attached(self) -> PreTrainedModel:
        if self._model is None:
            raise RoutingError(f"Router {self.name} reads prompts with a model; compose one.")
        return self._model

    @torch.no_grad()
    def _means_of(self, prompts: Sequence[list[int]]) -> Tensor:
        """The mean affinity of each prompt, given by its tokens, and expert."""
        model = self._attached
        stack = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
        layers: Mapping[str, Any] = {site: model.get_submodule(site) for site in self.votes}
        sites = {name: layer.site for name, layer in layers.items()}
        poll = _Poll(self._routers, self.votes, self.pool_size)
        found, device = torch.empty(len(prompts), self.pool_size), input_device(model)
        with self._base_alone(), unwatched(), watch_inputs(model, sites, poll.add):
            for rows in batches_of_tokens([len(prompt) for prompt in prompts], BATCH_TOKENS):
                ids = pad_right([prompts[row] for row in rows], 0)
                mask = pad_right([[1] * len(prompts[row]) for row in rows], 0).to(device)
                poll.begin(mask)
                stack(input_ids=ids.to(device), attention_mask=mask)
                found[rows] = poll.means()
        return found

    @contextmanager
    def _base_alone(self) -> Iterator[None]:
        """No expert acts in the passes of this thread while the context is open."""
        rows, announced = self._turn.rows, self._turn.announced
        self.serve(torch.tensor([NOBODY]))
        try:
            yield
        finally:
            self._turn.rows, self._turn.announced = rows, announced


class _Poll:
    """The affinities of a batch of texts, averaged over tokens and sites."""

    def __init__(self, routers: Mapping[str, CentredRouter], votes: Votes, pool_size: int) -> None:
        self._routers, self._votes, self._pool_size = routers, votes, pool_size

    def begin(self, mask: Tensor) -> None:
        """A batch comes whose tokens are where `mask` [texts, columns] is 1."""
        self._shares = (mask / mask.sum(dim=1, keepdim=True)).float()
        self._sums = torch.zeros(len(mask), self._pool_size)
        self._sites = torch.zeros(self._pool_size)

    def add(self, site: Site, u: Tensor, _: Tensor | None) -> None:
        """At each site: the activations [texts, columns, n]."""
        experts = self._votes[site.name][1].cpu()
        tokens = self._routers[site.name].to(u.device).affinities(u.reshape(-1, u.shape[-1]))
        rows = tokens.view(*self._shares.shape, -1)
        self._sums[:, experts] += torch.einsum("tc,tce->te", self._shares, rows).cpu()
        self._sites[experts] += 1

    def means(self) -> Tensor:
        """The mean of each text and expert [texts, pool_size], 0 for experts that act nowhere."""
        return self._sums / self._sites.clamp(min=1)
