import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernel_problems import DIFFERENTIABLE, ON_CPUS, Problem, make_problem
from phatgoose.errors import ConfigError
from phatgoose.routing.kernels.choice import KERNELS, choose_kernel
from phatgoose.routing.kernels.native import add_routed, runs_natively, top_experts
from phatgoose.routing.routers.per_token.arrow import ArrowRouter
from phatgoose.routing.routers.per_token.vector_router import ScoredRouter

native_module = importlib.import_module(
    "phatgoose.routing.kernels.native"
)  # the name is the kernel's too
BODIES = [name for name in ON_CPUS if name != "reference"]
load_library = native_module._library.__wrapped__  # as in a fresh process
needs_native = pytest.mark.skipif(native_module._library() is None, reason="no C++ compiler")
ROUNDINGS = {torch.float32: 8, torch.bfloat16: 4}  # in units of the dtype's eps


def assert_equals_reference(problem: Problem, name: str) -> None:
    """Values and gradients within a few roundings of the reference in float64."""
    exact = problem.mapped(Tensor.double).solved_by("reference")
    scale = problem.mapped(magnitudes).solved_by("reference")
    for got, wanted, size in zip(problem.solved_by(name), exact, scale, strict=False):
        assert_close(got, wanted, size, problem.u.dtype)


def magnitudes(x: Tensor) -> Tensor:
    """What sums of these come to without cancellation: roundings are relative to that."""
    return x.double().abs()


