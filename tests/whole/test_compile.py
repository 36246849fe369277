"""torch.compile sees through routed layers: one graph, and the numbers of the eager model.

The backends here need no compiler; on CPUs torch's kernels take the native one's place in a graph.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from architectures import Tiny, make_tiny
from phatgoose.experts.lora import LoraStack
from phatgoose.routing.compose import compose
from phatgoose.routing.layers import RoutedLinear
from phatgoose.routing.routers.phatgoose import standardise
from phatgoose.routing.stacks import SiteStack
from phatgoose.sites import Site
from routed_models import by_vectors
from tiny import assert_same_logits, logits_of, make_ids, make_model

SITE = Site("linear", in_features=16, out_features=24, stream="decoder")
EXPERTS = 50
ROUTERS = ("phatgoose", "arrow", "merged")
each_backend = pytest.mark.parametrize("backend", ["eager", "aot_eager"])


@pytest.fixture(autouse=True)
def _forget_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees the graphs of another; the eager layers use the kernels that graphs do."""
    monkeypatch.setattr("phatgoose.routing.kernels.native.runs_natively", lambda *_: False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_stack(dtype: torch.dtype) -> SiteStack:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(EXPERTS, 8, SITE.in_features, generator=generator).to(dtype)
    B = torch.randn(EXPERTS, 8, SITE.out_features, generator=generator).to(dtype)
    return SiteStack(torch.arange(EXPERTS), {"lora": LoraStack(A, B)})


def make_layer(router: str, dtype: torch.dtype = torch.float32) -> RoutedLinear:
    stack = make_stack(dtype)
    vectors = torch.randn(EXPERTS, SITE.in_features, generator=torch.Generator().manual_seed(1))
    chosen = by_vectors(router, standardise(vectors)).to(dtype)
    base = nn.Linear(SITE.in_features, SITE.out_features, dtype=dtype)
    return RoutedLinear(base, SITE, stack, chosen)


def assert_one_graph(layer: nn.Module, u: Tensor, backend: str) -> None:
    """`layer` compiles to one graph (fullgraph raises where it doesn't) with its own numbers."""
    with torch.no_grad():
        wanted = layer(u)
        got = torch.compile(layer, fullgraph=True, backend=backend, dynamic=False)(u)
    slack = 4 * torch.finfo(u.dtype).eps * float(wanted.abs().max())
    torch.testing.assert_close(got, wanted, rtol=0, atol=slack)


@each_backend
@pytest.mark.parametrize("router", ROUTERS)
def test_a_routed_linear_is_one_graph(router, backend):
    assert_one_graph(make_layer(router), torch.randn(2, 5, SITE.in_features), backend)


@pytest.mark.parametrize("router", ["phatgoose", "arrow", "merged"])
def test_a_whole_routed_llama_is_one_graph(router, llama_pool):
    model, ids = compose(llama_pool, make_model("llama"), router=router), make_ids(rows=2)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    inputs = {"use_cache": False, "attention_mask": mask}
    wanted = logits_of(model, ids, **inputs)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    assert_same_logits(logits_of(compiled, ids, **inputs), wanted)


def test_a_whole_routed_t5_is_one_graph():
    model, ids = Tiny(make_tiny("t5", num_layers=1)).routed, make_ids(rows=2)
    inputs = {"attention_mask": (ids > 40).long(), "use_cache": False}
    wanted = logits_of(model, ids, **inputs)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    assert_same_logits(logits_of(compiled, ids, **inputs), wanted)
