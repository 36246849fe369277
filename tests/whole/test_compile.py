"""torch.compile sees through routed layers: one graph, and the numbers of the eager model.

The backends here need no compiler; on CPUs torch's kernels take the native one's place in a graph.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from architectures import Tiny, make_tiny
from phatgoose.experts.lora import LoraStack
from phatgoose.routing.layers import RoutedLinear
from phatgoose.routing.routers.phatgoose import standardise
from phatgoose.routing.stacks import SiteStack
from phatgoose.sites import Site
from routed_models import by_vectors
from tiny import assert_same_logits, logits_of, make_ids, random

SITE = Site("linear", in_features=16, out_features=24, stream="decoder")
EXPERTS = 50


@pytest.fixture(autouse=True)
def _forget_graphs(no_native: None) -> Iterator[None]:
    """No test sees the graphs of another; the eager layers use the kernels that graphs do."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("router", ["phatgoose", "arrow", "merged"])
def test_a_routed_linear_is_one_graph(router, backend):
    """fullgraph raises where there are several."""
    A, B = random(EXPERTS, 8, SITE.in_features), random(EXPERTS, 8, SITE.out_features, seed=1)
    stack = SiteStack(torch.arange(EXPERTS), {"lora": LoraStack(A, B)})
    chosen = by_vectors(router, standardise(random(EXPERTS, SITE.in_features, seed=2)))
    layer = RoutedLinear(nn.Linear(SITE.in_features, SITE.out_features), SITE, stack, chosen)
    u = torch.randn(2, 5, SITE.in_features)
    with torch.no_grad():
        wanted = layer(u)
        got = torch.compile(layer, fullgraph=True, backend=backend, dynamic=False)(u)
    slack = 4 * torch.finfo(u.dtype).eps * float(wanted.abs().max())
    torch.testing.assert_close(got, wanted, rtol=0, atol=slack)


@pytest.mark.parametrize(("name", "layers"), [("llama", "num_hidden_layers"), ("t5", "num_layers")])
def test_a_whole_routed_model_is_one_graph(name, layers):
    model, ids = Tiny(make_tiny(name, **{layers: 1})).routed, make_ids(rows=2)
    inputs = {"attention_mask": (ids > 40).long(), "use_cache": False}
    wanted = logits_of(model, ids, **inputs)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    assert_same_logits(logits_of(compiled, ids, **inputs), wanted)
