"""Whatever tensors are handed to it, the native kernel stays inside them or isn't called."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from phatgoose.errors import ConfigError, RoutingError
from phatgoose.routing.kernels.native import add_routed, native, top_experts
from phatgoose.routing.kernels.triton_gpu import triton_gpu

library = importlib.import_module("phatgoose.routing.kernels.native")._library
pytestmark = [
    pytest.mark.skipif(library() is None, reason="no C++ compiler"),
    pytest.mark.usefixtures("_no_gradients"),
]
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


@pytest.mark.parametrize("name", ["A", "B"])
@pytest.mark.parametrize("ranks", [r - 1, r + 1])
def test_ranks_that_differ_are_refused(name, ranks):
    held = tensors()
    held[name] = torch.randn(E, ranks, held[name].shape[2])
    for call in (multiply, add):
        with pytest.raises(RoutingError, match="Kernel native"):
            call(held)


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


@pytest.mark.parametrize("chosen", [0, -1, E + 1, 2**40])
def test_more_experts_than_there_are_can_not_be_chosen(chosen):
    for call in (choose, add):
        with pytest.raises(RoutingError, match=f"k = {chosen}"):
            call(tensors(), chosen)


@pytest.mark.parametrize("name", ["y", "u", "vectors", "A", "B"])
def test_what_is_added_to_in_place_must_be_contiguous(name):
    held = tensors()
    held[name] = held[name].repeat_interleave(2, dim=-1)[..., ::2]
    with pytest.raises(RoutingError, match="contiguous"):
        add(held)


@pytest.mark.parametrize("name", ["u", "experts", "weights", "A", "B"])
def test_triton_is_not_handed_addresses_of_other_shapes_either(name):
    held = tensors()
    held[name] = held[name][..., :-1].contiguous()
    with pytest.raises((RoutingError, ConfigError), match="ernel triton"):
        triton_gpu(*(held[part] for part in ("u", "experts", "weights", "A", "B")))
