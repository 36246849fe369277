"""What vLLM serves: experts from a routed folder, and the share that a layer gets.

Nothing here needs vLLM. A layer of vLLM may hold several of the base's layers, packed one after the
other (queries, keys and values), and only this process's share of each: some of the outputs, or
some of the inputs. Glossary of `routing.kernels`: E experts, r rank, n inputs, d outputs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phatgoose.base.identity import BaseReference
from phatgoose.errors import ConfigError, RoutingError
from phatgoose.experts.expert import tail_of
from phatgoose.routing.layers import folded_weight
from phatgoose.routing.opening import is_routed
from phatgoose.routing.routers.fixed import Random
from phatgoose.routing.routers.prompt import ByPrompt
from phatgoose.routing.routers.router import STANDARDISED, Router, RouterAtSite
from phatgoose.routing.saved import SavedModel, read_saved
from phatgoose.routing.stacks import SiteStack, check_numbers

MODEL = "PHATGOOSE_MODEL"  # in the environment: a routed folder
CPU = torch.device("cpu")
GATEWAY = "serve it by 'phatgoose serve', or by a gateway in front of vLLM (docs/engines.md)"
ELSEWHERE = f"Such a base can't be routed inside vLLM: {GATEWAY}."


# A layer's share.


class Section(NamedTuple):
    """Adjacent outputs of a layer that are split together, such as keys: all, and those here."""

    total: int
    held: int


class Share(NamedTuple):
    """What the process `rank` of `size` holds of a layer: inputs, and sections of its outputs."""

    inputs: int
    held_inputs: int
    sections: tuple[Section, ...]
    rank: int = 0
    size: int = 1

    @property
    def splits_inputs(self) -> bool:
        return self.held_inputs < self.inputs

    @property
    def columns(self) -> slice:
        """Of the inputs, those here."""
        start = self.rank * self.held_inputs if self.splits_inputs else 0
        return slice(start, start + self.held_inputs)

    def rows(self, section: Section) -> slice:
        """Of a section's outputs, those here."""
        # Fewer heads of keys than processes: several processes hold the same ones.
        copies = max(1, section.held * self.size // section.total)
        start = self.rank // copies * section.held
        return slice(start, start + section.held)


class Part(NamedTuple):
    """A site in a layer: its outputs are those from `first` on, `width` of them.

    `rows` are the site's own outputs that these are.
    """

    site: str
    first: int
    width: int
    outputs: int
    rows: tuple[slice, ...]

    def of(self, tensor: Tensor, dim: int = -1) -> Tensor:
        """The share of a `tensor` with the site's outputs in `dim`."""
        if len(self.rows) == 1:
            rows = self.rows[0]
            return tensor.narrow(dim, rows.start, rows.stop - rows.start)
        outputs = torch.arange(self.outputs, device=tensor.device)
        return tensor.index_select(dim, torch.cat([outputs[rows] for rows in self.rows]))


class Place(NamedTuple):
    """Where a site is in vLLM's model: the layer, and which of several packed ones."""

    layer: str
    member: int
    members: int


def place_of(
    site: str, packed: Mapping[str, Sequence[str]], rename: Callable[[str], str | None]
) -> Place:
    """Where `site` is, by a model's `packed_modules_mapping` and its `rename` of weights' names."""
    renamed = (rename(f"{site}.weight") or "").removesuffix(".weight")
    parent, _, leaf = renamed.rpartition(".")
    in_base = site.rpartition(".")[2]
    for name, members in packed.items():
        # vLLM's renaming may have the packed name already.
        if in_base in members and leaf in (in_base, name):
            member = list(members).index(in_base)
            return Place(f"{parent}.{name}".lstrip("."), member, len(members))
    return Place(renamed, 0, 1)


def parts_of(layer: str, share: Share, sites: Mapping[int, str], count: int) -> tuple[Part, ...]:
    """The parts of a `layer` that packs `count` sites, of which these `sites` have experts.

    Raises RoutingError where sections and packed sites are not one and the same.
    """
    sections = share.sections
    if count not in (1, len(sections)):
        raise RoutingError(
            f"{layer} packs {count} layers of the base in {len(sections)} sections; which is which "
            f"isn't known here. {ELSEWHERE}"
        )
    # One site in several sections is a layer that the base itself has packed.
    groups = [sections] if count == 1 else list(zip(sections, strict=True))
    parts = []
    first = 0
    for index, group in enumerate(groups):
        width = sum(section.held for section in group)
        if index in sites:
            outputs = sum(section.total for section in group)
            parts.append(Part(sites[index], first, width, outputs, _rows_of(share, group)))
        first += width
    return tuple(parts)


def _rows_of(share: Share, group: Iterable[Section]) -> tuple[slice, ...]:
    rows = []
    begin = 0
    width = 0
    for section in group:
        here = share.rows(section)
        rows.append(slice(begin + here.start, begin + here.stop))
        begin += section.total
        width += section.held
    return (slice(0, begin),) if width == begin else tuple(rows)


# What is opened.


@contextmanager
def _as_usual() -> Iterator[None]:
    """New tensors are float32 on the CPU: vLLM builds models with its own type and device set."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with CPU:
            yield
    finally:
        torch.set_default_dtype(before)


class Experts(NamedTuple):
    """The experts of one part of a layer, in this process: the router's tensors and numbers there.

    `state` are its tensors, A and B those of the kernels.
    """

    numbers: dict[str, Any]
    state: dict[str, Tensor]
    A: Tensor
    B: Tensor


class Served(NamedTuple):
    """A routed folder, opened: its router, experts by name, sites, and base."""

    place: str
    saved: SavedModel
    router: Router
    names: tuple[str, ...]
    sites: tuple[str, ...]
    base: BaseReference

    @_as_usual()
    def experts(self, part: Part, share: Share, dtype: torch.dtype) -> Experts:
        """The share of the experts at one site, in `dtype`, on the CPU, checked against the layer.

        Raises RoutingError for experts that don't fit, or aren't plain LoRAs.
        """
        stack, lora, state = self._at(part.site, dtype)
        sizes = (lora.A.shape[2], lora.B.shape[2])
        if sizes != (share.inputs, part.outputs):
            raise RoutingError(f"{part.site}: the experts map {sizes[0]} to {sizes[1]} features.")
        check_numbers(stack, part.site, self.names)
        at_site = RouterAtSite(self.router, part.site, stack.experts, self.names, state)
        tensors = {**at_site.to(dtype).state(), "members": at_site.members}
        if share.splits_inputs:
            if self.router.fused != STANDARDISED:
                raise ConfigError(
                    f"Router {self.router.name} reads all inputs of a layer at once, and "
                    f"{part.site} is split over {share.size} processes; use "
                    f"--tensor-parallel-size 1, or router phatgoose."
                )
            tensors["vectors"] = tensors["vectors"][..., share.columns].contiguous()
        A = lora.A[..., share.columns].contiguous()
        numbers = {name: getattr(at_site, name) for name in ("k", "E", "eps", "pool_size")}
        return Experts(numbers, tensors, A, part.of(lora.B).contiguous())

    @_as_usual()
    def folded(self, part: Part, share: Share, weight: Tensor) -> Tensor:
        """The part's `weight` [d', n'] with the mean of all experts, for routers that fold."""
        saved = self.saved.tensors.get(f"folded.{part.site}")
        if saved is not None:
            return part.of(saved, 0)[:, share.columns].to(weight)
        _, lora, _ = self._at(part.site, weight.dtype)
        A = lora.A[..., share.columns].to(weight.device)
        B = part.of(lora.B).to(weight.device)
        outputs, inputs = weight.shape
        layer = torch.nn.Linear(inputs, outputs, bias=False, device="meta")
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        return folded_weight(layer, type(lora)(A, B), len(self.names))

    def _at(self, site: str, dtype: torch.dtype) -> tuple[SiteStack, Any, Mapping[str, Tensor]]:
        """All experts at a site, the same as plain LoRAs, and the router's tensors there."""
        stack, state = self.saved.at(site)
        stack = stack.to(CPU, dtype)
        if stack.plain_lora is None:
            raise RoutingError(
                f"vLLM adds plain LoRAs, and {self.place} has experts at {site} that are of "
                f"another kind or have biases: leave them out (phatgoose compose --leave-out), or "
                f"{GATEWAY}."
            )
        return stack, stack.plain_lora, state


@_as_usual()
def open_served() -> Served:
    """What the environment names. Raises ConfigError for what vLLM can't route token by token."""
    place = os.environ.get(MODEL)
    check_place(place)
    saved = read_saved(Path(str(place)))
    router = saved.router
    why = ""
    instead = f"{GATEWAY}; or use router phatgoose"
    if isinstance(router, ByPrompt):
        why = "reads the whole prompt before its first token, and vLLM's layers see tokens only"
    elif isinstance(router, Random):
        why = "draws lots, and a shared prefix cache would hold one draw for all requests"
    elif any(map(tail_of, saved.records)):
        why = "has experts that act from a prompt's end on, and vLLM's layers see no prompts"
        instead = "serve it by 'phatgoose serve'"
    if why:
        raise ConfigError(f"Router {router.name} {why}: {instead}.")
    return Served(str(place), saved, router, saved.names, tuple(saved.sizes), saved.base)


def check_place(place: str | None) -> None:
    """Raise ConfigError unless `place` is a routed folder."""
    if not place or not is_routed(place):
        raise ConfigError(
            f"{MODEL} is {place!r}; wanted a routed model's folder here (phatgoose compose POOL "
            f"--out FOLDER)."
        )
