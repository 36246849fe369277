"""Tasks: their answers, validation splits and evaluation examples."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from phatgoose.tasks.task import Example, Task

EXAMPLES = (
    Example("Is it good?", "yes", ("yes", "no")),
    Example("Is it bad?", "no", ("yes", "no")),
)


def numbered(count: int) -> Task:
    return Task("task", tuple(Example(f"question {i}", f"{i}") for i in range(count)))


def test_accepted_answers_are_the_references_or_the_target():
    assert Example("q", "a").answers == ("a",)
    assert Example("q", "a", references=("a", "b")).answers == ("a", "b")


def test_a_given_validation_split_is_kept():
    task = Task("task", train=EXAMPLES, validation=EXAMPLES[:1])
    assert task.with_validation() is task
    assert task.validation_origin == "given"


@settings(max_examples=30)
@given(st.integers(2, 80), st.integers(0, 5))
def test_a_made_validation_split_takes_from_training_and_loses_nothing(count, seed):
    task = numbered(count)
    split = task.with_validation(seed)
    assert split.train
    assert split.validation
    assert sorted(split.train + split.validation, key=str) == sorted(task.train, key=str)
    assert split == task.with_validation(seed)


def test_a_made_validation_split_has_at_most_500_examples():
    assert len(numbered(6000).with_validation().validation) == 500


def test_evaluation_takes_test_then_validation_then_train():
    task = Task("task", train=EXAMPLES, validation=EXAMPLES[:1], test=EXAMPLES[1:])
    assert task.evaluation_examples() == EXAMPLES[1:]
    assert replace(task, test=()).evaluation_examples() == EXAMPLES[:1]
    assert replace(task, test=(), validation=()).evaluation_examples() == EXAMPLES
