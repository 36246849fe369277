import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import layer_norm
from transformers.pytorch_utils import Conv1D

from oracle import mixture, naively_routed, token_weights
from phatgoose.base.loading import load_base
from phatgoose.errors import ConfigError, PoolError
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from phatgoose.routing.routers.fixed.merged import UniformRouter
from phatgoose.routing.routers.per_token.vector_router import ScoredRouter, standardise
from phatgoose.routing.routers.registry import ROUTERS
from phatgoose.tasks.collating import pad_left, pad_right
from routed_models import compose_by
from tiny import assert_same_logits, logits_of, make_ids

EPS = 1e-5
SITE = "model.layers.0.self_attn.q_proj"  # of the tiny Llama; 32 inputs


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scored(gates: torch.Tensor, k: int = 2, eps: float = EPS) -> ScoredRouter:
    return ScoredRouter(standardise(gates), k, eps)


def plain_scores(u: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """v̄ᵀū/√n with both standardised as the method's formula says, float64 [T, E]."""
    u, v = u.double(), gates.double()
    u = (u - u.mean(-1, keepdim=True)) / (u.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
    v = (v - v.mean(-1, keepdim=True)) / v.std(-1, unbiased=False, keepdim=True)
    return u @ v.T / math.sqrt(u.shape[-1])


def with_vectors(pool: Pool, name: str, value: float) -> Pool:
    """The pool with constant gates and means for the expert `name`."""

    def constant(vectors):
        return {site: torch.full_like(v, value) for site, v in vectors.items()}

    return Pool(
        tuple(
            replace(e, gates=constant(e.gates), means=constant(e.means)) if e.name == name else e
            for e in pool.experts
        )
    )


@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_folded_standardisation_equals_the_plain_one(spread):
    gates, u = random(5, 33) + 3, spread * (random(9, 33, seed=1) + 0.5)
    got = scored(gates).affinities(u)
    torch.testing.assert_close(got.double(), plain_scores(u, gates), rtol=1e-4, atol=1e-5)


def test_activations_are_standardised_as_layer_norm_does():
    gates, u = random(5, 32), 0.003 * random(9, 32, seed=1)
    plain = layer_norm(u, (32,), eps=EPS) @ standardise(gates).T / math.sqrt(32)
    torch.testing.assert_close(scored(gates).affinities(u), plain)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_softmax_is_over_the_chosen_k_only(k):
    gates, u = random(5, 32), random(9, 32, seed=1)
    decision = scored(gates, k)(u)
    scores = plain_scores(u, gates).sort(dim=-1, descending=True)
    assert torch.equal(decision.experts, scores.indices[:, :k])
    torch.testing.assert_close(
        decision.weights.double(), scores.values[:, :k].softmax(-1), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("k", [1, 2, 4])
def test_softmax_over_all_then_renormalised_is_the_same(k):
    gates, u = random(5, 32), random(9, 32, seed=1)
    decision = scored(gates, k)(u)
    over_all = plain_scores(u, gates).softmax(dim=-1).topk(k, dim=-1)
    renormalised = over_all.values / over_all.values.sum(dim=-1, keepdim=True)
    assert torch.equal(decision.experts, over_all.indices)
    torch.testing.assert_close(decision.weights.double(), renormalised, rtol=1e-5, atol=1e-6)


def test_only_the_direction_of_a_gate_counts():
    gates, u = random(5, 32), random(9, 32, seed=1)
    scales = torch.tensor([[0.01], [1.0], [50.0], [3.0], [0.5]])
    decision, other = scored(gates)(u), scored(gates * scales + 2)(u)
    assert torch.equal(decision.experts, other.experts)
    torch.testing.assert_close(decision.weights, other.weights, rtol=1e-4, atol=1e-5)


def test_k_is_lowered_to_the_number_of_experts():
    assert scored(random(3, 8), k=7)(random(2, 8)).experts.shape == (2, 3)


def test_a_single_token_is_routed():
    decision = scored(random(5, 32))(random(1, 32, seed=1))
    assert decision.experts.shape == (1, 2)
    assert decision.weights.sum().item() == pytest.approx(1)


def test_a_constant_activation_weighs_its_experts_equally():
    decision = scored(random(5, 32))(torch.full((1, 32), 2.0))
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
def test_an_untrained_gate_scores_zero_and_warns_once(llama, llama_pool, router, value):
    pool = with_vectors(llama_pool, "e1", value)
    with pytest.warns(UserWarning, match="'e1'") as warned:
        model = compose(pool, llama, k=4, router=router)
    assert len(warned) == 1
    for layer in composition_of(model).layers.values():
        u = random(6, layer.in_features)
        scores = layer.router.affinities(u)
        assert not scores[:, 1].any()
        assert scores[:, 0].all()
    assert logits_of(model, make_ids()).isfinite().all()


def test_a_pool_of_untrained_gates_alone_is_no_nan(llama, llama_pool):
    pool = with_vectors(llama_pool.select(["e0"]), "e0", 0.0)
    with pytest.warns(UserWarning, match="'e0'"):
        model = compose(pool, llama, k=1)
    assert logits_of(model, make_ids()).isfinite().all()


def test_average_activation_scores_with_the_means(base, pool):
    ids = make_ids()
    with naively_routed(base.model, pool.experts, k=2, vectors="means"):
        wanted = logits_of(base.model, ids)
    got = logits_of(compose(pool, base, k=2, router="average-activation"), ids)
    assert_same_logits(got, wanted)


def test_gates_and_means_choose_differently(llama_pool):
    u = random(8, 32)
    gates, means = (mixture(u, llama_pool.experts, SITE, 1, kind) for kind in ("gates", "means"))
    assert not torch.allclose(gates, means)


def test_merged_is_the_exact_mean_of_all_products(base, pool):
    ids = make_ids()
    got = logits_of(compose(pool, base, router="merged"), ids)
    merged = load_base(base.id, dtype="float32").model
    for site in pool.sites:
        loras = [expert.lora[site] for expert in pool.experts]
        mean = sum(lora.scale * lora.B.double() @ lora.A.double() for lora in loras) / len(loras)
        layer = merged.get_submodule(site)
        layer.weight.data += mean.T if isinstance(layer, Conv1D) else mean
    assert_same_logits(got, logits_of(merged, ids))


def test_merged_is_not_the_mean_of_the_factors(llama, llama_pool):
    u = random(1, 32)
    loras = [expert.lora[SITE] for expert in llama_pool.experts]
    A, B = (torch.stack([getattr(lora, side) for lora in loras]).mean(0) for side in "AB")
    layer = composition_of(compose(llama_pool, llama, router="merged")).layers[SITE]
    assert not torch.allclose(layer(u) - layer.base(u), loras[0].scale * u @ A.T @ B.T, atol=1e-3)


def test_merged_needs_no_vectors(llama, llama_pool):
    bare = Pool(tuple(replace(expert, gates={}, means={}) for expert in llama_pool.experts))
    compose(bare, llama, router="merged")


@pytest.mark.parametrize(
    ("router", "kind"), [("phatgoose", "gates"), ("average-activation", "means")]
)
def test_missing_vectors_are_told(llama, llama_pool, router, kind):
    first = replace(llama_pool.experts[0], **{kind: {}})
    with pytest.raises(PoolError, match=f"'e0' has no {kind}"):
        compose(Pool((first, *llama_pool.experts[1:])), llama, router=router)


def test_a_uniform_router_gives_all_experts_the_same_weight():
    decision = UniformRouter(2, 2)(random(3, 8))
    assert torch.equal(decision.experts, torch.tensor([[0, 1]] * 3))
    assert torch.equal(decision.weights, torch.tensor([[0.5, 0.5]] * 3))


def test_an_unknown_router_is_refused(llama, llama_pool):
    with pytest.raises(ConfigError, match="'best'"):
        compose(llama_pool, llama, router="best")


@pytest.mark.parametrize("k", [1, 2, 3])
def test_uniform_top_k_takes_the_experts_of_phatgoose_and_weighs_them_alike(base, pool, k):
    decisions = {}
    for router in ("phatgoose", "uniform-top-k"):
        layers = composition_of(compose(pool, base, router=router, k=k)).layers
        decisions[router] = {
            site: layer.router(random(9, layer.in_features)) for site, layer in layers.items()
        }
        detach(base.model)
    for site, wanted in decisions["phatgoose"].items():
        got = decisions["uniform-top-k"][site]
        assert torch.equal(got.experts, wanted.experts)
        torch.testing.assert_close(got.weights, torch.full((9, k), 1 / k))


def test_uniform_top_k_of_one_is_phatgoose_and_of_all_is_merged(llama, llama_pool):
    ids, logits = make_ids(rows=2), {}
    for router, k in (("phatgoose", 1), ("uniform-top-k", 1), ("uniform-top-k", 4), ("merged", 4)):
        logits[router, k] = logits_of(compose(llama_pool, llama, router=router, k=k), ids)
        detach(llama.model)
    assert torch.equal(logits["uniform-top-k", 1], logits["phatgoose", 1])
    assert_same_logits(logits["uniform-top-k", 4], logits["merged", 4])


@pytest.mark.parametrize("router", ["phatgoose", "average-activation", "arrow", "random"])
def test_a_k_above_the_pool_is_told_where_k_matters(llama, llama_pool, router):
    with pytest.warns(UserWarning, match="k is 5, but the pool has 4 experts"):
        compose(llama_pool, llama, router=router, k=5)


@pytest.mark.parametrize("router", ["merged", "single", "oracle", "best-individual"])
def test_a_k_above_the_pool_is_not_told_where_k_does_not_matter(llama, llama_pool, router):
    compose_by(router, llama_pool, llama, k=5)


@pytest.mark.parametrize("router", ROUTERS)
def test_weights_of_every_router_sum_to_one(llama, llama_pool, toy_embedder, router):
    model = compose_by(router, llama_pool, llama)
    if router in ("retrieval", "phatgoose-input"):
        composition_of(model).lookup.serve(torch.tensor([3, 0, 1]))
    for layer in composition_of(model).layers.values():
        decision = layer.router(random(6, layer.in_features))
        assert decision.experts.shape == decision.weights.shape
        assert decision.experts.dtype == torch.int64
        assert decision.weights.dtype == torch.float32
        torch.testing.assert_close(decision.weights.sum(dim=-1), torch.ones(6))
        chosen = decision.experts.sort(dim=-1).values
        assert chosen.diff(dim=-1).ne(0).all()  # nobody twice


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_leaves_the_base_as_it_was(base, pool, toy_embedder, router):
    ids, plain = make_ids(rows=2), dict(base.model.named_modules())
    attributes, wanted = set(vars(base.model)), logits_of(base.model, ids)
    assert not torch.equal(logits_of(compose_by(router, pool, base), ids), wanted)
    detach(base.model)
    assert dict(base.model.named_modules()) == plain
    assert set(vars(base.model)) == attributes
    assert not any(module._forward_pre_hooks for module in base.model.modules())
    assert torch.equal(logits_of(base.model, ids), wanted)


@pytest.mark.parametrize("router", [router for router in ROUTERS if router != "random"])
@pytest.mark.parametrize("kind", ["llama", "t5"], indirect=True)
def test_every_router_generates_a_padded_batch_as_its_rows_alone(base, pool, toy_embedder, router):
    model = compose_by(router, pool, base)
    long, short = make_ids(tokens=9), make_ids(tokens=5, seed=1)
    pad = pad_right if base.is_encoder_decoder else pad_left
    ids = pad([long[0].tolist(), short[0].tolist()], 0)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    got = model.generate(ids, attention_mask=ids.ne(0).long(), **options)
    for row, alone in zip(got, (long, short), strict=True):
        wanted = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
        assert torch.equal(row[-5:], wanted[0, -5:])


def test_the_oracle_itself_weighs_the_best_expert_most(llama_pool):
    weights = token_weights(random(32), llama_pool.experts, SITE, k=3)
    assert len(weights) == 3
    assert list(weights.values()) == sorted(weights.values(), reverse=True)
