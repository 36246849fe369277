"""What the parts of a stack share: one part for each way in which experts act at a site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["Part", "row_tensor"]


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
