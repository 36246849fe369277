"""All experts' modules at one site, stacked kind by kind.

Rows of a part belong to the rows of the whole stack that its `rows` name: an expert's module is in
one part, at one place. Glossary: E experts of the part, r rank, m size of a bottleneck, n inputs, d
outputs of the site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...config import ACTIVATIONS
from ...experts.kinds.bottleneck import BottleneckLayers
from ...experts.kinds.ia3 import ScalingVector
from ...experts.kinds.kind import SiteModule
from ...experts.kinds.lora import LoraFactors
from ...experts.pool import Pool
from .rows import filled_up

__all__ = ["PARTS", "TENSORS", "BottleneckStack", "LoraStack", "ScalingStack", "SiteStack"]
__all__ += ["joined_stacks", "kept_stack", "stack_modules", "stack_of"]


@dataclass(frozen=True)
class LoraStack:
    """LoRAs. Ranks that differ are filled up with zeros, which changes no number."""

    A: Tensor  # [E, r, n]
    B: Tensor  # [E, r, d], transposed, scale folded in
    bias: Tensor | None = None  # [E, d], scale folded in; None when no expert has one
    rows: Tensor | None = None  # [E] int64; None: all rows of the stack are LoRAs


@dataclass(frozen=True)
class ScalingStack:
    """(IA)³ vectors, as what they differ from 1 by: l - 1, in float32."""

    deltas: Tensor  # [E, n] or [E, d]
    rows: Tensor  # [E] int64


@dataclass(frozen=True)
class BottleneckStack:
    """Bottleneck adapters. Sizes that differ are filled up with zeros, which changes no number."""

    down: Tensor  # [E, m, d]
    down_bias: Tensor  # [E, m]
    up: Tensor  # [E, m, d], transposed, scale folded in
    up_bias: Tensor  # [E, d], scale folded in
    activations: Tensor  # [E] int64, indices into ACTIVATIONS
    rows: Tensor  # [E] int64


# Each part's fields, and the names of their tensors beside those of other parts.
PARTS = {
    "lora": {"A": "A", "B": "B", "bias": "B_bias", "rows": "lora_rows"},
    "input_scaling": {"deltas": "input_deltas", "rows": "input_rows"},
    "output_scaling": {"deltas": "output_deltas", "rows": "output_rows"},
    "bottleneck": {
        "down": "down",
        "down_bias": "down_bias",
        "up": "up",
        "up_bias": "up_bias",
        "activations": "activations",
        "rows": "bottleneck_rows",
    },
}
COMPUTED = ("A", "B", "B_bias", "down", "down_bias", "up", "up_bias")  # in the model's type
SIZED = ("A", "B", "down", "up", "down_bias")  # by rank or size of the bottleneck, second
TENSORS = tuple(name for names in PARTS.values() for name in names.values())
STACKS: dict[str, Any] = {
    "lora": LoraStack,
    "input_scaling": ScalingStack,
    "output_scaling": ScalingStack,
    "bottleneck": BottleneckStack,
}


@dataclass(frozen=True)
class SiteStack:
    """All experts' modules at one site; parts of which there are none are None.

    Only the experts that act at the site are in it; `experts` holds their indices in the pool, [E].
    """

    experts: Tensor  # [E] int64
    lora: LoraStack | None = None
    input_scaling: ScalingStack | None = None
    output_scaling: ScalingStack | None = None
    bottleneck: BottleneckStack | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors but `experts`, under the names TENSORS."""
        held: dict[str, Tensor] = {}
        for part, names in PARTS.items():
            for field, name in names.items():
                tensor = getattr(getattr(self, part), field, None)
                held |= {} if tensor is None else {name: tensor}
        return held

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], experts: Tensor) -> SiteStack:
        """The stack that `tensors` gave these names."""
        parts = {}
        for part, names in PARTS.items():
            held = {f: tensors[name] for f, name in names.items() if name in tensors}
            parts[part] = STACKS[part](**held) if held else None
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
        held = {part: getattr(self, part) for part in PARTS}
        return {
            part: every if stack.rows is None else stack.rows
            for part, stack in held.items()
            if stack is not None
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
    """The stack of one site's `modules`, which are those of the pool's `experts` (indices)."""
    loras = {row: m for row, m in enumerate(modules) if isinstance(m, LoraFactors)}
    bottlenecks = {row: m for row, m in enumerate(modules) if isinstance(m, BottleneckLayers)}
    scalings = {row: m for row, m in enumerate(modules) if isinstance(m, ScalingVector)}
    inputs = {row: m for row, m in scalings.items() if m.on_input}
    outputs = {row: m for row, m in scalings.items() if not m.on_input}
    return SiteStack(
        torch.tensor(experts, device=device),
        _stack_loras(loras, dtype, device, alone=len(loras) == len(modules)) if loras else None,
        _stack_scalings(inputs, device) if inputs else None,
        _stack_scalings(outputs, device) if outputs else None,
        _stack_bottlenecks(bottlenecks, dtype, device) if bottlenecks else None,
    )


def stack_of(pool: Pool, site: str, dtype: torch.dtype, device: torch.device) -> SiteStack:
    """The modules of the experts of `pool` that act at `site`, in `dtype` on `device`."""
    present = [z for z, expert in enumerate(pool.experts) if site in expert.modules]
    modules = [pool.experts[z].modules[site] for z in present]
    return stack_modules(present, modules, dtype, device)


def joined_stacks(stacks: Sequence[SiteStack]) -> SiteStack:
    """The stack of all experts of several stacks of one site, in order."""
    experts = torch.cat([stack.experts for stack in stacks])
    tensors: dict[str, Tensor] = {}
    for part, names in PARTS.items():
        held, rows, first = [], [], 0
        for stack in stacks:
            if getattr(stack, part) is not None:
                held.append(getattr(stack, part))
                rows.append(stack.rows()[part] + first)
            first += len(stack.experts)
        if not held:
            continue
        for field, name in names.items():
            tensors |= _joined_field(held, field, name)
        if sum(map(len, rows)) < len(experts) or part != "lora":
            tensors[names["rows"]] = torch.cat(rows)
    return SiteStack.of(tensors, experts)


def _joined_field(parts: Sequence[Any], field: str, name: str) -> dict[str, Tensor]:
    """One field of several parts of a kind, filled up where it is sized; {} if none has it."""
    held = [getattr(part, field) for part in parts]
    known = [tensor for tensor in held if tensor is not None]
    if field == "rows" or not known:
        return {}
    width = max(tensor.shape[1] for tensor in known) if known[0].dim() > 1 else 0
    filled = [
        known[0].new_zeros(len(part.A), width) if tensor is None else _widened(tensor, width)
        for part, tensor in zip(parts, held, strict=True)
    ]
    return {name: torch.cat(filled)}


def _widened(tensor: Tensor, width: int) -> Tensor:
    """A tensor [E, r, ..] with zeros up to `width` in its second dimension; others as they are."""
    missing = width - tensor.shape[1] if tensor.dim() > 1 else 0
    return functional.pad(tensor, (*[0, 0] * (tensor.dim() - 2), 0, missing)) if missing else tensor


def kept_stack(stack: SiteStack, rows: Tensor) -> SiteStack:
    """The stack of the experts in these `rows` (in order), no wider than they need."""
    place = torch.full((len(stack.experts),), -1, device=rows.device)
    place[rows] = torch.arange(len(rows), device=rows.device)
    tensors: dict[str, Tensor] = {}
    for part, own in stack.rows().items():
        places = place[own]
        stay = (places >= 0).nonzero().flatten()
        if not len(stay):
            continue
        names = PARTS[part]
        held = {
            name: stack.tensors()[name][stay] for name in names.values() if name in stack.tensors()
        }
        held[names["rows"]] = places[stay]
        tensors |= _narrowed(held)
    if "lora_rows" in tensors and len(tensors["lora_rows"]) == len(rows):
        del tensors["lora_rows"]
    if "B_bias" in tensors and not tensors["B_bias"].any():
        del tensors["B_bias"]
    return SiteStack.of(tensors, stack.experts[rows])


def _narrowed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a part without the ranks that only experts that left had."""
    sized = {name: tensor for name, tensor in tensors.items() if name in SIZED}
    if not sized:
        return tensors
    width = next(iter(sized.values())).shape[1]
    while width > 1 and not any(tensor[:, width - 1].any() for tensor in sized.values()):
        width -= 1
    return tensors | {name: tensor[:, :width].contiguous() for name, tensor in sized.items()}


def _stack_loras(
    loras: Mapping[int, LoraFactors], dtype: torch.dtype, device: torch.device, *, alone: bool
) -> LoraStack:
    """The stack of LoRAs by their rows in the whole stack, of which they are all if `alone`."""
    modules = list(loras.values())
    rank = max(lora.A.shape[0] for lora in modules)
    A = torch.cat([filled_up(lora.A[None], rank) for lora in modules])
    B = torch.cat([filled_up(lora.B.T[None], rank) for lora in modules])
    bias = None
    if any(lora.bias is not None for lora in modules):
        zeros = torch.zeros(B.shape[2])
        bias = torch.stack([zeros if lora.bias is None else lora.bias for lora in modules])
    scales = torch.tensor([lora.scale for lora in modules])
    if bool((scales != 1).any()):
        B = B.float() * scales[:, None, None]
        bias = None if bias is None else bias.float() * scales[:, None]
    return LoraStack(
        A.to(device, dtype),
        B.to(device, dtype),
        None if bias is None else bias.to(device, dtype),
        None if alone else _rows(loras, device),
    )


def _stack_scalings(scalings: Mapping[int, ScalingVector], device: torch.device) -> ScalingStack:
    deltas = torch.stack([scaling.vector.float() - 1 for scaling in scalings.values()])
    return ScalingStack(deltas.to(device), _rows(scalings, device))


def _stack_bottlenecks(
    bottlenecks: Mapping[int, BottleneckLayers], dtype: torch.dtype, device: torch.device
) -> BottleneckStack:
    modules = list(bottlenecks.values())
    E, size, d = len(modules), max(m.down.shape[0] for m in modules), modules[0].up.shape[0]
    stack = BottleneckStack(
        down=torch.zeros(E, size, d, dtype=dtype, device=device),
        down_bias=torch.zeros(E, size, dtype=dtype, device=device),
        up=torch.zeros(E, size, d, dtype=dtype, device=device),
        up_bias=torch.zeros(E, d, dtype=dtype, device=device),
        activations=torch.tensor([ACTIVATIONS.index(m.activation) for m in modules], device=device),
        rows=_rows(bottlenecks, device),
    )
    for i, module in enumerate(modules):
        own = module.down.shape[0]
        stack.down[i, :own], stack.down_bias[i, :own] = module.down, module.down_bias
        stack.up[i, :own] = _scaled(module.up, module.scale).T
        stack.up_bias[i] = _scaled(module.up_bias, module.scale)
    return stack


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1 else scale * tensor.float()


def _rows(modules: Mapping[int, SiteModule], device: torch.device) -> Tensor:
    return torch.tensor(list(modules), device=device)
