"""What a site's experts come to at constant shares: factors of a LoRA, or a layer of its own.

Glossary: w_z the share of expert z, R the sum of the ranks. From `layers`, with constant w:

    y = (1 + Σ w_z (l_z - 1)) ⊙ (W (u ⊙ (1 + Σ w_z (l_z - 1))) + b) + Σ w_z (B_z A_z u + bias_z)

The LoRAs' part is one LoRA of rank R: A = [A_1; A_2; …], B = [w_1 B_1, w_2 B_2, …].
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ...errors import RoutingError
from ...experts.kind import Constant
from ...sites import WrappedLinear, linear_shape
from ..composition import Composition
from ..layers import FoldedLinear, RoutedLayer, RoutedLinear, has_plain_weight, matrix_of


@dataclass(frozen=True)
class Update:
    """What experts at constant shares do at a site; parts that no one has are None."""

    A: Tensor  # [R, n]
    B: Tensor  # [d, R]
    bias: Tensor | None = None  # [d]
    input_factor: Tensor | None = None  # [n]
    output_factor: Tensor | None = None  # [d]

    @property
    def rank(self) -> int:
        return len(self.A)

    @property
    def is_lora(self) -> bool:
        return self.input_factor is None and self.output_factor is None

    @property
    def is_nothing(self) -> bool:
        return self.rank == 0 and self.bias is None and self.is_lora


@dataclass(frozen=True)
class CutLoss:
    """A cut at a site: to `rank`, from factors of rank `of`.

    `norm` is the Frobenius norm of the update B A, `lost` that of what the cut took off.
    """

    rank: int
    of: int
    norm: float
    lost: float


def fixed_update(layer: RoutedLayer, shares: Tensor, parts: Composition) -> Update:
    """What the experts of `layer` do at these `shares` [E of the pool].

    Factors of weight 1 keep their type, weighted ones are float32. Raises RoutingError for a
    kind of expert that can't be said so (`Part.constant`), such as a bottleneck adapter.
    """
    if isinstance(layer, FoldedLinear):
        return _unfolded(layer)
    if not isinstance(layer, RoutedLinear):
        raise RoutingError(f"{layer.site.name} is no layer of a routed model that can leave it.")
    stack = layer.stack
    weights = shares.to(layer.experts.device)[layer.experts]
    n, d = layer.in_features, layer.out_features
    found = Update(weights.new_zeros(0, n).float(), weights.new_zeros(d, 0).float())
    for name, rows in stack.rows().items():
        own = weights[rows]
        constant = stack.parts[name].constant(own)
        if constant is not None:
            found = _with(found, constant)
        elif bool(own.any()):
            row = int(rows[own.nonzero()[0, 0]])
            raise RoutingError(
                f"Expert {parts.experts[int(layer.experts[row])]!r} is of the kind {name!r}, which "
                f"neither a LoRA nor a weight can hold; leave it out (--leave-out)."
            )
    return found


def _with(update: Update, more: Constant) -> Update:
    A, B, bias = update.A, update.B, update.bias
    if more.A is not None and more.B is not None:
        A = torch.cat([A, more.A]) if update.rank else more.A
        B = torch.cat([B, more.B], dim=1) if update.rank else more.B
    if more.bias is not None and bool(more.bias.any()):
        bias = more.bias if bias is None else bias + more.bias
    return Update(
        A,
        B,
        bias,
        _product(update.input_factor, more.input_factor),
        _product(update.output_factor, more.output_factor),
    )


def _product(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one * other if one is not None and other is not None else other if one is None else one


def _unfolded(layer: FoldedLinear) -> Update:
    delta = layer.folded.float() - matrix_of(layer.base).float()
    n, d = layer.in_features, layer.out_features
    eye = torch.eye(min(n, d), dtype=delta.dtype, device=delta.device)
    A, B = (delta, eye) if d <= n else (eye, delta)
    used = A.any(dim=1) & B.any(dim=0)
    return Update(A[used], B[:, used])


@torch.no_grad()
def cut(update: Update, rank: int | None = None) -> tuple[Update, CutLoss]:
    """`update` with a LoRA of at most this `rank`, the nearest there is, and what that loses.

    None cuts nothing off; then a rank beyond the site's own sizes is brought down to these, which
    loses no more than float32 rounds. Truncated singular values (Eckart and Young 1936), float64.
    """
    A, B = update.A.cpu().double(), update.B.cpu().double()  # not every device has float64
    right, left = torch.linalg.qr(A.T), torch.linalg.qr(B)
    # B A = Q_B (R_B R_Aᵀ) Q_Aᵀ: its SVD is that of the small matrix, and d x n is never formed.
    U, S, V = torch.linalg.svd(left.R @ right.R.T)
    norm = float(S.square().sum().sqrt())
    most = min(rank or update.rank, A.shape[1], B.shape[0])
    if update.rank <= most:
        return update, CutLoss(update.rank, update.rank, norm, 0.0)
    lost = float(S[most:].square().sum().sqrt())
    # Half of each singular value on either side, so that neither is far from the other's size.
    root = S[:most].sqrt()
    found = replace(
        update,
        A=(root[:, None] * (V[:most] @ right.Q.T)).float().to(update.A.device),
        B=((left.Q @ U[:, :most]) * root).float().to(update.B.device),
    )
    return found, CutLoss(most, update.rank, norm, lost)


def widened_to(update: Update, rank: int) -> Update:
    """The same update with `rank` ranks; those that are added are 0."""
    more = rank - update.rank
    A = torch.cat([update.A, update.A.new_zeros(more, update.A.shape[1])])
    B = torch.cat([update.B, update.B.new_zeros(update.B.shape[0], more)], dim=1)
    return replace(update, A=A, B=B)


class AddedUpdate(WrappedLinear):
    """A linear layer with a LoRA beside it, as PEFT computes it.

    `active` says on which tokens of a pass it acts, [tokens, 1] or None for all.
    """

    def __init__(
        self, base: nn.Module, update: Update, active: Callable[[int], Tensor | None]
    ) -> None:
        super().__init__(base, *linear_shape(base))
        self.update, self.active = update, active

    def forward(self, u: Tensor) -> Tensor:
        y: Tensor = self.base(u)
        update = self.update
        inner = functional.linear(u.to(update.A.dtype), update.A)
        more = functional.linear(inner.to(update.B.dtype), update.B)
        added = (more if update.bias is None else more + update.bias).to(y.dtype)
        active = self.active(added[..., 0].numel())
        return y + (added if active is None else added * active.view(*added.shape[:-1], 1))


@torch.no_grad()
def merged_layer(layer: RoutedLayer, update: Update) -> nn.Module:
    """A layer of the base's own class with `update` inside its weight and bias.

    Summed in float32 (float64 in a float64 base) and rounded once, to the base's type. Raises
    RoutingError for a quantised or offloaded weight, and for a bias that the base has no place for.
    """
    base, name = layer.base, layer.site.name
    weight: Tensor = base.weight
    if not has_plain_weight(base) or not weight.is_floating_point():
        raise RoutingError(
            f"The base's weight at {name} is quantised or kept elsewhere, so that nothing can be "
            f"added to it: export an adapter, or load the base plainly."
        )
    parameters = {"weight": _merged_weight(layer, update)}
    if base.bias is not None:
        bias = base.bias if update.output_factor is None else base.bias * update.output_factor
        parameters["bias"] = bias if update.bias is None else bias + update.bias
    elif update.bias is not None:
        raise RoutingError(
            f"The experts add a bias at {name}, and the base has none there that could hold it: "
            f"export an adapter."
        )
    return _with_parameters(base, parameters)


def _merged_weight(layer: RoutedLayer, update: Update) -> Tensor:
    if isinstance(layer, FoldedLinear):
        found = layer.folded
    else:
        exact = torch.promote_types(layer.base.weight.dtype, torch.float32)
        found = matrix_of(layer.base).to(exact)
        if update.input_factor is not None:
            found = found * update.input_factor
        if update.output_factor is not None:
            found = found * update.output_factor[:, None]
        found = found + update.B.to(exact) @ update.A.to(exact)
    return (found.T if isinstance(layer.base, Conv1D) else found).contiguous()


def _with_parameters(base: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    own = base._parameters
    made = copy.copy(base)
    made._parameters = dict(own)
    for name, tensor in parameters.items():
        kept = own[name]
        if kept is not None:
            made._parameters[name] = nn.Parameter(tensor.to(kept.dtype), requires_grad=False)
    return made
