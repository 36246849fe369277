"""The operator of routed layers: one node for torch.compile, and our own layers' numbers."""

import pytest
import torch

from phatgoose.routing.kernels.plain import reference
from phatgoose.routing.routers.phatgoose import standardise
from phatgoose_vllm import op
from routed_models import by_vectors
from tiny import random

N, E, R = 24, 6, 4
WIDTHS = (16, 8, 8)


def made(rule, widths=WIDTHS, seed=0, split=None):
    """The tensors of a packed layer's sites, and the place of their update."""
    tensors, sites, first = [], [], 0
    for index, width in enumerate(widths):
        vectors = standardise(random(E, N, seed=seed + index))
        factors = (
            random(E, R, N, seed=seed + index + 10),
            random(E, R, width, seed=seed + index + 20),
        )
        tensors += [vectors, *factors]
        router = rule(vectors)
        numbers = {"k": router.k, "eps": router.eps}
        sites.append(op.SiteUpdate(router.router, numbers, ("vectors",), first, width))
        first += width
    update = op.LayerUpdate(tuple(sites), split)
    return tensors, op.place_of_update(object(), lambda: update)


RULES = {
    "phatgoose": lambda v: by_vectors("phatgoose", v),
    "arrow": lambda v: by_vectors("arrow", v),
    "all": lambda v: by_vectors("phatgoose", v, E),
}


def wanted_of(rule, u, tensors, product=reference):
    parts = []
    for at in range(0, len(tensors), 3):
        vectors, A, B = tensors[at : at + 3]
        decision = rule(vectors)(u)
        parts.append(product(u, decision.experts, decision.weights, A, B))
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize("widths", [WIDTHS, (12,)], ids=["packed", "alone"])
@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize("name", RULES)
def test_each_site_of_a_packed_layer_gets_its_own_experts(name, tokens, widths):
    tensors, update = made(RULES[name], widths)
    u, y = random(tokens, N, seed=7), random(tokens, sum(widths), seed=8)
    before = y.clone()
    with torch.inference_mode():
        op.add_routed(y, u, tensors, update)
    torch.testing.assert_close(y - before, wanted_of(RULES[name], u, tensors), rtol=1e-4, atol=1e-4)


def test_a_layer_split_over_processes_sums_the_scores_and_nothing_else():
    """Two processes, one after the other: what each adds, summed, is the whole layer's update."""
    rule, u = RULES["phatgoose"], random(9, N, seed=7)
    tensors, _ = made(rule, (16,))
    vectors, A, B = tensors
    halves = [slice(0, N // 2), slice(N // 2, N)]
    seen = []

    def noted(mine):
        seen.append(mine)
        return mine

    def mine_of(half):
        return [vectors[:, half].contiguous(), A[..., half].contiguous(), B]

    _, update = made(rule, (16,), split=op.Split(N, noted))
    for half in halves:  # what each process would sum
        op.add_routed(torch.zeros(9, 16), u[:, half].contiguous(), mine_of(half), update)
    scores, total = sum(seen), torch.zeros(9, 16)
    _, update = made(rule, (16,), split=op.Split(N, lambda _: scores))
    for half in halves:
        y = torch.zeros(9, 16)
        op.add_routed(y, u[:, half].contiguous(), mine_of(half), update)
        total += y
    assert [each.shape for each in seen] == [(9, E + 2)] * 2
    torch.testing.assert_close(total, wanted_of(rule, u, tensors), rtol=1e-4, atol=1e-4)


def test_compiled_it_is_one_node_and_the_same_numbers():
    rule = RULES["phatgoose"]
    tensors, update = made(rule)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    def layer(u, weight):
        y = u @ weight
        torch.ops.phatgoose.add_routed(y, u, tensors, update)
        return y.relu()

    u, weight = random(5, N, seed=7), random(N, sum(WIDTHS), seed=9)
    with torch.inference_mode():
        got = torch.compile(layer, backend=backend, fullgraph=True)(u, weight)
        assert torch.equal(got, layer(u, weight))
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert len(graphs) == 1
    assert sum("add_routed" in target for target in targets) == 1
    assert not [t for t in targets if "topk" in t or "softmax" in t]


def test_torch_finds_the_operator_well_made():
    tensors, update = made(RULES["phatgoose"])
    arguments = (random(5, sum(WIDTHS)), random(5, N), tensors, update)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.phatgoose.add_routed.default, arguments, test_utils=tests)