def assert_close(got: Tensor, wanted: Tensor, size: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == wanted.shape
    eps = torch.finfo(dtype).eps * ROUNDINGS[dtype]
    assert ((got.double() - wanted).abs() <= eps * size).all()


problems = st.integers(1, 5).flatmap(
    lambda E: st.builds(
        make_problem,
        T=st.integers(0, 20),
        E=st.just(E),
        k=st.integers(1, E),
        r=st.integers(1, 9),
        n=st.integers(1, 70),
        d=st.integers(1, 150),
        dtype=st.sampled_from(list(ROUNDINGS)),
        strided=st.booleans(),
        seed=st.integers(0, 999),
    )
)


@pytest.mark.parametrize("name", ON_CPUS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems)
def test_every_kernel_equals_the_reference_in_values_and_gradients(name, problem):
    assert_equals_reference(problem, name)


def test_the_reference_is_the_sum_of_the_paper():
    problem = make_problem().mapped(Tensor.double)
    wanted = torch.zeros(5, 9).double()
    for t in range(5):
        for w, z in zip(problem.weights[t], problem.experts[t], strict=True):
            wanted[t] += w * problem.B[z].T @ (problem.A[z] @ problem.u[t])
    torch.testing.assert_close(problem.solved_by("reference")[0], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_an_expert_nobody_chose_adds_nothing_and_gets_no_gradient(name):
    problem = make_problem(E=4, k=2)
    problem.experts = torch.tensor([[0, 3]]).expand(5, -1)
    problem.A[1:3], problem.B[1:3] = 1e20, 1e10
    value, _, _, grad_A, grad_B = problem.solved_by(name)
    assert value.abs().max() < 1e3
    assert not grad_A[1:3].any()
    assert not grad_B[1:3].any()
    assert grad_A[0].any()


@pytest.mark.parametrize("name", ON_CPUS)
@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one_token(name, tokens):
    assert_equals_reference(make_problem(T=tokens), name)


@pytest.mark.parametrize("name", ON_CPUS)
def test_all_experts_can_be_chosen_at_once(name):
    assert_equals_reference(make_problem(E=3, k=3), name)


@pytest.mark.parametrize("name", BODIES)
def test_weights_of_zero_leave_nothing(name):
    problem = make_problem()
    problem.weights = torch.zeros_like(problem.weights)
    assert not problem.solved_by(name)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ON_CPUS)
def test_the_result_has_the_dtype_of_the_activations(name, dtype):
    problem = make_problem(dtype=dtype)
    assert problem.weights.dtype == torch.float32
    assert problem.solved_by(name)[0].dtype == dtype


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


def chosen_by_auto(problem: Problem) -> str:
    kernel = choose_kernel("auto", problem.u, problem.experts, problem.A, problem.B)
    return next(name for name, body in KERNELS.items() if body is kernel)


@pytest.mark.parametrize(
    ("tokens", "experts", "name"),
    [(1, 100, "gather"), (512, 8, "concat"), (32, 100, "concat"), (512, 100, "grouped")],
)
def test_auto_takes_what_was_measured_to_be_fastest(tokens, experts, name, monkeypatch):
    problem = make_problem(T=tokens, E=experts, r=8, n=8, d=8)
    if runs_natively(problem.u, problem.A):
        assert chosen_by_auto(problem) == "native"
    monkeypatch.setattr("phatgoose.routing.kernels.choice.runs_natively", lambda *_: False)
    assert chosen_by_auto(problem) == name


def test_auto_takes_a_kernel_with_gradients_where_they_are_wanted():
    problem = make_problem(E=8)
    problem.u = problem.u.requires_grad_()
    assert chosen_by_auto(problem) in DIFFERENTIABLE
    with torch.no_grad():
        assert chosen_by_auto(problem) == "native" or not runs_natively(problem.u, problem.A)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_found_by_name(name):
    p = make_problem()
    assert choose_kernel(name, p.u, p.experts, p.A, p.B) is KERNELS[name]


def test_an_unknown_kernel_is_refused():
    p = make_problem()
    with pytest.raises(ConfigError, match="fastest"):
        choose_kernel("fastest", p.u, p.experts, p.A, p.B)


@needs_native
@pytest.mark.parametrize("router", [ScoredRouter, ArrowRouter])
@settings(max_examples=40, deadline=None, derandomize=True)
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
    plain = router(vectors, k, 1e-5) if router is ScoredRouter else router(vectors, k)
    wanted = plain.affinities(u).topk(plain.k, dim=-1)
    experts, weights = top_experts(u, vectors, plain.k, plain.eps)
    got = plain.affinities(u).gather(1, experts)
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


def test_without_a_compiler_other_kernels_serve(monkeypatch, tmp_path):
    problem = make_problem(E=8)
    monkeypatch.setattr(native_module, "_library", lambda: None)
    assert not runs_natively(problem.u)
    assert chosen_by_auto(problem) in DIFFERENTIABLE


def test_a_compiler_that_fails_is_no_error_and_one_line(monkeypatch, tmp_path, caplog):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PHATGOOSE_NATIVE", raising=False)
    assert load_library() is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert load_library() is None
    assert [line.count("\n") for line in caplog.messages] == [0, 0]
    assert "there is no C++ compiler, 'no-such-compiler'" in caplog.messages[1]


def test_the_library_is_built_once_into_the_users_cache(monkeypatch, tmp_path):
    if load_library() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_library() is not None
    (built,) = (tmp_path / "phatgoose" / "native").iterdir()
    made = built.stat().st_mtime_ns
    assert load_library() is not None
    assert built.stat().st_mtime_ns == made


@needs_native
def test_the_library_leaves_the_processor_as_it_was():
    """Linked with -ffast-math it would turn subnormal numbers off for the whole process."""
    assert torch.tensor(1e-40) * 1.0 == torch.tensor(1e-40)
    assert float(np.float32(1e-40) * np.float32(1.0)) > 0


def test_the_native_kernel_says_what_it_needs(monkeypatch):
    problem = make_problem(E=8)
    with pytest.raises(ConfigError, match=r"Kernel native needs .* torch.float16 on cpu; use kern"):
        problem.mapped(Tensor.half).value_by("native")
    problem.u = problem.u.requires_grad_()
    with pytest.raises(ConfigError, match="no_grad"):
        KERNELS["native"](problem.u, problem.experts, problem.weights, problem.A, problem.B)
    monkeypatch.setattr(native_module, "_library", lambda: None)
    with pytest.raises(ConfigError, match=r"C\+\+ compiler"):
        problem.value_by("native")


def test_the_native_kernel_can_be_turned_off(monkeypatch, caplog):
    monkeypatch.setenv("PHATGOOSE_NATIVE", "0")
    assert load_library() is None
    assert caplog.messages == []
