"""Routers that don't look at their input: random, single, weights, best-individual."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from phatgoose.base import load_base
from phatgoose.errors import ConfigError, PoolError
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from phatgoose.routing.routers.fixed import Random
from phatgoose.routing.routers.router import SiteRouter
from phatgoose.routing.saved import load, save
from phatgoose.tasks.task import Example, Task
from routed_models import SCORES
from tiny import assert_same_logits, logits_of, make_ids
from topic_prompts import by_single

CHOOSING = Task(
    "choosing",
    test=tuple(Example(f"input {i}", "yes", ("yes", "no", "who knows")) for i in range(5)),
)
OPEN = Task("open", test=tuple(Example(f"some input {i}", "no") for i in range(4)))


def random_router(experts: int, k: int, seed: int = 0) -> SiteRouter:
    return SiteRouter(Random(k=k, seed=seed), "site", torch.arange(experts), experts, {})


def test_every_set_of_experts_is_as_likely():
    decision = random_router(4, 2)(torch.zeros(6000, 8))
    counts = Counter(tuple(sorted(row)) for row in decision.experts.tolist())
    assert len(counts) == 6
    assert all(abs(count - 1000) < 4 * (6000 / 6 * 5 / 6) ** 0.5 for count in counts.values())


def test_what_is_drawn_depends_on_the_seed_and_goes_on_until_it_starts_anew():
    u, router = torch.zeros(40, 8), random_router(4, 2, seed=3)
    first, second = router(u).experts, router(u).experts
    assert not torch.equal(first, second)
    router.restart()
    halves = torch.cat([router(u[:10]).experts, router(u[10:]).experts])
    assert torch.equal(halves, first)  # by the number of tokens, not of passes
    state = torch.get_rng_state()
    assert torch.equal(random_router(4, 2, seed=3)(u).experts, first)
    assert torch.equal(torch.get_rng_state(), state)  # chance elsewhere is left alone
    assert not torch.equal(random_router(4, 2, seed=4)(u).experts, first)


def test_sites_draw_apart(llama, llama_pool):
    layers = composition_of(compose(llama_pool, llama, router="random")).layers
    drawn = [layer.router(torch.zeros(40, 8)).experts for layer in layers.values()]
    for i, one in enumerate(drawn):
        assert not any(torch.equal(one, other) for other in drawn[i + 1 :])


def answers(model, **options):
    result = evaluate(model, [CHOOSING, OPEN], max_new_tokens=5, **options)
    return [score.predictions for score in result.scores]


@pytest.mark.parametrize("kind", ["llama", "t5"], indirect=True)
def test_evaluations_by_a_seed_are_repeated_to_the_bit(base, pool, tmp_path):
    seen = {}
    for seed in (0, 1):
        model = compose(pool, base, router=f"random:seed={seed}")
        once = seen[seed] = answers(model)
        logits_of(model, make_ids())
        assert answers(model) == once
        (alone,) = evaluate(model, OPEN, max_new_tokens=5).scores
        assert alone.predictions == once[1]  # no task depends on those before it
        save(model, tmp_path / str(seed))
        assert answers(load(tmp_path / str(seed), dtype="float32")) == once
        detach(model)
    assert seen[0] != seen[1]


def test_single_is_the_expert_it_names(base, pool):
    ids = make_ids(rows=2)
    for name in ("e0", "e2"):
        wanted = logits_of(compose(pool.select([name]), base, k=1, router="phatgoose"), ids)
        detach(base.model)
        model = compose(pool, base, router=f"single:expert={name}")
        assert composition_of(model).experts == (name,)
        assert_same_logits(logits_of(model, ids), wanted)
        detach(model)


@pytest.mark.parametrize(
    ("router", "options", "message"),
    [
        ("single", {}, "the name of its expert .*: one of e0, e1, e2, e3"),
        ("single:expert=e9", {}, "no expert 'e9'"),
        ("single:expert=e1", {"leave_out": ["e1"]}, "no expert 'e1'"),
    ],
)
def test_single_needs_a_name_unless_there_is_one_expert(
    llama, llama_pool, router, options, message
):
    with pytest.raises(PoolError, match=message):
        compose(llama_pool, llama, router=router, **options)
    model = compose(llama_pool, llama, router="single", keep=["e1"])
    assert composition_of(model).experts == ("e1",)


@pytest.mark.parametrize(
    ("options", "chosen"),
    [({}, "e3"), ({"leave_out": ["e3"]}, "e1"), ({"keep": ["e0"]}, "e0")],
    ids=["of all", "of some", "of one"],
)
def test_best_individual_is_the_expert_of_the_best_mean(llama, llama_pool, options, chosen):
    ids = make_ids(rows=2)
    (wanted,) = by_single(llama, llama_pool, [chosen], lambda model, _: logits_of(model, ids))
    model = compose(llama_pool, llama, router="best-individual", scores=SCORES, **options)
    assert composition_of(model).experts == (chosen,)
    assert torch.equal(logits_of(model, ids), wanted)


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        ({"e9": 1}, PoolError),
        ({"e0": math.nan}, ConfigError),
        ({"e0": 1e9}, ConfigError),
    ],
)
def test_odd_mixtures_are_refused(llama_pool, weights, error):
    with pytest.raises(error):
        compose(llama_pool, weights=weights)


def test_a_mixture_of_one_is_that_expert_times_its_weight(llama, llama_pool):
    base = load_base(llama_pool.base.id, dtype="float32")
    ids = make_ids()
    alone = logits_of(compose(llama_pool, base, router="single:expert=e1"), ids)
    base = load_base(llama_pool.base.id, dtype="float32")
    assert_same_logits(logits_of(compose(llama_pool, base, weights={"e1": 1}), ids), alone)
    base = load_base(llama_pool.base.id, dtype="float32")
    plain = logits_of(base.model, ids)
    assert_same_logits(logits_of(compose(llama_pool, base, weights={"e1": 0}), ids), plain)
