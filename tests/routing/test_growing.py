"""Pools that grow and shrink: the same model, bit for bit, as one composed from the start."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch

from growth_cases import NAMES, ROUTERS, assert_same_models, composed
from mixed_experts import LORAS, OTHERS, ordered
from phatgoose.errors import ExpertError, PoolError, RoutingError, WrongBaseError
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from phatgoose.routing.growing import add_experts, remove_experts
from phatgoose.routing.layers import RoutedLinear
from phatgoose.routing.saved.change import add_to_saved
from phatgoose.routing.saved.save import save
from routed_models import compose_by, with_embeddings
from tiny import logits_of, make_ids, make_model


@pytest.mark.parametrize("router", ROUTERS)
def test_a_grown_model_is_the_composed_one(llama, uneven, toy_embedder, router):
    pool = with_embeddings(uneven)
    model = composed(router, uneven.select(["e0"]), llama)
    assert add_experts(model, pool.select(["e1"])) is model
    add_experts(model, pool.select(["e2", "e3"]))
    assert_same_models(model, composed(router, uneven, llama))


@pytest.mark.parametrize(
    ("router", "left"),
    [
        *((router, ["e0", "e2", "e3"]) for router in ROUTERS),
        *(("phatgoose", left) for left in (["e0"], ["e1", "e3"], ["e0", "e1"], ["e3"])),
        *((router, ["e3"]) for router in ("retrieval", "merged")),
    ],
)
@pytest.mark.filterwarnings("ignore:k is 2")
def test_a_smaller_model_is_the_composed_one(llama, uneven, toy_embedder, router, left):
    model = composed(router, uneven, llama)
    remove_experts(model, [name for name in NAMES if name not in left])
    pool = Pool(tuple(e for e in with_embeddings(uneven).experts if e.name in left))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = compose(pool, copy.deepcopy(llama), router=router)
    assert_same_models(model, wanted)


def test_leaving_and_coming_again_is_a_change_of_order(llama, uneven):
    model = composed("phatgoose", uneven, llama)
    remove_experts(model, ["e1"])
    add_experts(model, uneven.select(["e1"]))
    order = Pool(tuple(uneven.experts[z] for z in (0, 2, 3, 1)))
    assert_same_models(model, compose(order, copy.deepcopy(llama), router="phatgoose"))


def test_the_base_comes_back_bit_for_bit(llama, uneven):
    ids = make_ids()
    wanted = logits_of(llama.model, ids)
    model = compose(uneven.select(["e0", "e1"]), llama, router="phatgoose")
    add_experts(model, uneven.select(["e2"]))
    remove_experts(model, ["e0"])
    assert torch.equal(logits_of(detach(model), ids), wanted)
    assert not any(isinstance(module, RoutedLinear) for module in model.modules())


def test_what_can_not_join_leaves_the_model_as_it_was(llama, uneven, pool_of):
    model = compose(uneven.select(["e0", "e2"]), llama, router="phatgoose")
    parts, wanted = composition_of(model), logits_of(model, make_ids())
    with pytest.raises(PoolError, match="'e2' is there already"):
        add_experts(model, uneven.select(["e2"]))
    with pytest.raises(WrongBaseError, match="fingerprint"):
        add_experts(model, Pool(pool_of("t5").experts[1:2]))
    bare = uneven.select(["e1"]).experts[0]
    bare = type(bare)(bare.info, bare.directory, bare.lora, {}, {})
    with pytest.raises(PoolError, match="Expert 'e1' has no gates"):
        add_experts(model, Pool((bare,)))
    lost = {f"lost.{site}": factors for site, factors in bare.lora.items()}
    gates = {f"lost.{site}": gate for site, gate in uneven.experts[1].gates.items()}
    with pytest.raises(ExpertError, match="which the base model lacks"):
        add_experts(model, Pool((type(bare)(bare.info, bare.directory, lost, gates, {}),)))
    assert composition_of(model) is parts
    assert torch.equal(logits_of(model, make_ids()), wanted)


def measured_in(pool: Pool, *formats: str | None) -> Pool:
    """The pool whose experts record that they were measured on bases of these formats."""
    pairs = zip(pool.experts, formats, strict=True)
    return Pool(tuple(replace(e, info=replace(e.info, measured_in=each)) for e, each in pairs))


@pytest.mark.parametrize("router", ["discriminant", "average-activation"])
def test_statistics_of_quantised_and_plain_bases_are_not_mixed(llama, uneven, router, tmp_path):
    plain = measured_in(uneven, *("torch.bfloat16", "torch.float32") * 2)
    mixed = measured_in(uneven, *["torch.bfloat16"] * 3, "torch.bfloat16, Params4bit")
    told = r"\(not quantised: .*'e2'; Params4bit: 'e3'\)\. .* phatgoose stats EXPERT --task"
    with pytest.raises(PoolError, match=told):
        compose(mixed, llama, router=router)
    compose(mixed, llama, router="phatgoose")  # which compares none
    detach(llama.model)
    joining = mixed.select(["e3"])
    model = compose(plain.select(["e0", "e1", "e2"]), llama, router=router)
    save(model, tmp_path / "routed")
    with pytest.raises(PoolError, match="Params4bit: 'e3'"):
        add_experts(model, joining)
    with pytest.raises(PoolError, match="Params4bit: 'e3'"):
        add_to_saved(tmp_path / "routed", joining)
    add_experts(model, plain.select(["e3"]))
    detach(model)
    with pytest.warns(UserWarning, match=r"the statistics of 'e0' were .* \(not quantised: 'e1'"):
        compose(measured_in(uneven, None, *["torch.float32"] * 3), llama, router=router)


def test_what_can_not_leave_is_told(llama, uneven):
    model = compose(uneven, llama, k=3, router="phatgoose")
    with pytest.raises(PoolError, match="no expert 'e9'; there are e0, e1, e2, e3"):
        remove_experts(model, ["e9"])
    with pytest.raises(PoolError, match="No expert would be left"):
        remove_experts(model, NAMES)
    with pytest.raises(PoolError, match="list of names"):
        remove_experts(model, "e0")
    with pytest.warns(UserWarning, match="k is 3, but the pool then has 1 expert;"):
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


@pytest.mark.parametrize(
    "steps", [[LORAS, OTHERS], [OTHERS, LORAS], [["ia32"], ["lora0"], ["bottleneck5"], ["ia36"]]]
)
def test_experts_of_other_kinds_join(llama, llama_mixed, steps):
    model = composed("phatgoose", ordered(llama_mixed, steps[0]), llama)
    for step in steps[1:]:
        add_experts(model, ordered(llama_mixed, step))
    names = [name for step in steps for name in step]
    assert_same_models(model, composed("phatgoose", ordered(llama_mixed, names), llama))


@pytest.mark.parametrize("router", ["phatgoose", "merged"])
@pytest.mark.parametrize(
    "left", [LORAS, ["ia32", "ia36"], ["bottleneck4", "lora0"], ["biased1", "ia36", "lora7"]]
)
def test_experts_of_any_kind_leave(llama, llama_mixed, left, router):
    model = composed(router, llama_mixed, llama)
    remove_experts(model, [name for name in llama_mixed.names if name not in left])
    assert_same_models(model, composed(router, llama_mixed.select(left), llama))
