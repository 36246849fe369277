"""Stand-ins for gates that nobody trained, so that their experts can join a pool of gated ones.

Not in the paper. Without data an expert's update is all that is known of it, and Arrow's vector
(`per_token.arrow`) is the direction it reacts to most. Two things of a gate are unknown:
how it would be spread over the other directions, and on which side of zero it would open. The side
is guessed to be the one on which the trained gates of the pool lie on average; in a pool without
any, the one where the vector's largest entry is positive. Standardised like a gate, the stand-in
then competes on equal terms. Experts with data are better served by `phatgoose gate`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....experts.pool import Pool
from .arrow import arrow_vector
from .scored import standardise

__all__ = ["gates_or_stand_ins"]


def gates_or_stand_ins(pool: Pool, site: str) -> Tensor:
    """The vectors [E, n] of the experts that act at `site`: gates, standardised, or stand-ins."""
    present = [expert for expert in pool.experts if site in expert.modules]
    gates = [standardise(e.gates[site][None])[0] for e in present if site in e.gates]
    middle = torch.stack(gates).mean(dim=0) if gates else None
    trained = iter(gates)
    rows = [
        next(trained)
        if site in expert.gates
        else _stand_in(arrow_vector(expert.lora[site]), middle)
        for expert in present
    ]
    return torch.stack(rows)


def _stand_in(direction: Tensor, middle: Tensor | None) -> Tensor:
    """`direction` [n] on the side of `middle`, the mean of the trained gates, standardised."""
    vector = standardise(direction[None])[0]
    side = vector[direction.abs().argmax()] if middle is None else vector @ middle
    return -vector if side < 0 else vector
