"""research/study/taken_apart.py: whose choices are replaced, against the expert alone."""

from __future__ import annotations

import runpy

import pytest
import torch

from paths import ROOT
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.recording import record
from tiny import assert_same_logits, logits_of, make_ids

IDS = make_ids(rows=2, tokens=6)


@pytest.fixture
def replace_choices(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "research" / "study")  # where its neighbour is
    return runpy.run_path(str(ROOT / "research" / "study" / "taken_apart.py"))["replace_choices"]


def replaced(model, replace_choices, row):
    hook, _ = replace_choices(model, 2, row, "seed")
    logits = logits_of(model, IDS)
    with record(model) as recording:
        logits_of(model, IDS)
    hook.remove()
    detach(model)
    return logits, recording


def test_everywhere_is_the_expert_alone(llama, llama_pool, replace_choices):
    alone = compose(llama_pool, llama, router=f"single:expert={llama_pool.names[2]}")
    wanted = logits_of(alone, IDS)
    detach(alone)
    for row in ("all", "prompt"):  # a pass of several tokens reads a prompt
        got, _ = replaced(compose(llama_pool, llama, router="phatgoose"), replace_choices, row)
        assert_same_logits(got, wanted)


def test_nothing_of_an_answer_is_in_a_pass_of_prompts(llama, llama_pool, replace_choices):
    model = compose(llama_pool, llama, router="phatgoose")
    wanted = logits_of(model, IDS)
    detach(model)
    got, _ = replaced(compose(llama_pool, llama, router="phatgoose"), replace_choices, "answer")
    assert_same_logits(got, wanted)


def weights_of_expert_2(recording):
    """Its weight for each token at each site, [sites, rows, tokens]."""
    return torch.stack([passes[0][..., 2] for passes in recording.weights.values()])


@pytest.mark.parametrize(("row", "places"), [("before", slice(0, 5)), ("end", slice(5, 6))])
def test_a_part_of_the_prompt_is_replaced(llama, llama_pool, replace_choices, row, places):
    _, recording = replaced(compose(llama_pool, llama, router="phatgoose"), replace_choices, row)
    weights = weights_of_expert_2(recording)
    assert (weights[..., places] == 1).all()
    others = torch.ones(6, dtype=torch.bool)
    others[places] = False
    assert (weights[..., others] < 1).any()


@pytest.mark.parametrize(("row", "share"), [("quarter", 4), ("half", 2)])
def test_a_share_of_the_sites_is_replaced(llama, llama_pool, replace_choices, row, share):
    _, recording = replaced(compose(llama_pool, llama, router="phatgoose"), replace_choices, row)
    alone = (weights_of_expert_2(recording) == 1).flatten(1).all(dim=1)
    assert alone.sum() == len(alone) // share
