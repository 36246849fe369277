"""The choice alone: what decided, who came second, and that it is what a model does."""

from __future__ import annotations

from dataclasses import replace

import pytest

import phatgoose as pg
from discriminants import FOLLOW_UP, some_chats, taught_in
from phatgoose.errors import ConfigError, TaskError
from phatgoose.routing.conversation import ChatTexts
from phatgoose.routing.opening import open_chooser
from phatgoose.tasks.task import Chat
from routed_models import TOPICS


@pytest.fixture(scope="module")
def taught(pool_of, tmp_path_factory):
    """A pool's folder, whose experts' prompts a reader has read and which bring some of them."""
    return taught_in(tmp_path_factory.mktemp("chooser") / "experts", pool_of("llama"))


@pytest.fixture(scope="module")
def chooser(taught):
    return pg.Chooser.open(taught)


def test_the_choice_is_that_of_the_router_with_the_text_that_decided(taught, chooser):
    router = open_chooser(taught)
    bases = set[bool]()
    for chat in some_chats(150):
        chosen = chooser.choose(chat)
        turns = [(message["role"], message["content"]) for message in chat]
        assert chooser.choose(Chat(turns)) == chosen
        texts = ChatTexts.of(turns)
        assert [chosen.weights] == router.choose([texts]).named(router.experts)
        bases.add(chosen.expert == "base")
        said = "\n".join(message["content"] for message in chat if message["role"] != "assistant")
        assert all(part in said for part in chosen.view.split(" "))
        assert list(chosen.scores.values()) == sorted(chosen.scores.values(), reverse=True)
        assert chosen.scores.keys() == {*router.experts, "base"}
        rest = {name: score for name, score in chosen.scores.items() if name != chosen.expert}
        assert chosen.runner_up == max(rest, key=rest.__getitem__)
        assert chosen.margin == chosen.scores[chosen.expert] - max(rest.values())
    assert bases == {True, False}


def test_the_part_that_asks_and_the_message_that_a_follow_up_follows_are_the_view(chooser):
    pasted = f"{TOPICS[1]}\n\n" + "The committee met on Monday and adjourned at noon. " * 3
    assert chooser.choose(pasted).view == TOPICS[1]
    chat = [{"role": "user", "content": [{"type": "text", "text": TOPICS[2]}]}]
    chat += [{"role": "assistant", "content": None}, {"role": "user", "content": FOLLOW_UP}]
    chosen = chooser.choose(chat)
    assert (chosen.expert, chosen.view) == (chooser.experts[2], TOPICS[2])


def test_an_explanation_has_the_nearest_example_prompts_of_both(taught, chooser):
    asked = f"{TOPICS[3]} 4"
    assert chooser.choose(asked).nearest == {}
    chosen = chooser.choose(asked, explain=True)
    assert next(iter(chosen.nearest)) == chosen.expert == chooser.experts[3]
    assert chosen.nearest[chosen.expert][0] == asked
    assert chosen.nearest.keys() == {chosen.expert, chosen.runner_up} - {"base"}
    assert all(len(prompts) == 3 for prompts in chosen.nearest.values())
    without = chooser.choose("")
    assert (without.weights, without.scores, without.view, without.margin) == ({}, {}, "", None)
    assert chooser.choose("", explain=True) == without


def test_routers_by_token_and_what_is_no_message_are_refused(taught, chooser):
    with pytest.raises(ConfigError, match="doesn't choose by a prompt alone"):
        pg.Chooser.open(taught, router="arrow")
    for wrong in ([{"content": "hi"}], ["hi"], [{"role": "user", "content": 3}]):
        with pytest.raises(TaskError, match="A message is"):
            chooser.choose(wrong)


def test_several_experts_are_together_ahead_of_the_runner_up(taught):
    chosen = pg.Chooser.open(taught, router="discriminant:fallback=off", k=2).choose(TOPICS[0])
    assert len(chosen.weights) == 2
    assert chosen.runner_up not in chosen.weights
    assert "base" not in chosen.scores
    alone = replace(chosen, weights=dict([*chosen.weights.items()][:1]))
    assert alone.runner_up == list(chosen.weights)[1]
