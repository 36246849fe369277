"""Batches with almost no padding: several texts share a row, and none attends to another.

A text is a stem and branches that continue it: a prompt and its answer choices. A row holds texts
one after the other. The attention mask lets a branch see only its stem and itself, and positions
restart with each text and return to the stem's end with each branch. So the model's output for
every token is the same as for its stem and branch alone.
"""

from __future__ import annotations

import heapq
import inspect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

__all__ = [
    "BranchedText",
    "PackedBatch",
    "can_pack",
    "pack_rows",
    "packed_batches",
]

IMPLEMENTATIONS = ("sdpa", "eager")  # of attention: those that add a mask to the scores
FULL = "full_attention"
# In a row of so many tokens, each costs twice as much as alone, because attention is computed over
# the whole row, masked parts too. Measured on SmolLM2-135M in bfloat16 on a CPU; it only decides
# how rows are filled.
COSTLY_ROW = 700
FILLS = (1.0, 0.95, 0.9, 0.8, 0.7)  # shares of its budget to which a batch may be filled


@dataclass(frozen=True)
class BranchedText:
    """A stem of at least one token, and branches that each continue it separately."""

    stem: Sequence[int]
    branches: Sequence[Sequence[int]] = ()

    @property
    def length(self) -> int:
        """The tokens of stem and branches together."""
        return len(self.stem) + sum(map(len, self.branches))


@dataclass(frozen=True)
class PackedBatch:
    """Texts as a batch of rows.

    `owners` [rows, columns] is the index of each token's text, -1 for padding; `starts` [texts] is
    where each text begins when the rows are concatenated. A text's tokens are contiguous: its stem,
    then its branches in order.
    """

    inputs: dict[str, Tensor]
    owners: Tensor
    starts: Tensor


def can_pack(model: PreTrainedModel) -> bool:
    """True for a causal model that takes positions and any attention mask in all its layers.

    Transformers passes a mask of four dimensions on unchanged where attention goes through its own
    interface. Layers with a window or a state would see beyond their text.
    """
    config = model.config.get_text_config()
    return bool(
        not model.config.is_encoder_decoder
        and model._supports_attention_backend
        and not model._is_stateful
        and config._attn_implementation in IMPLEMENTATIONS
        and set(getattr(config, "layer_types", None) or [FULL]) == {FULL}
        and getattr(config, "sliding_window", None) is None
        and "position_ids" in inspect.signature(model.forward).parameters
    )


def packed_batches(lengths: Sequence[int], budget: int) -> Iterator[list[list[int]]]:
    """Batches of rows of text indices: every text once, at most `budget` tokens with padding.

    A text longer than the budget comes alone. The longest come first, so that memory runs out early
    or never. A nearly full batch may leave its last texts to the next one, where fitting them all
    would take long rows.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    while order:
        ends = sorted({_filled(order, lengths, fill * budget) for fill in FILLS}, reverse=True)
        found = [_rows(order[:end], lengths, budget) for end in ends]
        _, rows = min(found, key=lambda each: each[0])
        yield rows
        order = order[sum(map(len, rows)) :]


def _filled(order: Sequence[int], lengths: Sequence[int], room: float) -> int:
    """How many of the first texts in `order` fit into `room` together, at least one."""
    totals = itertools.accumulate(lengths[i] for i in order)
    return max(1, sum(1 for _ in itertools.takewhile(lambda total: total <= room, totals)))


def _rows(
    order: Sequence[int], lengths: Sequence[int], budget: int
) -> tuple[float, list[list[int]]]:
    """The cost of a token, and the indices in `order`, longest first, in the cheapest rows.

    One row for all, without padding, always fits the budget but is seldom cheap.
    """
    total = sum(lengths[i] for i in order)
    best, rows = math.inf, list[list[int]]()
    for count in range(-(-total // lengths[order[0]]), 0, -1):
        if 1 + total / count / COSTLY_ROW >= 0.98 * best:
            break  # even without padding, fewer and longer rows would save almost nothing
        shared = _distributed(order, lengths, count)
        columns = max(sum(lengths[i] for i in row) for row in shared)
        tokens = len(shared) * columns
        cost = tokens / total * (1 + columns / COSTLY_ROW)
        if cost < best and (tokens <= budget or count == 1):
            best, rows = cost, shared
    return best, rows


def _distributed(order: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """`count` rows of indices, each index put into the shortest row so far."""
    rows = [(0, row, list[int]()) for row in range(count)]
    for index in order:
        filled, row, indices = rows[0]
        indices.append(index)
        heapq.heapreplace(rows, (filled + lengths[index], row, indices))
    return [indices for _, _, indices in rows if indices]


def pack_rows(
    rows: Sequence[Sequence[BranchedText]], pad_token_id: int, dtype: torch.dtype
) -> PackedBatch:
    """The texts of each row as one batch; `dtype` is that of the model.

    `inputs` are what its forward pass takes. Texts are numbered row by row. Padding sees the first
    token of its row and not itself, which is how `token_masks` recognises it.
    """
    columns = max(sum(text.length for text in row) for row in rows)
    shape = (len(rows), columns)
    tokens, positions = torch.full(shape, pad_token_id), torch.zeros(shape, dtype=torch.long)
    owners, branches = torch.full(shape, -1), torch.zeros(shape, dtype=torch.long)
    starts: list[int] = []
    for row, texts in enumerate(rows):
        at = 0
        for text in texts:
            starts.append(row * columns + at)
            for branch, part in enumerate([text.stem, *text.branches]):
                place, begin = slice(at, at + len(part)), len(text.stem) if branch else 0
                tokens[row, place] = torch.tensor(part, dtype=torch.long)
                positions[row, place] = torch.arange(begin, begin + len(part))
                owners[row, place], branches[row, place] = len(starts) - 1, branch
                at += len(part)
    mask = torch.zeros(len(rows), 1, columns, columns, dtype=dtype)
    mask.masked_fill_(~_visible(owners, branches).unsqueeze(1), torch.finfo(dtype).min)
    inputs = {"input_ids": tokens, "position_ids": positions, "attention_mask": mask}
    return PackedBatch(inputs, owners, torch.tensor(starts))


def _visible(owners: Tensor, branches: Tensor) -> Tensor:
    """Whether each token (row of the result) sees each (column), [rows, columns, columns]."""
    columns = owners.shape[1]
    earlier = torch.ones(columns, columns, dtype=torch.bool).tril()
    same_text = owners.unsqueeze(2) == owners.unsqueeze(1)
    same_branch = branches.unsqueeze(2) == branches.unsqueeze(1)
    in_stem = (branches == 0).unsqueeze(1)
    padding = owners.eq(-1).unsqueeze(2)
    first = torch.arange(columns) == 0
    return torch.where(padding, first, earlier & same_text & (same_branch | in_stem))
