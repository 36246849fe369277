"""Pools of several kinds of expert: each alone is itself, together they are the mixture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mixed_experts import mixed_output, mixed_pool_for, naively_mixed
from oracle import token_weights
from phatgoose.analysis.findings import vector_similarity
from phatgoose.analysis.near_duplicates import cosines, near_duplicates
from phatgoose.base.loading import load_base
from phatgoose.base.sites import Site
from phatgoose.config import ACTIVATIONS
from phatgoose.errors import ExpertError, PoolError
from phatgoose.evaluation.comparison.methods import lacking
from phatgoose.experts.applied import ModifiedLinear, applied
from phatgoose.experts.expert import Expert
from phatgoose.experts.kinds.bottleneck import BottleneckLayers
from phatgoose.experts.kinds.ia3 import ScalingVector
from phatgoose.experts.kinds.lora import LoraFactors
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import announcing, composition_of
from phatgoose.routing.kernels.bottlenecks import (
    all_bottlenecks,
    choose_bottleneck,
    grouped_bottleneck,
    reference_bottleneck,
)
from phatgoose.routing.kernels.weighted_rows import reference_rows, weighted_rows
from phatgoose.routing.layers import RoutedLinear
from phatgoose.routing.recording import record
from phatgoose.routing.routers.fixed.merged import UniformRouter
from phatgoose.routing.routers.registry import ROUTERS
from phatgoose.routing.saved.load import load
from phatgoose.routing.saved.save import save
from phatgoose.routing.stacks.site_stack import stack_modules
from routed_models import compose_by, of_task
from tiny import assert_same_logits, logits_of, make_ids, peft_model

PRECISE = {"rtol": 1e-5, "atol": 1e-5}
KINDS = ("llama", "t5", "gpt2")
CPU = torch.device("cpu")
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def mixed_pool_of(base_folders, tmp_path_factory) -> Callable[[str], Pool]:
    """`mixed_pool_of(kind)`: `mixed_pool_for` the tiny base of that kind, made once."""

    @cache
    def make(kind: str) -> Pool:
        base = load_base(base_folders[kind], dtype="float32")
        return mixed_pool_for(base, tmp_path_factory.mktemp(kind))

    return make


@pytest.fixture
def mixed_pool(kind, mixed_pool_of) -> Pool:
    return mixed_pool_of(kind)


@pytest.fixture
def llama_mixed(mixed_pool_of) -> Pool:
    return mixed_pool_of("llama")


@each_kind
@pytest.mark.parametrize("name", ["lora0", "biased1", "ia32", "bottleneck4"])
def test_a_pool_forced_to_one_expert_is_that_expert_alone(base, mixed_pool, name):
    ids = make_ids(rows=2)
    plain = logits_of(base.model, ids)
    expert = next(expert for expert in mixed_pool.experts if expert.name == name)
    if expert.kind == "bottleneck":
        with applied(base.model, expert.modules, ModifiedLinear):
            wanted = logits_of(base.model, ids)
    else:
        wanted = logits_of(peft_model(base, expert.directory), ids)
    assert not torch.allclose(wanted, plain, atol=0.1)
    for options in ({"keep": [name], "k": 1}, {"router": "single", "expert": name}):
        assert_same_logits(logits_of(compose(mixed_pool, base, **options), ids), wanted)
        detach(base.model)
    assert torch.equal(logits_of(base.model, ids), plain)


@each_kind
@pytest.mark.parametrize("k", [1, 2, 8])
def test_every_layer_is_the_mixture_written_out(base, mixed_pool, k):
    model, experts = compose(mixed_pool, base, k=k), mixed_pool.experts
    parts = set()
    for site, layer in composition_of(model).layers.items():
        u = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(k))
        wanted = [
            mixed_output(layer.base, t, experts, token_weights(t, experts, site, k), site)
            for t in u.flatten(0, 1)
        ]
        torch.testing.assert_close(layer(u).flatten(0, 1), torch.stack(wanted).float(), **PRECISE)
        parts.add(frozenset(layer.stack.rows()))
    assert {"lora", "input_scaling", "bottleneck"} in parts
    assert {"lora", "output_scaling"} in parts


@each_kind
def test_the_whole_model_is_the_naively_mixed_one(base, mixed_pool):
    ids = make_ids(rows=2, tokens=4)
    with naively_mixed(base.model, mixed_pool.experts, k=3):
        wanted = logits_of(base.model, ids)
    assert_same_logits(logits_of(compose(mixed_pool, base, k=3), ids), wanted)


@given(seed=st.integers(0, 1000), tokens=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_any_stack_of_modules_is_their_sum(seed, tokens):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def whole(most: int, least: int = 1) -> int:
        return int(torch.randint(least, most + 1, (1,), generator=generator))

    n, d = whole(6), whole(6)

    def any_module() -> LoraFactors | ScalingVector | BottleneckLayers:
        kind, m = whole(5), whole(4)
        if kind <= 2:
            bias = normal(d) if kind == 2 else None
            return LoraFactors(normal(m, n), normal(d, m), float(normal(1)), bias)
        if kind <= 4:
            return ScalingVector(normal(n if kind == 3 else d), on_input=kind == 3)
        activation = ACTIVATIONS[whole(2, 0)]
        return BottleneckLayers(normal(m, d), normal(m), normal(d, m), normal(d), activation, 0.5)

    modules = [any_module() for _ in range(whole(6))]
    base, u = nn.Linear(n, d), normal(tokens, n)
    stack = stack_modules(range(len(modules)), modules, torch.float32, CPU)
    assert sorted(row for rows in stack.rows().values() for row in rows.tolist()) == list(
        range(len(modules))
    )
    router = UniformRouter(len(modules), len(modules) + 1)
    layer = RoutedLinear(base, Site("site", n, d, "decoder"), stack, router, "auto")
    weights = dict.fromkeys(range(len(modules)), 1 / (len(modules) + 1))
    experts = [Holder({"site": module}) for module in modules]
    wanted = torch.stack([mixed_output(base, t, experts, weights, "site") for t in u])
    torch.testing.assert_close(layer(u), wanted.float(), rtol=1e-4, atol=1e-4)


class Holder:
    """As much of an expert as a mixture looks at."""

    def __init__(self, modules):
        self.modules = modules


@each_kind
def test_merged_is_the_mean_of_what_each_adds(base, mixed_pool):
    model = compose(mixed_pool, base, router="merged")
    experts = mixed_pool.experts
    for site, layer in composition_of(model).layers.items():
        u = torch.randn(1, layer.in_features, generator=torch.Generator().manual_seed(0))
        weights = {z: 1 / 8 for z, expert in enumerate(experts) if site in expert.modules}
        wanted = mixed_output(layer.base, u[0], experts, weights, site)
        torch.testing.assert_close(layer(u)[0], wanted.float(), **PRECISE)


@pytest.mark.usefixtures("toy_embedder")
@pytest.mark.parametrize("router", [router for router in ROUTERS if router != "arrow"])
def test_every_router_but_arrow_routes_a_mixed_pool(llama, llama_mixed, router, tmp_path):
    four = llama_mixed.select(["lora0", "ia32", "bottleneck3", "biased1"]).experts
    pool = Pool(tuple(renamed(expert, f"e{z}") for z, expert in enumerate(four)))
    ids = make_ids()
    plain = logits_of(llama.model, ids)
    model = compose_by(router, pool, llama)
    got = logits_of(model, ids)
    assert not torch.allclose(got, plain, atol=1e-3)
    with record(model) as recording:
        watched = logits_of(model, ids)
    if router != "random":  # which draws anew
        assert_same_logits(watched, got)
    assert set(recording.usage()) == set(composition_of(model).layers)
    save(model, tmp_path / "routed")
    detach(model)
    assert torch.equal(logits_of(llama.model, ids), plain)
    loaded = of_task(load(tmp_path / "routed", llama), "second")
    assert_same_logits(logits_of(loaded, ids), got)


def renamed(expert: Expert, name: str) -> Expert:
    return replace(expert, info=replace(expert.info, name=name))


def test_random_routing_starts_anew_for_each_task(llama, llama_mixed):
    pool = llama_mixed.select(["ia32", "bottleneck3", "biased1"])
    model, ids, got = compose(pool, llama, router="random", k=1), make_ids(), []
    for _ in range(2):
        with announcing(model, "task", []):
            got.append(logits_of(model, ids))
    assert torch.equal(*got)
    assert not torch.equal(logits_of(model, ids), got[0])


def test_routers_of_mixed_sites_are_compared(llama, llama_mixed):
    similarity = vector_similarity(compose(llama_mixed, llama))
    assert similarity.shape == (8, 8)
    assert all(similarity[z, z] == pytest.approx(1) for z in range(8))
    assert abs(similarity[2, 6]) < 0.5


def test_near_duplicates_are_found_among_all_kinds(llama_mixed):
    twins = [renamed(llama_mixed.select([name]).experts[0], "twin") for name in ("ia32", "biased1")]
    for twin in twins:
        twin = replace(twin, info=replace(twin.info, adapter_sha256="another"))
        (found,) = near_duplicates(Pool((*llama_mixed.experts, twin)))
        assert (found.other, found.identical) == ("twin", False)
    same = cosines(llama_mixed)
    assert same[2, 3] == same[0, 2] == 0  # of different kinds
    assert 0 < abs(float(same[3, 4])) < 0.9


def test_a_loaded_mixed_model_has_the_same_tensors(llama, llama_mixed, tmp_path):
    model = compose(llama_mixed, llama)
    layers = {s: each.stack.tensors() for s, each in composition_of(model).layers.items()}
    save(model, tmp_path / "routed")
    detach(model)
    loaded = composition_of(load(tmp_path / "routed", llama)).layers
    assert loaded.keys() == layers.keys()
    for site, tensors in layers.items():
        got = loaded[site].stack.tensors()
        assert got.keys() == tensors.keys()
        assert all(torch.equal(got[name], tensors[name]) for name in tensors)
        assert all(got[name].dtype == tensors[name].dtype for name in tensors)


def test_plain_loras_keep_their_fast_layer(llama, llama_mixed):
    layers = composition_of(compose(llama_mixed, llama)).layers
    assert not any(layer.is_plain for layer in layers.values())  # a LoRA with biases everywhere
    detach(llama.model)
    layers = composition_of(compose(llama_mixed, llama, leave_out=["biased1"])).layers
    plain = {site for site, layer in layers.items() if layer.is_plain}
    assert {site.rpartition(".")[2] for site in plain} == {"q_proj", "up_proj", "gate_proj"}


def test_arrow_names_the_experts_that_have_no_factors(llama, llama_mixed):
    with pytest.raises(PoolError, match=r"'ia32' \(ia3\), 'bottleneck3' \(bottleneck\)"):
        compose(llama_mixed, llama, router="arrow")
    loras = llama_mixed.select(["lora0", "biased1", "lora7"])
    assert not hasattr(llama.model, "phatgoose")
    compose(loras, llama, router="arrow")
    assert lacking(llama_mixed)["arrow"] == [e.name for e in llama_mixed.experts if not e.lora]


def test_stand_ins_are_for_loras(llama, llama_mixed):
    bare = tuple(replace(expert, gates={}) for expert in llama_mixed.experts[:3])
    with pytest.raises(PoolError, match=r"none in 'ia32' \(ia3\)"):
        compose(Pool(bare), llama, stand_in=True)


def test_a_gate_of_the_wrong_size_is_refused_where_only_the_base_can_tell(llama, llama_mixed):
    expert = llama_mixed.select(["ia32"]).experts[0]
    site = next(s for s, module in expert.modules.items() if not module.on_input)
    wrong = replace(expert, gates={**expert.gates, site: torch.ones(7)})
    with pytest.raises(ExpertError, match=rf"site {site}: the gate has shape \(7,\)"):
        compose(Pool((wrong,)), llama, k=1)


def test_padding_is_routed_like_any_token(llama, llama_mixed):
    model, ids = compose(llama_mixed, llama), make_ids()
    layer, seen = composition_of(model).layers["model.layers.0.mlp.down_proj"], []
    layer.register_forward_hook(lambda layer, args, y: seen.append((args[0], y)))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    logits_of(model, ids, attention_mask=mask)
    ((u, y),) = seen
    with torch.no_grad():
        assert torch.equal(y, layer(u))
    assert not torch.allclose(y, layer.base(u), atol=1e-2)


@each_kind
def test_bfloat16_stays_close(kind, base, mixed_pool):
    layers = composition_of(compose(mixed_pool, load_base(base.id, dtype="bfloat16"))).layers
    for site, layer in layers.items():
        u = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
        experts = mixed_pool.experts
        wanted = torch.stack(
            [
                mixed_output(layer.base, t, experts, token_weights(t, experts, site, 2), site)
                for t in u
            ]
        )
        got = layer(u)
        assert got.dtype == torch.bfloat16
        slack = 6 * torch.finfo(torch.bfloat16).eps * float(wanted.abs().max())
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=slack)


# --- the products ---


def bottleneck_arguments(seed: int, tokens: int, experts: int, k: int, m: int, d: int):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    chosen = torch.rand(tokens, experts, generator=generator).topk(k).indices
    weights = torch.rand(tokens, k, generator=generator).add(0.1).requires_grad_()
    activations = torch.randint(0, len(ACTIVATIONS), (experts,), generator=generator)
    tensors = (normal(experts, m, d), normal(experts, m), normal(experts, m, d))
    return (normal(tokens, d), chosen, weights, *tensors, normal(experts, d), activations)


@given(
    seed=st.integers(0, 99),
    tokens=st.integers(1, 9),
    experts=st.integers(1, 7),
    m=st.integers(1, 5),
    d=st.integers(1, 9),
    data=st.data(),
)
@settings(max_examples=30, deadline=None)
def test_bottleneck_bodies_have_the_values_and_gradients_of_the_loop(
    seed, tokens, experts, m, d, data
):
    k = data.draw(st.integers(1, experts))
    arguments = bottleneck_arguments(seed, tokens, experts, k, m, d)
    learnt = [each for each in arguments if each.requires_grad]
    wanted = reference_bottleneck(*arguments)
    cotangent = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(seed))
    slopes = torch.autograd.grad((wanted * cotangent).sum(), learnt)
    for body in (all_bottlenecks, grouped_bottleneck):
        got = body(*arguments)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        found = torch.autograd.grad((got * cotangent).sum(), learnt)
        torch.testing.assert_close(found, slopes, rtol=1e-3, atol=1e-3)


@given(
    seed=st.integers(0, 99),
    tokens=st.integers(1, 9),
    experts=st.integers(1, 7),
    d=st.integers(1, 9),
)
@settings(max_examples=30, deadline=None)
def test_weighted_rows_have_the_values_and_gradients_of_the_loop(seed, tokens, experts, d):
    _, chosen, weights, *_, rows, _ = bottleneck_arguments(seed, tokens, experts, 1, 1, d)
    wanted = reference_rows(chosen, weights, rows)
    torch.testing.assert_close(weighted_rows(chosen, weights, rows), wanted, **PRECISE)
    cotangent = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(seed))
    found, slopes = (
        torch.autograd.grad((f(chosen, weights, rows) * cotangent).sum(), [weights, rows])
        for f in (weighted_rows, reference_rows)
    )
    torch.testing.assert_close(found, slopes, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("experts", "k", "body"), [(4, 2, all_bottlenecks), (5, 2, grouped_bottleneck)]
)
def test_few_bottlenecks_are_computed_side_by_side(experts, k, body):
    y, chosen, _, down, *_ = bottleneck_arguments(0, 3, experts, k, 2, 4)
    assert choose_bottleneck(y, chosen, down) is body


def test_sizes_are_filled_up_with_zeros_which_changes_nothing():
    def layers(m: int) -> BottleneckLayers:
        parts = (torch.randn(m, 6), torch.randn(m), torch.randn(6, m), torch.randn(6))
        return BottleneckLayers(*parts, "silu", 2.0)

    small, large = layers(2), layers(9)
    stack = stack_modules([0, 1], [small, large], torch.float32, CPU).bottleneck
    assert stack.down.shape == stack.up.shape == (2, 9, 6)
    assert not stack.down[0, 2:].any()
    assert not stack.up[0, 2:].any()
    assert torch.equal(stack.up[0, :2], (2.0 * small.up).T)
    y = torch.randn(4, 6)
    arguments = (y, torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1))
    tensors = (stack.down, stack.down_bias, stack.up, stack.up_bias, stack.activations)
    wanted = small.at(y).apply(nn.Identity(), y) - y
    torch.testing.assert_close(grouped_bottleneck(*arguments, *tensors), wanted, **PRECISE)
