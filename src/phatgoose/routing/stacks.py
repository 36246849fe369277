"""Stacks: the modules of all experts at one site, in a few tensors.

Rows of experts: joined, appended into spare room, taken out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from ..config import ACTIVATIONS
from ..errors import RoutingError
from ..experts.kinds.bottleneck import BottleneckLayers
from ..experts.kinds.ia3 import ScalingVector
from ..experts.kinds.kind import SiteModule
from ..experts.kinds.lora import LoraFactors
from ..experts.pool import Pool
from .kernels.choice import Kernel
from .kernels.plain import choose_bottleneck, weighted_rows
from .routers.router import RoutingDecision

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


def renumbered(left: Tensor, count: int) -> Tensor:
    """The place of each of `count` rows among those that are `left` (indices, in order), or -1."""
    found = torch.full((count,), -1, device=left.device)
    found[left] = torch.arange(len(left), device=left.device)
    return found


def used_width(tensors: Sequence[Tensor]) -> int:
    """The width beyond which all rows [E, r, ..] of all `tensors` are zero; 1 at least."""
    width = tensors[0].shape[1]
    while width > 1 and not any(tensor[:, width - 1].any() for tensor in tensors):
        width -= 1
    return width


# -------------------------------------------------------------------------------------------------
# What the parts of a stack share: one part for each way in which experts act at a site.
# -------------------------------------------------------------------------------------------------


class Part:
    """Some experts' modules at one site, stacked: a frozen dataclass of tensors, one row an expert.

    `names` gives each field's name among the tensors of the whole stack. Fields in `computed` have
    the model's type, those in `sized` a rank or size as their second dimension, which zeros fill up
    where experts differ. `rows` are the experts' rows in the whole stack; None means all of them.
    """

    names: ClassVar[Mapping[str, str]]
    computed: ClassVar[tuple[str, ...]] = ()
    sized: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()  # fields that may be None
    rows: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by their names in the whole stack."""
        held = {name: getattr(self, field) for field, name in self.names.items()}
        return {name: tensor for name, tensor in held.items() if tensor is not None}


def row_tensor(rows: Iterable[int], device: torch.device) -> Tensor:
    """Rows as a tensor, int64."""
    return torch.tensor(list(rows), device=device)


# -------------------------------------------------------------------------------------------------
# LoRAs, stacked: all factors of a site in two tensors.
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoraStack(Part):
    """LoRAs. Ranks that differ are filled up with zeros, which changes no number."""

    names: ClassVar[Mapping[str, str]] = {"A": "A", "B": "B", "bias": "B_bias", "rows": "lora_rows"}
    computed: ClassVar[tuple[str, ...]] = ("A", "B", "bias")
    sized: ClassVar[tuple[str, ...]] = ("A", "B")
    optional: ClassVar[tuple[str, ...]] = ("bias", "rows")

    A: Tensor  # [E, r, n]
    B: Tensor  # [E, r, d], transposed, scale folded in
    bias: Tensor | None = None  # [E, d], scale folded in; None when no expert has one
    rows: Tensor | None = None  # [E] int64; None: all rows of the stack are LoRAs

    @classmethod
    def of(
        cls, loras: Mapping[int, LoraFactors], dtype: torch.dtype, device: torch.device, total: int
    ) -> LoraStack:
        """The stack of `loras` by their rows in the whole stack, which has `total` rows."""
        modules = list(loras.values())
        rank = max(lora.A.shape[0] for lora in modules)
        A = torch.cat([widened(lora.A[None], rank) for lora in modules])
        B = torch.cat([widened(lora.B.T[None], rank) for lora in modules])
        bias = None
        if any(lora.bias is not None for lora in modules):
            zeros = torch.zeros(B.shape[2])
            bias = torch.stack([zeros if lora.bias is None else lora.bias for lora in modules])
        scales = torch.tensor([lora.scale for lora in modules])
        if bool((scales != 1).any()):
            B = B.float() * scales[:, None, None]
            bias = None if bias is None else bias.float() * scales[:, None]
        return cls(
            A.to(device, dtype),
            B.to(device, dtype),
            None if bias is None else bias.to(device, dtype),
            None if len(loras) == total else row_tensor(loras, device),
        )

    def added(self, u: Tensor, chosen: RoutingDecision, kernel: Kernel) -> Tensor:
        """Σ w_z (B_z A_z u + bias_z) for every token of u [T, n] in the type of A, [T, d]."""
        delta = kernel(u, chosen.experts, chosen.weights, self.A, self.B)
        if self.bias is None:
            return delta
        return delta + weighted_rows(chosen.experts, chosen.weights, self.bias)


