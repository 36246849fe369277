"""Answers of single experts serve the rows that leave inputs to them."""

import pytest

from comparisons import TASKS, TOKENS, by_hand, cells_of
from phatgoose.config import Routing
from phatgoose.evaluation.comparison.cells import answered_by_experts
from phatgoose.evaluation.evaluate import EvaluationSet, ScoringSettings
from phatgoose.tasks.encoding import Encoder
from phatgoose.tasks.task import Chat, Example, Task

pytestmark = pytest.mark.usefixtures("toy_embedder")


def of(task, base) -> tuple[EvaluationSet, Encoder]:
    chosen = EvaluationSet.of(task, ScoringSettings(max_new_tokens=TOKENS))
    return chosen, Encoder.of(base)


@pytest.mark.parametrize("router", ["phatgoose", "merged", "retrieval"])
def test_other_models_and_unknown_answers_share_nothing(setting, tasks, llama, router):
    model = by_hand(router, setting, llama)
    chosen, encoder = of(tasks["choose"], llama)
    questions = chosen.questions(encoder)
    everyones = {
        name: {"choose": {"answers": ["good"] * 9, "tied": []}} for name in setting.pool.names
    }
    shares = answered_by_experts(everyones, model, chosen, questions) is not None
    assert shares == (router == "retrieval")
    elsewhere = {name: {"pick": result["choose"]} for name, result in everyones.items()}
    for unknown in ({}, elsewhere, {"somebody": everyones["e0"]}):
        assert answered_by_experts(unknown, model, chosen, questions) is None


def test_a_chat_s_answers_are_of_the_expert_that_its_last_message_has(setting, llama, monkeypatch):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    monkeypatch.setattr(llama.tokenizer, "chat_template", template)
    model = by_hand("retrieval", setting, llama)
    chat = Chat((("system", "5 + 6 = 11, 1 + 9"), ("user", "plums or apples")))
    everyones = {name: {"chat": {"answers": [name], "tied": []}} for name in setting.pool.names}
    found = []
    for asked in (chat, "plums or apples"):
        chosen, encoder = of(Task("chat", test=(Example(asked, "e0"),)), llama)
        got = answered_by_experts(everyones, model, chosen, chosen.questions(encoder))
        found.append(got[0].predictions[0].answer)
    assert found[0] == found[1]


def test_a_comparison_shares_where_single_experts_are_scored(setting, tmp_path, computed):
    shared = setting.run(tmp_path / "shared", ["retrieval", "oracle"])
    assert computed == cells_of("e0", "e1", "e2")
    alone = setting.run(tmp_path / "alone", ["retrieval"])
    assert computed[12:] == cells_of("retrieval")
    for task in TASKS:
        one, other = shared.results["retrieval"][task], alone.results["retrieval"][task]
        assert (one.score, one.ties) == (other.score, other.ties)
        for mine, theirs in zip(one.sample.statistics, other.sample.statistics, strict=True):
            assert (mine == theirs).all()


def test_several_experts_an_input_are_scored_themselves(setting, tmp_path, computed):
    setting.run(tmp_path, ["retrieval", "oracle"], routing=Routing(k=2, router="phatgoose"))
    assert computed == cells_of("e0", "e1", "e2", "retrieval")
