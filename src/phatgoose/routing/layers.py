"""The layers of a routed model: linear ones that add their experts' updates.

With w_z the weights of a token, zero for experts that it didn't choose, u the input, W and b the
site's own weight and bias (Muqeeth et al. 2024, section 3, for LoRAs; the rest is ours):

    y₀ = W (u ⊙ (1 + Σ w_z (l_z - 1))) + b                     z: (IA)³ on the input
    y  = y₀ ⊙ (1 + Σ w_z (l_z - 1))                            z: (IA)³ on the output
       + Σ w_z (B_z A_z u + bias_z)                            z: LoRA, scale folded in
       + Σ w_z (U_z f_z(D_z y₀ + b_z) + c_z)                   z: bottleneck adapter

and what other kinds' parts add or multiply by, in the order of the registry of kinds. One softmax
weighs all experts of the site, whatever their kind. LoRAs read the input as it came and
adapters the output before anything is added to it, which is what each was trained on; every expert
adds its own change, weighted, and none reads another's. (Scaling the input is the exception: to
leave it out for the others would take a second product with W.) With one expert of weight 1 this is
that expert alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ..experts.lora import LoraStack
from ..experts.stack import Part
from ..sites import Site
from .context import RoutingContext, uncompiled
from .kernels import choose_kernel, one_call
from .recording import watches_over
from .routers.router import RouterAtSite, RoutingDecision
from .stacks import SiteStack, renumbered
from .tails import Active, Tails


class RoutedLayer(nn.Module):
    """The frame of the layers of a routed model: a site, its experts, and the base's layer there.

    `experts` [E] are the pool's indices of the experts that act here. The base's layer, `base`, is
    no submodule: its parameters are this layer's own, under their own names. So state dicts are
    those of the base, and code that moves, offloads or trains parameters (accelerate, for one)
    finds them where they were.
    """

    base: Any
    experts: Tensor

    def __init__(self, base: nn.Module, site: Site, experts: Tensor) -> None:
        super().__init__()
        # Past nn.Module, which would make it a submodule and change every name in state dicts.
        self.__dict__["base"] = base
        # The very dictionary, so that whoever replaces a parameter replaces the base's too.
        self._parameters = base._parameters
        for name, child in base.named_children():
            self.add_module(name, child)
        self.site = site
        self.in_features, self.out_features = site.in_features, site.out_features
        self.register_buffer("experts", experts, persistent=False)

    def extra_repr(self) -> str:
        return repr(self.base)

    def train(self, mode: bool = True) -> RoutedLayer:
        self.base.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoutedLayer:
        self.base._apply(fn, recurse=False)  # layers of other makes have buffers too
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _save_to_state_dict(self, *arguments: object) -> None:
        self.base._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, *arguments: object) -> None:
        self.base._load_from_state_dict(*arguments)


class RoutedLinear(RoutedLayer):
    """A linear layer (of any make) with experts of any kinds and a router that chooses among them.

    Experts and router are buffers that stay out of the model's state dict; those of the stack have
    the names that `SiteStack.tensors` gives them.
    """

    at_site: RouterAtSite
    A: Tensor
    B: Tensor

    def __init__(
        self, base: nn.Module, site: Site, stack: SiteStack, at_site: RouterAtSite
    ) -> None:
        super().__init__(base, site, stack.experts)
        self.at_site = at_site
        self.kernel = at_site.router.kernel
        self.context: RoutingContext | None = at_site.context
        self.part_types = {n: (type(part), part.names()) for n, part in stack.parts.items()}
        for name, tensor in stack.tensors().items():
            # Kernels take addresses, and trust that there are no gaps.
            self.register_buffer(name, tensor.contiguous(), persistent=False)
        self.is_plain = stack.plain_lora is not None
        if not self.is_plain:
            for part, rows in stack.rows().items():
                place = renumbered(rows, len(stack.experts))
                self.register_buffer(f"{part}_place", place, persistent=False)
        self.one_call = self.is_plain and bool(at_site.router.fused)

    @property
    def stack(self) -> SiteStack:
        return SiteStack(self.experts, self._parts())

    def _parts(self) -> dict[str, Part]:
        parts = {}
        for name, (part, names) in self.part_types.items():
            fields: dict[str, Any] = {f: getattr(self, key, None) for f, key in names.items()}
            parts[name] = part(**fields)
        return parts

    def choose(self, u: Tensor, active: Tensor | None = None) -> RoutingDecision:
        """The experts of each token of u [.., n] and their weights; calls the watches back.

        Only those are chosen that are `active` [T, E], if given.
        """
        tokens = u.reshape(-1, u.shape[-1])
        decision: RoutingDecision = self.at_site(tokens, active)
        for watch in watches_over(self, self.site):
            experts = self.experts[decision.experts]
            distribution = partial(self.at_site.distribution, tokens)
            watch.tell(self.site, u, experts, decision.weights, distribution)
        return decision

    def forward(self, u: Tensor) -> Tensor:
        """[.., n] to [.., d]; the formula above."""
        if not self.is_plain:
            return self._all_parts(u, self.choose(u))
        y: Tensor = self.base(u)
        if self.one_call and self._added_in_one_call(y, u):
            return y
        return y + self._update(u, self.choose(u)).view(y.shape).to(y.dtype)

    def _added_in_one_call(self, y: Tensor, u: Tensor) -> bool:
        at_site = self.at_site
        k = at_site.k
        stacked = at_site.vectors, self.A, self.B
        if not y.is_contiguous():
            return False
        add_routed = one_call(self.kernel, y, u, stacked, k)
        # One call leaves no decision to show, so a watched layer goes the longer way.
        if add_routed is None or watches_over(self, self.site):
            return False
        add_routed(y, u, stacked, k, at_site.eps)
        return True

    def _update(self, u: Tensor, decision: RoutingDecision) -> Tensor:
        tokens = u.reshape(-1, u.shape[-1]).to(self.A.dtype)
        return self._product(tokens, decision.experts, decision.weights, self.A, self.B)

    def _all_parts(self, u: Tensor, decision: RoutingDecision) -> Tensor:
        chosen = list[tuple[Part, Tensor, Tensor]]()
        for name, part in self._parts().items():
            place = getattr(self, f"{name}_place")[decision.experts]
            # An expert of another part gets row 0 with weight 0: shapes stay static.
            chosen.append((part, place.clamp(min=0), decision.weights * (place >= 0)))
        scaled = u
        for part, experts, weights in chosen:
            factor = part.input_factor(experts, weights)
            if factor is not None:
                scaled = (scaled * factor.view(u.shape)).to(u.dtype)
        first: Tensor = self.base(scaled)
        y0 = first.reshape(-1, first.shape[-1])
        y = y0
        for part, experts, weights in chosen:
            factor = part.output_factor(experts, weights)
            if factor is not None:
                y = (y * factor).to(y0.dtype)
        tokens = u.reshape(-1, u.shape[-1])
        for part, experts, weights in chosen:
            added = part.added(tokens, y0, experts, weights, self._product)
            if added is not None:
                y = y + added.to(y.dtype)
        return y.view(first.shape)

    def _product(
        self, tokens: Tensor, experts: Tensor, weights: Tensor, A: Tensor, B: Tensor
    ) -> Tensor:
        kernel = choose_kernel(self.kernel, tokens, experts, A, B)
        return kernel(tokens, experts, weights, A, B)


class TailedLinear(RoutedLinear):
    """A routed linear layer of which some experts act from a prompt's end on."""

    def __init__(
        self,
        base: nn.Module,
        site: Site,
        stack: SiteStack,
        at_site: RouterAtSite,
        tails: Tails,
    ) -> None:
        """`tails` are how many of a prompt's last tokens each expert acts on, None: all tokens."""
        super().__init__(base, site, stack, at_site)
        self.tails = tails

    def forward(self, u: Tensor) -> Tensor:
        active = self._active(u.device)
        if active.mask is None:
            return super().forward(u)
        if not self.is_plain:
            return self._all_parts(u, self.choose(u, active.mask))
        y: Tensor = self.base(u)
        if active.tokens is None:
            decision = self.choose(u, active.mask)
            return y + self._update(u, decision).view(y.shape).to(y.dtype)
        if not len(active.tokens):
            return y
        return self._added_at(y, u, active, active.tokens)

    @uncompiled
    def _active(self, device: torch.device) -> Active:
        active = self.context.active(self.tails, device) if self.context else Active()
        if watches_over(self, self.site):  # who want to see every token
            active = active._replace(tokens=None)
        return active

    def _added_at(self, y: Tensor, u: Tensor, active: Active, index: Tensor) -> Tensor:
        """Y [.., d] with updates at the few tokens of this `index`, where some are active."""
        rows = y.reshape(-1, y.shape[-1])
        tokens = u.reshape(-1, u.shape[-1])[index]
        if active.mask_there is None and self.one_call:
            changed = rows[index]
            if self._added_in_one_call(changed, tokens):
                return rows.index_copy_(0, index, changed).view(y.shape)
        if self.at_site.router.by_token:
            # Not one token more: gates of many experts cost as much as the rest of the layer.
            decision: RoutingDecision = self.at_site(tokens, active.mask_there)
        else:
            of_all = self.choose(u, active.mask)
            decision = RoutingDecision(of_all.experts[index], of_all.weights[index])
        add = rows.index_add if y.requires_grad else rows.index_add_
        return add(0, index, self._update(tokens, decision).to(y.dtype)).view(y.shape)