# -------------------------------------------------------------------------------------------------
# (IA)³ vectors, stacked: those that scale the site's input, and those that scale its output.
# -------------------------------------------------------------------------------------------------

Kind = TypeVar("Kind", bound="ScalingStack")


@dataclass(frozen=True)
class ScalingStack(Part):
    """(IA)³ vectors as what they differ from 1 by, l - 1, in float32."""

    deltas: Tensor  # [E, n] or [E, d]
    rows: Tensor  # [E] int64

    @classmethod
    def of(cls: type[Kind], scalings: Mapping[int, ScalingVector], device: torch.device) -> Kind:
        """The stack of `scalings` by their rows in the whole stack."""
        deltas = torch.stack([scaling.vector.float() - 1 for scaling in scalings.values()])
        return cls(deltas.to(device), row_tensor(scalings, device))

    def factor(self, chosen: RoutingDecision) -> Tensor:
        """1 + Σ w_z (l_z - 1) for every token, float32."""
        return 1 + weighted_rows(chosen.experts, chosen.weights, self.deltas)


@dataclass(frozen=True)
class InputScalingStack(ScalingStack):
    """Vectors that scale the input of the site's linear layer."""

    names: ClassVar[Mapping[str, str]] = {"deltas": "input_deltas", "rows": "input_rows"}


@dataclass(frozen=True)
class OutputScalingStack(ScalingStack):
    """Vectors that scale its output."""

    names: ClassVar[Mapping[str, str]] = {"deltas": "output_deltas", "rows": "output_rows"}


# -------------------------------------------------------------------------------------------------
# Bottleneck adapters, stacked.
# -------------------------------------------------------------------------------------------------

FIELDS = ("down", "down_bias", "up", "up_bias")


@dataclass(frozen=True)
class BottleneckStack(Part):
    """Bottleneck adapters. Sizes that differ are filled up with zeros, which changes no number."""

    names: ClassVar[Mapping[str, str]] = {
        **{field: field for field in (*FIELDS, "activations")},
        "rows": "bottleneck_rows",
    }
    computed: ClassVar[tuple[str, ...]] = FIELDS
    sized: ClassVar[tuple[str, ...]] = ("down", "up", "down_bias")

    down: Tensor  # [E, m, d]
    down_bias: Tensor  # [E, m]
    up: Tensor  # [E, m, d], transposed, scale folded in
    up_bias: Tensor  # [E, d], scale folded in
    activations: Tensor  # [E] int64, indices into ACTIVATIONS
    rows: Tensor  # [E] int64

    @classmethod
    def of(
        cls, adapters: Mapping[int, BottleneckLayers], dtype: torch.dtype, device: torch.device
    ) -> BottleneckStack:
        """The stack of `adapters` by their rows in the whole stack."""
        modules = list(adapters.values())
        E, size, d = len(modules), max(m.down.shape[0] for m in modules), modules[0].up.shape[0]
        activations = [ACTIVATIONS.index(module.activation) for module in modules]
        stack = cls(
            down=torch.zeros(E, size, d, dtype=dtype, device=device),
            down_bias=torch.zeros(E, size, dtype=dtype, device=device),
            up=torch.zeros(E, size, d, dtype=dtype, device=device),
            up_bias=torch.zeros(E, d, dtype=dtype, device=device),
            activations=torch.tensor(activations, device=device),
            rows=row_tensor(adapters, device),
        )
        for i, module in enumerate(modules):
            own = module.down.shape[0]
            stack.down[i, :own], stack.down_bias[i, :own] = module.down, module.down_bias
            stack.up[i, :own] = _scaled(module.up, module.scale).T
            stack.up_bias[i] = _scaled(module.up_bias, module.scale)
        return stack

    def added(self, y: Tensor, chosen: RoutingDecision) -> Tensor:
        """Σ w_z (U_z f_z(D_z y + b_z) + c_z) for every token of y [T, d], [T, d]."""
        arguments = (y.to(self.down.dtype), chosen.experts)
        product = choose_bottleneck(*arguments, self.down)
        return product(
            *(*arguments, chosen.weights, self.down, self.down_bias),
            *(self.up, self.up_bias, self.activations),
        )


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1 else scale * tensor.float()


