"""Rows of experts: joined, appended into spare room, taken out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["GROWTH", "appended", "joined", "take_rows", "used_width", "widened"]

GROWTH = 1.5  # how much room is made when a stack is full, as a multiple of what it must hold


def widened(tensor: Tensor, width: int) -> Tensor:
    """A tensor [E, r, ..] with zeros up to `width` in its second dimension."""
    missing = width - tensor.shape[1]
    return functional.pad(tensor, (*[0, 0] * (tensor.dim() - 2), 0, missing)) if missing else tensor


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all `parts`, in order; the one part itself where there is only one.

    Zeros fill up ranks that differ, the second of three dimensions.
    """
    if len(parts) == 1:
        return parts[0]
    if parts[0].dim() == 3:
        rank = max(part.shape[1] for part in parts)
        parts = [widened(part, rank) for part in parts]
    return torch.cat(list(parts))


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
        room[: len(old)] = widened(old, rank)
    room[len(old) : total] = widened(new, rank)
    return room


def take_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """These rows [K] (indices, in order) of `tensor`: a view where they are its first ones."""
    are_first = len(rows) == 0 or int(rows[-1]) == len(rows) - 1
    return tensor[: len(rows)] if are_first else tensor.index_select(0, rows)


def used_width(tensors: Sequence[Tensor]) -> int:
    """The width beyond which all rows [E, r, ..] of all `tensors` are zero; 1 at least."""
    width = tensors[0].shape[1]
    while width > 1 and not any(tensor[:, width - 1].any() for tensor in tensors):
        width -= 1
    return width
