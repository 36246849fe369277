"""Kernels in torch and the native one: values, gradients, threads, and which one is chosen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import phatgoose
from fake_packages import install
from kernel_problems import (
    assert_are_the_top,
    assert_equals_reference,
    make_problem,
    problems_of,
    scored,
)
from phatgoose.config import Routing
from phatgoose.errors import ConfigError
from phatgoose.routing.kernels import (
    KERNELS,
    choose_kernel,
    one_call,
    outside_kernels,
    top_experts_for,
)
from phatgoose.routing.kernels.native import add_routed, runs_natively, top_experts
from phatgoose.routing.layers import RoutedLinear
from phatgoose.routing.stacks import SiteStack, stack_of
from phatgoose.sites import Site
from routed_models import by_vectors

FLOATS = (torch.float32, torch.bfloat16)
needs_native = pytest.mark.skipif(not runs_natively(torch.zeros(1)), reason="no native kernel")
each_kernel = pytest.mark.parametrize("name", KERNELS)
problems = st.integers(1, 5).flatmap(
    lambda E: problems_of(
        FLOATS,
        T=st.integers(0, 20),
        E=st.just(E),
        k=st.integers(1, E),
        r=st.integers(1, 9),
        n=st.integers(1, 70),
        d=st.integers(1, 150),
        repeated=st.booleans(),
    )
)


@needs_native
def test_the_native_kernel_writes_where_its_inputs_are():
    problem = make_problem()
    wanted = problem.solved_by("native")
    with torch.device("meta"):
        torch.testing.assert_close(problem.solved_by("native"), wanted)


@each_kernel
@settings(max_examples=60, derandomize=True)
@given(problem=problems)
def test_every_kernel_equals_the_reference_in_values_and_gradients(name, problem):
    """Also where tokens name an expert twice, who gets both weights."""
    assert_equals_reference(problem, problem.solved_by(name))


def test_the_reference_is_the_sum_of_the_paper():
    problem = make_problem().mapped(Tensor.double)
    wanted = torch.zeros(5, 9).double()
    for t in range(5):
        for w, z in zip(problem.weights[t], problem.experts[t], strict=True):
            wanted[t] += w * problem.B[z].T @ (problem.A[z] @ problem.u[t])
    torch.testing.assert_close(problem.value_by("reference"), wanted, rtol=1e-12, atol=1e-12)


@each_kernel
def test_an_expert_nobody_chose_adds_nothing_and_gets_no_gradient(name):
    problem = make_problem(E=4, k=2)
    problem.experts = torch.tensor([[0, 3]]).expand(5, -1)
    problem.A[1:3] = torch.nan if name == "native" else 1e20  # the native one doesn't read it
    problem.B[1:3] = 1e10
    value, *gradients = problem.solved_by(name)
    assert value.abs().max() < 1e3
    for gradient in gradients[2:]:  # of A and B
        assert not gradient[1:3].any()
        assert gradient[0].any()


@pytest.mark.parametrize(
    ("tokens", "experts", "name"),
    [(1, 100, "gather"), (512, 8, "concat"), (32, 100, "concat"), (512, 100, "grouped")],
)
def test_auto_takes_what_was_measured_to_be_fastest(tokens, experts, name):
    p = make_problem(T=tokens, E=experts, r=8, n=8, d=8)
    if runs_natively(p.u, p.A):
        assert choose_kernel("auto", p.u, p.experts, p.A, p.B) is KERNELS["native"]
    p.u.requires_grad_()  # which the native one can't have
    assert choose_kernel("auto", p.u, p.experts, p.A, p.B) is KERNELS[name]


@pytest.mark.parametrize(
    ("tokens", "experts", "name"),
    [(1, 100, "gather"), (512, 8, "concat"), (32, 100, "concat"), (512, 100, "concat")],
)
def test_auto_on_a_gpu_takes_torch_s_and_reads_no_counts_back(tokens, experts, name):
    p = make_problem(T=tokens, E=experts, r=8, n=8, d=8)
    with FakeTensorMode():
        # No other package's kernels are for this kind.
        u = torch.empty(p.u.shape, device="xpu")
        stacks = [torch.empty(part.shape, device="xpu") for part in (p.experts, p.A, p.B)]
        assert choose_kernel("auto", u, *stacks) is KERNELS[name]
        has_product = hasattr(torch.nn.functional, "grouped_mm")  # torch 2.8 hasn't
        if has_product and (tokens, experts) == (512, 100):  # it reads none, in bfloat16
            stacks = [part.bfloat16() for part in stacks]
            assert choose_kernel("auto", u.bfloat16(), *stacks) is KERNELS["grouped"]


def test_a_kernel_that_can_t_take_a_tensor_is_refused_by_name():
    p = make_problem(E=8)
    with pytest.raises(ConfigError, match=r"Kernel native can't take torch.int64 on cpu"):
        choose_kernel("native", p.u.long(), p.experts, p.A, p.B)
    with pytest.raises(ConfigError, match="without gradients"):
        choose_kernel("native", p.u.requires_grad_(), p.experts, p.A, p.B)


# Of other packages

MADE = """
from phatgoose.routing.kernels import KERNELS, OutsideKernel

