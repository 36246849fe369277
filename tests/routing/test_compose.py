"""Composed models: every layer is the mixture of the method, and the base comes back."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch

from oracle import formula, naively_routed
from phatgoose.base.identity import BaseReference
from phatgoose.base.loading import load_base
from phatgoose.config import Routing
from phatgoose.errors import ConfigError, ExpertError, RoutingError, WrongBaseError
from phatgoose.experts.importing import import_adapters
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, composition_of, detach, save
from phatgoose.routing.kernels import KERNELS
from phatgoose.routing.opening import is_pool, is_routed, open_model
from tiny import (
    assert_same_logits,
    logits_of,
    make_adapter,
    make_ids,
    make_model,
    random,
)

Q_PROJ = {  # a site with 32 inputs in every kind of tiny base
    "llama": "model.layers.0.self_attn.q_proj",
    "qwen2": "model.layers.0.self_attn.q_proj",
    "gpt2": "transformer.h.0.attn.c_attn",
    "t5": "decoder.block.0.layer.0.SelfAttention.q",
}


def assert_is_naively_routed(base, pool, k, ids, **how) -> None:
    vectors = "means" if how.get("router") == "average-activation" else "gates"
    with naively_routed(base.model, pool.experts, k, vectors=vectors):
        wanted = logits_of(base.model, ids)
    assert not torch.allclose(wanted, logits_of(base.model, ids), atol=0.1)
    model = compose(pool, base, k=k, **{"router": "phatgoose"} | how)
    assert_same_logits(logits_of(model, ids), wanted)


@pytest.mark.parametrize(
    ("k", "size", "how"),
    [
        *((k, (2, 7), {}) for k in (1, 2, 3, 4)),
        (2, (1, 1), {}),
        *((2, (2, 7), {"kernel": name}) for name in KERNELS),
        (2, (2, 7), {"router": "average-activation"}),
    ],
)
def test_the_whole_model_is_the_naively_routed_one(base, pool, k, size, how):
    assert_is_naively_routed(base, pool, k, make_ids(*size), **how)


def test_sites_with_fewer_than_k_experts_use_those_there_are(llama, uneven):
    assert_is_naively_routed(llama, uneven, 4, make_ids())


def test_the_parameters_of_a_routed_model_are_the_bases_under_their_names(base, pool):
    wanted = dict(base.model.named_parameters())
    model = compose(pool, base, router="phatgoose")
    got = dict(model.named_parameters())
    assert got.keys() == wanted.keys()
    assert all(parameter is wanted[name] for name, parameter in got.items())
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in detach(model).parameters()} == {torch.bfloat16}


def test_a_routed_model_loads_a_state_dict_of_the_base(base, pool):
    model, ids = compose(pool, base, router="phatgoose"), make_ids()
    wanted = logits_of(model, ids)
    state = load_base(base.id, dtype="float32").model.state_dict()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert not torch.allclose(logits_of(model, ids), wanted)
    model.load_state_dict(state)
    assert torch.equal(logits_of(model, ids), wanted)
    missed = next(iter(state))
    del state[missed]
    with pytest.raises(RuntimeError, match=re.escape(missed)):
        model.load_state_dict(state)


def test_a_layer_in_bfloat16_is_the_mixture_up_to_rounding(base, pool, kind):
    model = compose(pool, load_base(base.id, dtype="bfloat16"), k=4, router="phatgoose")
    layer, u = composition_of(model).layers[Q_PROJ[kind]], random(8, 32).bfloat16()
    wanted = layer.base(u).double() + formula(pool.experts, Q_PROJ[kind], k=4)(u)
    assert layer(u).dtype == torch.bfloat16
    atol = 2 * torch.finfo(torch.bfloat16).eps * float(wanted.abs().max())
    torch.testing.assert_close(layer(u).double(), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("router", ["phatgoose", "arrow", "merged", "discriminant:fallback=off"])
def test_a_base_in_float64_is_routed_too(llama, llama_pool, router):
    wanted = logits_of(compose(llama_pool, llama, router=router), make_ids())
    detach(llama.model).double()
    got = logits_of(compose(llama_pool, llama, router=router), make_ids())
    assert got.dtype == torch.float64
    assert_same_logits(got.float(), wanted)


def test_impossible_settings_are_refused_and_leave_the_base_alone(llama, llama_pool):
    modules = dict(llama.model.named_modules())
    with pytest.raises(ConfigError, match=r"k is 2\.5, but must be a valid integer"):
        compose(llama_pool, llama, k=2.5)
    with pytest.raises(ConfigError, match="unknown setting 'arrow'; known are router, k, kernel"):
        compose(llama_pool, llama, arrow="peft")
    for other in ({"router": "arrow"}, {"routing": Routing("arrow")}):
        with pytest.raises(ConfigError, match="router arrow: unknown setting 'e0'"):
            compose(llama_pool, llama, weights={"e0": 1.0}, **other)
    assert dict(llama.model.named_modules()) == modules
    compose(llama_pool, llama, router="phatgoose")
    with pytest.raises(RoutingError, match="routed already"):
        compose(llama_pool, llama, router="phatgoose")


def test_what_a_user_set_on_the_model_is_there_again_after_detaching(llama, llama_pool):
    kept = {"tokenizer": "mine", "generate": print}
    vars(llama.model).update(kept)
    model = compose(llama_pool, llama.model, router="discriminant:fallback=off")
    assert (model.tokenizer, model.generate) != ("mine", print)
    assert kept.items() <= vars(detach(model)).items()


# Whose base it is


@pytest.mark.parametrize("by", ["base", "model", "name", "nothing"])
def test_the_base_can_be_named_in_many_ways(llama, llama_pool, by):
    base = {"base": llama, "model": llama.model, "name": llama.id, "nothing": None}[by]
    folder = llama_pool.experts[0].directory.parent
    model = compose(folder, base, router="phatgoose")
    assert composition_of(model).experts == llama_pool.names
    assert (model is llama.model) == (by in ("base", "model"))
    assert composition_of(model).base == BaseReference(llama.id, None, llama.fingerprint)


def test_another_base_of_the_same_shape_is_refused(llama_pool, base_folders):
    other = make_model("llama", seed=1)
    with pytest.raises(WrongBaseError, match="fingerprint"):
        compose(llama_pool, other, router="phatgoose")
    assert not hasattr(other, "phatgoose")
    # In float16 weights round otherwise; loaded by `load_base` it has its fingerprint with it.
    half = load_base(base_folders["llama"], dtype="float16")
    detach(compose(llama_pool, half, router="phatgoose"))
    with pytest.raises(WrongBaseError):
        compose(llama_pool, half.model, router="phatgoose")


@pytest.mark.filterwarnings("ignore:.*fingerprint")
def test_an_unknown_fingerprint_is_taken_on_trust_but_no_other_shapes(
    llama, loaded_bases, llama_pool
):
    unknown = tuple(
        replace(e, info=replace(e.info, base=BaseReference("x"))) for e in llama_pool.experts
    )
    with pytest.warns(UserWarning, match="fingerprint"):
        compose(Pool(unknown), llama, router="phatgoose")
    with pytest.raises(ExpertError, match="'e0'"):
        compose(Pool(unknown), copy.deepcopy(loaded_bases["gpt2"]), router="phatgoose")


# Models opened from any place


@pytest.fixture
def places(llama, llama_pool, tmp_path):
    """The same pool as a folder and a routed model, one expert, and the base; and the logits."""
    model = compose(llama_pool, llama, router="arrow")
    save(model, tmp_path / "routed")
    wanted, expert = logits_of(model, make_ids()), llama_pool.experts[0].directory
    detach(model)
    folder = {"folder": expert.parent, "routed": tmp_path / "routed", "expert": expert}
    return {**folder, "base": llama.id}, wanted


def test_places_are_told_apart(places, llama):
    where, _ = places
    assert [name for name, place in where.items() if is_routed(place)] == ["routed"]
    assert [name for name, place in where.items() if is_pool(place)] == ["folder", "expert"]
    assert is_pool("hub:me/pool")
    for place in (where["routed"], where["base"]):
        with pytest.raises(ConfigError, match="is not a pool"):
            open_model(place, llama, scores={"a": {}})


def test_pools_routed_models_and_bases_are_opened_alike(places, llama):
    where, wanted = places
    for name in ("folder", "routed"):
        for base in (None, load_base(llama.id, dtype="float32")):
            opened = open_model(where[name], base, dtype="float32", routing=Routing("arrow"))
            assert torch.equal(logits_of(opened.model, make_ids()), wanted)
            assert opened.tokenizer.eos_token == llama.tokenizer.eos_token
    alone = open_model(where["base"], dtype="float32").model
    assert torch.equal(logits_of(alone, make_ids()), logits_of(llama.model, make_ids()))


def test_a_folder_of_adapters_is_opened_as_the_pool_of_their_imports(llama, tmp_path):
    folders = [make_adapter(llama, tmp_path / "adapters" / n, seed=s) for s, n in enumerate("abc")]
    import_adapters(folders, tmp_path / "pool")
    read, imported = (
        open_model(tmp_path / place, dtype="float32", routing=Routing("auto")).model
        for place in ("adapters", "pool")
    )
    assert read.phatgoose.routing.router == "arrow"
    assert torch.equal(logits_of(read, make_ids()), logits_of(imported, make_ids()))
