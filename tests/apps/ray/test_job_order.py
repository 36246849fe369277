"""Which job a worker of the Ray engine gets next."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("ray")
from phatgoose.apps.ray_engine import job_for


@dataclass(frozen=True)
class Job:
    group: str | None
    name: str


GROUPS = st.sampled_from(["a", "b", "c", None])


@given(GROUPS, st.lists(GROUPS, max_size=4), st.lists(GROUPS, min_size=1, max_size=8))
def test_there_is_always_a_job_and_the_workers_own_group_comes_first(group, taken, groups):
    left = [Job(name, str(i)) for i, name in enumerate(groups)]
    job = job_for(group, taken, left)
    assert job in left
    if group in groups:
        assert job == left[groups.index(group)]


def test_a_group_that_no_worker_is_at_comes_next():
    left = [Job("a", "1"), Job("a", "2"), Job("b", "3")]
    assert job_for(None, ["a"], left).group == "b"
    assert job_for(None, ["a", "b"], left).group == "a"
