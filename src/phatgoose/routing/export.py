"""Export: a routed model with constant routing as a PEFT LoRA adapter, or as a plain model.

An adapter is exact where all experts are LoRAs: a sum of LoRAs is a LoRA of the sum of their ranks.
A merged model is exact for (IA)³ and DoRAs too. Nothing of ours is needed to load either.

Glossary: w_z the share of expert z, R the sum of the ranks. From `layers`, with constant w:

    y = (1 + Σ w_z (l_z - 1)) ⊙ (W (u ⊙ (1 + Σ w_z (l_z - 1))) + b) + Σ w_z (B_z A_z u + bias_z)

The LoRAs' part is one LoRA of rank R: A = [A_1; A_2; …], B = [w_1 B_1, w_2 B_2, …].
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..base.identity import Base
from ..base.loading import quiet_loading
from ..errors import RoutingError
from ..experts.adapter_files import PEFT_FILES
from ..experts.lora import LoraFactors
from ..experts.stack import Constant
from ..files import new_directory, require_free
from ..sites import replaced
from .compose import Composition, composition_of
from .layers import FoldedLinear, RoutedLayer, RoutedLinear, has_plain_weight, matrix_of

EXPORT_INFO = "phatgoose_export.json"
FACTORS = ("input_factor", "output_factor")


@dataclass(frozen=True)
class CutLoss:
    """A cut at a site: to `rank`, from factors of rank `of`.

    `norm` is the Frobenius norm of the update B A, `lost` that of what the cut took off.
    """

    rank: int
    of: int
    norm: float
    lost: float


@dataclass(frozen=True)
class Export:
    """What was exported to `folder`: how much each of `experts` adds, float64 [E] by site.

    `losses` are an adapter's cuts by site, {} for a merged model.
    """

    folder: Path
    merged: bool
    experts: tuple[str, ...]
    shares: Mapping[str, Tensor]
    losses: Mapping[str, CutLoss]

    @property
    def mixture(self) -> dict[str, float]:
        """Each expert's mean share over the sites."""
        mean = torch.stack(list(self.shares.values())).mean(dim=0)
        return dict(zip(self.experts, mean.tolist(), strict=True))

    @property
    def rank(self) -> int:
        return max((loss.rank for loss in self.losses.values()), default=0)

    @property
    def lost(self) -> float:
        losses = self.losses.values()
        lost = math.hypot(*(loss.lost for loss in losses))
        norm = math.hypot(*(loss.norm for loss in losses))
        return lost / (norm or 1.0)


def export(
    model: PreTrainedModel, out: str | Path, *, merged: bool = False, rank: int | None = None
) -> Export:
    """What was written of the routed `model` to the folder `out`, complete or not at all.

    Routing must be constant. An adapter is one of PEFT's, of one rank at all sites; `rank` cuts it
    by SVD. `merged` writes the whole model with the updates in its weights, and the tokenizer.

    Raises RoutingError when the model is not routed, its routing is not constant, an expert can't
    be exported in this form, the `rank` is impossible, or `out` exists or can't be written.
    """
    target = Path(out)
    parts = composition_of(model)
    require_free(target, RoutingError)
    shares: dict[str, Tensor] = {}
    updates: dict[str, Constant] = {}
    for site, layer in parts.layers.items():
        constant = constant_shares(layer, parts)
        if constant is None:
            raise RoutingError(
                f"Router {parts.routing.name} chooses again for every "
                f"{'input' if parts.chooser else 'token'}, which an adapter can't hold; "
                f"route by merged, single or fixed weights (weights:NAME=SHARE,...)."
            )
        shares[site] = constant
        updates[site] = fixed_update(layer, constant, parts)
    _check_exportable(parts, updates, merged, rank)
    losses: dict[str, CutLoss] = {}
    with new_directory(target, RoutingError) as work:
        if merged:
            layers = {}
            for site, update in updates.items():
                layers[site] = merged_layer(parts.layers[site], update)
            with replaced(model, layers), torch.no_grad(), quiet_loading():
                type(model).save_pretrained(model, work)  # the model's own is that of routed models
            if parts.tokenizer is not None:
                parts.tokenizer.save_pretrained(work)
        else:
            loras, losses = _loras(updates, rank)
            linears = [layer.base for layer in parts.layers.values()]
            linear = next((layer for layer in linears if isinstance(layer, Conv1D)), linears[0])
            base = Base(model, parts.tokenizer, **asdict(parts.base))
            LoraFactors.write(work, loras, PEFT_FILES.about(base, linear))
        result = Export(target, merged, parts.experts, shares, losses)
        record = {
            "form": "merged model" if merged else "PEFT adapter",
            "base": asdict(parts.base),
            "router": parts.router.text,
            "experts": result.mixture,
            "lost": result.lost,
            "sites": {site: asdict(loss) for site, loss in losses.items()},
        }
        text = json.dumps(record, indent=2) + "\n"
        (work / EXPORT_INFO).write_text(text, encoding="utf-8")
    return result