class FoldedLinear(RoutedLayer):
    """A linear layer with the mean of its experts' updates inside its weight, rounded once."""

    folded: Tensor

    def __init__(
        self, base: nn.Module, site: Site, folded: Tensor, experts: Tensor, pool_size: int
    ) -> None:
        super().__init__(base, site, experts)
        self.weight_of_each = 1 / pool_size
        self.register_buffer("folded", folded, persistent=False)

    def forward(self, u: Tensor) -> Tensor:
        for watch in watches_over(self, self.site):
            experts = self.experts.expand(u[..., 0].numel(), -1)
            equal = torch.full(experts.shape, self.weight_of_each, device=u.device)
            watch.tell(self.site, u, experts, equal, equal.clone)
        return functional.linear(u, self.folded, self.base.bias)


def has_plain_weight(base: nn.Module) -> bool:
    """True for a layer that only multiplies by its weight, which is not packed or offloaded."""
    weight: Tensor = base.weight  # type: ignore[assignment]
    # Exactly these: subclasses, quantised ones for instance, may do more than multiply.
    is_linear = type(base) in (nn.Linear, Conv1D) and type(weight) is nn.Parameter
    return is_linear and not weight.is_meta


def matrix_of(base: nn.Module) -> Tensor:
    """The weight as [d, n]."""
    weight: Tensor = base.weight  # type: ignore[assignment]
    # GPT-2's Conv1D keeps its weight as [n, d].
    return weight.T if isinstance(base, Conv1D) else weight


@torch.no_grad()
def folded_weight(base: nn.Module, stack: LoraStack, pool_size: int) -> Tensor:
    """W plus the mean of all B A, [d, n], in the dtype of W, summed in float32."""
    weight = matrix_of(base)
    A = stack.A.float().flatten(0, 1)  # [E r, n]
    B = stack.B.float().flatten(0, 1)  # [E r, d]
    return (weight.float() + B.T @ A / pool_size).to(weight.dtype)