# -------------------------------------------------------------------------------------------------
# All experts' modules at one site, stacked part by part.
#
# An expert's module is in one part. Glossary: E experts of the part, r rank, m size of a
# bottleneck, n inputs, d outputs of the site.
# -------------------------------------------------------------------------------------------------

PARTS: dict[str, Any] = {
    "lora": LoraStack,
    "input_scaling": InputScalingStack,
    "output_scaling": OutputScalingStack,
    "bottleneck": BottleneckStack,
}
TENSORS = tuple(name for part in PARTS.values() for name in part.names.values())
COMPUTED = tuple(part.names[field] for part in PARTS.values() for field in part.computed)
SIZED = tuple(part.names[field] for part in PARTS.values() for field in part.sized)


@dataclass(frozen=True)
class SiteStack:
    """All experts' modules at one site; parts of which there are none are None.

    Only the experts that act at the site are in it; `experts` holds their indices in the pool, [E].
    """

    experts: Tensor  # [E] int64
    lora: LoraStack | None = None
    input_scaling: InputScalingStack | None = None
    output_scaling: OutputScalingStack | None = None
    bottleneck: BottleneckStack | None = None

    @property
    def parts(self) -> dict[str, Part]:
        """The parts that are there, by name."""
        held = {name: getattr(self, name) for name in PARTS}
        return {name: part for name, part in held.items() if part is not None}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors but `experts`, under the names TENSORS."""
        return {name: t for part in self.parts.values() for name, t in part.tensors().items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], experts: Tensor) -> SiteStack:
        """The stack that `tensors` gave these names."""
        parts = {}
        for name, part in PARTS.items():
            held = {field: tensors[n] for field, n in part.names.items() if n in tensors}
            parts[name] = part(**held) if held else None
        return cls(experts, **parts)

    def to(self, device: torch.device, dtype: torch.dtype) -> SiteStack:
        """The same on `device`; in `dtype`, but for indices and what is kept in float32."""
        moved = {
            name: tensor.to(device, dtype if name in COMPUTED else None)
            for name, tensor in self.tensors().items()
        }
        return SiteStack.of(moved, self.experts.to(device))

    @property
    def dtype(self) -> torch.dtype:
        """The model's type, which most of the tensors have; float32 with scalings only."""
        computed = (tensor for name, tensor in self.tensors().items() if name in COMPUTED)
        return next(computed, torch.empty(0)).dtype

    def rows(self) -> dict[str, Tensor]:
        """The rows of each part that is there."""
        every = torch.arange(len(self.experts), device=self.experts.device)
        return {
            name: every if part.rows is None else part.rows for name, part in self.parts.items()
        }

    @property
    def plain_lora(self) -> LoraStack | None:
        """The LoRAs, where there is nothing else here, no biases either."""
        lora = self.lora
        return lora if lora and lora.rows is None and lora.bias is None else None


def stack_modules(
    experts: Sequence[int],
    modules: Sequence[SiteModule],
    dtype: torch.dtype,
    device: torch.device,
) -> SiteStack:
    """The stack of one site's `modules`, which are those of the pool's `experts` (indices).

    Raises RoutingError for a module of a kind that no part here stacks.
    """
    for module in modules:
        if not isinstance(module, LoraFactors | BottleneckLayers | ScalingVector):
            raise RoutingError(
                f"Experts of the kind {module.kind!r} can't be stacked: no part of a stack holds "
                f"{type(module).__name__} (docs/extending.md); leave them out (--leave-out)."
            )
    loras = {row: m for row, m in enumerate(modules) if isinstance(m, LoraFactors)}
    bottlenecks = {row: m for row, m in enumerate(modules) if isinstance(m, BottleneckLayers)}
    scalings = {row: m for row, m in enumerate(modules) if isinstance(m, ScalingVector)}
    inputs = {row: m for row, m in scalings.items() if m.on_input}
    outputs = {row: m for row, m in scalings.items() if not m.on_input}
    return SiteStack(
        torch.tensor(experts, device=device),
        LoraStack.of(loras, dtype, device, len(modules)) if loras else None,
        InputScalingStack.of(inputs, device) if inputs else None,
        OutputScalingStack.of(outputs, device) if outputs else None,
        BottleneckStack.of(bottlenecks, dtype, device) if bottlenecks else None,
    )


