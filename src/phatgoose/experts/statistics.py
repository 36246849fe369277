"""Prompt statistics: what a reader makes of an expert's prompts, block by block.

A prompt is read as a whole: the mean of a block's states over its tokens. An expert shares mean and
covariance of that over its training prompts; router discriminant compares new prompts with them
(docs/format.md). Not in the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..sites import Tensors

WHOLE = "whole"  # what of a prompt is read: the mean over its tokens
PARTS = {"mean": "bd", "factor": "brd", "rest": "bd"}  # b blocks of size d
RANK = 16  # r of the covariance that is shared


def prompt_statistics_of(states: Tensor, rank: int = RANK) -> Tensors:
    """What is shared of the `states` [prompts, blocks, d] of prompts, float32 by name."""
    return {f"{WHOLE}.{part}": tensor for part, tensor in moments_of(states, rank).items()}


def moments_of(values: Tensor, rank: int = RANK) -> Tensors:
    """Mean and covariance over prompts of `values` [prompts, blocks, d], float32 by part.

    `mean` is [blocks, d]. The covariance, whose denominator is the number of prompts, is `factor`
    [blocks, rank, d], its `rank` strongest directions times the root of their strength, and `rest`
    [blocks, d], what these leave of its diagonal. Products are in float64: some activations are a
    thousand times the others.
    """
    mean = values.mean(dim=0)
    centred = (values - mean).transpose(0, 1).double()  # [blocks, prompts, d]
    factors = torch.stack([_strongest(block, rank) for block in centred])
    left = centred.square().mean(dim=1) - factors.square().sum(dim=1)
    return {"mean": mean, "factor": factors.float(), "rest": left.clamp(min=0).float()}


def grown(statistics: Tensors, count: int, states: Tensor) -> Tensors:
    """The `statistics` of `count` prompts, and the `states` [prompts, blocks, d] of more, together.

    As if all had been measured at once, but for what the first ones' `rest` left of a covariance.
    """
    more = len(states)
    share = count / (count + more)
    old = {part: statistics[f"{WHOLE}.{part}"].double() for part in PARTS}
    mean = states.mean(dim=0).double()
    away = old["mean"] - mean
    between = away[:, None] * (share * (1 - share)) ** 0.5
    centred = (states - mean).transpose(0, 1).double() * ((1 - share) / more) ** 0.5
    rows = torch.cat([old["factor"] * share**0.5, centred, between], dim=1)
    rank = old["factor"].shape[1]
    factors = torch.stack([_strongest(block * len(block) ** 0.5, rank) for block in rows])
    left = rows.square().sum(dim=1) - factors.square().sum(dim=1)
    parts = {
        "mean": mean + share * away,
        "factor": factors,
        "rest": left.clamp(min=0) + share * old["rest"],
    }
    return {f"{WHOLE}.{part}": tensor.float() for part, tensor in parts.items()}


def _strongest(centred: Tensor, rank: int) -> Tensor:
    count, size = centred.shape
    gram = centred @ centred.T if count < size else centred.T @ centred
    values, vectors = torch.linalg.eigh(gram)  # ascending
    kept = min(rank, len(values))
    vectors = vectors[:, -kept:].flip(1).T
    if count < size:
        strongest = vectors @ centred
    else:
        values = values[-kept:].flip(0).clamp(min=0)
        strongest = vectors * values.sqrt()[:, None]
    return torch.nn.functional.pad(strongest / count**0.5, (0, 0, 0, rank - kept))
