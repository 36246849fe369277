"""Mixed pools that grow and shrink, composed and packed: as if made from the start."""

from __future__ import annotations

import copy

import pytest
import torch

from growth_cases import assert_same_models, composed
from mixed_experts import mixed_pool_for
from phatgoose.base.sites import find_sites
from phatgoose.errors import ExpertError
from phatgoose.experts.adapter import check_fit
from phatgoose.experts.expert import Expert
from phatgoose.experts.kinds.ia3 import ScalingVector
from phatgoose.experts.pool import Pool
from phatgoose.routing.growing import add_experts, remove_experts
from phatgoose.routing.saved.load import load
from phatgoose.routing.saved.segments import add_to_saved, compact, remove_from_saved, save_pool

LORAS, OTHERS = ["lora0", "lora7"], ["ia32", "bottleneck3", "bottleneck4", "biased1"]


@pytest.fixture(scope="module")
def eight(loaded_bases, tmp_path_factory) -> Pool:
    """`mixed_pool_for` the tiny Llama."""
    return mixed_pool_for(loaded_bases["llama"], tmp_path_factory.mktemp("mixed"))


def ordered(pool: Pool, names: list[str]) -> Pool:
    experts = {expert.name: expert for expert in pool.experts}
    return Pool(tuple(experts[name] for name in names))


@pytest.mark.parametrize(
    "steps", [[LORAS, OTHERS], [OTHERS, LORAS], [["ia32"], ["lora0"], ["bottleneck5"], ["ia36"]]]
)
def test_experts_of_other_kinds_join(llama, eight, steps):
    model = composed("phatgoose", ordered(eight, steps[0]), llama)
    for step in steps[1:]:
        add_experts(model, ordered(eight, step))
    names = [name for step in steps for name in step]
    assert_same_models(model, composed("phatgoose", ordered(eight, names), llama))


@pytest.mark.parametrize("router", ["phatgoose", "merged"])
@pytest.mark.parametrize(
    "left", [LORAS, ["ia32", "ia36"], ["bottleneck4", "lora0"], ["biased1", "ia36", "lora7"]]
)
def test_experts_of_any_kind_leave(llama, eight, left, router):
    model = composed(router, eight, llama)
    remove_experts(model, [name for name in eight.names if name not in left])
    assert_same_models(model, composed(router, eight.select(left), llama))


def test_a_packed_mixed_model_grows_shrinks_and_is_compacted(llama, eight, tmp_path):
    place, first = tmp_path / "packed", ["lora0", "lora7", "bottleneck3"]
    save_pool(ordered(eight, first), place, copy.deepcopy(llama))
    second = ["ia32", "bottleneck4", "biased1", "bottleneck5"]
    add_to_saved(place, ordered(eight, second))
    wanted = composed("phatgoose", ordered(eight, [*first, *second]), llama)
    assert_same_models(load(place, copy.deepcopy(llama)), wanted)
    remove_from_saved(place, ["bottleneck3", "lora7"])
    wanted = composed("phatgoose", ordered(eight, ["lora0", *second]), llama)
    assert_same_models(load(place, copy.deepcopy(llama)), wanted)
    compact(place)
    assert_same_models(load(place, copy.deepcopy(llama)), wanted)


def test_a_pool_without_loras_is_packed_and_grows(llama, eight, tmp_path):
    place = tmp_path / "packed"
    save_pool(ordered(eight, ["ia32", "ia36"]), place, copy.deepcopy(llama))
    add_to_saved(place, ordered(eight, ["lora0"]))
    wanted = composed("phatgoose", ordered(eight, ["ia32", "ia36", "lora0"]), llama)
    assert_same_models(load(place, copy.deepcopy(llama)), wanted)


def test_int8_is_for_the_factors_of_loras(llama, eight, tmp_path):
    place = tmp_path / "packed"
    save_pool(eight, place, copy.deepcopy(llama), stored="int8")
    loaded = load(place, copy.deepcopy(llama))
    wanted = composed("phatgoose", eight, llama)
    for site, layer in loaded.phatgoose.layers.items():
        mine, theirs = layer.stack.tensors(), wanted.phatgoose.layers[site].stack.tensors()
        for name in mine.keys() - {"A", "B"}:
            assert torch.equal(mine[name], theirs[name])
        for name in mine.keys() & {"A", "B"}:
            assert (mine[name] - theirs[name]).abs().max() <= theirs[name].abs().max() / 253


def test_sizes_are_held_against_what_is_there(llama, eight, tmp_path):
    save_pool(ordered(eight, ["lora0", "bottleneck3"]), tmp_path / "packed", copy.deepcopy(llama))
    site = "model.layers.0.self_attn.k_proj"
    ia3 = eight.select(["ia32"]).experts[0]
    modules = {site: ScalingVector(torch.ones(96), on_input=False)}
    gates = {site: ia3.gates[site]}
    odd = Expert(ia3.info, ia3.directory, modules, gates, {})
    with pytest.raises(ExpertError, match=r"'ia32', site .* maps 32 to 96 features, .* 32 to 32"):
        add_to_saved(tmp_path / "packed", Pool((odd,)))
    with pytest.raises(ExpertError, match=r"maps 32 to 96 features, the base model 32 to 32"):
        check_fit("ia32", modules, find_sites(llama.model))
