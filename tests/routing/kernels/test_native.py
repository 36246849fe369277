"""Whatever tensors are handed to it, the native kernel stays inside them or isn't called."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernel_problems import ROUNDINGS, assert_close, magnitudes, make_problem
from phatgoose.errors import ConfigError, RoutingError
from phatgoose.routing.kernels.choice import KERNELS
from phatgoose.routing.kernels.native import add_routed, native, top_experts
from phatgoose.routing.kernels.triton_gpu import triton_gpu
from phatgoose.routing.routers.arrow import ArrowRouter
from phatgoose.routing.routers.phatgoose import PhatgooseRouter

native_module = importlib.import_module(
    "phatgoose.routing.kernels.native"
)  # the name is the kernel's too


load_library = native_module._library.__wrapped__  # as in a fresh process


needs_native = pytest.mark.skipif(native_module._library() is None, reason="no C++ compiler")
T, E, k, r, n, d = 3, 6, 2, 4, 16, 24
Change = Callable[[Tensor], Tensor]


@pytest.fixture
def _no_gradients():
    with torch.no_grad():
        yield


def tensors() -> dict[str, Tensor]:
    """What the kernels take, by letter, of sizes that belong together."""
    return {
        "y": torch.zeros(T, d),
        "u": torch.randn(T, n),
        "experts": torch.tensor([[0, 5], [1, 2], [3, 4]]),
        "weights": torch.rand(T, k),
        "vectors": torch.randn(E, n),
        "A": torch.randn(E, r, n),
        "B": torch.randn(E, r, d),
    }


def multiply(held: dict[str, Tensor]) -> Tensor:
    return native(*(held[name] for name in ("u", "experts", "weights", "A", "B")))


def choose(held: dict[str, Tensor], chosen: int = k) -> Tensor:
    return top_experts(held["u"], held["vectors"], chosen, 1e-5)[0]


def add(held: dict[str, Tensor], chosen: int = k) -> Tensor:
    add_routed(held["y"], held["u"], held["vectors"], held["A"], held["B"], chosen, 1e-5)
    return held["y"]


CHANGES: dict[str, Change] = {
    "narrowed": lambda t: t[..., :-1].contiguous(),
    "widened": lambda t: torch.cat([t, t], dim=-1),
    "fewer rows": lambda t: t[:-1].contiguous(),
    "another dimension": lambda t: t[None],
    "flat": lambda t: t.flatten(),
    "empty": lambda t: t[..., :0],
    "of another type": lambda t: t.half() if t.is_floating_point() else t.int(),
    "elsewhere": lambda t: t.to("meta"),
}
TAKEN = {
    multiply: ("u", "experts", "weights", "A", "B"),
    choose: ("u", "vectors"),
    add: ("y", "u", "vectors", "A", "B"),
}


ALLOWED = {  # what a call can't tell from other sizes of T, E or d, or converts
    *((multiply, "B", change) for change in ("narrowed", "widened")),
    (multiply, "weights", "of another type"),
    *((choose, name, "fewer rows") for name in ("u", "vectors")),
    *((add, name, "another dimension") for name in ("y", "u")),
}


@pytest.mark.usefixtures("_no_gradients")
@needs_native
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("call", "name"), [(call, name) for call, names in TAKEN.items() for name in names]
)
def test_tensors_that_do_not_belong_together_are_refused(call, name, change):
    held = tensors()
    assert call(held).isfinite().all()
    held[name] = CHANGES[change](held[name])
    if (call, name, change) in ALLOWED:
        assert call(held).isfinite().all()
        return
    with pytest.raises((RoutingError, ConfigError), match="Kernel native") as caught:
        call(held)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("_no_gradients")
@needs_native
@pytest.mark.parametrize("name", ["A", "B"])
@pytest.mark.parametrize("ranks", [r - 1, r + 1])
def test_ranks_that_differ_are_refused(name, ranks):
    held = tensors()
    held[name] = torch.randn(E, ranks, held[name].shape[2])
    for call in (multiply, add):
        with pytest.raises(RoutingError, match="Kernel native"):
            call(held)


@pytest.mark.usefixtures("_no_gradients")
@needs_native
@pytest.mark.parametrize("index", [-1, E, 2**62, -(2**62)])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_an_index_of_no_expert_is_refused_whatever_its_weight(index, tokens, weight):
    held = tensors()
    held = {name: held[name][:tokens] for name in ("u", "experts", "weights")} | {
        name: held[name] for name in ("A", "B")
    }
    held["experts"][-1, -1], held["weights"][-1, -1] = index, weight
    with pytest.raises(RoutingError, match=f"Experts .*{index}.* there are 6, from 0 on"):
        multiply(held)


@pytest.mark.usefixtures("_no_gradients")
@needs_native
@pytest.mark.parametrize("chosen", [0, -1, E + 1, 2**40])
def test_more_experts_than_there_are_can_not_be_chosen(chosen):
    for call in (choose, add):
        with pytest.raises(RoutingError, match=f"k = {chosen}"):
            call(tensors(), chosen)


@pytest.mark.usefixtures("_no_gradients")
@needs_native
@pytest.mark.parametrize("name", ["y", "u", "vectors", "A", "B"])
def test_what_is_added_to_in_place_must_be_contiguous(name):
    held = tensors()
    held[name] = held[name].repeat_interleave(2, dim=-1)[..., ::2]
    with pytest.raises(RoutingError, match="contiguous"):
        add(held)


@pytest.mark.usefixtures("_no_gradients")
@needs_native
@pytest.mark.parametrize("name", ["u", "experts", "weights", "A", "B"])
def test_triton_is_not_handed_addresses_of_other_shapes_either(name):
    held = tensors()
    cut = held[name][:, :-1] if name == "B" else held[name][..., :-1]  # any d would do
    held[name] = cut.contiguous()
    with pytest.raises((RoutingError, ConfigError), match="ernel triton"):
        triton_gpu(*(held[part] for part in ("u", "experts", "weights", "A", "B")))


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
@pytest.mark.parametrize("router", [PhatgooseRouter, ArrowRouter])
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
    plain = router(vectors, k, 1e-5) if router is PhatgooseRouter else router(vectors, k)
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
