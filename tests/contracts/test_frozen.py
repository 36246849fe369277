"""The frozen contract: tokens, choices, scores and losses of tiny models, to the last choice."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

import phatgoose as pg
from frozen_cases import BASES, CASES, FROZEN, difference, found, routed, tiny_house
from phatgoose.routing.compose import detach
from routed_models import compose_by

WANTED = json.loads(FROZEN.read_text(encoding="utf-8"))
GROUPS = sorted({case.rpartition("/")[0] for case in CASES})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("house")


@pytest.fixture(scope="module")
def house(place):
    with tiny_house(place) as made:
        yield made


def digest_of(model) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def test_every_case_is_frozen():
    assert set(WANTED) == set(CASES)


@pytest.mark.parametrize("group", GROUPS)
def test_numbers_are_the_frozen_ones(group, house, place):
    base = house.bases[group.partition("/")[0]].model
    before = digest_of(base)
    for case in (case for case in CASES if case.startswith(f"{group}/")):
        changed = difference(found(house, case, place), WANTED[case], case)
        assert not changed, changed
        assert digest_of(base) == before, f"after {case} the base isn't what it was, bit for bit"


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("router", ["phatgoose", "arrow", "merged", "discriminant", "retrieval"])
def test_a_saved_model_is_loaded_as_it_was(kind, router, house, tmp_path):
    base = house.bases[kind]
    model = compose_by(router, house.pools[kind, "lora"], base)
    wanted = routed(model, base)
    pg.save(model, tmp_path / "routed")
    detach(model)
    loaded = pg.load(tmp_path / "routed", dtype="float32")
    with torch.no_grad():
        assert routed(loaded, base) == wanted
