"""The layers of a routed model: linear ones that add their experts' updates.

W u + sum over z in E_t of w_z B_z A_z u                                     (METHOD section 4)

Sites at which other modules than LoRAs act have layers of their own (`mixed`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ..base.sites import Site
from ..errors import RoutingError
from .kernels.choice import Kernel, choose_kernel
from .kernels.native import add_routed, runs_natively
from .recording import watches_over
from .routers.decision import RoutingDecision
from .stacks.site_stack import LoraStack, SiteStack

__all__ = [
    "ChoosingLayer",
    "FoldedLinear",
    "RoutedLayer",
    "RoutedLinear",
    "folded_weight",
    "is_cheaper_folded",
]


class RoutedLayer(nn.Module):
    """What all layers of a routed model share: their site, its experts, and the base's layer there.

    `experts` [E] are the pool's indices of the experts that act here. The base's layer, `base`, is
    no submodule: its parameters are this layer's own, in one dictionary under their own names. So
    state dicts are those of the base, and whoever moves, offloads or trains parameters (accelerate,
    for one) finds them where they were.
    """

    base: Any
    experts: Tensor

    def __init__(self, base: nn.Module, site: Site, experts: Tensor) -> None:
        super().__init__()
        self.__dict__["base"] = base
        self._parameters = base._parameters
        for name, child in base.named_children():
            self.add_module(name, child)
        self.site = site
        self.in_features, self.out_features = site.in_features, site.out_features
        self.register_buffer("experts", experts, persistent=False)

    def extra_repr(self) -> str:
        """The base's layer."""
        return repr(self.base)

    def train(self, mode: bool = True) -> RoutedLayer:
        """Self, and the base's layer, in training or evaluation mode."""
        self.base.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoutedLayer:
        self.base._apply(fn, recurse=False)  # layers of other makes have buffers too
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self.base._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.base._load_from_state_dict(*arguments)


class ChoosingLayer(RoutedLayer):
    """A routed layer with a router that chooses among its experts for every token."""

    router: Any  # a module, of one of the routers

    @property
    def stack(self) -> SiteStack:
        """The experts' modules as they are now."""
        raise NotImplementedError

    def choose(self, u: Tensor) -> RoutingDecision:
        """The experts of each token of u [.., n] and their weights; who watches is told."""
        tokens = u.reshape(-1, u.shape[-1])
        decision: RoutingDecision = self.router(tokens)
        if watches := watches_over(self, self.site):
            chosen, router = self.experts[decision.experts], self.router
            for watch in watches:
                watch.tell(
                    self.site, u, chosen, decision.weights, lambda: router.distribution(tokens)
                )
        return decision


class RoutedLinear(ChoosingLayer):
    """A linear layer (of any make) with a pool of LoRA experts and a router.

    Experts and router are buffers that stay out of the model's state dict.
    """

    A: Tensor
    B: Tensor

    def __init__(
        self,
        base: nn.Module,
        site: Site,
        stack: SiteStack,
        router: nn.Module,
        kernel: str,
        product: Kernel | None = None,
        *,
        one_call: bool = False,
    ) -> None:
        """`stack` holds LoRAs only, without biases: RoutingError for another.

        `product` takes the place of the kernels where another function than theirs is wanted.

        `one_call` says that the router is nothing but the top k of an affinity, which the native
        kernel can find and add up in one call.
        """
        super().__init__(base, site, stack.experts)
        loras = stack.plain_lora
        if loras is None:
            raise RoutingError(f"Not all experts at {site.name} are plain LoRAs.")
        self.register_buffer("A", loras.A, persistent=False)
        self.register_buffer("B", loras.B, persistent=False)
        self.router = router
        self.kernel = kernel
        self.product = product
        self.one_call = one_call and product is None and kernel in ("auto", "native")
        self.room: dict[str, Tensor] = {}  # what A and B begin, where they have grown

    @property
    def stack(self) -> SiteStack:
        """The experts' factors as they are now."""
        return SiteStack(self.experts, LoraStack(self.A, self.B))

    def forward(self, u: Tensor) -> Tensor:
        """[.., n] to [.., d]."""
        y: Tensor = self.base(u)
        if self.one_call and self._added_in_one_call(y, u):
            return y
        decision = self.choose(u)
        tokens = u.reshape(-1, u.shape[-1])
        arguments = (tokens.to(self.A.dtype), decision.experts)
        kernel = self.product or choose_kernel(self.kernel, *arguments, self.A, self.B)
        delta = kernel(*arguments, decision.weights, self.A, self.B)
        return y + delta.view(y.shape).to(y.dtype)

    def _added_in_one_call(self, y: Tensor, u: Tensor) -> bool:
        """True where choosing and adding to y could be left to the native kernel as one."""
        router, A, B = self.router, self.A, self.B
        vectors = router.vectors
        if not (
            u.is_contiguous()
            and y.is_contiguous()
            and runs_natively(y, u, vectors, A, B)
            and not watches_over(self, self.site)
        ):
            return False
        add_routed(y, u, vectors, A, B, router.k, router.eps)
        return True


class FoldedLinear(RoutedLayer):
    """A linear layer with the mean of its experts' updates inside its weight.

    The base layer is kept for `detach`. In bfloat16 the sum of weight and update is rounded once,
    where a factored update would be rounded apart.
    """

    folded: Tensor

    def __init__(
        self, base: nn.Module, site: Site, folded: Tensor, experts: Tensor, pool_size: int
    ) -> None:
        """`folded` [d, n] comes from `folded_weight`. Raises RoutingError for an offloaded bias."""
        super().__init__(base, site, experts)
        if self.base.bias is not None and self.base.bias.is_meta:
            raise RoutingError(
                f"The experts at {site.name} are folded into a weight, which needs the base's bias "
                f"beside it, but accelerate keeps that elsewhere; compose the pool anew."
            )
        self.weight_of_each = 1 / pool_size
        self.register_buffer("folded", folded, persistent=False)

    def forward(self, u: Tensor) -> Tensor:
        """[.., n] to [.., d]."""
        if watches := watches_over(self, self.site):
            experts = self.experts.expand(u[..., 0].numel(), -1)
            equal = torch.full(experts.shape, self.weight_of_each, device=u.device)
            for watch in watches:
                watch.tell(self.site, u, experts, equal, lambda: equal)
        return functional.linear(u, self.folded, self.base.bias)


def is_cheaper_folded(base: nn.Module, stack: LoraStack) -> bool:
    """True where E r (n + d) factors outnumber the n d weights, and those are all there is to it.

    Subclasses of a linear layer (quantised ones, for instance) may do more than multiply; weights
    that accelerate keeps elsewhere aren't there to be added to.
    """
    weight: Tensor = base.weight  # type: ignore[assignment]
    plain = type(base) in (nn.Linear, Conv1D) and type(weight) is nn.Parameter
    return plain and not weight.is_meta and stack.A.numel() + stack.B.numel() > weight.numel()


@torch.no_grad()
def folded_weight(base: nn.Module, stack: LoraStack, pool_size: int) -> Tensor:
    """W plus the mean of all B A, [d, n], in the dtype of W; summed in float32.

    Those of the pool's experts that are not in `stack` count as zero.
    """
    weight: Tensor = base.weight  # type: ignore[assignment]
    weight = weight.T if isinstance(base, Conv1D) else weight
    A, B = stack.A.float().flatten(0, 1), stack.B.float().flatten(0, 1)  # [E r, n], [E r, d]
    return (weight.float() + B.T @ A / pool_size).to(weight.dtype)
