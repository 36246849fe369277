"""Tasks: answers, validation splits, evaluation examples, and mixtures."""

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from phatgoose.tasks.task import Example, Task, draw, mix


def rows(name: str, count: int) -> tuple[Example, ...]:
    return tuple(Example(f"{name} {i}", str(i)) for i in range(count))


def make_task(name: str, train: int, validation: int = 0, test: int = 0) -> Task:
    return Task(name, rows(name, train), rows(f"{name} v", validation), rows(f"{name} t", test))


def origins(examples: tuple[Example, ...]) -> Counter[str]:
    return Counter(example.input.split()[0] for example in examples)


@settings(max_examples=30)
@given(st.integers(2, 80), st.integers(0, 5))
def test_a_made_validation_split_takes_from_training_and_loses_nothing(count, seed):
    task = make_task("task", count)
    split = task.with_validation(seed)
    assert split.train
    assert split.validation
    assert sorted(split.train + split.validation, key=str) == sorted(task.train, key=str)
    assert split == task.with_validation(seed)
    assert split.with_validation(9) is split  # one that is there is kept


def test_evaluation_takes_test_then_validation_then_train():
    task = make_task("task", 3, 2, 1)
    for part in ("test", "validation", "train"):
        assert task.evaluation_examples() == getattr(task, part) != ()
        task = replace(task, **{part: ()})


def test_validation_examples_are_those_a_task_has_or_would_set_apart():
    own, divided = make_task("a", 20, 3), make_task("b", 20)
    mixed = mix([own, divided], "both", seed=4)
    apart = divided.with_validation(4)
    assert set(mixed.validation) == {*own.validation, *apart.validation}
    assert mixed.train == own.train + apart.train
    assert "seed 4" in mixed.validation_origin


def test_no_task_has_most_of_the_validation_examples_because_it_is_large():
    tasks = [make_task("a", 9, 9000), make_task("b", 9, 2), make_task("c", 9, 600)]
    mixed = mix(tasks, "all")
    assert origins(mixed.validation) == {"a": 500, "b": 2, "c": 500}
    drawn = origins(draw(mixed.validation, 50, seed=0))
    assert min(drawn["a"], drawn["c"]) > 15
    assert mixed.validation[:500] != tasks[0].validation[:500]  # a draw, not the head of the file
