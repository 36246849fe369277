"""Batches with next to no padding: several texts share a row, and none sees another.

A text is a stem and branches that each go on from its end: a prompt and its answer choices. In a
row all stand one after the other; an attention mask lets a branch see its stem and itself alone,
and positions begin anew with each text and go back to the stem's end with each branch. So what a
model says of every token is what it would say of stem and branch alone.
"""

from __future__ import annotations

import heapq
import inspect
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

__all__ = [
    "Packed",
    "Text",
    "can_pack",
    "head_at",
    "pack",
    "packed_batches",
    "quick_backward",
]

IMPLEMENTATIONS = ("sdpa", "eager")  # of attention: those that add a mask to the scores
FULL = "full_attention"
# A token that stands in a row of so many costs twice as much as alone, since a row's attention is
# computed whole, also where the mask hides it. Measured on SmolLM2-135M in bfloat16 on a CPU; only
# the way that rows are filled goes by it.
DEAR_ROW = 700
FILLS = (1.0, 0.95, 0.9, 0.8, 0.7)  # shares of its budget that a batch may be filled up to
# Tokens in a row up to which all probabilities of attention take no more memory than what else a
# backward pass needs (six bytes a token, head and column).
SHORT_ROW = 256


@dataclass(frozen=True)
class Text:
    """A stem of at least one token, and what goes on from its end, each branch by itself."""

    stem: Sequence[int]
    branches: Sequence[Sequence[int]] = ()

    @property
    def length(self) -> int:
        """Tokens of stem and branches."""
        return len(self.stem) + sum(map(len, self.branches))


@dataclass(frozen=True)
class Packed:
    """Texts as a batch of rows.

    `owners` [rows, columns] says of which text each token is, -1 for padding; `starts` [texts]
    where each begins when rows are put one after the other. A text's tokens stand together: its
    stem, then its branches in order.
    """

    inputs: dict[str, Tensor]
    owners: Tensor
    starts: Tensor


def can_pack(model: PreTrainedModel) -> bool:
    """True for a causal model that takes positions and any attention mask in all its layers.

    Transformers hands a mask of four dimensions on as it is where attention goes through its own
    interface. Layers with a window or a state of their own would see beyond their text.
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
    """Batches of rows of indices that visit every text once: at most `budget` tokens, padded.

    A text longer than the budget comes alone. Longest first, so that memory runs out early or
    never. A batch that is nearly full may leave its last texts to the next one, where all of them
    would fit in long rows only.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    while order:
        ends = sorted({_filled(order, lengths, fill * budget) for fill in FILLS}, reverse=True)
        found = [_rows(order[:end], lengths, budget) for end in ends]
        _, rows = min(found, key=lambda each: each[0])
        yield rows
        order = order[sum(map(len, rows)) :]


def _filled(order: Sequence[int], lengths: Sequence[int], room: float) -> int:
    """How many of the first texts in `order` have room together; one has always."""
    totals = itertools.accumulate(lengths[i] for i in order)
    return max(1, sum(1 for _ in itertools.takewhile(lambda total: total <= room, totals)))


def _rows(
    order: Sequence[int], lengths: Sequence[int], budget: int
) -> tuple[float, list[list[int]]]:
    """The cost of a token, and the indices in `order`, longest first, in rows that cost least.

    All in one row, without padding, is always within the budget, but seldom cheap.
    """
    total = sum(lengths[i] for i in order)
    best, rows = math.inf, list[list[int]]()
    for count in range(-(-total // lengths[order[0]]), 0, -1):
        if 1 + total / count / DEAR_ROW >= 0.98 * best:
            break  # fewer and longer rows, even without padding, would save next to nothing
        shared = _shared_out(order, lengths, count)
        columns = max(sum(lengths[i] for i in row) for row in shared)
        tokens = len(shared) * columns
        cost = tokens / total * (1 + columns / DEAR_ROW)
        if cost < best and (tokens <= budget or count == 1):
            best, rows = cost, shared
    return best, rows


def _shared_out(order: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """`count` rows of indices, each put into the row that is shortest by then."""
    rows = [(0, row, list[int]()) for row in range(count)]
    for index in order:
        filled, row, indices = rows[0]
        indices.append(index)
        heapq.heapreplace(rows, (filled + lengths[index], row, indices))
    return [indices for _, _, indices in rows if indices]


def pack(rows: Sequence[Sequence[Text]], pad_token_id: int, dtype: torch.dtype) -> Packed:
    """The texts of each row as one batch; `dtype` is that of the model.

    `inputs` are what its forward pass takes. Texts are numbered row by row. Padding sees the first
    token of its row and not itself, by which it is known (`token_masks`).
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
    return Packed(inputs, owners, torch.tensor(starts))


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


@contextmanager
def head_at(model: nn.Module, places: Tensor) -> Iterator[None]:
    """While the context is open, logits are computed at `places` only, [1, places, vocabulary].

    `places` count the tokens of a batch, row by row.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(
        lambda _, args: (args[0].flatten(0, 1)[places].unsqueeze(0), *args[1:])
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def quick_backward(model: PreTrainedModel, columns: int) -> Iterator[None]:
    """While the context is open, attention goes the way whose backward pass is the quicker one.

    On a CPU plain products take half the time of torch's fused kernel; they keep every probability,
    so only where rows of `columns` tokens are short. `model` is one that can be packed.
    """
    usual = model.config.get_text_config()._attn_implementation
    if model.device.type != "cpu" or columns > SHORT_ROW or usual == "eager":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(usual)
