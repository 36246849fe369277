"""Other affinities than the paper's, and the temperature, each against its formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from phatgoose.config import AFFINITIES, Routing
from phatgoose.errors import ConfigError, PoolError, RoutingError
from phatgoose.evaluation.comparison.methods import rows_of
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from phatgoose.routing.growing import add_experts, remove_experts
from phatgoose.routing.routers.router import RouterSite, router_of
from phatgoose.routing.saved.load import load
from phatgoose.routing.saved.save import save
from phatgoose.tasks.encoding import Encoder
from phatgoose.tasks.neutral import neutral_examples
from tiny import logits_of, make_ids

EPS = 1e-5


@pytest.fixture
def three(pool_of):
    """Three experts of the tiny Llama."""
    return pool_of("llama", (4, 4, 4))


def affinities_of(base, pool: Pool, site: str, u: torch.Tensor, **settings) -> torch.Tensor:
    return router_at(base, pool, site, Routing(**settings)).affinities(u)


def router_at(base, pool: Pool, site: str, routing: Routing):
    router = router_of(routing)
    router.read_base(base.model, base.tokenizer, pool)
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


@pytest.mark.parametrize("affinity", ["centred", "trimmed"])
def test_far_means_of_one_expert_leave_the_others_affinities(llama, pool_of, affinity):
    pool = pool_of("llama", (4, 4, 4, 4, 4))
    site = pool.sites[0]
    gates = pool.vectors("gates", site)
    u = torch.randn(20, gates.shape[1], generator=torch.Generator().manual_seed(0))
    means = {name: 1e30 * mean for name, mean in pool.experts[0].means.items()}
    attacked = Pool((replace(pool.experts[0], means=means), *pool.experts[1:]))
    plain = affinities_of(llama, pool, site, u, affinity=affinity)
    found = affinities_of(llama, attacked, site, u, affinity=affinity)
    assert found.isfinite().all()
    assert (found - plain).abs().max() < 3 * plain.std()


def test_raw_is_what_the_sigmoid_saw(llama, three, case):
    site, gates, _, u = case
    found = affinities_of(llama, three, site, u, affinity="raw")
    torch.testing.assert_close(found, u @ gates.T)


def test_trimmed_leaves_out_the_features_of_the_largest_mean(llama, three, case):
    site, gates, mean, u = case
    n = u.shape[1]
    out = mean.abs().argsort(descending=True)[: max(1, round(0.01 * n))]
    left = torch.tensor([feature for feature in range(n) if feature not in out.tolist()])
    expected = standard(u[:, left]) @ standard(gates[:, left]).T / len(left) ** 0.5
    found = affinities_of(llama, three, site, u, affinity="trimmed")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    far = u.clone()
    far[:, out] += 1000.0
    torch.testing.assert_close(affinities_of(llama, three, site, far, affinity="trimmed"), found)


def test_centred_is_zero_at_the_pools_usual_activation(llama, three, case):
    site, gates, mean, u = case
    scale = u.std(-1, correction=0, keepdim=True) * u.shape[1] ** 0.5
    expected = (u - mean) @ standard(gates).T / scale
    found = affinities_of(llama, three, site, u, affinity="centred")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    at_mean = affinities_of(llama, three, site, mean[None], affinity="centred")
    torch.testing.assert_close(at_mean, torch.zeros_like(at_mean), atol=1e-4, rtol=0)


def test_calibrated_is_the_papers_less_what_neutral_text_has_of_it(llama, three, case):
    site, gates, _, u = case
    seen = []
    hook = llama.model.get_submodule(site).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(0, -2))
    )
    for example in neutral_examples():
        pair = Encoder.of(llama).pairs([example])[0]
        logits_of(llama.model, torch.tensor([pair.prompt + pair.target]))
    hook.remove()

    def plain(tokens: torch.Tensor) -> torch.Tensor:
        return standard(tokens) @ standard(gates).T / tokens.shape[1] ** 0.5

    usual = plain(torch.cat(seen))
    expected = (plain(u) - usual.mean(dim=0)) / usual.std(dim=0, correction=0)
    found = affinities_of(llama, three, site, u, affinity="calibrated")
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


def test_calibrated_affinities_of_a_gate_never_trained_are_0(llama, three, case):
    site, _, _, u = case
    gates = {name: torch.zeros_like(gate) for name, gate in three.experts[0].gates.items()}
    pool = Pool((replace(three.experts[0], gates=gates), *three.experts[1:]))
    found = affinities_of(llama, pool, site, u, affinity="calibrated")
    assert not found[:, 0].any()
    assert found[:, 1:].isfinite().all()


def test_calibrated_wants_a_tokenizer_and_the_base_to_stay(llama, three):
    with pytest.raises(ConfigError, match="reads neutral text; hand the base over with its tok"):
        compose(three, llama.model, affinity="calibrated")
    model = compose(three.select(three.names[:2]), llama, affinity="calibrated")
    with pytest.raises(RoutingError, match="measured with the base alone; compose the pool anew"):
        add_experts(model, three.select(three.names[2:]))
    detach(model)


@pytest.mark.parametrize("router", ["phatgoose", "average-activation", "arrow"])
@pytest.mark.parametrize("affinity", AFFINITIES)
def test_a_temperature_divides_every_affinity_and_moves_no_choice(
    llama, three, case, router, affinity
):
    site, _, _, u = case
    one = affinities_of(llama, three, site, u, router=router, affinity=affinity)
    half = affinities_of(
        llama, three, site, u, router=router, affinity=affinity, router_temperature=0.5
    )
    torch.testing.assert_close(half, 2 * one)


@pytest.mark.parametrize("affinity", AFFINITIES)
def test_the_top_k_of_the_affinities_act_with_their_softmax(llama, three, case, affinity):
    site, _, _, u = case
    routing = Routing(affinity=affinity, router_temperature=0.7)
    router = router_at(llama, three, site, routing)
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
