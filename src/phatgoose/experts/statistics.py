"""Readings: how the base alone reads an expert's prompts, block by block (docs/format.md).

A decoder knows its task only when it has seen the whole prompt. So a prompt is read in two places:
at its end, the hidden state of its last token, and as a whole, the mean over its tokens. An expert
shares their mean and covariance over its training prompts; router discriminant compares new prompts
with them. Not in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..sites import blocks_of
from ..tasks.prompt_passes import PromptReading, last_token, mean_token

PLACES = ("end", "whole")
PARTS = {"mean": 2, "factor": 3, "rest": 2}  # of a place, and how many dimensions each has
RANK = 16  # of the covariance that is shared


class PromptStates(PromptReading):
    """Reads the output of all blocks in both places: [texts, 2, blocks, d], float32."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.blocks = range(len(blocks_of(model)))

    def begin(self, mask: Tensor) -> None:
        self._mask, self._states = mask, list[Tensor]()

    def see_block(self, index: int, hidden: Tensor) -> None:
        end, whole = last_token(hidden, self._mask).float(), mean_token(hidden, self._mask)
        self._states.append(torch.stack([end, whole], dim=1).cpu())

    def found(self) -> Tensor:
        return torch.stack(self._states, dim=2)


def readings_of(states: Tensor, rank: int = RANK) -> dict[str, Tensor]:
    """The readings to share, of the `states` [prompts, 2, blocks, d] of prompts, float32 by name.

    For each place `PLACE.mean`, `PLACE.factor` and `PLACE.rest`, as `moments_of` has them.
    """
    found = {}
    for place, values in zip(PLACES, states.unbind(dim=1), strict=True):
        found.update({f"{place}.{part}": each for part, each in moments_of(values, rank).items()})
    return found


def moments_of(
    values: Tensor, rank: int = RANK, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Mean and covariance over prompts of `values` [prompts, blocks, d], float32 by part.

    `mean` is [blocks, d]. The covariance, whose denominator is the number of prompts, is `factor`
    [blocks, rank, d], its `rank` strongest directions times the root of their strength, and `rest`
    [blocks, d], what these leave of its diagonal. Products are in `dtype`: some activations are a
    thousand times the others; embeddings do with float32, which takes a third of the time.
    """
    mean = values.mean(dim=0)
    centred = (values - mean).transpose(0, 1).to(dtype)  # [blocks, prompts, d]
    factors = torch.stack([_strongest(block, rank) for block in centred])
    left = centred.square().mean(dim=1) - factors.square().sum(dim=1)
    return {"mean": mean, "factor": factors.float(), "rest": left.clamp(min=0).float()}


def readings_size(config: PreTrainedConfig) -> int:
    """How many numbers prompt statistics are: mean, rest, RANK factors by block and place."""
    text = config.get_text_config()
    return len(PLACES) * int(text.num_hidden_layers) * int(text.hidden_size) * (2 + RANK)


def readings_problems(readings: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the shapes and numbers of readings, a phrase each."""
    wanted = {f"{place}.{part}": many for place in PLACES for part, many in PARTS.items()}
    if set(readings) != set(wanted):
        return [f"they are {', '.join(sorted(readings))}; wanted {', '.join(wanted)}"]
    problems = [
        f"{name} has shape {tuple(tensor.shape)}, wanted {wanted[name]} dimensions"
        for name, tensor in readings.items()
        if tensor.dim() != wanted[name]
    ]
    if problems:
        return problems
    blocks, size = readings["end.mean"].shape
    for name, tensor in readings.items():
        dimensions = wanted[name]
        fits = tensor.shape[:: dimensions - 1] == (blocks, size)
        if not fits or tensor.dtype != torch.float32 or not tensor.numel():
            problems.append(
                f"{name} has shape {tuple(tensor.shape)} and type {tensor.dtype}, wanted "
                f"{dimensions} dimensions, {blocks} blocks first and {size} numbers last, float32"
            )
        elif name.endswith("rest") and (tensor < 0).any():
            problems.append(f"{name} has variances below 0")
    return problems


def _strongest(centred: Tensor, rank: int) -> Tensor:
    count, size = centred.shape
    gram = centred @ centred.T if count < size else centred.T @ centred
    values, vectors = torch.linalg.eigh(gram)  # ascending
    kept = min(rank, len(values))
    values, vectors = values[-kept:].flip(0).clamp(min=0), vectors[:, -kept:].flip(1).T
    strongest = vectors @ centred if count < size else vectors * values.sqrt()[:, None]
    return torch.nn.functional.pad(strongest / count**0.5, (0, 0, 0, rank - kept))
