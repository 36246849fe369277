"""The modules of all experts at one site, stacked in a few tensors, part by part.

E experts, r rank or another size of one's own, n inputs, d outputs of the site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import RoutingError
from ..experts import kinds
from ..experts.lora import LoraStack
from ..experts.pool import Pool
from ..experts.stack import Part, Stacked, widened

Member = tuple[type[Part], Mapping[str, Tensor | None]]  # an expert's part, its tensors by field
SQUARED = torch.finfo(torch.float32).max ** 0.5  # what a norm after the layer can still square


def parts_of_kinds() -> dict[str, type[Any]]:
    """The parts of stacks that all kinds declare, by name."""
    return {part.name: part for kind in kinds().values() for part in kind.stacked}


def renumbered(staying: Tensor, count: int) -> Tensor:
    """The new number of each of `count` rows, of which these stay (indices, in order), or -1."""
    numbers = torch.full((count,), -1, device=staying.device)
    numbers[staying] = torch.arange(len(staying), device=staying.device)
    return numbers


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
        tensors: dict[str, Tensor] = {}
        for part in self.parts.values():
            tensors |= part.tensors()
        return tensors

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], experts: Tensor) -> SiteStack:
        parts = {}
        for name, part in parts_of_kinds().items():
            names = part.names().items()
            fields = {name: tensors[key] for name, key in names if key in tensors}
            if fields:
                parts[name] = part(**fields)
        return cls(experts, parts)

    def to(self, device: torch.device, dtype: torch.dtype) -> SiteStack:
        """The same on `device`; in `dtype`, but for indices and what belongs in float32."""
        forms = self._forms()
        moved = {}
        for name, tensor in self.tensors().items():
            is_models = forms[name].dtype == "model"
            moved[name] = tensor.to(device, dtype if is_models else forms[name].types[0])
        return SiteStack.of(moved, self.experts.to(device))

    @property
    def dtype(self) -> torch.dtype:
        """The model's type, which most of the tensors have; float32 with scalings only."""
        forms = self._forms()
        for name, tensor in self.tensors().items():
            if forms[name].dtype == "model":
                return tensor.dtype
        return torch.float32

    def _forms(self) -> dict[str, Stacked]:
        forms = {}
        for part in self.parts.values():
            for name, form in part.forms().items():
                forms[part.names()[name]] = form
        return forms

    def rows(self) -> dict[str, Tensor]:
        """The rows of each part's experts in the whole stack."""
        everyone = torch.arange(len(self.experts), device=self.experts.device)
        rows = {}
        for name, part in self.parts.items():
            rows[name] = everyone if part.rows is None else part.rows
        return rows

    def members(self) -> list[Member]:
        """The part of each expert and its tensors there, no wider than they need to be."""
        members: dict[int, Member] = {}
        for name, rows in self.rows().items():
            part = self.parts[name]
            forms = part.forms()
            stacks: dict[str, Tensor] = {}
            for key in forms:
                stack = getattr(part, key)
                if key != "rows" and stack is not None:
                    stacks[key] = stack
            sized = [key for key in stacks if forms[key].is_filled_up]
            widths = _used_widths([stacks[key] for key in sized])
            for place, row in enumerate(rows.tolist()):
                tensors = {}
                for key, stack in stacks.items():
                    tensor = stack[place]
                    if key in sized:
                        tensor = tensor[: widths[place]]
                    if not forms[key].optional or tensor.any():
                        tensors[key] = tensor
                members[row] = type(part), tensors
        return [members[row] for row in range(len(self.experts))]

    @property
    def plain_lora(self) -> LoraStack | None:
        """The LoRAs, where there is nothing else here, no biases either."""
        lora = self.parts.get("lora")
        if isinstance(lora, LoraStack) and lora.rows is None and lora.B_bias is None:
            return lora
        return None


def _used_widths(stacks: Sequence[Tensor]) -> list[int]:
    """How much of the second dimension of `stacks` [E, r, ..] each expert uses, at least 1."""
    if not stacks:
        return []
    # Ranks of zeros are other experts': composing anew would not have them.
    used = torch.stack([stack.reshape(*stack.shape[:2], -1).any(dim=-1) for stack in stacks])
    numbers = torch.arange(1, used.shape[2] + 1, device=used.device)
    widths: list[int] = (used.any(dim=0) * numbers).amax(dim=1).clamp(min=1).tolist()
    return widths


def stacked(members: Sequence[Member], experts: Tensor, dtype: torch.dtype) -> SiteStack:
    """The stack of one site's `members`, of these `experts`, on their device."""
    rows: dict[str, dict[int, Mapping[str, Tensor | None]]] = {}
    for row, (part, tensors) in enumerate(members):
        rows.setdefault(part.name, {})[row] = tensors
    parts = {}
    for name, part in parts_of_kinds().items():
        if name in rows:
            parts[name] = part.of(rows[name], dtype, experts.device, len(members))
    return SiteStack(experts, parts)


def stack_of(pool: Pool, site: str, dtype: torch.dtype, device: torch.device) -> SiteStack:
    """The stack of the pool's experts that have a module at `site`."""
    present = list[int]()
    members = list[Member]()
    kinds_by_name = kinds()
    for z, expert in enumerate(pool.experts):
        if site in expert.modules:
            module = expert.modules[site]
            part = next(part for part in kinds_by_name[module.kind].stacked if part.stacks(module))
            present.append(z)
            members.append((part, part.row(module)))
    return stacked(members, torch.tensor(present, device=device), dtype)


@torch.no_grad()
def check_numbers(stack: SiteStack, where: str, names: Sequence[str]) -> None:
    """Raise RoutingError for an expert whose update at the site `where` can't be computed with.

    Its numbers, the product of its factors and their squares must be finite. `names`: the pool's.
    """
    most = min(torch.finfo(stack.dtype).max, SQUARED)
    for name, part in stack.parts.items():
        tensors = part.tensors()
        bounds = []
        if len(part.compared) > 1:  # no number of B A is above |A| |B|
            A, B = (tensors.pop(part.names()[key]) for key in part.compared)
            bounds.append(_lengths(A) * _lengths(B))
        bounds += [_lengths(tensor) for tensor in tensors.values() if tensor.is_floating_point()]
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
    wide = torch.promote_types(rows.dtype, torch.float32)
    lengths: Tensor = torch.linalg.vector_norm(rows.flatten(1), dim=1, dtype=wide)
    return lengths.float()


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
    for name, rows in one.state.items():
        both = [rows, other.state[name].to(rows)]
        if rows.dim() > 1:  # with zeros where ranks differ
            width = max(tensor.shape[1] for tensor in both)
            both = [widened(tensor, width) for tensor in both]
        state[name] = torch.cat(both)
    return SitePart(stacked(members, experts, one.stack.dtype), state)


def kept_part(part: SitePart, numbers: Tensor) -> SitePart | None:
    """The part with the experts' new `numbers` [pool], -1 for those that leave; None if all do."""
    experts = numbers[part.stack.experts]
    rows = (experts >= 0).nonzero().flatten()
    if not len(rows):
        return None
    members = part.stack.members()
    staying = [members[row] for row in rows.tolist()]
    stack = stacked(staying, experts[rows], part.stack.dtype)
    return SitePart(stack, {name: tensor[rows] for name, tensor in part.state.items()})
