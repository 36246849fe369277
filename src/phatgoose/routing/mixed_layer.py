"""The layer of a site at which experts of several kinds act, or others than plain LoRAs.

One softmax weighs all experts of the site, whatever their kind; with w_z the weights of a token,
zero for those that it didn't choose, u the input, W and b the site's own weight and bias:

    y₀ = W (u ⊙ (1 + Σ w_z (l_z - 1))) + b                     z: (IA)³ on the input
    y  = y₀ ⊙ (1 + Σ w_z (l_z - 1))                            z: (IA)³ on the output
       + Σ w_z (B_z A_z u + bias_z)                            z: LoRA, scale folded in
       + Σ w_z (U_z f_z(D_z y₀ + b_z) + c_z)                   z: bottleneck adapter

So LoRAs read the input as it came and adapters the output before anything is added to it, which is
what each was trained on; every expert adds its own change, weighted, and none passes through
another. (What scales the input is the exception: leaving it out for the others would take a second
product with W.) With one expert of weight 1 this is `kinds.modules` at strength 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..base.sites import Site
from .kernels.bottlenecks import choose_bottleneck
from .kernels.choice import Kernel, choose_kernel
from .kernels.weighted_rows import weighted_rows
from .layers import ChoosingLayer
from .routers.decision import RoutingDecision
from .stacks.site_stack import BottleneckStack, LoraStack, ScalingStack, SiteStack

__all__ = ["MixedLinear"]


class MixedLinear(ChoosingLayer):
    """A linear layer (of any make) with experts of any kinds and a router.

    The stack's tensors are buffers under the names that `SiteStack.tensors` gives them, and stay
    out of the model's state dict.
    """

    def __init__(
        self,
        base: nn.Module,
        site: Site,
        stack: SiteStack,
        router: nn.Module,
        kernel: str,
        product: Kernel | None = None,
    ) -> None:
        """`kernel` and `product` are those of the LoRAs, as for `RoutedLinear`."""
        super().__init__(base, site, stack.experts)
        self.router, self.kernel, self.product = router, kernel, product
        self.tensors = tuple(stack.tensors())
        for name, tensor in stack.tensors().items():
            self.register_buffer(name, tensor, persistent=False)
        for part, rows in stack.rows().items():
            place = torch.full((len(stack.experts),), -1, device=rows.device)
            place[rows] = torch.arange(len(rows), device=rows.device)
            self.register_buffer(f"{part}_place", place, persistent=False)

    @property
    def stack(self) -> SiteStack:
        """The experts' modules as they are now."""
        return SiteStack.of({name: getattr(self, name) for name in self.tensors}, self.experts)

    def forward(self, u: Tensor) -> Tensor:
        """[.., n] to [.., d]; the formula above."""
        stack = self.stack
        decision = self.choose(u)
        scaled = u
        if stack.input_scaling is not None:
            factor = self._factor("input_scaling", stack.input_scaling, decision)
            scaled = (u * factor.view(u.shape)).to(u.dtype)
        first: Tensor = self.base(scaled)
        y0 = first.reshape(-1, first.shape[-1])
        y = y0
        if stack.output_scaling is not None:
            y = (y0 * self._factor("output_scaling", stack.output_scaling, decision)).to(y0.dtype)
        if stack.lora is not None:
            y = y + self._loras(u.reshape(-1, u.shape[-1]), stack.lora, decision).to(y.dtype)
        if stack.bottleneck is not None:
            y = y + self._bottlenecks(y0, stack.bottleneck, decision).to(y.dtype)
        return y.view(first.shape)

    def _chosen(self, part: str, decision: RoutingDecision) -> RoutingDecision:
        """The decision among the experts of one part: weights are 0 where it fell on others."""
        place = getattr(self, f"{part}_place")[decision.experts]
        return RoutingDecision(place.clamp(min=0), decision.weights * (place >= 0))

    def _factor(self, part: str, scaling: ScalingStack, decision: RoutingDecision) -> Tensor:
        """1 + Σ w_z (l_z - 1) for every token, float32."""
        chosen = self._chosen(part, decision)
        return 1 + weighted_rows(chosen.experts, chosen.weights, scaling.deltas)

    def _loras(self, u: Tensor, loras: LoraStack, decision: RoutingDecision) -> Tensor:
        """Σ w_z (B_z A_z u + bias_z) for every token."""
        chosen = self._chosen("lora", decision)
        arguments = (u.to(loras.A.dtype), chosen.experts)
        kernel = self.product or choose_kernel(self.kernel, *arguments, loras.A, loras.B)
        delta = kernel(*arguments, chosen.weights, loras.A, loras.B)
        if loras.bias is None:
            return delta
        return delta + weighted_rows(chosen.experts, chosen.weights, loras.bias)

    def _bottlenecks(self, y: Tensor, stack: BottleneckStack, decision: RoutingDecision) -> Tensor:
        """Σ w_z (U_z f_z(D_z y + b_z) + c_z) for every token."""
        chosen = self._chosen("bottleneck", decision)
        arguments = (y.to(stack.down.dtype), chosen.experts)
        kernel = choose_bottleneck(*arguments, stack.down)
        return kernel(
            *(*arguments, chosen.weights, stack.down, stack.down_bias),
            *(stack.up, stack.up_bias, stack.activations),
        )
