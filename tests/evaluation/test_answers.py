"""Answers: log-likelihoods of choices, or generated text."""

from dataclasses import replace

import pytest
import torch

from oracle import naively_routed
from phatgoose.errors import EvaluationError
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.evaluation.likelihood import choice_log_likelihoods
from phatgoose.routing.compose import compose
from phatgoose.tasks.task import Example, Task
from scored_tasks import CHOICE_TASK, greedy_text, inputs_of, naive_scores, open_task
from tiny import logits_of


def test_ties_are_counted_and_the_first_choice_is_taken(llama):
    llama.model.lm_head.weight.data.zero_()  # all tokens equally likely
    examples = (
        Example("x", "cd", ("ab", "cd")),
        Example("y", "ef", ("ef", "gh")),
        Example("longer", "ef", ("ij", "ef", "gh")),
    )
    score = evaluate(llama, Task("ties", test=examples)).scores[0]
    assert [prediction.answer for prediction in score.predictions] == ["ab", "ef", "ij"]
    assert (score.ties, score.n) == (3, 3)
    assert score.score == pytest.approx(1 / 3)


@pytest.mark.parametrize("packed", [True, False])
def test_a_choice_listed_twice_ties_with_itself(base, packed, monkeypatch):
    if not packed:
        monkeypatch.setattr("phatgoose.tasks.batching.can_pack", lambda _: False)
    first = evaluate(base, CHOICE_TASK).scores[0].predictions
    twice = tuple(
        replace(e, choices=(*e.choices, p.answer))
        for e, p in zip(CHOICE_TASK.test, first, strict=True)
    )
    score = evaluate(base, replace(CHOICE_TASK, test=twice)).scores[0]
    assert [p.answer for p in score.predictions] == [p.answer for p in first]
    assert score.ties == score.n


@pytest.mark.parametrize("budget", [1, 4096])
def test_open_tasks_are_scored_by_generation_and_exact_match(base, budget):
    task = open_task(base, tokens=5)
    score = evaluate(base, task, max_new_tokens=5, token_budget=budget).scores[0]
    assert [p.answer for p in score.predictions[:3]] == [e.target for e in task.test[:3]]
    assert [p.correct for p in score.predictions] == [True, True, True, False]
    assert (score.metric, score.score, score.ties) == ("exact match", 0.75, 0)


@pytest.mark.parametrize("kind", ["gpt2", "t5"], indirect=True)
def test_dropout_plays_no_part(base):
    base.model.train()
    one, other = (inputs_of(CHOICE_TASK, evaluate(base, CHOICE_TASK)) for _ in range(2))
    assert one == other


@pytest.mark.parametrize("kind", ["llama", "t5"], indirect=True)
def test_a_task_bounds_its_own_answers(base):
    examples = tuple(Example(text, "x") for text in ("a", "some longer text", "b c d"))
    tasks = [
        Task("own", test=examples, max_new_tokens=2),
        Task("the rest", test=examples),
        Task("long", test=examples, max_new_tokens=9),
    ]
    scores = evaluate(base, tasks, max_new_tokens=4).scores
    for score, tokens in zip(scores, (2, 4, 9), strict=True):
        answers = [prediction.answer for prediction in score.predictions]
        assert answers == [greedy_text(base.model, base, e.input, tokens) for e in examples]
    usual = evaluate(base, tasks[1]).scores[0].predictions[0].answer
    assert usual == greedy_text(base.model, base, "a", 64)


@pytest.mark.parametrize("budget", [1, 90, 4096])
def test_rank_classification_is_the_naive_one(base, budget):
    score = evaluate(base, CHOICE_TASK, token_budget=budget).scores[0]
    right = 0
    for example, prediction in zip(CHOICE_TASK.test, score.predictions, strict=True):
        wanted = naive_scores(base.model, base, example)
        assert prediction.scores == pytest.approx(wanted, abs=1e-4)
        assert prediction.answer == example.choices[wanted.index(max(wanted))]
        assert prediction.correct == (prediction.answer == example.target)
        right += prediction.correct
    assert (score.score, score.n) == (right / 5, 5)
    assert score.metric == "rank classification accuracy"


@pytest.mark.parametrize("budget", [1, 4096])
def test_a_model_that_cannot_be_packed_is_scored_alike(llama, monkeypatch, budget):
    wanted = evaluate(llama, CHOICE_TASK).scores[0].predictions
    monkeypatch.setattr("phatgoose.tasks.batching.can_pack", lambda _: False)
    got = evaluate(llama, CHOICE_TASK, token_budget=budget).scores[0].predictions
    for one, other in zip(got, wanted, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-5)


def test_a_prompt_without_tokens_is_refused(llama):
    with pytest.raises(EvaluationError, match="no tokens"):
        list(choice_log_likelihoods(llama.model, [([], [[7], [9]])], 0, 100))


def test_a_routed_model_is_scored_as_the_naively_routed_one(base, pool):
    with naively_routed(base.model, pool.experts, k=2):
        wanted = [naive_scores(base.model, base, example) for example in CHOICE_TASK.test]
    score = evaluate(compose(pool, base, router="phatgoose"), CHOICE_TASK).scores[0]
    for prediction, scores in zip(score.predictions, wanted, strict=True):
        assert prediction.scores == pytest.approx(scores, abs=1e-4)


def test_choices_of_a_single_token_need_no_second_pass(base):
    prompt = base.tokenizer("is it?")["input_ids"]
    ((index, scores),) = choice_log_likelihoods(base.model, [(prompt, [[7], [9], [1]])], 0, 100)
    if base.is_encoder_decoder:
        start = torch.tensor([[0]])
        row = logits_of(base.model, torch.tensor([prompt]), decoder_input_ids=start)[0, -1]
    else:
        row = logits_of(base.model, torch.tensor([prompt]))[0, -1]
    assert index == 0
    assert scores == pytest.approx(row.log_softmax(-1)[[7, 9, 1]].tolist(), abs=1e-5)
