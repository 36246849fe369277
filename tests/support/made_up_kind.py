"""A kind of expert that the package doesn't know: it adds a vector to a layer's output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from phatgoose.experts.kinds.kind import SiteModule
from phatgoose.experts.pool import Pool
from phatgoose.routing.stacks import PARTS, Part, SiteStack


@dataclass(frozen=True)
class Shift(SiteModule):
    kind: ClassVar[str] = "shift"

    vector: Tensor

    def at(self, weight: Tensor) -> Shift:
        return Shift(self.vector.to(weight))

    def apply(self, base: nn.Module, u: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        return base(u) + strength * self.vector


@dataclass(frozen=True)
class ShiftStack(Part):
    names: ClassVar[Mapping[str, str]] = {"shifts": "shifts", "rows": "shift_rows"}

    shifts: Tensor
    rows: Tensor


@dataclass(frozen=True)
class StackWithShifts(SiteStack):
    shift: ShiftStack | None = None


def stack_with_shifts(monkeypatch: pytest.MonkeyPatch, stack: SiteStack) -> StackWithShifts:
    """`stack`, whose last expert is a shift; the kind's part is in PARTS until the test ends."""
    monkeypatch.setitem(PARTS, "shift", ShiftStack)
    rest = torch.arange(len(stack.experts) - 1)
    lora = replace(stack.lora, A=stack.lora.A[:-1], B=stack.lora.B[:-1], rows=rest)
    shifts = ShiftStack(torch.ones(1, stack.lora.B.shape[2]), torch.tensor([len(rest)]))
    return StackWithShifts(stack.experts, lora, shift=shifts)


def pool_with_shifts(pool: Pool) -> Pool:
    """The pool whose last expert is a shift at every site."""
    *rest, last = pool.experts
    shifts = {site: Shift(torch.ones(lora.B.shape[0])) for site, lora in last.lora.items()}
    return Pool((*rest, replace(last, modules=shifts)))
