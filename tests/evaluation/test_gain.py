"""Gains: how much more an expert scores than its base, on rows that it wasn't trained on."""

from dataclasses import replace

import pytest

from phatgoose.errors import TaskError, WrongBaseError
from phatgoose.evaluation.gain import FEWEST_ROWS, gain_over_base, solved_rows
from phatgoose.experts.expert import Gain
from phatgoose.tasks.task import Example, Task
from scored_tasks import naive_scores
from tiny import peft_model

ROWS = tuple(Example(f"is {n} odd or even?", "odd", ("even", "odd")) for n in range(40))
MORE = tuple(Example(f"and {n}?", "even", ("even", "odd")) for n in range(40))


def right(model, base, example: Example) -> bool:
    scores = naive_scores(model, base, example)
    return example.choices[scores.index(max(scores))] == example.target


def test_a_gain_is_the_difference_of_right_answers_with_an_interval_in_pairs(llama, llama_pool):
    expert = llama_pool.experts[1]
    alone = peft_model(llama, expert.directory)
    by_expert = [right(alone, llama, row) for row in ROWS]
    by_base = [right(llama.model, llama, row) for row in ROWS]
    gain = gain_over_base(expert, llama, Task("odd", test=ROWS))
    differences = [ours - theirs for ours, theirs in zip(by_expert, by_base, strict=True)]
    assert len(set(differences)) > 1
    assert (gain.rows, gain.metric) == (40, "rank classification accuracy")
    assert gain.value == pytest.approx(sum(differences) / 40, abs=1e-12)
    assert gain.low < gain.value < gain.high
    assert [right(llama.model, llama, row) for row in ROWS] == by_base  # nothing is left on it


def test_an_expert_is_better_if_its_interval_is_above_0():
    assert Gain(0.4, 0.1, 0.7, 30, "exact match").is_sure
    assert not Gain(0.4, 0.0, 0.7, 30, "exact match").is_sure
    assert str(Gain(0.4, -0.02, 0.704, 30, "BLEU")) == "+40 points [-2, +70] on 30 rows"


def test_rows_that_the_expert_was_trained_on_do_not_count(llama_pool):
    expert = llama_pool.experts[0]
    mine = replace(expert, info=replace(expert.info, task={"source": "mine.jsonl"}))
    trained = Task("mine", train=ROWS, source="mine.jsonl")
    assert solved_rows(mine, trained) == trained.with_validation(0).validation
    assert solved_rows(mine, replace(trained, source="others.jsonl")) == ROWS
    assert solved_rows(mine, replace(trained, test=MORE)) == MORE
    many = tuple(replace(row, input=f"{row.input} {n}") for n in range(3) for row in ROWS)
    assert len(solved_rows(expert, Task("many", test=many))) == 100


def test_few_rows_and_other_bases_are_refused(llama, llama_pool, loaded_bases):
    few = Task("odd", test=ROWS[: FEWEST_ROWS - 1])
    with pytest.raises(TaskError, match=r"has 19 rows .* takes at least 20"):
        gain_over_base(llama_pool.experts[0], llama, few)
    with pytest.raises(WrongBaseError):
        gain_over_base(llama_pool.experts[0], loaded_bases["qwen2"], Task("odd", test=ROWS))
