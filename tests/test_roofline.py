"""The roofline of the Triton programs: what is noted down is what is launched and moved."""

from __future__ import annotations

import pytest

from paths import ROOT

PERFORMANCE = ROOT / "research" / "performance.md"


@pytest.fixture
def roofline(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import roofline

    return roofline


def test_few_tokens_take_three_launches_and_many_eight_or_nine(roofline):
    def names(way, tokens, experts):
        linear = roofline.Linear(64, 32, tokens, experts)
        return [launch.program for launch in roofline.launches_of(way, linear)]

    few = ["score_experts", "shrink_pair", "expand_token"]
    grouped = ["torch.zeros", "count_pairs", "arrange_experts", "place_pairs"]
    blocks = [*grouped, "shrink_block", "expand_block", "add_choices"]
    assert names(roofline.in_one_call, 16, 36) == names(roofline.in_one_call, 16, 166) == few
    assert names(roofline.in_one_call, 2048, 36) == ["score_and_choose", *blocks]
    scored = ["score_experts", "choose_experts"]
    assert names(roofline.in_one_call, 2048, 166) == [*scored, *blocks]
    assert names(roofline.apart, 16, 36) == ["score_and_choose", *few[1:], "torch.add"]
    assert names(roofline.apart, 2048, 166) == [*scored, *blocks, "torch.add"]


def test_bytes_and_products_are_those_of_the_tensors(roofline):
    linear = roofline.Linear(n=64, d=32, tokens=1, experts=4)
    scores, shrink, expand = roofline.launches_of(roofline.in_one_call, linear)
    u, vectors, of_a_token = 2 * 64, 2 * 4 * 64, 2 * (8 + 4)  # index and weight of two experts
    assert scores.moved == u + vectors + 4 * 4
    inner, factors = 2 * 16 * 4, 2 * 16 * 2  # of the two experts that one token has
    assert shrink.moved == pytest.approx(u + 4 * 4 + of_a_token + factors * 64 + inner)
    assert expand.moved == pytest.approx(inner + of_a_token + factors * 32 + 2 * 2 * 32)
    assert [each.products for each in (scores, shrink, expand)] == [256, 2048, 1024]


def test_a_launch_takes_as_long_as_the_slower_of_both(roofline):
    by_bytes = roofline.Launch.of("x", 3.35e12, 1, on_tensor_cores=True)
    by_products = roofline.Launch.of("x", 1, 989e12, on_tensor_cores=True)
    assert (by_bytes.seconds, by_products.seconds) == (1, 2)


def test_the_tables_of_the_documentation_are_what_it_prints(roofline):
    written = PERFORMANCE.read_text(encoding="utf-8")
    for phase, tokens in roofline.PHASES.items():
        assert f"{phase}:" in written
        assert roofline.table(tokens) in written, "run benchmarks/roofline.py and paste its tables"
