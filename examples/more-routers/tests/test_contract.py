"""What every router promises, for each that the package registers."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch

from growth_cases import assert_same_models, changed, composed
from phatgoose.routing.compose import detach
from phatgoose.routing.routers.registry import ROUTERS
from phatgoose.routing.saved import load, save
from routed_models import with_embeddings
from tiny import logits_of, make_ids
from topic_prompts import retrieving

NAMES = sorted(
    point.name
    for point in metadata.entry_points(group="phatgoose.routers")
    if point.value.startswith("more_routers")
)


def test_the_registry_knows_them_all():
    assert len(NAMES) == 8
    assert set(NAMES) <= set(ROUTERS)


@retrieving
@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_answers_the_same(name, llama, llama_pool, tmp_path):
    ids = make_ids(rows=2)
    model = composed(name, with_embeddings(llama_pool), llama)
    wanted = logits_of(model, ids)
    save(model, tmp_path / "routed")
    detach(model)
    assert not torch.equal(logits_of(llama.model, ids), wanted)
    assert torch.equal(logits_of(load(tmp_path / "routed", llama), ids), wanted)


@retrieving
@pytest.mark.parametrize("name", [name for name in NAMES if ROUTERS[name].grows])
def test_a_pool_that_grew_and_shrank_is_the_pool_composed_at_once(name, llama, uneven, tmp_path):
    pool = with_embeddings(uneven)
    model = composed(name, pool.select(["e0", "e1", "e2"]), llama)
    model = changed(model, tmp_path / "routed", llama, pool.select(["e3"]), ["e1"])
    assert_same_models(model, composed(name, pool.select(["e0", "e2", "e3"]), llama))