def made(u, experts, weights, A, B):
    return KERNELS["reference"](u, experts, weights, A, B)

KERNEL = OutsideKernel(made, takes=lambda u, A, B: u.is_cpu, runs_on=lambda *tensors: True)
"""


@pytest.fixture
def made(no_native, tmp_path, monkeypatch):
    """A kernel of another package, on a machine without a native one; `odd` can't be loaded."""
    points = {"made": "made_kernels:KERNEL", "odd": "made_kernels:made"}
    install(tmp_path, monkeypatch, "made_kernels", MADE, {"phatgoose.kernels": points})
    outside_kernels.cache_clear()
    with pytest.warns(UserWarning, match="odd of made-kernels is left out"):
        yield outside_kernels()["made"]
    outside_kernels.cache_clear()


def test_another_package_s_kernel_is_taken_by_name_and_by_auto(made, llama_pool):
    p = make_problem(T=3, E=8)
    parts = (p.u, p.experts, p.A, p.B)
    assert choose_kernel("made", *parts) is choose_kernel("auto", *parts) is made.product
    assert choose_kernel("gather", *parts) is KERNELS["gather"]
    assert one_call("auto", p.cotangent, p.u, (p.A[:, 0], p.A, p.B), 2) is None
    assert top_experts_for(p.u, p.A[:, 0]) is None
    few = make_problem(T=3, E=3)
    assert choose_kernel("auto", few.u, few.experts, few.A, few.B) is KERNELS["concat"]


def test_one_that_refuses_or_can_t_be_loaded_is_an_error_where_it_is_named(made):
    p = make_problem(E=8)
    with pytest.raises(ConfigError, match=r"Kernel made can't take torch.float32 on meta"):
        choose_kernel("made", p.u.to("meta"), p.experts, p.A, p.B)
    with pytest.raises(ConfigError, match="Kernel odd can't take"):
        choose_kernel("odd", p.u, p.experts, p.A, p.B)


def test_another_package_s_calls_are_made_where_auto_prefers_it(made, monkeypatch):
    p = make_problem(T=3, E=8)
    stacked = (p.A[:, 0], p.A, p.B)
    fused = made._replace(top_experts=top_experts, add_routed=add_routed)
    monkeypatch.setitem(outside_kernels(), "made", fused)
    assert top_experts_for(p.u, p.A[:, 0]) is top_experts
    taken = {name: one_call(name, p.cotangent, p.u, stacked, 2) for name in ("auto", "made")}
    assert taken == {"auto": add_routed, "made": add_routed}
    assert one_call("auto", p.cotangent, p.u, stacked, 8) is None
    assert one_call("made", p.cotangent, p.u, stacked, 8) is add_routed
    assert one_call("concat", p.cotangent, p.u, stacked, 2) is None


def test_a_named_kernel_of_another_package_is_a_setting(tmp_path, monkeypatch):
    """In a process of its own, since names are read when settings are first imported."""
    points = {"phatgoose.kernels": {"made": "made_kernels:KERNEL"}}
    install(tmp_path, monkeypatch, "made_kernels", MADE, points)
    code = "from phatgoose.config import Routing; print(Routing(kernel='made').kernel)"
    paths = os.pathsep.join([str(tmp_path), str(Path(phatgoose.__file__).parents[1])])
    told = subprocess.check_output(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}
    )
    assert told.decode().strip() == "made"
    with pytest.raises(ConfigError, match="kernel is 'made', but must be 'auto', "):
        Routing(kernel="made")


