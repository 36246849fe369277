"""Answers: the best choice or generated text."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import pytest
from transformers import GenerationConfig

from phatgoose.evaluation.evaluate import evaluate
from phatgoose.tasks.task import Example, Task
from scored_tasks import CHOICE_TASK, greedy_text, inputs_of, open_task


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


def test_the_head_gets_rows_that_lie_together_when_answers_are_written(llama):
    layouts = []
    head = llama.model.get_output_embeddings()
    written = Task("written", train=tuple(Example(text, "x") for text in ("a b", "c d", "e f")))
    answers = evaluate(llama, written, max_new_tokens=2).scores[0].predictions
    with ExitStack() as stack:
        hook = head.register_forward_hook(
            lambda _, inputs, output: layouts.append((len(output), inputs[0].is_contiguous()))
        )
        stack.callback(hook.remove)
        again = evaluate(llama, written, max_new_tokens=2).scores[0].predictions
    assert {rows for rows, _ in layouts} == {3}
    assert all(together for _, together in layouts)
    assert again == answers


def test_evaluation_writes_the_likeliest_answers(base):
    task = open_task(base, tokens=5)
    base.model.generation_config = GenerationConfig(
        repetition_penalty=1.3, suppress_tokens=[0, *range(3, 100)], eos_token_id=1
    )
    answers = evaluate(base, task, max_new_tokens=5).scores[0].predictions
    assert [p.correct for p in answers] == [True, True, True, False]
