"""PHATGOOSE per input: one expert for a whole input, chosen by gates.

Not in the paper, which chooses for every token at every site anew. In the first study a pool of
weak experts does better with one of them alone, and gates find it without an embedder. With
`input_k` above 1 the k experts with the highest mean affinities act together, weighted by the
softmax of these means over `input_temperature`. The symbols are those of `routers.affinities`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...base.sites import Site
from ...errors import RoutingError
from ...experts.pool import Pool
from ...tasks.prompt_passes import PromptReading, mean_token
from .affinities import CentredRouter, affinity_vectors
from .prompt_router import BaseReader, LookedUp, routed_sites
from .router import Lookup, SavedLookup, Scores

VOTES = "lookup.votes."  # before a site's name, in files
# The score of who can't be heard: `router.highest` keeps minus infinity for those it has taken.
LEAST = torch.finfo(torch.float32).min

Votes = Mapping[str, tuple[Tensor, Tensor]]  # by site: vectors [E, n + 1], experts [E] (indices)


class PhatgooseInput(LookedUp):
    """Router phatgoose-input."""

    def lookup_of(
        self, pool: Pool, scores: Scores | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> Lookup:
        """The gates' votes. Raises ConfigError without `tokenizer`."""
        return self._vote(GateVote.votes_of(pool), len(pool), tokenizer)

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
        return self._vote(votes, saved.experts, tokenizer)

    def _vote(
        self, votes: Votes, pool_size: int, tokenizer: PreTrainedTokenizerBase | None
    ) -> GateVote:
        k, temperature = self.input_k, self.input_temperature
        return GateVote(votes, pool_size, self.routing.eps, self.needed(tokenizer), k, temperature)


class GateVote(BaseReader):
    """The experts z with the highest mean of v̄_zᵀ(u - M) / sqrt(var(u) + eps) / √n over an input.

    The mean is over the prompt's tokens, then over the sites where z acts and that the prompt
    passes (those of the encoder, where there is one). Experts that act at none of these come after
    all others. u is the base's own activation.
    """

    name = "phatgoose-input"

    def __init__(
        self,
        votes: Votes,
        pool_size: int,
        eps: float,
        tokenizer: PreTrainedTokenizerBase,
        k: int = 1,
        temperature: float = 1.0,
    ) -> None:
        """`votes` are made by `votes_of`; `eps` is added to the variance of u."""
        super().__init__(tokenizer, k, temperature)
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

    def reading(self, model: PreTrainedModel) -> PromptReading:
        """The poll of all sites."""
        return _Poll(model, self._routers, self.votes, self.pool_size)


class _Poll(PromptReading):
    """The affinities of a batch of texts, averaged over tokens and sites."""

    def __init__(
        self,
        model: PreTrainedModel,
        routers: Mapping[str, CentredRouter],
        votes: Votes,
        pool_size: int,
    ) -> None:
        self._routers, self._votes, self._pool_size = routers, votes, pool_size
        self.sites = routed_sites(model, votes)

    def begin(self, mask: Tensor) -> None:
        """A batch comes whose tokens are where `mask` [texts, columns] is 1."""
        self._mask = mask
        self._sums = torch.zeros(len(mask), self._pool_size)
        self._sites = torch.zeros(self._pool_size)

    def see_site(self, site: Site, u: Tensor) -> None:
        """The affinities of the activations u [texts, columns, n] at a site."""
        experts = self._votes[site.name][1].cpu()
        tokens = self._routers[site.name].to(u.device).affinities(u.reshape(-1, u.shape[-1]))
        rows = tokens.view(*self._mask.shape, -1)
        self._sums[:, experts] += mean_token(rows, self._mask).cpu()
        self._sites[experts] += 1

    def found(self) -> Tensor:
        """The mean of each text and expert [texts, pool_size].

        LEAST for experts that act at no site that prompts pass; 0 if that is everyone.
        """
        means, unheard = self._sums / self._sites.clamp(min=1), self._sites == 0
        return means if unheard.all() else means.masked_fill(unheard, LEAST)
