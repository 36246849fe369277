"""The examples of a task whose tokens are counted."""

from __future__ import annotations

import warnings

from phatgoose.tasks.encoding import Encoder
from phatgoose.tasks.task import Example, Task
from phatgoose.training.planning.sample import SAMPLE, pairs_of, sample_of


def task_of(count: int) -> Task:
    return Task("counting", train=tuple(Example(str(i), "yes") for i in range(count)))


def test_a_sample_is_drawn_by_seed_and_of_a_bounded_size():
    task = task_of(SAMPLE + 50)
    drawn = sample_of(task, 3)
    assert len(set(drawn)) == SAMPLE
    assert set(drawn) <= set(task.train)
    assert drawn == sample_of(task, 3)
    assert drawn != sample_of(task, 4)
    assert set(sample_of(task_of(5), 0)) == set(task_of(5).train)


def test_pairs_are_the_encoders_own_and_cut_targets_are_no_news(llama):
    encoder = Encoder.of(llama)
    examples = [Example("plums", "yes " * 600), Example("apples", "no")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = pairs_of(encoder, examples)
    assert pairs[1] == encoder.pair("apples", "no")
    assert len(pairs[0].target) < 600
