"""GLIDER: PHATGOOSE's affinities, and how near the whole input is to each expert's training inputs.

Li et al., EMNLP 2025. At every site and for every token

    logit_z = v̄_zᵀū / √n + λ cos(embedding of the input, centroid of expert z),

and the k experts with the highest logits act, weighted by the softmax over them. The first term is
the gates' (`routers.phatgoose`), the second is the same at all sites and for all tokens of an
input.

Published, the second term compares descriptions of tasks that a language model wrote, one for each
expert's task and one for each evaluation task; the released code looks the latter up by the task's
name and sets λ by evaluation suite, from 3 to 1000. That is not zero-shot. Here the prompt itself
is embedded and held against the centroid of the expert's training inputs (`routers.centroid`),
with one λ for everything: 3, which the released scripts use for BIG-bench. `temperature`
divides the whole logit.
"""

from __future__ import annotations

import torch
from phatgoose.routing.routers.centroid import Centroid, NearestCentroids
from phatgoose.routing.routers.prompt_router import PromptRouter, Tables
from torch import Tensor

from phatgoose.routing.choices import Choice
from phatgoose.routing.context import RoutingContext
from phatgoose.routing.routers.phatgoose import Phatgoose, PhatgooseRouter
from phatgoose.routing.routers.router import RouterSite

from . import GliderSettings


class AllCentroids(NearestCentroids):
    """The cosines of a prompt to all centroids, in place of weights."""

    name = "glider"
    chooses = False

    def choice(self, scores: Tensor) -> Choice:
        return Choice(torch.arange(scores.shape[1]).expand_as(scores), scores)


class GliderRouter(PhatgooseRouter):
    """The top k of v̄ᵀū/√n + λ cos, softmax over those k."""

    fused = one_call = by_token = False  # a token's experts depend on its prompt, too
    acting: Tensor
    context: RoutingContext

    def __init__(
        self, site: RouterSite, k: int, config: GliderSettings, context: RoutingContext
    ) -> None:
        super().__init__(site.state["vectors"], k, config.eps)
        self.context, self.scale = context, config.weight / config.temperature
        self.sees_all = site.sees_all
        self.register_buffer("acting", site.experts, persistent=False)

    def affinities(self, u: Tensor) -> Tensor:
        cosines = self.context.of_each(u, self.sees_all).weights[:, self.acting]
        return super().affinities(u) + self.scale * cosines


class Glider(Phatgoose, Centroid):
    """Router glider."""

    def chooser(self, tables: Tables) -> PromptRouter:
        return AllCentroids(tables, tables.tensors["centroids"], self.embedder(tables))

    def at(self, site: RouterSite) -> GliderRouter:
        return GliderRouter(site, self.k, self.config, self.context_of(site))
