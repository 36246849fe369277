"""What the base made of prompts, remembered for other discriminants."""

from __future__ import annotations

import pytest
import torch

from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from phatgoose.routing.routers import prompt_router as base_reader
from phatgoose.routing.routers.prompt_router import RememberedStates
from topic_prompts import PROMPTS, both_streams, scores_of

ROUTINGS = (
    "discriminant",
    "discriminant:place=end,shrinkage=1",
    "discriminant:first=0.6",
    "discriminant-phatgoose",
)


def reader(calls):
    """Reads prompts as [their sum, their length], and keeps them in `calls`."""

    def read(prompts):
        calls.append(list(prompts))
        return torch.tensor([[float(sum(prompt)), len(prompt)] for prompt in prompts])

    return read


def test_each_prompt_is_read_once_and_comes_in_the_order_asked_for():
    calls, states = [], RememberedStates()
    assert states.of([[1, 2], [3], [1, 2]], reader(calls)).tolist() == [[3, 2], [3, 1], [3, 2]]
    assert states.of([[4], [3]], reader(calls)).tolist() == [[4, 1], [3, 1]]
    assert states.of([[3], [1, 2]], reader(calls)).tolist() == [[3, 1], [3, 2]]
    assert calls == [[(1, 2), (3,)], [(4,)]]


def test_what_there_is_no_room_for_is_read_again():
    calls, states = [], RememberedStates(most_bytes=8)  # room for one
    for _ in range(2):
        assert states.of([[1], [2]], reader(calls)).tolist() == [[1, 1], [2, 1]]
    assert calls == [[(1,), (2,)], [(2,)]]


@both_streams
@pytest.mark.parametrize("first", range(len(ROUTINGS)))
def test_routers_choose_alike_by_what_others_read(base, pool, first, monkeypatch):
    """In whatever order they come: all blocks in both places are remembered."""
    routings = [*ROUTINGS[first:], *ROUTINGS[:first]]
    wanted = []
    for router in routings:
        model = compose(pool, base, router=router)
        wanted.append(scores_of(composition_of(model).lookup, PROMPTS))
        detach(model)
    passes, read_prompts = [], base_reader.read_prompts

    def counted(model, prompts, *rest):
        passes.extend(prompts)
        return read_prompts(model, prompts, *rest)

    monkeypatch.setattr(base_reader, "read_prompts", counted)
    states = RememberedStates()
    for router, scores in zip(routings, wanted, strict=True):
        model = compose(pool, base, router=router)
        lookup = composition_of(model).lookup
        lookup.remembered = states
        torch.testing.assert_close(scores_of(lookup, PROMPTS), scores, atol=1e-5, rtol=1e-5)
        detach(model)
    assert len(passes) == len(set(map(tuple, passes))) == len(PROMPTS)
