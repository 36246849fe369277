"""Router best-individual: the expert of the best mean."""

from __future__ import annotations

import pytest
import torch

from phatgoose.routing.compose import compose
from phatgoose.routing.composition import composition_of
from routed_models import SCORES
from tiny import logits_of, make_ids
from topic_prompts import (
    by_single,
)


@pytest.mark.parametrize(
    ("options", "chosen"),
    [({}, "e3"), ({"leave_out": ["e3"]}, "e1"), ({"keep": ["e0"]}, "e0")],
    ids=["of all", "of some", "of one"],
)
def test_best_individual_is_the_expert_of_the_best_mean(llama, llama_pool, options, chosen):
    ids = make_ids(rows=2)
    (wanted,) = by_single(llama, llama_pool, [chosen], lambda model, _: logits_of(model, ids))
    model = compose(llama_pool, llama, router="best-individual", scores=SCORES, **options)
    assert composition_of(model).experts == (chosen,)
    assert torch.equal(logits_of(model, ids), wanted)
