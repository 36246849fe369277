"""Agreement of routers, token by token; their decisions are kept in files, not in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..base.sites import Stream
from ..routing.watching import SitePass
from .reading import Observer

__all__ = ["Agreement", "DecisionFiles", "agreement"]


@dataclass(frozen=True)
class Agreement:
    """How far two routers agree over `decisions` (tokens x sites where both act).

    `first` is the share of decisions with the same expert of greatest weight; equals share a first
    choice equally, and two such choices agree by the sum over z of the smaller share. `overlap` is
    the mean of the same sum over weights, min(w_z, w'_z), which is 1 where the weights are equal.
    """

    first: float
    overlap: float
    decisions: int


class DecisionFiles(Observer):
    """Writes the decisions of each pass to a file of its own in `folder`."""

    def __init__(self, folder: Path, pool_index: Tensor) -> None:
        """`pool_index[z]` is the index, among all routers' experts, of the model's expert z."""
        self.folder, self.passes = folder, 0
        self._pool_index = pool_index
        self._tensors: dict[str, Tensor] = {}
        folder.mkdir(parents=True)

    def begin_pass(self, parts: Mapping[Stream, Tensor]) -> None:
        """Begin an empty file."""
        self._tensors = {}

    def add(self, passed: SitePass) -> None:
        """Keep the decisions on real tokens."""
        keep, site = passed.is_real().flatten(), passed.site.name
        chosen = self._pool_index[passed.experts.cpu()[keep]]
        self._tensors[f"experts.{site}"] = chosen.to(torch.int16).contiguous()
        self._tensors[f"weights.{site}"] = passed.weights.cpu()[keep].float().contiguous()

    def end_pass(self) -> None:
        """Write the pass."""
        save_file(self._tensors, self.folder / f"{self.passes:06}.safetensors")
        self.passes += 1


def agreement(first: Path, second: Path, pool_size: int) -> Agreement | None:
    """The agreement of two routers that read the same batches, None if they share no site.

    `first` and `second` are folders of `DecisionFiles`.
    """
    same, common, decisions = 0.0, 0.0, 0
    for one, other in _pairs(first, second, pool_size):
        same += float(torch.minimum(_first(one), _first(other)).sum())
        common += float(torch.minimum(one, other).sum())
        decisions += len(one)
    return Agreement(same / decisions, common / decisions, decisions) if decisions else None


def _pairs(first: Path, second: Path, pool_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Both routers' weights over the pool [T, E], for each pass and site where both act."""
    for file in sorted(first.iterdir()):
        one, other = load_file(file), load_file(second / file.name)
        for key in one.keys() & other.keys():
            if key.startswith("experts."):
                site = key.removeprefix("experts.")
                dense = [_dense(tensors, site, pool_size) for tensors in (one, other)]
                # A router that gives a token no expert here has made no choice to compare.
                decided = dense[0].any(dim=1) & dense[1].any(dim=1)
                yield dense[0][decided], dense[1][decided]


def _first(weights: Tensor) -> Tensor:
    """Each row's first choice, 1 at the expert of greatest weight, shared equally among equals."""
    best = (weights == weights.amax(dim=1, keepdim=True)).float()
    return best / best.sum(dim=1, keepdim=True)


def _dense(tensors: Mapping[str, Tensor], site: str, pool_size: int) -> Tensor:
    experts, weights = tensors[f"experts.{site}"], tensors[f"weights.{site}"]
    return torch.zeros(len(experts), pool_size).scatter_add(1, experts.long(), weights.float())
