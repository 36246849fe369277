"""One expert alone on its base."""

from __future__ import annotations

import pytest
import torch

from mixed_experts import (
    each_kind,
)
from phatgoose.experts.adapter import ModifiedLinear, applied
from phatgoose.routing.compose import compose, detach
from tiny import assert_same_logits, logits_of, make_ids, peft_model


@each_kind
@pytest.mark.parametrize("name", ["lora0", "biased1", "ia32", "bottleneck4"])
def test_a_pool_forced_to_one_expert_is_that_expert_alone(base, mixed_pool, name):
    ids = make_ids(rows=2)
    plain = logits_of(base.model, ids)
    expert = next(expert for expert in mixed_pool.experts if expert.name == name)
    if expert.kind == "bottleneck":
        with applied(base.model, expert.modules, ModifiedLinear):
            wanted = logits_of(base.model, ids)
    else:
        wanted = logits_of(peft_model(base, expert.directory), ids)
    assert not torch.allclose(wanted, plain, atol=0.1)
    for options in ({"keep": [name], "k": 1}, {"router": f"single:expert={name}"}):
        assert_same_logits(logits_of(compose(mixed_pool, base, **options), ids), wanted)
        detach(base.model)
    assert torch.equal(logits_of(base.model, ids), plain)
