"""The tensors of a routed model's files."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phatgoose.routing.saved.tensors import dequantised, quantised, read_saved


def test_what_is_in_one_file_is_mapped_and_not_copied(llama, packed):
    first = read_saved(packed).tensors
    name = next(name for name in first if name.startswith("A."))
    assert first[name].untyped_storage().nbytes() == (packed / "routed.safetensors").stat().st_size
    assert {first[name].untyped_storage().data_ptr() for name in first if name[1] == "."} == {
        first[name].untyped_storage().data_ptr()
    }


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.floats(1e-6, 1e6))
def test_int8_is_off_by_half_a_step_at_most(seed, size):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(3, 2, 7, generator=generator) * size
    factor[1, 1] = 0
    held = dict(quantised("A", "x", factor))
    assert held["A.x"].dtype == torch.int8
    error = (dequantised(held, "A.x") - factor).abs()
    largest = factor.abs().amax(dim=-1, keepdim=True)
    assert (error <= largest / 254 * (1 + 1e-5)).all()
    assert not dequantised(held, "A.x")[1, 1].any()
