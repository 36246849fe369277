"""Routers that don't look at their input: random, single, weights, and those by scores."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from odd_files import nested, one_line_of
from phatgoose.errors import ConfigError, PoolError, RoutingError
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.routing.compose import compose, composition_of, detach, load, save
from phatgoose.routing.routers.fixed import (
    Random,
    best_expert,
    best_expert_by_task,
    read_scores,
)
from phatgoose.routing.routers.router import SiteRouter
from routed_models import SCORES
from tiny import assert_same_logits, logits_of, make_ids
from topic_prompts import CHOOSING, OPEN, both_streams, by_single

NAMES = ("e0", "e1", "e2", "e3")


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


def test_evaluations_by_a_seed_are_repeated_to_the_bit(llama, llama_pool, tmp_path):
    def answers(model, *tasks):
        return [score.predictions for score in evaluate(model, tasks, max_new_tokens=5).scores]

    model = compose(llama_pool, llama, router="random:seed=1")
    drawn = [
        layer.router(torch.zeros(40, 8)).experts for layer in composition_of(model).layers.values()
    ]
    for i, one in enumerate(drawn):  # each site draws for itself
        assert not any(torch.equal(one, other) for other in drawn[i + 1 :])
    once = answers(model, CHOOSING, OPEN)
    logits_of(model, make_ids())
    assert answers(model, CHOOSING, OPEN) == once
    assert answers(model, OPEN) == once[1:]  # no task depends on those before it
    save(model, tmp_path / "routed")
    assert answers(load(tmp_path / "routed", dtype="float32"), CHOOSING, OPEN) == once


@pytest.mark.parametrize(
    ("chosen", "options"),
    [
        ("e2", {"router": "single:expert=e2"}),
        ("e3", {"router": "best-individual", "scores": SCORES}),
        ("e1", {"weights": {"e1": 1}}),
    ],
    ids=["single", "best-individual", "weights"],
)
def test_the_one_expert_is_that_expert_alone(base, pool, chosen, options):
    ids = make_ids(rows=2)
    (wanted,) = by_single(base, pool, [chosen], lambda model, _: logits_of(model, ids))
    model = compose(pool, base, **options)
    assert composition_of(model).experts == (chosen,)
    assert_same_logits(logits_of(model, ids), wanted)


def test_a_mixture_of_nothing_is_the_base(llama, llama_pool):
    plain = logits_of(llama.model, make_ids())
    assert_same_logits(logits_of(compose(llama_pool, llama, weights={"e1": 0}), make_ids()), plain)


FEW = {name: SCORES[name] for name in NAMES[:3]}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"router": "single"}, PoolError, "the name of its expert .*: one of e0, e1, e2, e3"),
        ({"router": "single:expert=e9"}, PoolError, "no expert 'e9'"),
        ({"weights": {"e9": 1}}, PoolError, "no expert 'e9'"),
        ({"weights": {"e0": math.nan}}, ConfigError, "numbers from -100 to 100"),
        ({"router": "oracle"}, ConfigError, "oracle needs the scores"),
        ({"router": "oracle", "scores": FEW}, PoolError, "'e3' lacks scores.* are of e0, e1, e2"),
    ],
)
def test_what_names_no_expert_is_refused(llama, llama_pool, options, error, message):
    with pytest.raises(error, match=message):
        compose(llama_pool, llama, **options)
    assert not hasattr(llama.model, "phatgoose")


# By scores


@both_streams
def test_the_oracle_scores_each_task_as_its_best_expert(base, pool):
    names, options = ("first", "second", "first"), {"max_new_tokens": 5}
    tasks = [replace(t, name=n) for t, n in zip((CHOOSING, CHOOSING, OPEN), names, strict=True)]
    got = evaluate(compose(pool, base, router="oracle", scores=SCORES), tasks, **options)
    detach(base.model)
    wanted = by_single(
        base, pool, ("e1", "e2", "e1"), lambda m, i: evaluate(m, tasks[i], **options).scores[0]
    )
    for one, other in zip(got.scores, wanted, strict=True):
        assert (one.task, one.metric, one.score) == (other.task, other.metric, other.score)
        for prediction, expected in zip(one.predictions, other.predictions, strict=True):
            assert prediction.answer == expected.answer
            assert prediction.scores == pytest.approx(expected.scores, abs=1e-4)
    assert got.scores[0].predictions != got.scores[1].predictions


@both_streams
def test_the_oracle_answers_nothing_but_its_tasks(base, pool):
    model = compose(pool, base, router="oracle", scores=SCORES)
    with pytest.raises(RoutingError, match="no scores for task 'open'; it has them for first, sec"):
        evaluate(model, OPEN)
    evaluate(model, replace(CHOOSING, name="second"))
    with pytest.raises(RoutingError, match="goes by the task's name"):  # which is over
        logits_of(model, make_ids())


def test_the_scores_of_a_comparison_are_read(tmp_path):
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps({"models": {"merged": 0.4}, "experts": SCORES, "tasks": []}))
    assert read_scores(path) == read_scores(str(path)) == SCORES


NO_SCORES = ["", "{", "[]", "3", "null", "{}", '{"models": {}}', b"\xff\xfe\x00", nested(100_000)]
NO_SCORES += [f'{{"experts": {odd}}}' for odd in ("null", "[]", "5", '{"e0": 0.5}', '{"e0": []}')]
NO_SCORES += [
    f'{{"experts": {{"e0": {{"t": {odd}}}}}}}' for odd in ("null", '"good"', "[0]", "NaN")
]


@pytest.mark.parametrize("content", NO_SCORES)
def test_a_file_without_scores_is_one_line(tmp_path, content):
    path = tmp_path / "c.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert "c.json" in one_line_of(lambda: read_scores(path), PoolError)


def test_the_best_expert_has_the_best_mean_or_the_best_score_on_a_task():
    assert best_expert(SCORES, NAMES) == "e3"
    assert best_expert(SCORES, ("e0", "e1", "e2")) == "e1"  # 0.45 each; the first of equals
    assert best_expert(SCORES, ("e2", "e1", "e0")) == "e2"
    assert best_expert_by_task(SCORES, NAMES) == {"first": "e1", "second": "e2"}
    assert best_expert_by_task(SCORES, ("e0", "e3")) == {"first": "e3", "second": "e3"}
    turned = {**SCORES, "e1": dict(reversed(SCORES["e1"].items()))}
    assert best_expert_by_task(turned, NAMES) == best_expert_by_task(SCORES, NAMES)
    for odd in ({"first": 0.1}, {**SCORES["e0"], "third": 0.2}, {}):
        with pytest.raises(PoolError, match="'e2' lacks scores, or was scored on other tasks"):
            best_expert({**SCORES, "e2": odd}, NAMES)
