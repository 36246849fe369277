"""All experts' modules at one site, stacked part by part.

An expert's module is in one part. Glossary: E experts of the part, r rank, m size of a bottleneck,
n inputs, d outputs of the site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import RoutingError
from ...experts.kinds.bottleneck import BottleneckLayers
from ...experts.kinds.ia3 import ScalingVector
from ...experts.kinds.kind import SiteModule
from ...experts.kinds.lora import LoraFactors
from ...experts.pool import Pool
from .bottleneck import BottleneckStack
from .ia3 import InputScalingStack, OutputScalingStack
from .lora import LoraStack
from .part import Part
from .rows import joined, take_rows, used_width, widened

__all__ = ["COMPUTED", "PARTS", "TENSORS", "SiteStack", "joined_stacks", "kept_stack"]
__all__ += ["stack_modules", "stack_of"]

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
    place = torch.full((len(stack.experts),), -1, device=rows.device)
    place[rows] = torch.arange(len(rows), device=rows.device)
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


def _narrowed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a part without the ranks that only experts that left had."""
    sized = {name: tensor for name, tensor in tensors.items() if name in SIZED}
    if not sized:
        return tensors
    width = used_width(list(sized.values()))
    return tensors | {name: tensor[:, :width].contiguous() for name, tensor in sized.items()}
