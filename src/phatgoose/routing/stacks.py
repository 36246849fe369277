"""Stacks: the modules of all experts at one site, in a few tensors, part by part.

Glossary: E experts, r rank or another size of one's own, n inputs, d outputs of the site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import RoutingError
from ..experts import Kind, kinds
from ..experts.kind import Part, SiteModule, Stacked, widened
from ..experts.lora import LoraStack
from ..experts.pool import Pool

Member = tuple[type[Part], Mapping[str, Tensor | None]]  # an expert's part, its tensors by field


class Declared(NamedTuple):
    """What the kinds declare: every part, and every part's tensors, by name."""

    parts: Mapping[str, type[Any]]
    tensors: Mapping[str, Stacked]


def declared() -> Declared:
    """The parts and tensors of all kinds."""
    return _declared(tuple(kinds().values()))


@lru_cache(maxsize=8)
def _declared(kinds: tuple[Kind, ...]) -> Declared:
    parts = {part.name: part for kind in kinds for part in kind.stacked}
    tensors = {
        part.names()[field]: form for part in parts.values() for field, form in part.forms().items()
    }
    return Declared(parts, tensors)


def renumbered(left: Tensor, count: int) -> Tensor:
    """The place of each of `count` rows among those that are `left` (indices, in order), or -1."""
    found = torch.full((count,), -1, device=left.device)
    found[left] = torch.arange(len(left), device=left.device)
    return found


@dataclass(frozen=True)
class SiteStack:
    """All experts' modules at one site: the parts that are there, by name.

    Only the experts that act at the site are in it, each in one part; `experts` holds their indices
    in the pool, [E].
    """

    experts: Tensor  # [E] int64
    parts: Mapping[str, Part] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors but `experts`, by their names in saved models."""
        return {name: t for part in self.parts.values() for name, t in part.tensors().items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], experts: Tensor) -> SiteStack:
        parts = {}
        for name, part in declared().parts.items():
            names = part.names().items()
            fields: dict[str, Any] = {f: tensors[key] for f, key in names if key in tensors}
            if fields:
                parts[name] = part(**fields)
        return cls(experts, parts)

    def to(self, device: torch.device, dtype: torch.dtype) -> SiteStack:
        """The same on `device`; in `dtype`, but for indices and what is kept in float32."""
        forms = declared().tensors
        moved = {
            name: tensor.to(device, dtype if forms[name].dtype == "model" else None)
            for name, tensor in self.tensors().items()
        }
        return SiteStack.of(moved, self.experts.to(device))

    @property
    def dtype(self) -> torch.dtype:
        """The model's type, which most of the tensors have; float32 with scalings only."""
        forms = declared().tensors
        in_it = (t for name, t in self.tensors().items() if forms[name].dtype == "model")
        return next(in_it, torch.empty(0)).dtype

    def rows(self) -> dict[str, Tensor]:
        every = torch.arange(len(self.experts), device=self.experts.device)
        return {
            name: every if part.rows is None else part.rows for name, part in self.parts.items()
        }

    def members(self) -> list[Member]:
        """The part of each expert and its tensors there, no wider than they need to be."""
        members: dict[int, Member] = {}
        for name, rows in self.rows().items():
            part, forms = self.parts[name], self.parts[name].forms()
            fields = {f: t for f in forms if f != "rows" and (t := getattr(part, f)) is not None}
            widths = [0] * len(rows)
            if sized := [field for field in fields if forms[field].is_filled_up]:
                # Ranks of zeros are other experts': composing anew would not have them.
                used = [fields[f].reshape(*fields[f].shape[:2], -1).any(dim=-1) for f in sized]
                places = torch.arange(1, used[0].shape[1] + 1, device=rows.device)
                most = (torch.stack(used).any(dim=0) * places).amax(dim=1).clamp(min=1)
                widths = most.tolist()
            for place, row in enumerate(rows.tolist()):
                own = {f: t[place] for f, t in fields.items()}
                own |= {f: own[f][: widths[place]] for f in sized}
                kept = {f: t for f, t in own.items() if not forms[f].optional or t.any()}
                members[row] = type(part), kept
        return [members[row] for row in range(len(self.experts))]

    @property
    def lora(self) -> LoraStack | None:
        part = self.parts.get("lora")
        return part if isinstance(part, LoraStack) else None

    @property
    def plain_lora(self) -> LoraStack | None:
        """The LoRAs, where there is nothing else here, no biases either."""
        lora = self.lora
        return lora if lora and lora.rows is None and lora.B_bias is None else None


