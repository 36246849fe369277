"""Composed models: every layer is the mixture of the method, and the base comes back."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from oracle import mixture, naively_routed
from phatgoose.base import BaseReference, load_base
from phatgoose.errors import (
    ConfigError,
    ExpertError,
    RoutingError,
    WrongBaseError,
)
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, composition_of, detach
from phatgoose.routing.kernels import KERNELS
from tiny import assert_same_logits, logits_of, make_ids, make_model, peft_model

Q_PROJ = {  # a site with 32 inputs in every kind of tiny base
    "llama": "model.layers.0.self_attn.q_proj",
    "qwen2": "model.layers.0.self_attn.q_proj",
    "gpt2": "transformer.h.0.attn.c_attn",
    "t5": "decoder.block.0.layer.0.SelfAttention.q",
}


@pytest.mark.parametrize(
    ("k", "size", "how"),
    [
        *((k, (2, 7), {}) for k in (1, 2, 3, 4)),
        (2, (1, 1), {}),
        *((2, (2, 7), {"kernel": name}) for name in KERNELS if name != "triton"),
        (2, (2, 7), {"router": "average-activation"}),
    ],
)
def test_the_whole_model_is_the_naively_routed_one(base, pool, k, size, how):
    ids = make_ids(*size)
    vectors = "means" if "router" in how else "gates"
    with naively_routed(base.model, pool.experts, k, vectors=vectors):
        wanted = logits_of(base.model, ids)
    assert not torch.allclose(wanted, logits_of(base.model, ids), atol=0.1)
    model = compose(pool, base, k=k, **{"router": "phatgoose"} | how)
    assert_same_logits(logits_of(model, ids), wanted)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": 7},
        {"alpha_pattern": 3},
        {"rank_pattern": 2, "alpha_pattern": 5, "use_rslora": True},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_one_expert_alone_is_the_peft_model(base, kind, make_expert, options):
    options = {
        key: {Q_PROJ[kind].rpartition(".")[2]: value} if key.endswith("pattern") else value
        for key, value in options.items()
    }
    expert, other = make_expert(base, "one", **options), make_expert(base, "other", seed=1)
    ids = make_ids(rows=2)
    wanted = logits_of(peft_model(base, expert.directory), ids)
    model = compose(Pool((expert, other)).select(["one"]), base, k=1, router="phatgoose")
    assert_same_logits(logits_of(model, ids), wanted)


def test_sites_with_fewer_than_k_experts_use_those_there_are(llama, make_expert):
    pool = Pool(
        (
            make_expert(llama, "everywhere"),
            make_expert(llama, "attention", seed=1, target_modules=["q_proj", "v_proj"]),
            make_expert(llama, "q", seed=2, target_modules=["q_proj"]),
        )
    )
    ids = make_ids()
    with naively_routed(llama.model, pool.experts, k=3):
        wanted = logits_of(llama.model, ids)
    assert_same_logits(logits_of(compose(pool, llama, k=3, router="phatgoose"), ids), wanted)


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
    loaded = model.load_state_dict(state)
    assert not loaded.missing_keys
    assert not loaded.unexpected_keys
    assert torch.equal(logits_of(model, ids), wanted)
    missed = next(iter(state))
    del state[missed]
    with pytest.raises(RuntimeError, match=re.escape(missed)):
        model.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"k": 2.5}, "k is 2.5, but must be a valid integer"),
        ({"kernel": None}, "kernel is None"),
    ],
)
def test_impossible_settings_are_refused_and_leave_the_base_alone(
    llama, llama_pool, options, named
):
    modules = dict(llama.model.named_modules())
    with pytest.raises(ConfigError, match=named):
        compose(llama_pool, **{"base": llama, **options})
    assert dict(llama.model.named_modules()) == modules
    compose(llama_pool, llama, router="phatgoose")
    with pytest.raises(RoutingError, match="routed already"):
        compose(llama_pool, llama, router="phatgoose")


def test_another_base_of_the_same_shape_is_refused(llama_pool):
    other = make_model("llama", seed=1)
    with pytest.raises(WrongBaseError, match="fingerprint"):
        compose(llama_pool, other, router="phatgoose")
    assert not hasattr(other, "phatgoose")


def test_an_unknown_fingerprint_is_taken_on_trust_but_no_other_shapes(base_folders, llama_pool):
    unsure = tuple(
        replace(e, info=replace(e.info, base=BaseReference("x"))) for e in llama_pool.experts
    )
    llama = load_base(base_folders["llama"], dtype="float32")
    with pytest.warns(UserWarning, match="fingerprint"):
        compose(Pool(unsure), llama, router="phatgoose")
    gpt2 = load_base(base_folders["gpt2"], dtype="float32")
    with pytest.raises(ExpertError, match="'e0'"), pytest.warns(UserWarning, match="fingerprint"):
        compose(Pool(unsure), gpt2, router="phatgoose")


@pytest.mark.parametrize("given", ["base", "model", "name", "nothing"])
def test_the_base_can_be_given_in_many_ways(llama, llama_pool, given):
    base = {"base": llama, "model": llama.model, "name": llama.id, "nothing": None}[given]
    model = compose(
        llama_pool.experts[0].directory.parent, base, router="phatgoose"
    )  # a pool's folder
    assert composition_of(model).experts == llama_pool.names
    assert (model is llama.model) == (given in ("base", "model"))
    assert composition_of(model).base == BaseReference(llama.id, None, llama.fingerprint)


def test_a_layer_in_bfloat16_is_the_mixture_up_to_rounding(base, pool, kind):
    model = compose(pool, load_base(base.id, dtype="bfloat16"), k=4, router="phatgoose")
    layer = composition_of(model).layers[Q_PROJ[kind]]
    u = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = layer.base(u).double() + mixture(u, pool.experts, Q_PROJ[kind], k=4)
    assert layer(u).dtype == torch.bfloat16
    atol = 2 * torch.finfo(torch.bfloat16).eps * float(wanted.abs().max())
    torch.testing.assert_close(layer(u).double(), wanted, rtol=0, atol=atol)


def test_a_model_in_float16_is_not_taken_on_trust(llama_pool, base_folders):
    """Its weights round otherwise; loaded by `load_base`, it has their fingerprint with it."""
    base = load_base(base_folders["llama"], dtype="float16")
    detach(compose(llama_pool, base, router="phatgoose"))
    with pytest.raises(WrongBaseError):
        compose(llama_pool, base.model, router="phatgoose")
