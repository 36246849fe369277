"""A pool of honest experts made of random numbers, for the attackers beside it."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from attackers import ATTACKS, HARMLESS, attacked
from phatgoose.experts.pool import Pool
from phatgoose.experts.statistics import readings_of
from phatgoose.tasks.embeddings import DEFAULT_EMBEDDER, PROMPT

__all__ = ["ATTACKS", "HARMLESS", "attacked", "honest"]

PROMPTS, ROWS, DIMS = 30, 20, 32


def honest(pool: Pool, blocks: int = 2, size: int = 32) -> Pool:
    """The experts of `pool`, each with statistics of a task of its own."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    usual = {
        site: 3 * normal(e.modules[site].in_features) for e in pool.experts for site in e.gates
    }
    experts = []
    for expert in pool.experts:
        means = {site: usual[site] + 0.5 * normal(len(gate)) for site, gate in expert.gates.items()}
        states = normal(2, blocks, size) + 0.3 * normal(PROMPTS, 2, blocks, size)
        rows = functional.normalize(normal(DIMS) + 0.3 * normal(ROWS, DIMS), dim=-1)
        experts.append(
            replace(
                expert,
                info=replace(expert.info, embedder=DEFAULT_EMBEDDER, embedding_form=PROMPT),
                means=means,
                readings=readings_of(states[:, 1]),
                embeddings=rows,
            )
        )
    return Pool(tuple(experts))
