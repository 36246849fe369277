"""Stand-ins for missing gates, so that experts without gates can join a pool of gated ones.

Not in the paper. Without data only an expert's update is known, and Arrow's vector
(`routers.arrow`) is the direction it reacts to most. Two things about the gate stay unknown: its
other directions, and its sign. The sign is guessed: the side on which the pool's trained gates lie
on average or, without any, the one where the vector's largest entry is positive. Standardised like
a gate, the stand-in competes on equal terms. With data, `phatgoose gate` does better.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...experts.pool import Pool
from .arrow import arrow_vector
from .vector_router import standardise


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
