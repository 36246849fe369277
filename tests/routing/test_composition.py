"""What a routed model was composed of, and inputs announced to it."""

from __future__ import annotations

import pytest
import torch

from phatgoose.errors import RoutingError
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import announcing, composition_of
from phatgoose.routing.recording import record
from tiny import logits_of, make_ids


@pytest.mark.parametrize("wants_routed", [detach, composition_of, lambda m: record(m).__enter__()])
def test_a_plain_model_is_not_routed(llama, wants_routed):
    with pytest.raises(RoutingError, match="not routed"):
        wants_routed(llama.model)


def test_random_routing_starts_anew_for_each_task(llama, llama_mixed):
    pool = llama_mixed.select(["ia32", "bottleneck3", "biased1"])
    model, ids, got = compose(pool, llama, router="random", k=1), make_ids(), []
    for _ in range(2):
        with announcing(model, "task", []):
            got.append(logits_of(model, ids))
    assert torch.equal(*got)
    assert not torch.equal(logits_of(model, ids), got[0])
