"""Many experts' modules at one site, stacked: one row an expert.

E experts of a stack, T tokens, k experts chosen for each token; other letters as in `module.py`.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from ..sites import FLOATS

INDICES = (torch.int64,)
Product = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Stacked:
    """A tensor of a part: its sizes after the number of experts, and its type.

    `sizes` has a letter for each: n for the site's inputs, d for its outputs; zeros fill up a first
    size of another letter where experts differ. `dtype` is "model" (that of the model), "float32"
    or "index" (int64). An `optional` one may be None, which means zeros.
    """

    sizes: str
    dtype: str = "model"
    optional: bool = False

    @property
    def types(self) -> tuple[torch.dtype, ...]:
        if self.dtype == "index":
            return INDICES
        return (torch.float32,) if self.dtype == "float32" else FLOATS

    @property
    def is_filled_up(self) -> bool:
        return self.sizes[:1] not in ("", "n", "d")


def stacked(sizes: str, dtype: str = "model", *, optional: bool = False) -> Any:
    """A field of a `Part`: a tensor [experts, *sizes] (see `Stacked`)."""
    form = {"form": Stacked(sizes, dtype, optional)}
    return field(default=None, metadata=form) if optional else field(metadata=form)


@dataclass(frozen=True)
class Constant:
    """What experts come to at constant weights; what they don't have is None.

    W u + b becomes `output_factor` ⊙ (W (u ⊙ `input_factor`) + b) + B A u + `bias`.
    """

    A: Any = None  # [r, n]
    B: Any = None  # [d, r]
    bias: Tensor | None = None  # [d]
    input_factor: Tensor | None = None  # [n]
    output_factor: Tensor | None = None  # [d]


@dataclass(frozen=True, kw_only=True)
class Part(ABC):
    """Some experts' modules at one site, stacked: a frozen dataclass of `stacked` tensors.

    `rows` are the experts' rows in the whole stack, None if these are all. `compared` names the
    fields that an expert's update is made of, one vector [E, d] or two factors [E, r, n] and
    [E, r, d] that are multiplied: by these, updates are measured and compared. A kind without them
    is refused where that is asked for, and so is one without `constant` where it is exported.
    `prefix` begins the tensors' names in saved models, None for the part's name.
    """

    name: ClassVar[str]
    prefix: ClassVar[str | None] = None
    compared: ClassVar[tuple[str, ...]] = ()

    rows: Tensor | None = stacked("", "index", optional=True)

    @classmethod
    def stacks(cls, module: Any) -> bool:
        """True for a module of the kind that belongs into this part."""
        return True

    @classmethod
    def row(cls, module: Any) -> Mapping[str, Tensor | None]:
        """A module's tensors by field, as they are stacked; by default its own of these names."""
        return {name: getattr(module, name) for name in cls.forms() if name != "rows"}

    @classmethod
    def of(
        cls,
        rows: Mapping[int, Mapping[str, Tensor | None]],
        dtype: torch.dtype,
        device: torch.device,
        total: int,
    ) -> Self:
        """The stack of what `row` gives, by their rows in the whole stack, which has `total`."""
        tensors = {}
        for name, form in cls.forms().items():
            filled = _filled([row.get(name) for row in rows.values()])
            if not filled:
                continue
            if form.is_filled_up:
                width = max(map(len, filled))
                filled = [widened(part[None], width)[0] for part in filled]
            exact = dtype if form.dtype == "model" else form.types[0]
            tensors[name] = torch.stack(filled).to(device, exact)
        if len(rows) < total:
            tensors["rows"] = torch.tensor(list(rows), device=device)
        return cls(**tensors)

    @classmethod
    def forms(cls) -> Mapping[str, Stacked]:
        """What its tensors look like, by field."""
        return {tensor.name: tensor.metadata["form"] for tensor in fields(cls)}

    @classmethod
    def names(cls) -> Mapping[str, str]:
        """The tensors' names in saved models, by field: no two kinds' are the same."""
        prefix = f"{cls.name}_" if cls.prefix is None else cls.prefix
        return {name: prefix + name for name in cls.forms()} | {"rows": f"{cls.name}_rows"}

    # How it acts: `experts` [T, k] are rows of this part, `weights` [T, k] theirs, 0 for others'.

    def input_factor(self, experts: Tensor, weights: Tensor) -> Tensor | None:
        """What multiplies the inputs, float32 [T, n]; None for nothing."""
        return None

    def output_factor(self, experts: Tensor, weights: Tensor) -> Tensor | None:
        """What multiplies the outputs of the base's layer, float32 [T, d]; None for nothing."""
        return None

    def added(
        self, u: Tensor, y: Tensor, experts: Tensor, weights: Tensor, product: Product
    ) -> Tensor | None:
        """What is added for inputs u [T, n] and the base's outputs y [T, d], [T, d]; or None.

        `product(u, experts, weights, A, B)` is the sum over z of w_z B_z A_z u, [T, d], for stacked
        factors A [E, r, n] and B [E, r, d] of this part's E experts, of one type with u.
        """
        return None

    def constant(self, weights: Tensor) -> Constant | None:
        """What it comes to at constant weights [E]; None if it can't be said so."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by their names in saved models."""
        tensors = {name: getattr(self, field) for field, name in self.names().items()}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _filled(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """These with zeros in place of None; none where all are None."""
    like = next((tensor for tensor in tensors if tensor is not None), None)
    if like is None:
        return []
    zeros = torch.zeros_like(like)
    return [zeros if tensor is None else tensor for tensor in tensors]


def widened(tensor: Tensor, width: int) -> Tensor:
    """A tensor [E, r, ..] with zeros up to `width` in its second dimension."""
    missing = width - tensor.shape[1]
    if not missing:
        return tensor
    later = [0, 0] * (tensor.dim() - 2)  # dimensions, which come first and stay
    return functional.pad(tensor, [*later, 0, missing])


def scaled(tensor: Tensor, scale: float) -> Tensor:
    """`tensor`, or in float32 its product with a `scale` other than 1."""
    return tensor if scale == 1 else scale * tensor.float()


def factor_of(weights: Tensor, deltas: Tensor) -> Tensor | None:
    """1 + Σ w_z deltas_z at constant weights [E]; None where that is 1."""
    change = (weights.float()[:, None] * deltas).sum(dim=0)
    if not change.any():
        return None
    return 1 + change