def stack_of(pool: Pool, site: str, dtype: torch.dtype, device: torch.device) -> SiteStack:
    """The modules of the experts of `pool` that act at `site`, in `dtype` on `device`."""
    present = [z for z, expert in enumerate(pool.experts) if site in expert.modules]
    modules = [pool.experts[z].modules[site] for z in present]
    return stack_modules(present, modules, dtype, device)


def joined_stacks(stacks: Sequence[SiteStack]) -> SiteStack:
    """The stack of all experts of several stacks of one site, in order; the one stack itself."""
    if len(stacks) == 1:
        return stacks[0]
    experts = torch.cat([stack.experts for stack in stacks])
    tensors: dict[str, Tensor] = {}
    for name, part in PARTS.items():
        held, rows, first = [], [], 0
        for stack in stacks:
            if name in stack.parts:
                held.append(stack.parts[name])
                rows.append(stack.rows()[name] + first)
            first += len(stack.experts)
        if not held:
            continue
        for field in part.names:
            tensors |= _joined_field(held, field)
        if sum(map(len, rows)) < len(experts) or "rows" not in part.optional:
            tensors[part.names["rows"]] = torch.cat(rows)
    return SiteStack.of(tensors, experts)


def _joined_field(parts: Sequence[Any], field: str) -> dict[str, Tensor]:
    """One field of several parts of a kind, filled up where it is sized; {} if none has it."""
    held = [getattr(part, field) for part in parts]
    known = [tensor for tensor in held if tensor is not None]
    if field == "rows" or not known:
        return {}
    width = max(tensor.shape[1] for tensor in known) if known[0].dim() > 1 else 0
    filled = [
        known[0].new_zeros(len(part.A), width)  # biases of LoRAs that have none
        if tensor is None
        else widened(tensor, width)
        if width
        else tensor
        for part, tensor in zip(parts, held, strict=True)
    ]
    return {parts[0].names[field]: joined(filled)}


def kept_stack(stack: SiteStack, rows: Tensor) -> SiteStack:
    """The stack of the experts in these `rows` (in order), no wider than they need."""
    place = renumbered(rows, len(stack.experts))
    tensors: dict[str, Tensor] = {}
    for name, own in stack.rows().items():
        part, places = stack.parts[name], place[own]
        stay = (places >= 0).nonzero().flatten()
        if not len(stay):
            continue
        held = {n: take_rows(tensor, stay) for n, tensor in part.tensors().items()}
        if len(stay) == len(rows) and "rows" in part.optional:
            held.pop(part.names["rows"], None)
        else:
            held[part.names["rows"]] = places[stay]
        tensors |= _narrowed(held)
    if "B_bias" in tensors and not tensors["B_bias"].any():
        del tensors["B_bias"]
    return SiteStack.of(tensors, stack.experts[rows])


class SitePart(NamedTuple):
    """Some experts at one site: their stack, and their rows of the router's tensors there.

    Models in memory (`growing`) and in files (`saved.tensors`) grow and shrink by these alone.
    """

    stack: SiteStack
    state: Mapping[str, Tensor]


def joined_parts(parts: Sequence[SitePart]) -> SitePart:
    """All experts of the parts, in order; the router's tensors as the first part has them."""
    state = joined_state([part.state for part in parts])
    return SitePart(joined_stacks([part.stack for part in parts]), state)


def joined_state(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A router's tensors of several parts, in the type and on the device of the first."""
    first, *others = states
    return {
        name: joined([rows, *(state[name].to(rows) for state in others)])
        for name, rows in first.items()
    }


def kept_part(part: SitePart, place: Tensor) -> SitePart | None:
    """The part without experts whose `place` [pool] is -1, numbered anew; None if none is left."""
    found = place.to(part.stack.experts.device)[part.stack.experts]
    rows = (found >= 0).nonzero().flatten()
    if not len(rows):
        return None
    stack = replace(kept_stack(part.stack, rows), experts=found[rows])
    return SitePart(stack, {name: take_rows(held, rows) for name, held in part.state.items()})


def _narrowed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a part without the ranks that only experts that left had."""
    sized = {name: tensor for name, tensor in tensors.items() if name in SIZED}
    if not sized:
        return tensors
    width = used_width(list(sized.values()))
    return tensors | {name: tensor[:, :width].contiguous() for name, tensor in sized.items()}
