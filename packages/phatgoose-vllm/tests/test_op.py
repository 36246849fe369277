"""The operator of routed layers: one node for torch.compile, and our own layers' numbers."""

import pytest
import torch

from phatgoose.routing.kernels.plain import reference
from phatgoose.routing.routers.phatgoose import standardise
from phatgoose_vllm import op
from routed_models import by_vectors
from tiny import random

N, E, R = 24, 6, 4
PACKED = (16, 8, 8)  # outputs of a layer's sites


def layer_of(router, widths=PACKED, split=None):
    """The tensors of a packed layer's sites, and the place of their update."""
    tensors, sites = [], []
    for index, width in enumerate(widths):
        vectors = standardise(random(E, N, seed=index))
        A, B = random(E, R, N, seed=index + 10), random(E, R, width, seed=index + 20)
        tensors += [vectors, A, B]
        rule = router(vectors)
        numbers = {"k": rule.k, "eps": rule.eps}
        first = sum(widths[:index])
        sites.append(op.SiteUpdate(rule.router, numbers, ("vectors",), first, width))
    update = op.LayerUpdate(tuple(sites), split)
    return tensors, op.place_of_update(object(), update)


ROUTERS = {
    "phatgoose": lambda v: by_vectors("phatgoose", v),
    "arrow": lambda v: by_vectors("arrow", v),
    "all": lambda v: by_vectors("phatgoose", v, E),
}


def wanted_of(router, u, tensors):
    parts = []
    for vectors, A, B in zip(*[iter(tensors)] * 3, strict=True):
        decision = router(vectors)(u)
        parts.append(reference(u, decision.experts, decision.weights, A, B))
    return torch.cat(parts, dim=-1)


def assert_close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("widths", [PACKED, (12,)], ids=["packed", "alone"])
@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_each_site_of_a_packed_layer_gets_its_own_experts(router, tokens, widths):
    tensors, update = layer_of(router, widths)
    u, y = random(tokens, N, seed=7), random(tokens, sum(widths), seed=8)
    before = y.clone()
    with torch.inference_mode():
        op.add_routed(y, u, tensors, update)
    assert_close(y - before, wanted_of(router, u, tensors))


def test_a_layer_split_over_processes_sums_the_scores_and_nothing_else():
    """Two processes, one after the other: what each adds, summed, is the whole layer's update."""
    router, u, seen = ROUTERS["phatgoose"], random(9, N, seed=7), []
    halves = slice(0, N // 2), slice(N // 2, N)

    def noted(scores):
        seen.append(scores)
        return scores

    def added(half, split):
        (vectors, A, B), update = layer_of(router, (16,), split)
        mine = [vectors[:, half].contiguous(), A[..., half].contiguous(), B]
        y = torch.zeros(9, 16)
        op.add_routed(y, u[:, half].contiguous(), mine, update)
        return y

    for half in halves:  # what each process would sum
        added(half, op.Split(N, noted))
    assert [each.shape for each in seen] == [(9, E + 2)] * 2
    total = sum(added(half, op.Split(N, lambda _: sum(seen))) for half in halves)
    assert_close(total, wanted_of(router, u, layer_of(router, (16,))[0]))


def test_compiled_it_is_one_node_and_the_same_numbers():
    tensors, update = layer_of(ROUTERS["phatgoose"])
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    def layer(u, weight):
        y = u @ weight
        torch.ops.phatgoose.add_routed(y, u, tensors, update)
        return y.relu()

    u, weight = random(5, N, seed=7), random(N, sum(PACKED), seed=9)
    with torch.inference_mode():
        got = torch.compile(layer, backend=backend, fullgraph=True)(u, weight)
        assert torch.equal(got, layer(u, weight))
    (graph,) = graphs
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("add_routed" in target for target in targets) == 1
    assert not [t for t in targets if "topk" in t or "softmax" in t]


def test_torch_finds_the_operator_well_made():
    tensors, update = layer_of(ROUTERS["phatgoose"])
    arguments = (random(5, sum(PACKED)), random(5, N), tensors, update)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.phatgoose.add_routed.default, arguments, test_utils=tests)
