"""What looks wrong with a pool, by its profiles and vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import phatgoose as pg
from analysed import TASKS
from phatgoose.analysis.findings import findings_of, vector_similarity
from phatgoose.analysis.routing_distribution import RoutingDistribution
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose
from tiny import make_adapter


def profile_with(first, probability=None, tokens=1000):
    """A profile of one site with these shares of first choices and of probability."""
    names = tuple(f"e{z}" for z in range(len(first)))
    probability = first if probability is None else probability
    rows = {
        measure: {"model.layers.0.q": np.array([tokens * np.array(share, float), [0] * len(first)])}
        for measure, share in (
            ("probability", probability),
            ("weight", first),
            ("chosen", first),
            ("first", first),
        )
    }
    present = np.array(probability)[np.array(probability) > 0]
    entropy = -(present * np.log(present)).sum()
    site = {"model.layers.0.q": np.array([tokens, 0.0])}
    return RoutingDistribution(
        names, site, rows, {"model.layers.0.q": np.array([tokens * entropy, 0.0])}
    )


def kinds(profile, similarity=None):
    size = len(profile.experts)
    return [
        f.kind
        for f in findings_of({"a": profile}, np.eye(size) if similarity is None else similarity)
    ]


def test_a_sound_pool_has_no_findings():
    assert kinds(profile_with([0.5, 0.3, 0.2])) == []


def test_one_expert_taking_everything_is_found():
    found = findings_of({"a": profile_with([0.85, 0.1, 0.05])}, np.eye(3))
    assert [f.kind for f in found] == ["takes-everything"]
    assert found[0].experts == ("e0",)
    assert "85%" in found[0].message
    assert kinds(profile_with([0.75, 0.2, 0.05])) == []


def test_a_gate_that_never_wins_is_found():
    found = findings_of({"a": profile_with([0.6, 0.4, 0.0], [0.5, 0.4, 0.1])}, np.eye(3))
    assert [(f.kind, f.experts) for f in found] == [("never-wins", ("e2",))]
    assert "never chosen at all" in found[0].message


def test_a_gate_that_wins_on_one_of_several_datasets_is_sound():
    profiles = {
        "a": profile_with([0.6, 0.4, 0.0], [0.5, 0.4, 0.1]),
        "b": profile_with([0.0, 0.4, 0.6], [0.1, 0.4, 0.5]),
    }
    assert findings_of(profiles, np.eye(3)) == []


def test_a_router_that_cannot_tell_experts_apart_is_found():
    assert kinds(profile_with([0.4, 0.3, 0.3], [0.34, 0.33, 0.33])) == ["undecided"]


def test_near_duplicates_are_found_once():
    similarity = np.array([[1, 0.97, 0], [0.97, 1, 0.3], [0, 0.3, 1]])
    found = findings_of({"a": profile_with([0.5, 0.3, 0.2])}, similarity)
    assert [(f.kind, f.experts) for f in found] == [("near-duplicates", ("e0", "e1"))]


def test_routers_that_compare_nothing_are_not_judged(llama, llama_pool):
    for router in ("merged", "random"):
        found = pg.analyse(llama_pool, TASKS, routers=[router], base=llama, score=False)
        assert found.routers[router].findings == ()


def test_an_expert_shared_twice_and_one_without_a_gate_are_found(llama, tmp_path, make_expert):
    first, sound = make_expert(llama, "first"), make_expert(llama, "sound", seed=1)
    adapter = make_adapter(llama, tmp_path / "copy", seed=0)
    gates = {site: 3 * gate + 0.01 for site, gate in first.gates.items()}  # not the same numbers
    copy = Expert.from_peft(adapter, gates, name="copy", base=llama).save(tmp_path / "copied")
    zeros = {site: torch.zeros_like(gate) for site, gate in first.gates.items()}
    flat = Expert.from_peft(adapter, zeros, name="flat", base=llama).save(tmp_path / "flat")
    with pytest.warns(UserWarning, match="never trained"):
        model = compose(Pool((first, copy, sound, flat)), llama, k=1)
    similarity = vector_similarity(model)
    assert similarity[0, 1] == pytest.approx(1, abs=1e-4)
    assert abs(similarity[0, 2]) < 0.5
    assert similarity[0, 3] == 0
    found = pg.analyse(model, TASKS, score=False).routers["phatgoose"].findings
    assert ("near-duplicates", ("first", "copy")) in [(f.kind, f.experts) for f in found]


def test_arrows_vectors_are_compared_up_to_their_sign(llama, llama_pool):
    model = compose(llama_pool, llama, router="arrow")
    similarity = vector_similarity(model)
    assert np.diag(similarity) == pytest.approx(1)
    assert (similarity >= 0).all()
    np.testing.assert_allclose(similarity, similarity.T)
    pg.detach(model)
    assert vector_similarity(compose(llama_pool, llama, router="merged")) is None
