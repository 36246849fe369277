"""Bottlenecks of several sizes, side by side."""

from __future__ import annotations

import torch
from torch import nn

from mixed_experts import (
    CPU,
    PRECISE,
)
from phatgoose.experts.kinds.bottleneck import BottleneckLayers
from phatgoose.routing.kernels.plain import grouped_bottleneck
from phatgoose.routing.stacks import stack_modules


def test_sizes_are_filled_up_with_zeros_which_changes_nothing():
    def layers(m: int) -> BottleneckLayers:
        parts = (torch.randn(m, 6), torch.randn(m), torch.randn(6, m), torch.randn(6))
        return BottleneckLayers(*parts, "silu", 2.0)

    small, large = layers(2), layers(9)
    stack = stack_modules([0, 1], [small, large], torch.float32, CPU).bottleneck
    assert stack.down.shape == stack.up.shape == (2, 9, 6)
    assert not stack.down[0, 2:].any()
    assert not stack.up[0, 2:].any()
    assert torch.equal(stack.up[0, :2], (2.0 * small.up).T)
    y = torch.randn(4, 6)
    arguments = (y, torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1))
    tensors = (stack.down, stack.down_bias, stack.up, stack.up_bias, stack.activations)
    wanted = small.at(y).apply(nn.Identity(), y) - y
    torch.testing.assert_close(grouped_bottleneck(*arguments, *tensors), wanted, **PRECISE)
