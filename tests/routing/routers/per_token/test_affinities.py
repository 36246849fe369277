"""Other affinities than the paper's, and the temperature, each against its formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from phatgoose.config import AFFINITIES, Routing
from phatgoose.errors import ConfigError, PoolError, RoutingError
from phatgoose.evaluation.comparison.rows import rows_of
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from phatgoose.routing.growing import add_experts, remove_experts
from phatgoose.routing.routers.router import RouterSite, router_of
from phatgoose.routing.saved.load import load
from phatgoose.routing.saved.save import save
from tiny import logits_of, make_ids

EPS = 1e-5


@pytest.fixture
def three(pool_of):
    """Three experts of the tiny Llama."""
    return pool_of("llama", (4, 4, 4))


def affinities_of(pool: Pool, site: str, u: torch.Tensor, **settings) -> torch.Tensor:
    return router_at(pool, site, Routing(**settings)).affinities(u)


def router_at(pool: Pool, site: str, routing: Routing):
    router = router_of(routing)
    state = router.state_at(pool, site)
    return router.at(RouterSite(site, torch.arange(len(pool)), len(pool), state, None))


def standard(rows: torch.Tensor) -> torch.Tensor:
    return (rows - rows.mean(-1, keepdim=True)) / rows.std(-1, correction=0, keepdim=True)


@pytest.fixture
def case(three):
    """A site, its gates, the pool's mean there, and tokens."""
    site = three.sites[0]
    gates = three.vectors("gates", site).float()
    u = torch.randn(7, gates.shape[1], generator=torch.Generator().manual_seed(0))
    mean = three.vectors("means", site).float().mean(0)
    return site, gates, mean, u


def test_raw_is_what_the_sigmoid_saw(three, case):
    site, gates, _, u = case
    found = affinities_of(three, site, u, affinity="raw")
    torch.testing.assert_close(found, u @ gates.T)


def test_trimmed_leaves_out_the_features_of_the_largest_mean(three, case):
    site, gates, mean, u = case
    n = u.shape[1]
    out = mean.abs().argsort(descending=True)[: max(1, round(0.01 * n))]
    left = torch.tensor([feature for feature in range(n) if feature not in out.tolist()])
    expected = standard(u[:, left]) @ standard(gates[:, left]).T / len(left) ** 0.5
    found = affinities_of(three, site, u, affinity="trimmed")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    far = u.clone()
    far[:, out] += 1000.0
    torch.testing.assert_close(affinities_of(three, site, far, affinity="trimmed"), found)


def test_centred_is_zero_at_the_pools_usual_activation(three, case):
    site, gates, mean, u = case
    scale = u.std(-1, correction=0, keepdim=True) * u.shape[1] ** 0.5
    expected = (u - mean) @ standard(gates).T / scale
    found = affinities_of(three, site, u, affinity="centred")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    at_mean = affinities_of(three, site, mean[None], affinity="centred")
    torch.testing.assert_close(at_mean, torch.zeros_like(at_mean), atol=1e-4, rtol=0)


@pytest.mark.parametrize("router", ["phatgoose", "average-activation", "arrow"])
@pytest.mark.parametrize("affinity", AFFINITIES)
def test_a_temperature_divides_every_affinity_and_moves_no_choice(three, case, router, affinity):
    site, _, _, u = case
    one = affinities_of(three, site, u, router=router, affinity=affinity)
    half = affinities_of(three, site, u, router=router, affinity=affinity, router_temperature=0.5)
    torch.testing.assert_close(half, 2 * one)


@pytest.mark.parametrize("affinity", AFFINITIES)
def test_the_top_k_of_the_affinities_act_with_their_softmax(three, case, affinity):
    site, _, _, u = case
    routing = Routing(affinity=affinity, router_temperature=0.7)
    router = router_at(three, site, routing)
    with torch.no_grad():
        decision = router(u)
    best = router.affinities(u).topk(2)
    assert torch.equal(decision.experts, best.indices)
    torch.testing.assert_close(decision.weights, best.values.softmax(-1))


@pytest.mark.parametrize("affinity", AFFINITIES)
def test_a_routed_model_is_saved_and_loaded_with_them(three, llama, tmp_path, affinity):
    model = compose(three, llama, affinity=affinity, router_temperature=0.5)
    ids = make_ids()
    expected = logits_of(model, ids)
    save(model, tmp_path / "routed")
    detach(model)
    again = load(tmp_path / "routed", llama)
    assert composition_of(again).routing.affinity == affinity
    assert torch.equal(logits_of(again, ids), expected)
    detach(again)


@pytest.mark.parametrize("affinity", ["trimmed", "centred"])
def test_what_depends_on_the_whole_pool_does_not_grow(three, llama, affinity):
    first, rest = three.select(three.names[:2]), three.select(three.names[2:])
    model = compose(first, llama, affinity=affinity)
    with pytest.raises(RoutingError, match="means of the whole pool; compose it anew"):
        add_experts(model, rest)
    with pytest.raises(RoutingError, match="means of the whole pool; compose it anew"):
        remove_experts(model, first.names[:1])
    detach(model)


@pytest.mark.parametrize("affinity", ["trimmed", "centred"])
def test_an_expert_without_means_is_named(three, llama, affinity):
    bare = Pool((*three.experts[:2], replace(three.experts[2], means={})))
    with pytest.raises(PoolError, match="'e2'"):
        compose(bare, llama, affinity=affinity)


def test_what_makes_no_sense_is_refused(three, llama):
    with pytest.raises(ConfigError, match=r"affinity is 'cosine', but must be one of standardised"):
        compose(three, llama, affinity="cosine")
    with pytest.raises(ConfigError, match="router uniform-top-k can only be standardised"):
        compose(three, llama, router="uniform-top-k", affinity="raw")
    with pytest.raises(ConfigError, match="stand-ins for gates can only be standardised"):
        compose(three, llama, stand_in=True, affinity="raw")
    with pytest.raises(ConfigError, match="router_temperature"):
        Routing(router_temperature=0.0)


def test_rows_of_a_comparison_tell_them_apart(three):
    changed = [
        Routing(),
        Routing(affinity="raw"),
        Routing(affinity="centred"),
        Routing(router_temperature=0.5),
    ]
    identities = [str(rows_of(three, ["phatgoose"], r)[0].identity) for r in changed]
    assert len(set(identities)) == len(changed)
    other = Pool(
        tuple(
            replace(e, means={site: mean + 1 for site, mean in e.means.items()})
            for e in three.experts
        )
    )
    same, means = Routing(), Routing(affinity="centred")
    assert (
        rows_of(other, ["phatgoose"], same)[0].identity
        == rows_of(three, ["phatgoose"], same)[0].identity
    )
    assert (
        rows_of(other, ["phatgoose"], means)[0].identity
        != rows_of(three, ["phatgoose"], means)[0].identity
    )
