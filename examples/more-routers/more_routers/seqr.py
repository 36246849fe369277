"""SEQR: the expert whose update is longest for the token, by what is usual for it.

Fleshman and Van Durme, arXiv 2509.18093. We know the abstract and others' summaries of the paper,
not its code: the norm-maximising adapter, argmax |B_z A_z u|, found cheaply by QR factorisations,
after an offline calibration that makes norms z-scores. Here with B = Q R the length is that of
R A u, whose size is the rank, exactly. Mean a and deviation s of each expert's lengths are over the
neutral text of `tasks.task`, read by the base alone; the paper's calibration data are not known
to us. The score is (|scale B A u| - a) / s, and the k highest get the weight 1/k each.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phatgoose.errors import ConfigError
from phatgoose.experts.lora import LoraFactors
from phatgoose.experts.pool import Pool
from phatgoose.routing.routers.router import Router, RouterSite, SiteRouter
from phatgoose.routing.routers.spectr import DIRECTIONS, SpectrRouter, padded_rows

from .neutral import over_neutral_text


class Seqr(Router):
    """Router seqr."""

    @property
    def form(self) -> Mapping[str, str]:
        return {DIRECTIONS: "Eqn", "usual": "E", "spread": "E"}

    def read_base(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, pool: Pool
    ) -> None:
        if tokenizer is None:
            raise ConfigError("Router seqr reads neutral text; hand over the base's tokenizer.")
        rows = {site: padded_rows(pool, site, stretching_rows) for site in pool.sites}
        self.calibration = over_neutral_text(
            model,
            tokenizer,
            rows,
            lambda site, u: SpectrRouter(rows[site], 1).to(u.device).scores(u),
        )

    def state_at(self, pool: Pool, site: str) -> dict[str, Tensor]:
        usual, spread = self.calibration[site]
        spread = spread.masked_fill(spread == 0, 1.0)  # an update of zero scores 0 everywhere
        return {
            DIRECTIONS: padded_rows(pool, site, stretching_rows),
            "usual": usual,
            "spread": spread,
        }

    def at(self, site: RouterSite) -> SiteRouter:
        return SeqrRouter(site.state, self.k)


class SeqrRouter(SpectrRouter):
    """The top k of (|R A u| - a) / s, each with the weight 1/k."""

    kept = (DIRECTIONS, "usual", "spread")
    usual: Tensor
    spread: Tensor

    def __init__(self, state: Mapping[str, Tensor], k: int) -> None:
        super().__init__(state[DIRECTIONS], k)
        for name in ("usual", "spread"):
            self.register_buffer(name, state[name].float(), persistent=False)

    def scores(self, u: Tensor) -> Tensor:
        return (super().scores(u) - self.usual) / self.spread


def stretching_rows(lora: LoraFactors) -> Tensor:
    """The rows of scale R A, float32 [q, n]."""
    R = torch.linalg.qr(lora.B.double(), mode="r").R
    rows: Tensor = lora.scale * R @ lora.A.double()
    return rows.float()