def _check_exportable(
    parts: Composition, updates: Mapping[str, Constant], merged: bool, rank: int | None
) -> None:
    """Raise RoutingError where an adapter, or a `merged` model, can't hold `updates` by site."""
    if rank is not None and (merged or rank < 1):
        raise RoutingError(
            f"A rank cuts an adapter (without --merged), and is at least 1; this one is {rank}."
        )
    if parts.tailed:
        raise RoutingError(
            f"From a prompt's end on act {', '.join(parts.tailed)}, which no adapter or weight "
            f"does; leave them out (--leave-out)."
        )
    for site, update in updates.items():
        base = parts.layers[site].base
        has_factors = update.input_factor is not None or update.output_factor is not None
        if has_factors and not merged:
            raise RoutingError(
                f"At {site} an expert scales the layer, which no LoRA does exactly: export with "
                f"--merged, or leave such experts out (--leave-out)."
            )
        if merged and not (has_plain_weight(base) and base.weight.is_floating_point()):
            raise RoutingError(
                f"The base's weight at {site} is quantised or kept elsewhere, so that nothing can "
                f"be added to it: export an adapter, or load the base plainly."
            )
        if merged and update.bias is not None and base.bias is None:
            raise RoutingError(
                f"The experts add a bias at {site}, and the base has none there that could hold "
                f"it: export an adapter."
            )


def constant_shares(layer: RoutedLayer, parts: Composition) -> Tensor | None:
    """How much each expert adds at the site of `layer`, float64 [E of the pool].

    None where that isn't the same for every input.
    """
    weights: Tensor | None = None
    if isinstance(layer, FoldedLinear):
        weights = torch.full((len(layer.experts),), layer.weight_of_each)
    elif isinstance(layer, RoutedLinear):
        weights = layer.at_site.router.constant(layer.at_site)
    is_left_out = getattr(parts.router, "falls_back", False)  # where the base answers alone
    if weights is None and len(parts.experts) == 1 and not is_left_out:
        weights = torch.ones(1)
    if weights is None:
        return None
    shares = torch.zeros(len(parts.experts), dtype=torch.float64)
    shares[layer.experts.cpu()] = weights.double().cpu()
    return shares


# What a site's experts come to at constant shares: factors of a LoRA, or a layer of its own.


def fixed_update(layer: RoutedLayer, shares: Tensor, parts: Composition) -> Constant:
    """What the experts of `layer` do at these `shares` [E of the pool].

    Factors of weight 1 keep their type, weighted ones are float32. Raises RoutingError for a
    kind of expert that can't be said so (`Part.constant`), such as a bottleneck adapter.
    """
    if not isinstance(layer, RoutedLinear):
        return _folded_update(layer)
    stack = layer.stack
    weights = shares.to(layer.experts.device)[layer.experts]
    constants = []
    for name, rows in stack.rows().items():
        constant = stack.parts[name].constant(weights[rows])
        if constant is not None:
            constants.append(constant)
        elif bool(weights[rows].any()):
            row = int(rows[weights[rows].nonzero()[0, 0]])
            raise RoutingError(
                f"Expert {parts.experts[int(layer.experts[row])]!r} is of the kind {name!r}, which "
                f"neither a LoRA nor a weight can hold; leave it out (--leave-out)."
            )
    return _sum_of(constants, layer)


def _sum_of(constants: Sequence[Constant], layer: RoutedLayer) -> Constant:
    device = layer.experts.device
    present: dict[str, list[Tensor]] = {}
    for constant in constants:
        for field, value in vars(constant).items():
            if value is not None:
                present.setdefault(field, []).append(value)
    A = present.get("A", [torch.zeros(0, layer.in_features, device=device)])
    B = present.get("B", [torch.zeros(layer.out_features, 0, device=device)])
    update = Constant(torch.cat(A), torch.cat(B, dim=1))
    biases = [bias for bias in present.get("bias", ()) if bool(bias.any())]
    if biases:
        update = replace(update, bias=reduce(torch.add, biases))
    for field in FACTORS:
        if field in present:
            update = replace(update, **{field: reduce(torch.mul, present[field])})
    return update


