"""Which kernel is taken, and what is said of those that can't be."""

from __future__ import annotations

import importlib

import pytest
import torch

from kernel_problems import DIFFERENTIABLE, Problem, make_problem
from phatgoose.config import KERNELS as NAMES
from phatgoose.config import Routing
from phatgoose.errors import ConfigError
from phatgoose.routing.kernels.choice import KERNELS, choose_kernel
from phatgoose.routing.kernels.native import runs_natively

native_module = importlib.import_module(
    "phatgoose.routing.kernels.native"
)  # the name is the kernel's too


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


def test_the_setting_knows_all_kernels():
    assert ("auto", *KERNELS) == NAMES
    with pytest.raises(ConfigError, match="fastest"):
        Routing(kernel="fastest")


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_found_by_name(name):
    p = make_problem()
    assert choose_kernel(name, p.u, p.experts, p.A, p.B) is KERNELS[name]


def test_without_a_compiler_other_kernels_serve(monkeypatch, tmp_path):
    problem = make_problem(E=8)
    monkeypatch.setattr(native_module, "_library", lambda: None)
    assert not runs_natively(problem.u)
    assert chosen_by_auto(problem) in DIFFERENTIABLE
