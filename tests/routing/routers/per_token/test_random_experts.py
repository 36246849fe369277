"""Router random: chance, but the same chance every time."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from phatgoose.evaluation.evaluate import evaluate
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from phatgoose.routing.recording import record
from phatgoose.routing.routers.random import RandomRouter
from phatgoose.routing.saved.load import load
from phatgoose.routing.saved.save import save
from phatgoose.tasks.task import Example, Task
from tiny import logits_of, make_ids

SITE = "model.layers.0.self_attn.o_proj"  # of the tiny Llama
CHOOSING = Task(
    "choosing",
    test=tuple(Example(f"input {i}", "yes", ("yes", "no", "who knows")) for i in range(5)),
)
OPEN = Task("open", test=tuple(Example(f"some input {i}", "no") for i in range(4)))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_k_different_experts_act_with_equal_weights(k):
    decision = RandomRouter(4, k, seed=0)(torch.zeros(50, 8))
    assert decision.experts.shape == (50, k)
    assert all(len(set(row)) == k for row in decision.experts.tolist())
    assert set(decision.experts.flatten().tolist()) == {0, 1, 2, 3}
    assert torch.equal(decision.weights, torch.full((50, k), 1 / k))


def test_k_is_lowered_to_the_experts_of_the_site():
    assert RandomRouter(2, 3, seed=0)(torch.zeros(5, 8)).experts.shape == (5, 2)
    assert RandomRouter(2, 3, seed=0)(torch.zeros(0, 8)).experts.shape == (0, 2)


def test_every_set_of_experts_is_as_likely():
    decision = RandomRouter(4, 2, seed=0)(torch.zeros(6000, 8))
    counts = Counter(tuple(sorted(row)) for row in decision.experts.tolist())
    assert len(counts) == 6
    assert all(abs(count - 1000) < 4 * (6000 / 6 * 5 / 6) ** 0.5 for count in counts.values())


def test_what_is_drawn_depends_on_the_seed_and_goes_on_until_it_starts_anew():
    u, router = torch.zeros(40, 8), RandomRouter(4, 2, seed=3)
    first, second = router(u).experts, router(u).experts
    assert not torch.equal(first, second)
    router.restart()
    assert torch.equal(router(u).experts, first)
    router.restart()
    halves = torch.cat([router(u[:10]).experts, router(u[10:]).experts])
    assert torch.equal(halves, first)  # by the number of tokens, not of passes
    assert torch.equal(RandomRouter(4, 2, seed=3)(u).experts, first)
    assert not torch.equal(RandomRouter(4, 2, seed=4)(u).experts, first)


def test_chance_elsewhere_plays_no_part_and_is_left_alone():
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    one = RandomRouter(4, 2, seed=3)(torch.zeros(9, 8)).experts
    assert torch.equal(torch.rand(3), wanted)
    assert torch.equal(RandomRouter(4, 2, seed=3)(torch.zeros(9, 8)).experts, one)


def test_sites_draw_apart(llama, llama_pool):
    layers = composition_of(compose(llama_pool, llama, router="random")).layers
    drawn = [layer.router(torch.zeros(40, 8)).experts for layer in layers.values()]
    for i, one in enumerate(drawn):
        assert not any(torch.equal(one, other) for other in drawn[i + 1 :])


def answers(model, **options):
    result = evaluate(model, [CHOOSING, OPEN], max_new_tokens=5, **options)
    return [score.predictions for score in result.scores]


@pytest.mark.parametrize("kind", ["llama", "t5"], indirect=True)
def test_evaluations_are_repeated_to_the_bit(base, pool, tmp_path):
    model = compose(pool, base, router="random")
    once = answers(model)
    assert answers(model) == once
    logits_of(model, make_ids())
    assert answers(model) == once
    (alone,) = evaluate(model, OPEN, max_new_tokens=5).scores
    assert alone.predictions == once[1]  # no task depends on those before it
    save(model, tmp_path / "routed")
    assert answers(load(tmp_path / "routed", dtype="float32")) == once


def test_another_seed_is_another_model(llama, llama_pool, tmp_path):
    seen = {}
    for seed in (0, 1):
        model = compose(llama_pool, llama, router="random", router_seed=seed)
        with record(model) as recording:
            seen[seed] = answers(model)
        for weights, real in zip(recording.weights[SITE], recording.real[SITE], strict=True):
            assert (weights[real] > 0).sum(dim=-1).eq(2).all()
        save(model, tmp_path / str(seed))
        again = load(tmp_path / str(seed), dtype="float32")
        assert composition_of(again).routing.router_seed == seed
        assert answers(again) == seen[seed]
        detach(model)
    assert seen[0] != seen[1]
