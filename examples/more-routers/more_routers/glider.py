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

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from phatgoose.config import NOT_NEGATIVE
from phatgoose.routing.choice import Choice
from phatgoose.routing.routers.phatgoose import Phatgoose
from phatgoose.routing.routers.prompt import choice_at
from phatgoose.routing.routers.retrieval import Centroid
from phatgoose.routing.routers.router import Router, RouterAtSite


@dataclass(frozen=True)
class Glider(Phatgoose, Centroid):
    """PHATGOOSE's scores plus the prompt's similarity to each expert's training inputs."""

    name, label, needs = "glider", "GLIDER", ("gates", "embeddings")
    # The choice for a prompt is the cosines to all centroids; a token's experts depend on both.
    fused, chooses, per_input, by_token = "", False, False, False

    weight: Annotated[
        float, "λ, the weight of the prompt's cosines relative to the gates.", NOT_NEGATIVE
    ] = 3.0

    decision, distribution = Router.decision, Router.distribution

    def choice(self, scores: Tensor) -> Choice:
        return Choice(torch.arange(scores.shape[1]).expand_as(scores), scores)

    def scores(self, u: Tensor, at_site: RouterAtSite) -> Tensor:
        cosines = choice_at(u, at_site).weights[:, at_site.members]
        return super().scores(u, at_site) + self.weight / self.temperature * cosines
