"""Products of tokens sorted by expert: one call where torch has it, else one an expert."""

from __future__ import annotations

import pytest
import torch

from phatgoose.experts.kinds.sums import expert_products, is_one_call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_run_of_rows_meets_its_own_factor(dtype):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(7, 8, generator=generator).to(dtype)
    factors = torch.randn(3, 8, 16, generator=generator).to(dtype)
    counts = torch.tensor([4, 0, 3])
    runs = ((rows[:4], factors[0]), (rows[4:], factors[2]))
    wanted = torch.cat([run.float() @ factor.float() for run, factor in runs])
    got = expert_products(rows, factors, counts)
    torch.testing.assert_close(got.float(), wanted, rtol=0.02, atol=0.05)


def test_one_call_is_for_bfloat16_in_multiples_of_eight():
    factor = torch.zeros(2, 8, 16)
    assert not is_one_call(factor)
    assert is_one_call(factor.bfloat16()) == hasattr(torch.nn.functional, "grouped_mm")
    assert not is_one_call(factor.bfloat16(), torch.zeros(2, 8, 12).bfloat16())
