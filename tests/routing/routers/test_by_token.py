"""Routers of tokens: phatgoose by the paper's formula; Arrow beside PEFT's."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from peft import ArrowConfig, create_arrow_model
from safetensors.torch import load_file, save_file

from oracle import plain_scores
from phatgoose.base.loading import load_base
from phatgoose.experts.adapter_files import ADAPTER_WEIGHTS
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, composition_of, detach
from phatgoose.routing.routers.arrow import arrow_vector
from phatgoose.routing.routers.phatgoose import standardise
from random_loras import loras
from routed_models import by_vectors, router_at
from tiny import assert_same_logits, logits_of, make_adapter, make_ids, random

SITE = "model.layers.0.self_attn.q_proj"  # of the tiny Llama; 32 inputs


@pytest.mark.parametrize("spread", [1.0, 1e-3])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_affinities_and_weights_are_those_of_the_paper(k, spread):
    gates, u = random(5, 33) + 3, spread * (random(9, 33, seed=1) + 0.5)
    at_site, wanted = by_vectors("phatgoose", standardise(gates), k), plain_scores(u, gates)
    precise = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(at_site.router.scores(u, at_site).double(), wanted, **precise)
    decision, best = at_site(u), wanted.topk(k)
    assert torch.equal(decision.experts, best.indices)
    weights = decision.weights.double()
    torch.testing.assert_close(weights, best.values.softmax(-1), **precise)
    over_all = wanted.softmax(dim=-1).topk(k, dim=-1).values  # the released code's, renormalised
    torch.testing.assert_close(weights, over_all / over_all.sum(-1, keepdim=True), **precise)


def test_a_constant_activation_has_no_favourite():
    decision = by_vectors("phatgoose", standardise(random(5, 32)))(torch.full((1, 32), 2.0))
    torch.testing.assert_close(decision.weights, torch.tensor([[0.5, 0.5]]), rtol=0, atol=1e-2)


@pytest.mark.parametrize("size", [32, 576, 2048])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1000.3])
def test_a_constant_gate_standardises_to_zeros(value, size):
    assert not standardise(torch.full((1, size), value)).any()


@pytest.mark.parametrize("size", [1e-5, 1.0, 1e4])
def test_a_trained_gate_of_any_size_keeps_its_direction(size):
    gate = random(1, 64)
    torch.testing.assert_close(standardise(size * gate), standardise(gate), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1])
@pytest.mark.parametrize("router", ["phatgoose", "average-activation"])
def test_an_untrained_gate_scores_zero(llama, llama_pool, router, value):
    first, second, *others = llama_pool.experts
    constant = {site: torch.full_like(v, value) for site, v in second.gates.items()}
    flat = replace(second, gates=constant, means=constant)
    model = compose(Pool((first, flat, *others)), llama, k=4, router=router)
    for layer in composition_of(model).layers.values():
        scores = layer.at_site.router.scores(random(6, layer.in_features), layer.at_site)
        assert not scores[:, 1].any()
        assert scores[:, 0].all()
    assert logits_of(model, make_ids()).isfinite().all()


@pytest.mark.parametrize("router", ["phatgoose", "average-activation", "arrow"])
def test_a_temperature_divides_every_affinity_and_the_top_k_act(llama, llama_pool, router):
    one, half = (
        router_at(SITE, llama, llama_pool, f"{router}:temperature={value}") for value in (1, 0.5)
    )
    u = random(7, 32)
    scores = half.router.scores(u, half)
    torch.testing.assert_close(scores, 2 * one.router.scores(u, one))
    decision, best = half(u), scores.topk(2)
    assert torch.equal(decision.experts, best.indices)
    torch.testing.assert_close(decision.weights, best.values.softmax(-1))


# Singular vectors of B A, beside those of the whole product


@settings(max_examples=150, derandomize=True)
@given(lora=loras(torch.float32, torch.bfloat16))
def test_arrows_vector_is_the_first_right_singular_one_of_the_product(lora):
    got = arrow_vector(lora)
    assert (got.dtype, got.shape) == (torch.float32, lora.A.shape[1:])
    product = lora.B.double() @ lora.A.double()
    _, values, V = torch.linalg.svd(product)
    if not product.any():
        assert not got.any()
        return
    assert got.norm() == pytest.approx(1, abs=1e-6)
    assert (product @ got.double()).norm() == pytest.approx(float(values[0]), rel=1e-6)
    if len(values) == 1 or values[1] < 0.9 * values[0]:
        aligned = got.double() * (got.double() @ V[0]).sign()
        torch.testing.assert_close(aligned, V[0], rtol=0, atol=1e-5)


# Beside the libraries' own


def arrow_config(experts: int, k: int, seed: int) -> ArrowConfig:
    config = ArrowConfig(top_k=k, router_temperature=1.0, rng_seed=seed)
    config.task_adapter_names = [f"e{z}" for z in range(experts)]
    config.gks_adapter_names = []
    return config


def spread_pool(base, folder) -> Pool:
    """A pool of four experts, each with one singular value far above the rest."""
    experts = []
    for z in range(4):
        adapter = make_adapter(base, folder / f"e{z}", seed=z)
        tensors = load_file(adapter / ADAPTER_WEIGHTS)
        for key, tensor in tensors.items():
            if ".lora_A." in key:
                tensor[1:] *= 0.2
        save_file(tensors, adapter / ADAPTER_WEIGHTS)
        experts.append(Expert.from_peft(adapter, {}, base=base))
    return Pool(tuple(experts))


@pytest.mark.parametrize("k", [2, 3])
def test_a_model_routed_by_arrow_is_that_of_peft(base, k, tmp_path):
    pool, ids = spread_pool(base, tmp_path), make_ids(rows=2)
    fresh, config = load_base(base.id, dtype="float32").model, arrow_config(4, k, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fan_in_fan_out at Conv1D, and transformers' own
        theirs = create_arrow_model(fresh, [str(e.directory) for e in pool.experts], config)
    wanted = logits_of(theirs.eval(), ids)
    assert not torch.allclose(logits_of(base.model, ids), wanted, atol=0.1)
    for variant in ("svd", "peft"):
        got = logits_of(compose(pool, base, router=f"arrow:form={variant}", k=k), ids)
        assert_same_logits(got, wanted)
        detach(base.model)
