"""SpectR: the experts whose updates look at most of the token's activation.

Fleshman and Van Durme, COLM 2025 (arXiv 2504.03454). With B A = U S Vᵀ an expert's factors are
A* = Vᵀ and B* = U S; its score for a token is |A* u|, the length of u in the input space of the
update. S plays no part: an expert that hardly stretches a direction scores as one that stretches it
much. The k experts with the highest scores get the weight 1/k each.

As published, k is 4, while `k` has its usual default here. The released code multiplies A* by the
LoRAs' common scale, which changes no ranking, keeps a rank's direction even where its singular
value is 0 (here it is left out, so an update of zero scores 0), and mixes the factors before their
product, (Σ w B*)(Σ w A*) u, so that B* of one expert meets A* of another. Here outputs are mixed,
Σ w B A u, which for k = 1 is the same.

With `shortlist` = N the choice is that of LAG (Fleshman and Van Durme, arXiv 2507.05346,
equations 6 and 7): of the N experts with the highest |a₁ᵀu|, a₁ being the first row of A* (Arrow's
vector), those with the highest |A* u|. LAG takes one of 20 (k = 1) and saves the other products by
that; here all are computed, for the same result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from phatgoose.config import AT_LEAST_1
from phatgoose.experts.lora import Factors
from phatgoose.experts.pool import Pool
from phatgoose.routing.routers.arrow import small_svd
from phatgoose.routing.routers.router import Router, RouterAtSite, highest, products

NOTHING = 1e-6  # singular values below this share of the largest are rounding
DIRECTIONS = "directions"  # the name of A* in files


@dataclass(frozen=True)
class Spectr(Router):
    """Router spectr: the top k of |A* u|, each with the weight 1/k."""

    name, label, needs, usual_k = "spectr", "SpectR", ("lora",), 2
    sizes, equal = {DIRECTIONS: "Eqn"}, True

    shortlist: Annotated[
        int | None, "Experts to choose among, the best by Arrow's scores; default: all.", AT_LEAST_1
    ] = None

    def table(self, pool: Pool, site: str) -> dict[str, Tensor]:
        return {DIRECTIONS: padded_rows(pool, site, right_singular_vectors)}

    def scores(self, u: Tensor, at_site: RouterAtSite) -> Tensor:
        along = along_directions(u, getattr(at_site, DIRECTIONS))
        scores: Tensor = along.norm(dim=-1)
        if self.shortlist is None or max(at_site.k, self.shortlist) >= at_site.E:
            return scores
        listed = highest(along[..., 0].abs(), max(at_site.k, self.shortlist))
        off = torch.full_like(scores, -torch.inf)
        return off.scatter(1, listed, scores.gather(1, listed))


def along_directions(u: Tensor, directions: Tensor) -> Tensor:
    """The products of tokens u [T, n] with `directions` [E, q, n], float32 [T, E, q]."""
    E, q, n = directions.shape
    return products(u, directions.reshape(E * q, n)).view(len(u), E, q)


def padded_rows(pool: Pool, site: str, rows_of: Callable[[Factors], Tensor]) -> Tensor:
    """`rows_of` each LoRA at `site`, [E, q, n], with zeros up to the highest rank q."""
    rows = [rows_of(expert.lora[site]) for expert in pool.experts if site in expert.lora]
    return pad_sequence(rows, batch_first=True)


def right_singular_vectors(lora: Factors) -> Tensor:
    """A* = Vᵀ of B A = U S Vᵀ, float32 [r, n], the largest S first; zeros where S is 0."""
    small = small_svd(lora.A, lora.B)
    left_out = small.values <= NOTHING * small.values[0]
    rows = small.V[: len(small.values)] @ small.Q.T
    return rows.masked_fill(left_out[:, None], 0.0).float()
