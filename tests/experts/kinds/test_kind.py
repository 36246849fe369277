"""Tensors of an adapter of any kind."""

from __future__ import annotations

import pytest

from changed_adapters import change_tensors, complaint_about
from phatgoose.experts.kinds.peft import ADAPTER_WEIGHTS

SITE = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_with_the_tensor(adapter, value):
    name = f"{SITE}.lora_B.weight"
    change_tensors(adapter, lambda tensors: tensors[name].view(-1)[7].fill_(value))
    message = complaint_about(adapter)
    assert name in message
    assert "not finite" in message


@pytest.mark.parametrize("length", [0, 5, 500, -1])
def test_truncated_weights_are_refused(adapter, length):
    weights = adapter / ADAPTER_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:length])
    assert "damaged or truncated" in complaint_about(adapter)
