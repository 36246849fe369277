"""What every router promises: for each that is installed, by brute force.

`make test-more-routers` runs these tests for the routers of examples/more-routers too.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Literal, get_args, get_origin

import pytest
import torch
from torch import Tensor

from mixed_experts import ordered
from phatgoose.config import Routing, settings_of
from phatgoose.errors import PoolError, RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, composition_of, detach, load, save
from phatgoose.routing.layers import FoldedLinear
from phatgoose.routing.recording import record
from phatgoose.routing.routers.registry import OURS, known_names
from phatgoose.routing.routers.router import Router, RouterAtSite, class_of, router_of
from phatgoose.routing.saved import add_to_saved, remove_from_saved
from phatgoose.tasks.batching import pad_left, pad_right
from routed_models import assert_is_that_of, compose_by, composed, of_task, with_embeddings
from tiny import logits_of, make_ids, random
from topic_prompts import PROMPTS, both_streams, experts_of

NAMES = known_names()
KINDS = {name: class_of(name) for name in NAMES}
GROWING = [name for name in NAMES if KINDS[name].grows]
FIXED = [name for name in NAMES if not KINDS[name].grows]
SCORING = [  # those that choose for each token by scores of their own
    name
    for name in NAMES
    if KINDS[name].scores is not Router.scores
    and KINDS[name].decision is Router.decision
    and name != "random"
]
each_router = pytest.mark.parametrize("name", NAMES)
pytestmark = [
    pytest.mark.usefixtures("toy_embedder"),
    pytest.mark.filterwarnings("ignore:k is", "ignore:Expert .* has a constant vector"),
]


def layers_of(model) -> list:
    """The routed layers of `model` that aren't folded."""
    layers = composition_of(model).layers.values()
    return [layer for layer in layers if not isinstance(layer, FoldedLinear)]


def told(model):
    """`model`, whose next passes are about three prompts if its router chooses by prompts."""
    context = composition_of(model).context
    if context is not None and composition_of(model).router.name != "oracle":
        context.use(experts_of(model, PROMPTS[:3]))
    return model


def restarted(at_site: RouterAtSite) -> RouterAtSite:
    at_site.restart()
    return at_site


# What is declared


@each_router
def test_its_line_in_the_list_is_that_of_its_class(name):
    kind, listed = KINDS[name], KINDS[name].listed()
    assert (kind.name, kind.needs, kind.usual_k) == (name, listed.needs, listed.k)
    assert kind.label
    assert listed.summary
    assert name not in OURS or kind.__module__.endswith(listed.place.partition(":")[0])
    assert kind.fused in ("", "v̄ᵀū/√n", "|vᵀu|")


@each_router
def test_its_settings_are_read_as_they_are_written(name):
    kind = KINDS[name]
    assert router_of(Routing(name, k=3)).k == (3 if kind.usual_k else 0)
    assert router_of(Routing(name)).k == (kind.usual_k or 0)
    for setting in settings_of(kind):
        value = other_than(setting, kind)
        router = replace(kind(), **{setting.name: value})
        assert router_of(Routing(router.text)) == router
        assert router.text != name


def other_than(setting, kind):
    """A value that the setting may have and that isn't its default."""
    options = (setting.type, *get_args(setting.type))
    named = [v for each in options if get_origin(each) is Literal for v in get_args(each)]
    if setting.name == "mixture":
        return "e0=0.5,e1=-2.0"
    if named:
        return next(v for v in named if v != setting.default)
    if isinstance(setting.default, int | float):
        return setting.default / 2 if isinstance(setting.default, float) and setting.default else 1
    return 2 if "int" in str(setting.type) else "text"


@pytest.mark.parametrize("name", [name for name in NAMES if KINDS[name].needs])
def test_experts_that_lack_what_it_needs_are_named(name, llama, llama_pool, llama_mixed):
    for need in KINDS[name].needs:
        if need == "lora":
            others, message = with_embeddings(llama_mixed), "'ia32', 'bottleneck3' have no LoRAs"
        else:
            pool = with_embeddings(llama_pool)
            bare = replace(pool.experts[0], **{need: None if need == "embeddings" else {}})
            others, message = Pool((bare, *pool.experts[1:])), f"'e0' has no {need}"
        with pytest.raises(PoolError, match=message):
            router_of(Routing(name)).check(others)
        with pytest.raises(PoolError, match=message):
            compose(others, llama, router=name)
    assert not hasattr(llama.model, "phatgoose")