# The native one


@needs_native
@pytest.mark.parametrize("index", [-1, 6, 2**62, -(2**62)])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_an_index_of_no_expert_is_refused_whatever_its_weight(index, weight):
    problem = make_problem(E=6)
    problem.experts[-1, -1], problem.weights[-1, -1] = index, weight
    with pytest.raises(IndexError, match="not among the 6 experts"):
        problem.value_by("native")


@pytest.mark.parametrize("name", ["A", "B"])
def test_gaps_in_factors_are_closed_before_their_addresses_are_taken(name, llama_pool):
    stack = stack_of(llama_pool, llama_pool.sites[0], torch.float32, torch.device("cpu"))
    n, d = (stack.tensors()[factor].shape[2] for factor in ("A", "B"))
    gaps = {n: t.repeat_interleave(2, dim=-1)[..., ::2] for n, t in stack.tensors().items()}
    router = by_vectors("phatgoose", torch.randn(4, n))
    gapped = SiteStack.of(gaps, stack.experts)
    layer = RoutedLinear(torch.nn.Linear(n, d), Site("site", n, d, "decoder"), gapped, router)
    assert getattr(layer, name).is_contiguous()


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    "sizes",
    [
        {"T": 60, "E": 3, "n": 40, "d": 330},  # many tokens for each expert
        {"T": 60, "E": 500, "n": 40, "d": 330},  # one or none
        {"T": 1030, "E": 3, "k": 1, "n": 8, "d": 40},
    ],
    ids=str,
)
def test_threads_share_out_columns_without_a_gap(threads, sizes):
    problem, before = make_problem(**sizes), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = problem.value_by("native")
    finally:
        torch.set_num_threads(before)
    assert_equals_reference(problem, [got])


@needs_native
@pytest.mark.parametrize("router", ["phatgoose", "arrow"])
@settings(max_examples=40, derandomize=True)
@given(
    T=st.integers(0, 9),
    E=st.integers(1, 40),
    n=st.integers(2, 80),
    k=st.integers(1, 4),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 999),
)
def test_the_native_top_experts_are_those_of_the_formula(router, dtype, **sizes):
    u, plain = scored(router, dtype=dtype, offset=1, **sizes)
    slack = 0.02 if dtype is torch.bfloat16 else 1e-4  # vectors rounded to bfloat16 have a mean
    assert_are_the_top(top_experts(u, plain.vectors, plain.k, plain.eps), u, plain, slack)


@needs_native
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("router", ["phatgoose", "arrow"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1024, 1047])
def test_a_token_chooses_alone_as_among_others_and_of_equals_the_first(n, dtype, router, threads):
    """Also of more vectors than a cache keeps at a time, and with NaN around what is read."""
    u, plain = scored(router, T=71, E=151, n=n, k=2, dtype=dtype, offset=1, seed=0)
    rows = u, plain.vectors.repeat(2, 1)
    framed = [nn.functional.pad(each, (0, 0, 9, 9), value=torch.nan) for each in rows]
    u, vectors = (each[9:-9] for each in framed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        experts, weights = top_experts(u, vectors, 4, plain.eps)
        alone = [top_experts(u[t : t + 1], vectors, 4, plain.eps) for t in range(len(u))]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat([each[0] for each in alone]), experts)
    assert torch.equal(torch.cat([each[1] for each in alone]), weights)
    assert torch.equal(experts[:, 1::2], experts[:, ::2] + 151)  # its equal comes right after it
    best = experts[:, ::2], 2 * weights[:, ::2]
    assert_are_the_top(best, u, plain, 0.02 if dtype is torch.bfloat16 else 1e-4)


@needs_native
@pytest.mark.parametrize("tokens", [0, 1, 2, 9, 40])
@pytest.mark.parametrize("dtype", FLOATS)
def test_one_native_call_is_choosing_and_adding(tokens, dtype):
    p = make_problem(T=tokens, E=30, r=8, n=48, d=150, dtype=dtype)
    got, vectors = p.cotangent.clone(), 7 * p.A[:, 0].contiguous()
    add_routed(got, p.u, (vectors, p.A, p.B), 3, 1e-5)
    p.experts, p.weights = top_experts(p.u, vectors, 3, 1e-5)
    assert_equals_reference(p, [got], added=True)
