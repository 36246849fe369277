"""Models opened from any place."""

from __future__ import annotations

import pytest
import torch

from phatgoose.config import Routing
from phatgoose.errors import ConfigError
from phatgoose.experts.importing import import_adapters
from phatgoose.routing.compose import (
    compose,
    detach,
    is_pool,
    is_routed,
    open_model,
    save,
    selected,
)
from tiny import logits_of, make_adapter, make_ids


@pytest.fixture
def places(llama, llama_pool, tmp_path):
    """The same pool as a folder and a routed model, one expert, and the base."""
    model = compose(llama_pool, llama, router="arrow")
    save(model, tmp_path / "routed")
    wanted = logits_of(model, make_ids())
    detach(model)
    expert = llama_pool.experts[0].directory
    return {
        "folder": expert.parent,
        "routed": tmp_path / "routed",
        "expert": expert,
        "base": llama.id,
    }, wanted


def test_places_are_told_apart(places):
    where, _ = places
    assert [name for name, place in where.items() if is_routed(place)] == ["routed"]
    assert [name for name, place in where.items() if is_pool(place)] == ["folder", "expert"]
    assert is_pool("hub:me/pool")


@pytest.mark.parametrize("name", ["folder", "routed"])
@pytest.mark.parametrize("given", [False, True], ids=["base as named", "base given"])
def test_a_pool_and_its_routed_model_are_opened_alike(places, llama, name, given):
    where, wanted = places
    base = llama if given else None
    opened = open_model(where[name], base, dtype="float32", routing=Routing("arrow"))
    assert torch.equal(logits_of(opened.model, make_ids()), wanted)
    assert opened.tokenizer.eos_token == llama.tokenizer.eos_token


def test_a_folder_of_adapters_is_opened_as_the_pool_of_their_imports(llama, tmp_path):
    folders = [make_adapter(llama, tmp_path / "adapters" / n, seed=s) for s, n in enumerate("abc")]
    import_adapters(folders, tmp_path / "pool")
    routing = Routing("auto")
    read, imported = (
        open_model(tmp_path / place, dtype="float32", routing=routing).model
        for place in ("adapters", "pool")
    )
    assert read.phatgoose.routing.router == "arrow"
    assert torch.equal(logits_of(read, make_ids()), logits_of(imported, make_ids()))


@pytest.mark.parametrize("name", ["routed", "base"])
def test_experts_are_chosen_of_pools_alone(places, llama, name):
    where, _ = places
    for choose in (
        lambda place: open_model(place, llama, scores={"a": {}}),
        lambda place: selected(place, ["e0"], None),
        lambda place: selected(place, None, ["e0"]),
    ):
        with pytest.raises(ConfigError, match="is not a pool"):
            choose(where[name])


def test_a_base_is_opened_alone(places, llama):
    where, wanted = places
    got = logits_of(open_model(where["base"], dtype="float32").model, make_ids())
    assert torch.equal(got, logits_of(llama.model, make_ids()))
    assert not torch.equal(got, wanted)
