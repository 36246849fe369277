"""SEQR: the expert whose update is longest for the token, by what is usual for it.

Fleshman and Van Durme, arXiv 2509.18093. We know the abstract and others' summaries of the paper,
not its code: the norm-maximising adapter, argmax |B_z A_z u|, found cheaply by QR factorisations,
after an offline calibration that makes norms z-scores. Here with B = Q R the length is that of
R A u, whose size is the rank, exactly. Mean a and deviation s of each expert's lengths are over the
neutral text of `neutral.txt`, read by the base alone; the paper's calibration data are not known
to us. The score is (|scale B A u| - a) / s, and the k highest get the weight 1/k each.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phatgoose.experts.lora import Factors
from phatgoose.experts.pool import Pool
from phatgoose.routing.routers.router import Router, RouterAtSite

from .neutral import Moments, over_neutral_text
from .spectr import DIRECTIONS, along_directions, padded_rows


@dataclass(frozen=True)
class Seqr(Router):
    """The k experts with the longest updates of the token, relative to neutral text."""

    name, label, needs, usual_k = "seqr", "SEQR", ("lora",), 1
    grows, equal = False, True
    sizes: ClassVar = {DIRECTIONS: "Eqn", "usual": "E", "spread": "E"}

    calibration: Moments = field(default_factory=dict, compare=False, repr=False)

    def fitted(
        self, pool: Pool, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
    ) -> Self:
        rows = {site: padded_rows(pool, site, stretching_rows) for site in pool.sites}
        moments = over_neutral_text(
            model, tokenizer, rows, lambda site, u: lengths(u, rows[site].to(u.device))
        )
        return replace(self, calibration=moments)

    def table(self, pool: Pool, site: str) -> dict[str, Tensor]:
        usual, spread = self.calibration[site]
        spread = spread.masked_fill(spread == 0, 1.0)  # an update of zero scores 0 everywhere
        rows = padded_rows(pool, site, stretching_rows)
        return {DIRECTIONS: rows, "usual": usual, "spread": spread}

    def scores(self, u: Tensor, at_site: RouterAtSite) -> Tensor:
        return (lengths(u, getattr(at_site, DIRECTIONS)) - at_site.usual) / at_site.spread


def lengths(u: Tensor, rows: Tensor) -> Tensor:
    """The length of `rows` [E, q, n] times each token of u [T, n], float32 [T, E]."""
    found: Tensor = along_directions(u, rows).norm(dim=-1)
    return found


def stretching_rows(lora: Factors) -> Tensor:
    """The rows of scale R A, float32 [q, n]."""
    R = torch.linalg.qr(lora.B.double(), mode="r").R
    rows: Tensor = lora.scale * R @ lora.A.double()
    return rows.float()
