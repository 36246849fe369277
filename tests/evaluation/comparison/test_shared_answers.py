"""Answers of single experts serve the rows that leave inputs to them."""

from __future__ import annotations

import pytest

from comparisons import TASKS, TOKENS, by_hand, cells_of
from phatgoose.config import Routing
from phatgoose.evaluation.comparison.cells import SharedAnswers
from phatgoose.evaluation.evaluate import EvaluationSet, ScoringSettings, score
from phatgoose.routing.compose import detach
from phatgoose.routing.composition import composition_of
from phatgoose.tasks.encoding import Encoder

pytestmark = pytest.mark.usefixtures("toy_embedder")
LEAVING = (
    "retrieval",
    "centroid",
    "discriminant",
    "joint-discriminant",
)  # each input to one expert


@pytest.mark.parametrize("router", LEAVING)
def test_shared_answers_are_those_of_the_model_itself(setting, tasks, llama, router):
    known = {}
    for name in ("e0", "e1", "e2"):
        alone = by_hand(name, setting, llama)
        known[name] = {each: result_of(alone, task, llama) for each, task in tasks.items()}
        detach(alone)
    model = by_hand(router, setting, llama, k=1)
    served = set()
    for name, task in tasks.items():
        chosen, encoder = of(task, llama)
        questions = chosen.questions(encoder)
        found = SharedAnswers(known).score(model, chosen, questions)
        wanted = score(model, chosen, questions)
        assert found is not None
        for part in ("task", "metric", "score", "n", "low", "high", "ties", "cuts"):
            assert getattr(found, part) == getattr(wanted, part), (name, part)
        for one, other in zip(found.predictions, wanted.predictions, strict=True):
            assert (one.answer, one.marks) == (other.answer, other.marks)
        served |= set(
            composition_of(model).context.choose(chosen.questions(encoder).prompts).lone().tolist()
        )
    assert len(served) > 1


def of(task, base) -> tuple[EvaluationSet, Encoder]:
    chosen = EvaluationSet.of(task, ScoringSettings(max_new_tokens=TOKENS))
    return chosen, Encoder.of(base)


def result_of(model, task, base) -> dict:
    """What the store holds of a cell, as far as it is shared."""
    chosen, encoder = of(task, base)
    predictions = score(model, chosen, chosen.questions(encoder)).predictions
    return {
        "answers": [each.answer for each in predictions],
        "tied": [i for i, each in enumerate(predictions) if each.tied],
    }


@pytest.mark.parametrize("router", ["phatgoose", "merged", "retrieval"])
def test_other_models_and_unknown_answers_share_nothing(setting, tasks, llama, router):
    model = by_hand(router, setting, llama)
    chosen, encoder = of(tasks["choose"], llama)
    questions = chosen.questions(encoder)
    everyones = {
        name: {"choose": {"answers": ["good"] * 9, "tied": []}} for name in setting.pool.names
    }
    shares = SharedAnswers(everyones).score(model, chosen, questions) is not None
    assert shares == (router == "retrieval")
    elsewhere = {name: {"pick": result["choose"]} for name, result in everyones.items()}
    for unknown in ({}, elsewhere, {"somebody": everyones["e0"]}):
        assert SharedAnswers(unknown).score(model, chosen, questions) is None


def test_a_comparison_shares_where_single_experts_are_scored(setting, tmp_path, computed):
    shared = setting.run(tmp_path / "shared", ["retrieval", "oracle"])
    assert computed == cells_of("e0", "e1", "e2")
    alone = setting.run(tmp_path / "alone", ["retrieval"])
    assert computed[12:] == cells_of("retrieval")
    for task in TASKS:
        one, other = shared.results["retrieval"][task], alone.results["retrieval"][task]
        assert (one.score, one.ties) == (other.score, other.ties)
        for mine, theirs in zip(one.sample.statistics, other.sample.statistics, strict=True):
            assert (mine == theirs).all()


def test_several_experts_an_input_are_scored_themselves(setting, tmp_path, computed):
    setting.run(tmp_path, ["retrieval", "oracle"], routing=Routing(k=2))
    assert computed == cells_of("e0", "e1", "e2", "retrieval")
