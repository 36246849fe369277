"""Stacks: the modules of all experts at one site, in a few tensors, part by part.

Rows of experts: joined, taken out. Glossary: E experts, r rank or another
size of one's own, n inputs, d outputs of the site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import RoutingError
from ..experts import Kind, kinds
from ..experts.kind import Part, SiteModule, Stacked, widened
from ..experts.lora import LoraStack
from ..experts.pool import Pool


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


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all `parts`, in order, with zeros where ranks differ; a lone part itself."""
    if len(parts) == 1:
        return parts[0]
    if parts[0].dim() > 1:
        width = max(part.shape[1] for part in parts)
        parts = [widened(part, width) for part in parts]
    return torch.cat(list(parts))


def take_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """These rows [K] (indices, in order) of `tensor`: a view where they are its first ones."""
    # Rows are in order, so the last one tells.
    are_first = len(rows) == 0 or int(rows[-1]) == len(rows) - 1
    return tensor[: len(rows)] if are_first else tensor.index_select(0, rows)


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

    @property
    def lora(self) -> LoraStack | None:
        part = self.parts.get("lora")
        return part if isinstance(part, LoraStack) else None

    @property
    def plain_lora(self) -> LoraStack | None:
        """The LoRAs, where there is nothing else here, no biases either."""
        lora = self.lora
        return lora if lora and lora.rows is None and lora.B_bias is None else None


def stack_modules(
    experts: Sequence[int], modules: Sequence[SiteModule], dtype: torch.dtype, device: torch.device
) -> SiteStack:
    """The stack of one site's `modules`, of these `experts`; RoutingError for unknown kinds."""
    members: dict[str, dict[int, SiteModule]] = {}
    by_kind = {kind.name: kind.stacked for kind in kinds().values()}
    for row, module in enumerate(modules):
        part = next((p for p in by_kind.get(module.kind, ()) if p.stacks(module)), None)
        if part is None:
            raise RoutingError(f"Experts of the kind {module.kind!r} can't be stacked here.")
        members.setdefault(part.name, {})[row] = module
    stacked = {
        name: part.of(members[name], dtype, device, len(modules))
        for name, part in declared().parts.items()
        if name in members
    }
    return SiteStack(torch.tensor(experts, device=device), stacked)


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


def joined_stacks(stacks: Sequence[SiteStack]) -> SiteStack:
    """One site's stacks as one, experts in the order of the stacks."""
    experts = torch.cat([stack.experts for stack in stacks])
    firsts = [sum(len(stack.experts) for stack in stacks[:i]) for i in range(len(stacks))]
    tensors: dict[str, Tensor] = {}
    for name, kind in declared().parts.items():
        pairs = [
            (stack.parts[name], stack.rows()[name] + first)
            for stack, first in zip(stacks, firsts, strict=True)
            if name in stack.parts
        ]
        for field_name, key in kind.names().items():
            known = [(getattr(part, field_name), len(rows)) for part, rows in pairs]
            like = next((tensor for tensor, _ in known if tensor is not None), None)
            if field_name == "rows":
                every = torch.cat([rows for _, rows in pairs]) if pairs else experts[:0]
                if pairs and len(every) < len(experts):
                    tensors[key] = every
            elif like is not None:
                zeros = like.new_zeros(1, *like.shape[1:])
                tensors[key] = joined(
                    [
                        zeros.expand(count, *zeros.shape[1:]) if t is None else t
                        for t, count in known
                    ]
                )
    return SiteStack.of(tensors, experts)


def kept_stack(stack: SiteStack, rows: Tensor) -> SiteStack:
    """The stack of the experts in these `rows` (in order), no wider than they need."""
    place = renumbered(rows, len(stack.experts))
    tensors: dict[str, Tensor] = {}
    for name, of_part in stack.rows().items():
        part, places = stack.parts[name], place[of_part]
        stay = (places >= 0).nonzero().flatten()
        if not len(stay):
            continue
        kept = {n: take_rows(tensor, stay) for n, tensor in part.tensors().items()}
        kept[part.names()["rows"]] = places[stay]
        for field_name, form in part.forms().items():
            key, is_row = part.names()[field_name], field_name == "rows"
            is_needless = len(stay) == len(rows) if is_row else not kept.get(key, stay).any()
            if form.optional and is_needless:
                kept.pop(key, None)
        sized = [name for name in kept if declared().tensors[name].is_filled_up]
        # Ranks that only experts that left had are zeros by now: composing anew would not have
        # them.
        width = kept[sized[0]].shape[1] if sized else 0
        while width > 1 and not any(kept[name][:, width - 1].any() for name in sized):
            width -= 1
        tensors |= kept | {name: kept[name][:, :width].contiguous() for name in sized}
    return SiteStack.of(tensors, stack.experts[rows])


class SitePart(NamedTuple):
    """Some experts at one site: their stack, and their rows of the router's tensors there.

    Saved models grow and shrink by these alone.
    """

    stack: SiteStack
    state: Mapping[str, Tensor]


def joined_parts(parts: Sequence[SitePart]) -> SitePart:
    """All experts of the parts, in order; the router's tensors as the first part has them."""
    first, *others = (part.state for part in parts)
    state = {
        name: joined([rows, *(each[name].to(rows) for each in others)])
        for name, rows in first.items()
    }
    return SitePart(joined_stacks([part.stack for part in parts]), state)


def kept_part(part: SitePart, place: Tensor) -> SitePart | None:
    """The part without experts whose `place` [pool] is -1, numbered again; None if none is left."""
    found = place.to(part.stack.experts.device)[part.stack.experts]
    rows = (found >= 0).nonzero().flatten()
    if not len(rows):
        return None
    stack = replace(kept_stack(part.stack, rows), experts=found[rows])
    return SitePart(stack, {name: take_rows(held, rows) for name, held in part.state.items()})