def stacked(members: Sequence[Member], experts: Tensor, dtype: torch.dtype) -> SiteStack:
    """The stack of one site's `members`, of these `experts`, on their device."""
    by_part: dict[str, dict[int, Mapping[str, Tensor | None]]] = {}
    for row, (part, tensors) in enumerate(members):
        by_part.setdefault(part.name, {})[row] = tensors
    parts = {
        name: part.of(by_part[name], dtype, experts.device, len(members))
        for name, part in declared().parts.items()
        if name in by_part
    }
    return SiteStack(experts, parts)


def stack_modules(
    experts: Sequence[int], modules: Sequence[SiteModule], dtype: torch.dtype, device: torch.device
) -> SiteStack:
    """The stack of one site's `modules`, of these `experts`."""
    members, by_kind = list[Member](), {kind.name: kind.stacked for kind in kinds().values()}
    for module in modules:
        part = next(part for part in by_kind[module.kind] if part.stacks(module))
        members.append((part, part.row(module)))
    return stacked(members, torch.tensor(experts, device=device), dtype)


def stack_of(pool: Pool, site: str, dtype: torch.dtype, device: torch.device) -> SiteStack:
    """The stack of the pool's experts that have a module at `site`."""
    present = [z for z, expert in enumerate(pool.experts) if site in expert.modules]
    modules = [pool.experts[z].modules[site] for z in present]
    return stack_modules(present, modules, dtype, device)


SQUARED = torch.finfo(torch.float32).max ** 0.5  # what a norm after the layer can still square


@torch.no_grad()
def check_numbers(stack: SiteStack, where: str, names: Sequence[str]) -> None:
    """Raise RoutingError for an expert whose update at the site `where` can't be computed with.

    Its numbers, the product of its factors and their squares must be finite. `names`: the pool's.
    """
    most = min(torch.finfo(stack.dtype).max, SQUARED)
    for name, part in stack.parts.items():
        factors = [getattr(part, field) for field in part.compared if len(part.compared) > 1]
        tensors = [t for t in part.tensors().values() if t.is_floating_point()]
        bounds = [_lengths(t) for t in tensors if all(t is not factor for factor in factors)]
        if factors:  # no number of B A is above |A| |B|
            bounds.append(_lengths(factors[0]) * _lengths(factors[1]))
        bound = torch.stack(bounds).amax(dim=0)
        for row in (~(bound <= most)).nonzero().flatten().tolist():  # so is NaN
            expert = names[int(stack.experts[stack.rows()[name][row]])]
            raise RoutingError(
                f"Expert {expert!r} at {where}: its update may have numbers of {bound[row]:.1e}, "
                f"more than a layer in {stack.dtype} can use ({most:.1e}); leave it out "
                f"(--leave-out {expert})."
            )


def _lengths(rows: Tensor) -> Tensor:
    """The norm of each expert's numbers, float32 [E]: none of them, nor of a product, is larger."""
    lengths: Tensor = torch.linalg.vector_norm(rows.flatten(1), dim=1, dtype=torch.float32)
    return lengths


class SitePart(NamedTuple):
    """Some experts at one site: their stack, and their rows of the router's tensors there.

    Saved models grow and shrink by these alone.
    """

    stack: SiteStack
    state: Mapping[str, Tensor]


def joined_parts(one: SitePart, other: SitePart) -> SitePart:
    """All experts of both, in order; the router's tensors as the first has them."""
    experts = torch.cat([one.stack.experts, other.stack.experts])
    members = [*one.stack.members(), *other.stack.members()]
    state = {}
    for name, rows in one.state.items():  # with zeros where ranks differ
        both = [rows, other.state[name].to(rows)]
        width = max(each.shape[1] for each in both) if rows.dim() > 1 else 0
        state[name] = torch.cat([widened(each, width) if width else each for each in both])
    return SitePart(stacked(members, experts, one.stack.dtype), state)


def kept_part(part: SitePart, place: Tensor) -> SitePart | None:
    """The part without experts whose `place` [pool] is -1, numbered again; None if none is left."""
    experts = place[part.stack.experts]
    rows = (experts >= 0).nonzero().flatten()
    if not len(rows):
        return None
    members = part.stack.members()
    staying = [members[row] for row in rows.tolist()]
    stack = stacked(staying, experts[rows], part.stack.dtype)
    return SitePart(stack, {name: tensor[rows] for name, tensor in part.state.items()})
