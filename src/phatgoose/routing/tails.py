"""Where experts are active that act from a prompt's end on: on its last tokens and the answer.

The position of each token tells, so padding, caches and drafts need no rules of their own.
"""

from __future__ import annotations

import sys
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

Tails = tuple[int | None, ...]  # of a prompt's last tokens that each expert acts on, None for all
IN_ANSWER = torch.iinfo(torch.int64).max  # a position behind every prompt


class Active(NamedTuple):
    """On which of a pass's T tokens the experts of a site are active.

    `mask` [T, E] says it of each expert, None for all of them everywhere. If any is on at most half
    of the tokens, `tokens` are the indices of these, and `mask_there` is the mask at them, None
    where all are active there.
    """

    mask: Tensor | None = None
    tokens: Tensor | None = None
    mask_there: Tensor | None = None


class PromptEnds:
    """How far each token of a pass is from its prompt's end."""

    def __init__(self, positions: Tensor, lengths: Tensor) -> None:
        """Of tokens at `positions` [rows, columns] behind prompts of `lengths` [rows or tokens]."""
        rows, columns = positions.shape
        if len(lengths) != positions.numel():  # beams repeat rows
            lengths = lengths.repeat_interleave(rows // len(lengths) * columns)
        left = lengths.to(positions.device) - positions.flatten()  # of the prompt, [tokens]
        # By tails and device: many sites of a pass ask for the same.
        self.active = cache(partial(_active, left))


def _active(left: Tensor, tails: Tails, device: torch.device) -> Active:
    """Where a site's experts are active, which have these tails; tensors on `device`."""
    reach = [tail or sys.maxsize for tail in tails]
    mask = left.to(device)[:, None] <= torch.tensor(reach, device=device)
    tokens = mask.any(dim=1).nonzero()[:, 0]
    mask_there = mask[tokens]
    all_there = bool(mask_there.all())
    if all_there and len(tokens) == len(mask):
        return Active()
    if 2 * len(tokens) > len(mask):
        return Active(mask)
    return Active(mask, tokens, None if all_there else mask_there)
