"""Rows of experts, joined and taken out: what growing pools do to stacks.

A stack's tensors have one row for each expert. Where ranks differ, rows are filled up with zeros
along the second dimension, which changes no number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["GROWTH", "appended", "filled_up", "joined", "kept", "used_rank"]

GROWTH = 1.5  # how much room is made when a stack is full, as a multiple of what it must hold


def filled_up(rows: Tensor, rank: int) -> Tensor:
    """Rows [E, r, ..] of a rank, which is 3-dimensional; others are left as they are."""
    missing = rank - rows.shape[1] if rows.dim() == 3 else 0
    return functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all `parts`, in order; the one part itself where there is one only."""
    rank = max(part.shape[1] if part.dim() > 1 else 0 for part in parts)
    return parts[0] if len(parts) == 1 else torch.cat([filled_up(part, rank) for part in parts])


def appended(old: Tensor, new: Tensor, room: Tensor | None) -> Tensor:
    """A tensor with room to spare, whose first rows are those of `old` and `new`.

    It is `room` itself if `old` begins it and it is large enough: then only `new` is copied. Else
    it is made GROWTH times as large as what it holds, so that adding experts one by one copies each
    of them a few times at most.
    """
    total, rank = len(old) + len(new), max(old.shape[1], new.shape[1])
    if not (
        room is not None
        and len(room) >= total
        and room.shape[1] == rank
        and (room.data_ptr(), room.dtype) == (old.data_ptr(), old.dtype)
    ):
        room = old.new_empty(int(GROWTH * total), rank, *old.shape[2:])
        room[: len(old)] = filled_up(old, rank)
    room[len(old) : total] = filled_up(new, rank)
    return room


def kept(tensor: Tensor, rows: Tensor) -> Tensor:
    """These rows [K] (indices, in order) of `tensor`: a view where they are its first ones."""
    are_first = len(rows) == 0 or int(rows[-1]) == len(rows) - 1
    return tensor[: len(rows)] if are_first else tensor.index_select(0, rows)


def used_rank(tensors: Sequence[Tensor]) -> int:
    """The rank beyond which all rows [E, r, ..] of all `tensors` are zero; 1 at least."""
    rank = tensors[0].shape[1]
    while rank > 1 and not any(tensor[:, rank - 1].any() for tensor in tensors):
        rank -= 1
    return rank