def _folded_update(layer: RoutedLayer) -> Constant:
    # Of the update there is but the product.
    delta = layer.folded.float() - matrix_of(layer.base).float()  # type: ignore[operator]
    d, n = delta.shape
    eye = torch.eye(min(n, d), dtype=delta.dtype, device=delta.device)
    update = Constant(delta, eye) if d <= n else Constant(eye, delta)
    used = update.A.any(dim=1) & update.B.any(dim=0)
    return Constant(update.A[used], update.B[:, used])


def _loras(
    updates: Mapping[str, Constant], rank: int | None
) -> tuple[dict[str, LoraFactors], dict[str, CutLoss]]:
    cuts = {site: cut(update, rank) for site, update in updates.items()}
    # PEFT may have a rank for each site, but many programs know one for all.
    widest = max(1, *(loss.rank for *_, loss in cuts.values()))
    loras = {}
    losses = {}
    for site, (A, B, loss) in cuts.items():
        more = widest - loss.rank
        A = functional.pad(A, (0, 0, 0, more)).cpu()
        B = functional.pad(B, (0, more)).cpu()
        bias = updates[site].bias
        if bias is not None:
            bias = bias.cpu()
        loras[site] = LoraFactors(A, B, 1, bias)  # a scale of 1, as an integer: Ollama wants one
        losses[site] = loss
    return loras, losses


@torch.no_grad()
def cut(update: Constant, rank: int | None = None) -> tuple[Tensor, Tensor, CutLoss]:
    """The factors of `update` in a LoRA of at most this `rank`, the nearest there is, and its loss.

    None cuts nothing off; then a rank beyond the site's own sizes is brought down to these, which
    loses no more than float32 rounds. Truncated singular values (Eckart and Young 1936), float64.
    """
    A = update.A.cpu().double()  # not every device has float64
    B = update.B.cpu().double()
    right = torch.linalg.qr(A.T)
    left = torch.linalg.qr(B)
    # B A = Q_B (R_B R_Aᵀ) Q_Aᵀ: its SVD is that of the small matrix, and d x n is never formed.
    U, S, V = torch.linalg.svd(left.R @ right.R.T)
    norm = float(S.square().sum().sqrt())
    full = len(A)
    most = min(rank or full, A.shape[1], B.shape[0])
    if full <= most:
        return update.A, update.B, CutLoss(full, full, norm, 0.0)
    lost = float(S[most:].square().sum().sqrt())
    # Half of each singular value on either side, so that neither is far from the other's size.
    root = S[:most].sqrt()
    A = (root[:, None] * (V[:most] @ right.Q.T)).float()
    return A, ((left.Q @ U[:, :most]) * root).float(), CutLoss(most, full, norm, lost)


@torch.no_grad()
def merged_layer(layer: RoutedLayer, update: Constant) -> nn.Module:
    """A layer of the base's own class with `update` inside its weight and bias.

    Summed in float32 (float64 in a float64 base) and rounded once, to the base's type.
    """
    base = layer.base
    if isinstance(layer, FoldedLinear):
        weight = layer.folded
    else:
        exact = torch.promote_types(base.weight.dtype, torch.float32)
        weight = matrix_of(base).to(exact)
        if update.input_factor is not None:
            weight = weight * update.input_factor
        if update.output_factor is not None:
            weight = weight * update.output_factor[:, None]
        weight = weight + update.B.to(exact) @ update.A.to(exact)
    if isinstance(base, Conv1D):
        weight = weight.T
    parameters = {"weight": weight.contiguous()}
    bias = base.bias
    if bias is not None:
        if update.output_factor is not None:
            bias = bias * update.output_factor
        parameters["bias"] = bias if update.bias is None else bias + update.bias
    merged = copy.copy(base)
    merged._parameters = dict(base._parameters)
    for name, tensor in parameters.items():
        rounded = tensor.to(base._parameters[name].dtype)
        merged._parameters[name] = nn.Parameter(rounded, requires_grad=False)
    return merged  # type: ignore[no-any-return]