@each_router
def test_a_k_above_the_pool_is_lowered_and_told_where_k_matters(name, llama, llama_pool):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = compose_by(name, llama_pool, llama, k=90)
    said = [str(each.message) for each in caught]
    expected = "k is 90, but the pool has 4 experts; k is lowered."
    assert (expected in said) == (KINDS[name].usual_k is not None)
    assert all(layer.at_site.k <= 4 for layer in layers_of(model))


# What is decided at a site


@each_router
def test_weights_are_of_different_experts_and_sum_to_one(name, llama, llama_pool):
    model = told(compose_by(name, llama_pool, llama))
    for layer in layers_of(model):
        decision = layer.at_site(random(6, layer.in_features))
        assert decision.experts.shape == decision.weights.shape
        assert decision.experts.dtype == torch.int64
        assert decision.weights.dtype == torch.float32
        torch.testing.assert_close(decision.weights.sum(dim=-1), torch.ones(6))
        assert decision.experts.sort(dim=-1).values.diff(dim=-1).ne(0).all()
        none = layer.at_site(random(0, layer.in_features))
        assert none.experts.shape == (0, decision.experts.shape[1])


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("name", SCORING)
def test_the_best_by_score_act_the_first_of_equals_first(name, llama, llama_pool, k):
    """Experts 0 and 2, and 1 and 3, are alike, so that all scores are ties."""
    first, second = with_embeddings(llama_pool).experts[:2]
    twins = [replace(e, info=replace(e.info, name=f"{e.name}b")) for e in (first, second)]
    model = told(compose(Pool((first, second, *twins)), llama, router=name, k=k))
    for layer in layers_of(model)[:3]:
        u = random(6, layer.in_features)
        with torch.no_grad():
            decision = layer.at_site(u)
        scores = layer.at_site.router.scores(u, layer.at_site)
        assert torch.equal(scores[:, :2], scores[:, 2:])
        for row, chosen in zip(scores.tolist(), decision.experts.tolist(), strict=True):
            assert chosen == sorted(range(4), key=lambda z: -row[z])[:k]
        assert_weights(layer.at_site, scores, decision)


def assert_weights(at_site: RouterAtSite, scores: Tensor, decision) -> None:
    chosen = scores.gather(1, decision.experts)
    wanted = chosen.softmax(dim=-1)
    if at_site.router.equal:
        wanted = torch.full_like(chosen, 1 / at_site.k)
    torch.testing.assert_close(decision.weights, wanted, rtol=1e-4, atol=1e-6)


@each_router
def test_only_experts_that_are_active_act(name, llama, llama_pool):
    model = told(compose_by(name, llama_pool, llama))
    active = torch.rand(6, 4, generator=torch.Generator().manual_seed(3)) < 0.5
    active[0], active[1] = False, True
    for layer in layers_of(model)[:4]:
        u = random(6, layer.in_features)
        E = len(layer.experts)
        free = restarted(layer.at_site)(u)
        decision = restarted(layer.at_site)(u, active[:, :E])
        dense = torch.zeros(6, E).scatter_add(1, decision.experts, decision.weights)
        assert not dense[~active[:, :E]].any()
        torch.testing.assert_close(decision.weights[1], free.weights[1])
        if name in SCORING or name == "random":
            some = active[:, :E].any(dim=1)
            torch.testing.assert_close(dense[some].sum(dim=1), torch.ones(int(some.sum())))
            scores = restarted(layer.at_site).router.scores(u, layer.at_site)
            for t in some.nonzero().flatten().tolist():
                allowed = [z for z in range(E) if active[t, z]]
                best = sorted(allowed, key=lambda z: -float(scores[t, z]))[: layer.at_site.k]
                assert {z for z in range(E) if dense[t, z]} == {z for z in best if dense[t, z]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in SCORING if KINDS[name].by_token])
def test_a_token_alone_chooses_as_in_a_batch(name, llama, llama_pool, dtype):
    model = compose_by(name, llama_pool, llama)
    for layer in layers_of(model)[:3]:
        router, u = copy.deepcopy(layer.at_site).to(dtype), random(9, layer.in_features).to(dtype)
        for tokens in (u, u.clone().requires_grad_()):  # the native kernel, and torch
            together = router(tokens)
            alone = [router(tokens[t : t + 1]) for t in range(len(u))]
            assert torch.equal(torch.cat([each.experts for each in alone]), together.experts)
            weights = torch.cat([each.weights for each in alone])
            torch.testing.assert_close(weights, together.weights, rtol=1e-6, atol=1e-6)


