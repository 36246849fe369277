"""Which factors belong together, and what is said of those that don't."""

from __future__ import annotations

import pytest
import torch

from phatgoose.routing.kernels.plain import belong_together, misfit


@pytest.mark.parametrize(
    ("A", "B", "wanted"),
    [
        ((3, 2, 5), (3, 2, 7), True),
        ((3, 2, 4), (3, 2, 7), False),  # of another input
        ((2, 2, 5), (3, 2, 7), False),  # of other experts
        ((3, 1, 5), (3, 2, 7), False),  # of another rank
        ((3, 0, 5), (3, 0, 7), False),
        ((3, 5), (3, 2, 7), False),
    ],
)
def test_factors_belong_together_by_experts_rank_and_input(A, B, wanted):
    assert belong_together(5, torch.Size(A), torch.Size(B)) is wanted


def test_a_misfit_is_told_with_sizes_types_and_devices():
    told = str(misfit("native", 3, u=torch.zeros(2, 5), A=torch.zeros(1, 2, 4).bfloat16()))
    assert "u [2, 5] float32 on cpu, A [1, 2, 4] bfloat16 on cpu, k = 3" in told
