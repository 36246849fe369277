"""The rows of the demo's tasks."""

from __future__ import annotations

import hashlib
from collections import Counter

from phatgoose.apps.demo import demo
from phatgoose.apps.demo.demo import SKILLS, TASKS, trained_task, unseen_suite, unseen_tasks
from phatgoose.tasks.loading import load_task
from phatgoose.tasks.task import Example

EXPERTS = tuple(SKILLS)
UNSEEN = tuple(SKILLS.values())
DIGEST = "f7092605b49a6aa09b6cf4bc434f9a6462f6e8da01a276c303129d1479632a57"


def rows_of(names: tuple[str, ...], split: str) -> dict[str, tuple[Example, ...]]:
    return {name: getattr(load_task(TASKS / f"{name}.csv"), split) for name in names}


def test_the_unseen_tasks_are_a_suite_in_the_order_of_the_skills():
    tasks = unseen_tasks(7)
    assert [len(task.test) for task in tasks] == [7] * len(SKILLS)
    assert unseen_suite(tasks).names == UNSEEN
    assert unseen_suite(tasks).load() == tuple(tasks)
    assert [trained_task(name).name for name in SKILLS] == list(EXPERTS)


def test_its_rows_are_distinct_and_no_unseen_task_has_a_row_that_is_trained_on():
    trained, unseen = rows_of(EXPERTS, "train"), rows_of(UNSEEN, "test")
    for rows in trained.values():
        assert len({row.input for row in rows}) == len(rows) >= 200
    for rows in unseen.values():
        assert len({row.input for row in rows}) == len(rows) == demo.EVALUATED
    seen = {row.input for rows in trained.values() for row in rows}
    assert not seen & {row.input for rows in unseen.values() for row in rows}


def test_the_right_answer_of_its_rows_stands_at_each_place_equally_often():
    for name, rows in (rows_of(EXPERTS, "train") | rows_of(UNSEEN, "test")).items():
        assert len({row.target for row in rows}) > 1
        if name in ("bookings", "course_places"):  # answered in writing
            assert not any(row.choices for row in rows)
            continue
        places = Counter(row.choices.index(row.target) for row in rows)
        assert set(places) == set(range(len(rows[0].choices)))
        assert max(places.values()) - min(places.values()) <= 1


def test_its_files_hold_the_rows_that_the_results_in_its_page_were_measured_on():
    digests = "".join(load_task(TASKS / f"{name}.csv").digest for name in (*EXPERTS, *UNSEEN))
    assert hashlib.sha256(digests.encode()).hexdigest() == DIGEST
