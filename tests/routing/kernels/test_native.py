"""The native kernel: its numbers, its threads, and which tensors it takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import phatgoose.routing.kernels.native as native_module
from kernel_problems import ROUNDINGS, assert_close, magnitudes, make_problem
from phatgoose.errors import ConfigError
from phatgoose.routing.kernels import KERNELS, choose_kernel
from phatgoose.routing.kernels.native import add_routed, top_experts
from phatgoose.routing.layers import RoutedLinear, SiteStack, stack_of
from phatgoose.sites import Site
from routed_models import by_vectors

load_library = native_module._library.__wrapped__  # as in a fresh process


needs_native = pytest.mark.skipif(native_module._library() is None, reason="no C++ compiler")


@needs_native
@pytest.mark.parametrize("index", [-1, 6, 2**62, -(2**62)])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_an_index_of_no_expert_is_refused_whatever_its_weight(index, weight):
    problem = make_problem(E=6)
    problem.experts[-1, -1], problem.weights[-1, -1] = index, weight
    with pytest.raises(IndexError, match="not among the 6 experts"):
        problem.value_by("native")


@needs_native
@pytest.mark.parametrize("name", ["A", "B"])
def test_gaps_in_factors_are_closed_before_their_addresses_are_taken(name, llama_pool):
    stack = stack_of(llama_pool, llama_pool.sites[0], torch.float32, torch.device("cpu"))
    n, d = stack.lora.A.shape[2], stack.lora.B.shape[2]
    gaps = {n: t.repeat_interleave(2, dim=-1)[..., ::2] for n, t in stack.tensors().items()}
    router = by_vectors("phatgoose", torch.randn(4, n))
    site = Site("site", n, d, "decoder")
    gapped = SiteStack.of(gaps, stack.experts)
    layer = RoutedLinear(torch.nn.Linear(n, d), site, gapped, router)
    assert getattr(layer, name).is_contiguous()


def test_the_native_kernel_ignores_experts_nobody_chose():
    problem = make_problem(E=4, k=2)
    problem.experts = torch.tensor([[0, 3]]).expand(5, -1)
    problem.A[1:3], problem.B[1:3] = float("nan"), float("nan")
    assert problem.value_by("native").isfinite().all()


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
    problem = make_problem(**sizes)
    wanted = problem.mapped(Tensor.double).value_by("reference")
    size = problem.mapped(magnitudes).value_by("reference")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = problem.value_by("native")
    finally:
        torch.set_num_threads(before)
    assert_close(got, wanted, size, problem.u.dtype)


@needs_native
@pytest.mark.parametrize("router", ["phatgoose", "arrow"])
@settings(max_examples=40, derandomize=True)
@given(
    T=st.integers(0, 9),
    E=st.integers(1, 40),
    n=st.integers(2, 80),
    k=st.integers(1, 4),
    dtype=st.sampled_from(list(ROUNDINGS)),
    seed=st.integers(0, 999),
)
def test_the_native_top_experts_are_those_of_the_formula(router, T, E, n, k, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    u = (3 * torch.randn(T, n, generator=generator) + 1).to(dtype)
    vectors = torch.randn(E, n, generator=generator)
    vectors = (vectors - vectors.mean(dim=-1, keepdim=True)).to(dtype)
    plain = by_vectors(router, vectors, k)
    wanted = plain.router.scores(u, plain).topk(plain.k, dim=-1)
    experts, weights = top_experts(u, vectors, plain.k, plain.eps)
    got = plain.router.scores(u, plain).gather(1, experts)
    slack = 0.02 if dtype is torch.bfloat16 else 1e-4  # vectors rounded to bfloat16 have a mean
    torch.testing.assert_close(got, wanted.values, rtol=slack, atol=slack)
    torch.testing.assert_close(weights, got.softmax(dim=-1), rtol=2 * slack, atol=2 * slack)
    assert all(len(set(row)) == plain.k for row in experts.tolist())


@needs_native
@pytest.mark.parametrize("tokens", [0, 1, 2, 9, 40])
@pytest.mark.parametrize("dtype", list(ROUNDINGS))
def test_one_native_call_is_choosing_and_adding(tokens, dtype):
    p = make_problem(T=tokens, E=30, r=8, n=48, d=150, dtype=dtype)
    vectors, y = torch.randn(30, 48).to(dtype), torch.randn(tokens, 150).to(dtype)
    got = y.clone()
    add_routed(got, p.u, vectors, p.A, p.B, 3, 1e-5)
    experts, weights = top_experts(p.u, vectors, 3, 1e-5)
    wanted = y.double() + KERNELS["reference"](
        p.u.double(), experts, weights.double(), p.A.double(), p.B.double()
    )
    torch.testing.assert_close(
        got, wanted.to(dtype), rtol=2e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-3
    )


def test_a_compiler_that_fails_is_no_error_and_one_line(monkeypatch, tmp_path, caplog):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PHATGOOSE_NATIVE", "compile")
    assert load_library() is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert load_library() is None
    assert [line.count("\n") for line in caplog.messages] == [0, 0]
    assert "there is no C++ compiler, 'no-such-compiler'" in caplog.messages[1]


@pytest.mark.parametrize("kernel", ["native", "triton"])
def test_a_kernel_that_can_t_take_a_tensor_is_refused_by_name(kernel):
    p = make_problem(E=8)
    with pytest.raises(ConfigError, match=rf"Kernel {kernel} can't take torch.int64 on cpu"):
        choose_kernel(kernel, p.u.long(), p.experts, p.A, p.B)
    with pytest.raises(ConfigError, match="without gradients"):
        choose_kernel(kernel, p.u.requires_grad_(), p.experts, p.A, p.B)