@each_router
def test_a_layer_adds_its_experts_updates_by_their_weights(name, llama, llama_pool):
    model = told(compose_by(name, llama_pool, llama))
    for layer in layers_of(model)[:4]:
        u = random(6, layer.in_features)
        decision = restarted(layer.at_site)(u)
        wanted = layer.base(u).double()
        for t in range(6):
            for z, weight in zip(decision.experts[t], decision.weights[t], strict=True):
                lora = llama_pool[composition_of(model).experts[layer.experts[z]]].lora
                factors = lora[layer.site.name]
                update = factors.scale * factors.B.double() @ (factors.A.double() @ u[t].double())
                wanted[t] += weight.double() * update
        layer.at_site.restart()
        with torch.no_grad():
            torch.testing.assert_close(layer(u).double(), wanted, rtol=1e-4, atol=1e-4)
        probabilities = restarted(layer.at_site).distribution(u)
        assert probabilities.shape == (6, len(layer.experts))
        torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(6))


# In a model


@each_router
@both_streams
def test_it_leaves_the_base_as_it_was(name, base, pool):
    ids, plain = make_ids(rows=2), dict(base.model.named_modules())
    attributes, wanted = set(vars(base.model)), logits_of(base.model, ids)
    assert not torch.equal(logits_of(compose_by(name, pool, base), ids), wanted)
    detach(base.model)
    assert dict(base.model.named_modules()) == plain
    assert set(vars(base.model)) == attributes
    for module in base.model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert torch.equal(logits_of(base.model, ids), wanted)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "random"])
@both_streams
def test_it_generates_a_padded_batch_as_its_rows_alone(name, base, pool):
    model = compose_by(name, pool, base)
    long, short = make_ids(tokens=9), make_ids(tokens=5, seed=1)
    pad = pad_right if base.is_encoder_decoder else pad_left
    ids = pad([long[0].tolist(), short[0].tolist()], 0)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    got = model.generate(ids, attention_mask=ids.ne(0).long(), **options)
    for row, alone in zip(got, (long, short), strict=True):
        wanted = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
        assert torch.equal(row[-5:], wanted[0, -5:])


@pytest.mark.parametrize("name", [name for name in NAMES if "lora" not in KINDS[name].needs])
def test_it_routes_experts_of_every_kind_and_saves_them(name, llama, llama_mixed, tmp_path):
    if name in ("best-individual", "oracle"):
        pytest.skip("their scores are of LoRAs")
    pool = ordered(llama_mixed, ["lora0", "bottleneck3", "ia32", "biased1"])
    model, ids = compose_by(name, pool, llama), make_ids(rows=2)
    with record(model) as recording:
        wanted = logits_of(model, ids)
    assert wanted.isfinite().all()
    assert any(shares.any() for shares in recording.usage().values())
    save(model, tmp_path / "routed")
    detach(model)
    loaded = load(tmp_path / "routed", llama)
    assert torch.equal(logits_of(loaded, ids), wanted)


# Saved, grown and shrunk


@each_router
@both_streams
def test_a_saved_model_is_the_same(name, base, pool, tmp_path):
    model, ids = compose_by(name, pool, base), make_ids(rows=2)
    with record(model) as recording:
        wanted = logits_of(model, ids)
    parts = composition_of(model)
    save(model, tmp_path / "routed")
    detach(model)
    loaded = of_task(load(tmp_path / "routed", base), "second")
    with record(loaded) as again:
        assert torch.equal(logits_of(loaded, ids), wanted)
    assert all(torch.equal(again.usage()[s], used) for s, used in recording.usage().items())
    assert composition_of(loaded).routing == parts.routing
    assert composition_of(loaded).experts == parts.experts


@pytest.mark.parametrize("name", GROWING)
def test_a_folder_that_grows_and_shrinks_is_the_one_saved_at_once(name, llama, uneven, tmp_path):
    pool, folder = with_embeddings(uneven), tmp_path / "routed"
    save(composed(name, pool.select(["e0", "e1"]), llama), folder)
    add_to_saved(folder, pool.select(["e2"]))
    assert add_to_saved(folder, pool.select(["e3"])).names == pool.names
    assert_is_that_of(folder, name, pool, llama)
    # Directions of spectr stay as many as they were, filled up with zeros.
    leaving = {"e0", "e3"} if name == "spectr" else {"e0", "e2"}
    left = remove_from_saved(folder, leaving).names
    assert {*left, *leaving} == set(pool.names)
    assert_is_that_of(folder, name, pool.select(left), llama)


@pytest.mark.parametrize("name", FIXED)
def test_what_is_made_for_its_experts_neither_grows_nor_shrinks(name, llama, llama_pool, tmp_path):
    folder = tmp_path / "routed"
    save(compose_by(name, llama_pool, llama), folder)
    for change in (add_to_saved, remove_from_saved):
        with pytest.raises(RoutingError, match=f"Router {name} is made for"):
            change(folder, llama_pool if change is add_to_saved else ["e0"])
