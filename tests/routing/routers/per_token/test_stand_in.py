"""Stand-ins: experts without gates in a pool of gated ones, on request and under a warning."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from phatgoose.config import Routing
from phatgoose.errors import PoolError
from phatgoose.evaluation.comparison.methods import lacking, rows_of
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from phatgoose.routing.routers.arrow import arrow_vector
from phatgoose.routing.routers.stand_in import gates_or_stand_ins
from phatgoose.routing.routers.vector_router import standardise
from phatgoose.routing.saved.load import load
from phatgoose.routing.saved.save import save
from tiny import logits_of, make_ids


def without_gates(pool: Pool, *names: str) -> Pool:
    return Pool(tuple(replace(e, gates={}) if e.name in names else e for e in pool.experts))


@pytest.fixture
def three(pool_of):
    """Three experts of the tiny Llama."""
    return pool_of("llama", (4, 4, 4))


@pytest.fixture
def two_gated(three):
    """The same, one of them without gates."""
    return without_gates(three, three.names[1])


def test_they_are_refused_unless_asked_for_and_the_refusal_says_how_to_ask(two_gated, llama):
    with pytest.raises(PoolError, match=r"'e1' has no gates.*--stand-in"):
        compose(two_gated, llama)
    assert not hasattr(llama.model, "phatgoose")


def test_a_stand_in_is_the_arrow_vector_on_the_side_of_the_trained_gates(two_gated):
    for site in two_gated.sites:
        rows = gates_or_stand_ins(two_gated, site)
        trained = [standardise(two_gated.experts[z].gates[site][None])[0] for z in (0, 2)]
        torch.testing.assert_close(rows[[0, 2]], torch.stack(trained))
        arrow = standardise(arrow_vector(two_gated.experts[1].lora[site])[None])[0]
        assert torch.equal(rows[1], arrow) or torch.equal(rows[1], -arrow)
        assert rows[1] @ (trained[0] + trained[1]) >= 0


def test_the_side_does_not_depend_on_the_sign_that_the_decomposition_came_out_with(three):
    site = three.sites[0]
    flipped = three.experts[1].lora | {
        site: replace(
            three.experts[1].lora[site],
            A=-three.experts[1].lora[site].A,
            B=-three.experts[1].lora[site].B,
        )
    }
    ungated = without_gates(three, *three.names)
    other = Pool((ungated.experts[0], replace(ungated.experts[1], modules=flipped)))
    torch.testing.assert_close(
        gates_or_stand_ins(ungated, site)[:2], gates_or_stand_ins(other, site), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("router", ["phatgoose", "uniform-top-k"])
def test_composing_names_those_that_are_guessed_and_survives_saving(
    two_gated, llama, tmp_path, router
):
    with pytest.warns(UserWarning, match=r"Arrow vectors in the gates' place: e1\. .* a guess"):
        model = compose(two_gated, llama, router=router, stand_in=True)
    wanted = logits_of(model, make_ids())
    save(model, tmp_path / "routed")
    detach(model)
    again = load(tmp_path / "routed", llama)
    assert composition_of(again).routing.stand_in
    torch.testing.assert_close(logits_of(again, make_ids()), wanted)
    detach(again)


def test_a_pool_with_all_gates_is_routed_as_ever(three, llama):
    model = compose(three, llama)
    wanted = logits_of(model, make_ids())
    detach(model)
    model = compose(three, llama, stand_in=True)
    assert torch.equal(logits_of(model, make_ids()), wanted)
    detach(model)


def test_a_comparison_counts_them_as_gated_and_keeps_their_cells_apart(two_gated):
    assert lacking(two_gated)["phatgoose"] == {"e1": ("gates",)}
    assert not lacking(two_gated, stand_in=True).get("phatgoose")
    rows = [
        rows_of(two_gated, ["phatgoose"], Routing(stand_in=stand_in))[0].identity
        for stand_in in (False, True)
    ]
    assert rows[0] != rows[1]
