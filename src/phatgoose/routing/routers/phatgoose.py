"""PHATGOOSE: gates, trained after their experts, become a router (Muqeeth et al. 2024, section 3).

At every site and for every token, an expert's affinity is the product of its gate and the token's
activation, both standardised; the k experts with the highest affinities act, weighted by the
softmax of their affinities over √n. Settings extend that: other affinities (`affinities`), a
temperature, and stand-ins for missing gates (`stand_in`).
"""

from __future__ import annotations

import warnings

from torch import Tensor

from ...experts.pool import Pool
from .affinities import AffinityRouting
from .router import check_needs
from .stand_in import gates_or_stand_ins


class Phatgoose(AffinityRouting):
    """Router phatgoose: scores activations against gates."""

    vectors = "gates"

    def check(self, pool: Pool) -> None:
        """Raise as every router does; warn of experts whose gates are stand-ins."""
        if not self.stands_in:
            super().check(pool)
            return
        self.refuse_other_affinities("stand-ins for gates")
        ungated = Pool(tuple(expert for expert in pool.experts if not expert.gates))
        if ungated.experts:
            check_needs(ungated, ("lora",), "Stand-ins for gates are made of")
            warnings.warn(
                f"Without gates, and routed by their Arrow vectors in the gates' place: "
                f"{', '.join(ungated.names)}. That is a guess; train gates with 'phatgoose gate' "
                f"where there are data.",
                stacklevel=5,
            )

    @property
    def stands_in(self) -> bool:
        """True where missing gates are replaced: a setting that routers made of this one lack."""
        return self.routing.stand_in and "stand_in" in self.spec.settings

    @property
    def grows(self) -> str | None:
        """Stand-ins depend on the gates of the whole pool."""
        if self.stands_in:
            return "Stand-ins for gates depend on the gates of the whole pool; compose it anew."
        return super().grows

    def vectors_at(self, pool: Pool, site: str) -> Tensor:
        """Gates, standardised or as the affinity has them, or their stand-ins."""
        if self.stands_in:
            return gates_or_stand_ins(pool, site)
        return super().vectors_at(pool, site)
