"""What looks wrong with a pool, by its profiles and vectors."""

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


ONE = profile_with([0.6, 0.4, 0.0], [0.5, 0.4, 0.1])
OTHER = profile_with([0.0, 0.4, 0.6], [0.1, 0.4, 0.5])
ALIKE = np.array([[1, 0.97, 0], [0.97, 1, 0.3], [0, 0.3, 1]])


@pytest.mark.parametrize(
    ("profiles", "similarity", "wanted"),
    [
        ([profile_with([0.5, 0.3, 0.2])], None, []),
        ([profile_with([0.85, 0.1, 0.05])], None, [("takes-everything", ("e0",))]),
        ([profile_with([0.75, 0.2, 0.05])], None, []),
        ([ONE], None, [("never-wins", ("e2",))]),
        ([ONE, OTHER], None, []),  # it wins on one of several datasets
        ([profile_with([0.4, 0.3, 0.3], [0.34, 0.33, 0.33])], None, [("undecided", None)]),
        ([profile_with([0.5, 0.3, 0.2])], ALIKE, [("near-duplicates", ("e0", "e1"))]),
    ],
)
def test_what_looks_wrong_is_found_once_and_nothing_else(profiles, similarity, wanted):
    similarity = np.eye(3) if similarity is None else similarity
    found = findings_of({f"d{i}": each for i, each in enumerate(profiles)}, similarity)
    assert [finding.kind for finding in found] == [kind for kind, _ in wanted]
    assert all(experts in (None, f.experts) for f, (_, experts) in zip(found, wanted, strict=True))


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
        model = compose(Pool((first, copy, sound, flat)), llama, k=1, router="phatgoose")
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
