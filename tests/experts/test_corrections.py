"""Corrections: kept in a pool's folder, and counted among the prompts of its experts."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from discriminants import taught_in
from phatgoose.errors import PoolError
from phatgoose.experts.corrections import FILE, Correction, correct, corrections_in, take_back
from phatgoose.experts.pool import Pool
from phatgoose.experts.statistics import grown, prompt_statistics_of
from phatgoose.routing.chooser import Chooser
from routed_models import TOPICS

STRANGE = 'Who "feeds"\nthe heron\u2028at {noon}? \U0001fabf'


@pytest.fixture
def place(pool_of, tmp_path):
    return taught_in(tmp_path / "experts", pool_of("llama"))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_statistics_grow_to_those_of_all_prompts(before, more, seed):
    states = torch.randn(before + more, 2, 12, generator=torch.Generator().manual_seed(seed))
    some = prompt_statistics_of(states[:before], rank=16)
    wanted = prompt_statistics_of(states, rank=16)
    got = grown(some, before, states[before:])
    for part in ("whole.mean", "whole.rest"):
        assert_close(got[part], wanted[part], atol=1e-5, rtol=1e-4)
    for one, other in zip(got["whole.factor"], wanted["whole.factor"], strict=True):
        assert_close(one.T @ one, other.T @ other, atol=1e-5, rtol=1e-4)


def test_a_corrected_prompt_gets_the_expert_that_was_named(place):
    prompt = f"{TOPICS[0]} of the northern orchards, please"
    assert Chooser.open(place).choose(prompt).expert == "e0"
    for _ in range(2):
        correct(place, Correction("e3", prompt))
    correct(place, Correction("nobody", prompt))  # of an expert that isn't here
    pool = Pool.open(place)
    count = pool["e3"].info.prompts_read
    assert pool.measured()["e3"].info.prompts_read == count + 2
    before = Chooser.open(pool.select(["e0", "e1", "e2", "e3"])).choose(prompt)
    assert before.scores["e3"] > 0
    take_back(place, [1, 2, 3])
    assert Chooser.open(place).choose(prompt).scores["e3"] < before.scores["e3"]


def test_they_are_lines_that_can_be_read_and_taken_back(tmp_path):
    rows = [Correction("a", "one"), Correction("b", STRANGE), Correction("a", "three")]
    for row in rows:
        correct(tmp_path, row)
    assert corrections_in(tmp_path) == rows
    assert [json.loads(line) for line in (tmp_path / FILE).read_text().split("\n")[:-1]] == [
        {"expert": row.expert, "prompt": row.prompt} for row in rows
    ]
    with pytest.raises(PoolError, match=r"There is no correction 4; .* has 3"):
        take_back(tmp_path, [4])
    take_back(tmp_path, [1, 3])
    assert corrections_in(tmp_path) == rows[1:2]


@pytest.mark.parametrize("line", ["{", "[]", '{"expert": "a"}', '{"expert": 1, "prompt": "x"}'])
def test_a_line_that_is_none_is_named(tmp_path, line):
    correct(tmp_path, Correction("a", "one"))
    with (tmp_path / FILE).open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(PoolError, match=f"{FILE}, line 2"):
        corrections_in(tmp_path)
