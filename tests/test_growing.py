"""Pools that grow and shrink: the same model, bit for bit, as one composed from the start."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from conftest import (
    compose_by,
    logits_of,
    make_ids,
    make_model,
    with_embeddings,
    write_expert,
)
from phatgoose.bases import Base
from phatgoose.errors import ExpertError, PoolError, RoutingError, WrongBaseError
from phatgoose.growing import add_experts, remove_experts
from phatgoose.layers import RoutedLinear
from phatgoose.pool import Pool
from phatgoose.routed import compose, composition_of, detach, record
from phatgoose.routers import VectorRouter
from phatgoose.rows import GROWTH
from phatgoose.storage import load, save

ROUTERS = (
    "phatgoose",
    "average-activation",
    "arrow",
    "uniform-top-k",
    "retrieval",
    "merged",
    "random",
)
NAMES = ("e0", "e1", "e2", "e3")


@pytest.fixture(scope="module")
def mixed_pool(loaded_bases, tmp_path_factory) -> Pool:
    """e0 to e3 of ranks 2, 1, 3, 1; e1 acts on queries only, e3 at no query."""
    folder, base = tmp_path_factory.mktemp("mixed"), loaded_bases["llama"]
    others = ["k_proj", "v_proj", "down_proj"]
    return Pool(
        (
            write_expert(base, folder, "e0", seed=0, rank=2, target_modules=[*others, "q_proj"]),
            write_expert(base, folder, "e1", seed=1, rank=1, target_modules=["q_proj"]),
            write_expert(base, folder, "e2", seed=2, rank=3),
            write_expert(base, folder, "e3", seed=3, rank=1, target_modules=others),
        )
    )


def composed(router: str, pool: Pool, base: Base, **options: object):
    given = {"router": router, "k": 2, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a k that is lowered
        pool = with_embeddings(pool) if router == "retrieval" else pool
        return compose(pool, copy.deepcopy(base), **given)


def assert_same_models(got, wanted) -> None:
    """Everything that decides is equal, and so are the numbers."""
    one, other = composition_of(got), composition_of(wanted)
    assert one.experts == other.experts
    assert one.records == other.records
    assert one.routing == other.routing
    assert set(one.layers) == set(other.layers)
    for name, layer in one.layers.items():
        expected = other.layers[name]
        assert got.get_submodule(name) is layer
        assert torch.equal(layer.experts, expected.experts)
        assert torch.equal(layer.A, expected.A)
        assert torch.equal(layer.B, expected.B)
        assert type(layer.router) is type(expected.router)
        if isinstance(layer.router, VectorRouter):
            assert torch.equal(layer.router.vectors, expected.router.vectors)
            assert layer.router.k == expected.router.k
    ids = make_ids(rows=2)
    with record(got) as mine, record(wanted) as theirs:
        assert torch.equal(logits_of(got, ids), logits_of(wanted, ids))
    used, expected = mine.usage(), theirs.usage()
    assert all(torch.equal(used[site], expected[site]) for site in expected)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_grown_model_is_the_composed_one(llama, mixed_pool, toy_embedder, router):
    pool = with_embeddings(mixed_pool)
    model = composed(router, mixed_pool.select(["e0"]), llama)
    assert add_experts(model, pool.select(["e1"])) is model
    add_experts(model, pool.select(["e2", "e3"]))
    assert_same_models(model, composed(router, mixed_pool, llama))


@pytest.mark.parametrize("left", [["e0"], ["e1", "e3"], ["e0", "e1"], ["e3"], ["e0", "e2", "e3"]])
@pytest.mark.parametrize("router", ["phatgoose", "retrieval", "merged"])
@pytest.mark.filterwarnings("ignore:k is 2")
def test_a_smaller_model_is_the_composed_one(llama, mixed_pool, toy_embedder, router, left):
    model = composed(router, mixed_pool, llama)
    remove_experts(model, [name for name in NAMES if name not in left])
    pool = Pool(tuple(e for e in with_embeddings(mixed_pool).experts if e.name in left))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = compose(pool, copy.deepcopy(llama), router=router, k=2)
    assert_same_models(model, wanted)


def test_leaving_and_coming_again_is_a_change_of_order(llama, mixed_pool):
    model = composed("phatgoose", mixed_pool, llama)
    remove_experts(model, ["e1"])
    add_experts(model, mixed_pool.select(["e1"]))
    order = Pool(tuple(mixed_pool.experts[z] for z in (0, 2, 3, 1)))
    assert_same_models(model, compose(order, copy.deepcopy(llama)))


def test_the_base_comes_back_bit_for_bit(llama, mixed_pool):
    ids = make_ids()
    wanted = logits_of(llama.model, ids)
    model = compose(mixed_pool.select(["e0", "e1"]), llama)
    add_experts(model, mixed_pool.select(["e2"]))
    remove_experts(model, ["e0"])
    assert torch.equal(logits_of(detach(model), ids), wanted)
    assert not any(isinstance(module, RoutedLinear) for module in model.modules())


def test_growth_is_copied_now_and_then_only(llama, make_expert):
    experts = [make_expert(llama, f"x{z}", seed=z) for z in range(8)]
    model = composed("phatgoose", Pool(tuple(experts[:4])), llama)
    places = []
    for expert in experts[4:]:
        add_experts(model, Pool((expert,)))
        layer = next(iter(composition_of(model).layers.values()))
        places.append(layer.A.data_ptr())
        assert len(layer.room["A"]) <= GROWTH * 8
    assert places[0] == places[1] == places[2]  # room for 7 was made when the fifth came
    assert places[3] != places[2]
    assert_same_models(model, composed("phatgoose", Pool(tuple(experts)), llama))


def test_a_grown_model_is_saved_and_loaded(llama, mixed_pool, tmp_path):
    model = composed("phatgoose", mixed_pool.select(["e0", "e1"]), llama)
    add_experts(model, mixed_pool.select(["e2", "e3"]))
    save(model, tmp_path / "routed")
    loaded = load(tmp_path / "routed", copy.deepcopy(llama))
    assert_same_models(loaded, composed("phatgoose", mixed_pool, llama))
    remove_experts(loaded, ["e3"])
    assert composition_of(loaded).experts == ("e0", "e1", "e2")


def test_what_can_not_join_leaves_the_model_as_it_was(llama, mixed_pool, pool_of):
    model = compose(mixed_pool.select(["e0", "e2"]), llama)
    parts, wanted = composition_of(model), logits_of(model, make_ids())
    with pytest.raises(PoolError, match="'e2' is there already"):
        add_experts(model, mixed_pool.select(["e2"]))
    with pytest.raises(WrongBaseError, match="fingerprint"):
        add_experts(model, Pool(pool_of("t5").experts[1:2]))
    bare = mixed_pool.select(["e1"]).experts[0]
    bare = type(bare)(bare.info, bare.directory, bare.lora, {}, {})
    with pytest.raises(PoolError, match="Expert 'e1' has no gates"):
        add_experts(model, Pool((bare,)))
    lost = {f"lost.{site}": factors for site, factors in bare.lora.items()}
    gates = {f"lost.{site}": gate for site, gate in mixed_pool.experts[1].gates.items()}
    with pytest.raises(ExpertError, match="which the base model lacks"):
        add_experts(model, Pool((type(bare)(bare.info, bare.directory, lost, gates, {}),)))
    assert composition_of(model) is parts
    assert torch.equal(logits_of(model, make_ids()), wanted)


def test_what_can_not_leave_is_told(llama, mixed_pool):
    model = compose(mixed_pool, llama)
    with pytest.raises(PoolError, match="no expert 'e9'; there are e0, e1, e2, e3"):
        remove_experts(model, ["e9"])
    with pytest.raises(PoolError, match="No expert would be left"):
        remove_experts(model, NAMES)
    with pytest.raises(PoolError, match="list of names"):
        remove_experts(model, "e0")
    with pytest.warns(UserWarning, match="k is 2, but 1 experts are left"):
        remove_experts(model, NAMES[1:])
    assert composition_of(model).experts == ("e0",)


@pytest.mark.parametrize("router", ["single", "oracle", "best-individual"])
def test_routers_made_for_their_experts_are_told_apart(llama, llama_pool, router):
    model = compose_by(router, llama_pool, llama)
    for change in (lambda: add_experts(model, llama_pool), lambda: remove_experts(model, ["e0"])):
        with pytest.raises(RoutingError, match=f"Router {router} is made for"):
            change()


def test_folded_experts_can_not_be_told_apart(llama, pool_of):
    model = compose(pool_of("llama", (24, 9, 20)), llama, router="merged")
    with pytest.raises(RoutingError, match="folded"):
        remove_experts(model, ["e0"])
    with pytest.raises(RoutingError, match="not routed"):
        remove_experts(make_model("llama"), ["e0"])
