"""Mixtures: one task out of several, for the Multitask model."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phatgoose.errors import TaskError
from phatgoose.tasks.task import Example, Task, draw, mix


def rows(name: str, count: int) -> tuple[Example, ...]:
    return tuple(Example(f"{name} {i}", str(i)) for i in range(count))


def make_task(name: str, train: int, validation: int = 0, test: int = 0) -> Task:
    return Task(
        name,
        rows(name, train),
        rows(f"{name} validation", validation),
        rows(f"{name} test", test),
        source=f"{name}.jsonl",
    )


def origins(examples: tuple[Example, ...]) -> Counter[str]:
    return Counter(example.input.split()[0] for example in examples)


def test_a_mixture_holds_all_training_examples_of_all_tasks():
    mixed = mix([make_task("a", 3, 1), make_task("b", 5, 2)], "both")
    assert mixed.name == "both"
    assert mixed.train == rows("a", 3) + rows("b", 5)
    assert mixed.test == ()


def test_a_draw_depends_on_the_seed_alone():
    tasks = [make_task("a", 50, 1), make_task("b", 50, 1)]
    assert mix(tasks, "x", most=5) == mix(tasks, "x", most=5)
    assert mix(tasks, "x", most=5).train != mix(tasks, "x", most=5, seed=1).train
    assert mix(tasks, "x", most=5).train != mix(tasks, "x", most=5).train[::-1]
    inputs = [row.input for row in mix(tasks, "x", most=5).train[:5]]
    assert inputs != [f"a {i}" for i in range(5)]  # a draw, not the head of the file


def test_validation_examples_are_those_a_task_has_or_would_set_apart():
    own, divided = make_task("a", 20, 3), make_task("b", 20)
    mixed = mix([own, divided], "both", seed=4)
    apart = divided.with_validation(4)
    assert set(mixed.validation) == {*own.validation, *apart.validation}
    assert mixed.train == own.train + apart.train
    assert "seed 4" in mixed.validation_origin
    assert mixed.with_validation(9) is mixed


def test_no_task_has_most_of_the_validation_examples_because_it_is_large():
    tasks = [make_task("a", 9, 9000), make_task("b", 9, 2), make_task("c", 9, 600)]
    mixed = mix(tasks, "all")
    assert origins(mixed.validation) == {"a": 500, "b": 2, "c": 500}
    drawn = origins(draw(mixed.validation, 50, seed=0))
    assert min(drawn["a"], drawn["c"]) > 15
    assert mixed.validation[:500] != tasks[0].validation[:500]  # a draw, not the head of the file


@given(
    st.lists(st.tuples(st.integers(2, 30), st.integers(0, 5)), min_size=1, max_size=5),
    st.integers(1, 30),
)
def test_no_task_gives_more_than_it_has_or_than_the_cap(sizes, most):
    tasks = [make_task(f"t{i}", *size) for i, size in enumerate(sizes)]
    mixed = mix(tasks, "mix", most=most)
    wanted = {t.name: min(most, len(t.with_validation().train)) for t in tasks}
    assert origins(mixed.train) == wanted
    assert not set(mixed.train) & set(mixed.validation)


@pytest.mark.parametrize(
    ("tasks", "most", "complaint"),
    [
        ([], None, "no tasks"),
        ([make_task("a", 3, 1)], 0, "most is 0"),
        ([make_task("a", 3, 1), make_task("b", 0, 2)], None, "'b' has no training examples"),
        ([make_task("a", 3, 1), make_task("b", 1)], None, "'b' has 1 training examples"),
        ([make_task("a", 3, 1), make_task("b", 0, 0, 4)], None, "'b' has no training examples"),
    ],
)
def test_what_cannot_be_mixed_is_refused(tasks, most, complaint):
    with pytest.raises(TaskError, match=complaint):
        mix(tasks, "mix", most=most)
