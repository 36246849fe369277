"""Prompts that the base reads once, for itself, experts that act from their end on, and routers."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from architectures import make_tiny, random_expert
from comparisons import Setting
from phatgoose.apps.generation import Sampling, generate
from phatgoose.base.active_tokens import ActsOn
from phatgoose.base.loading import load_base
from phatgoose.config import Routing
from phatgoose.evaluation import shared_prompts
from phatgoose.evaluation.comparison import compare as module
from phatgoose.evaluation.evaluate import EvaluationSet, ScoringSettings, evaluate, score
from phatgoose.evaluation.likelihood import choice_log_likelihoods
from phatgoose.evaluation.shared_prompts import SharedPrompts
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose
from phatgoose.routing.composition import composition_of, routing_for
from phatgoose.routing.routers import prompt_router
from phatgoose.tasks.encoding import Encoder
from phatgoose.tasks.suites.registry import open_suite
from phatgoose.tasks.task import Example, Task

ENDS = (ActsOn(tail=3), ActsOn(invocation=(7, 8)), ActsOn(tail=1))
# Of one length and several, with and without the invocation; of two no expert begins late.
PROMPTS = ([5, 9, 7, 8, 6, 7, 8, 4, 3], [9, 8, 7, 5, 6], [7, 8, 5, 5, 9, 9, 6], [5], [4, 4], [5])
CHOICES = ([[7], [9, 3], [1, 2, 3, 4]], [[7], [7]], [[8, 9, 9]])
NO_ROOM = pytest.mark.parametrize("room", [True, False])


def ending(pool: Pool, ends: tuple[ActsOn | None, ...] = ENDS) -> Pool:
    pairs = zip(pool.experts, ends, strict=False)
    return Pool(
        tuple(replace(e, info=replace(e.info, acts_on=end and end.record())) for e, end in pairs)
    )


@pytest.fixture
def without_room(monkeypatch, room):
    if not room:
        monkeypatch.setattr(shared_prompts, "MOST_BYTES", 0)


@NO_ROOM
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
@pytest.mark.usefixtures("without_room")
def test_choices_are_scored_as_without(architecture):
    base = make_tiny(architecture)
    pool = ending(Pool(tuple(random_expert(base, seed) for seed in range(3))))
    routed = compose(pool, copy.deepcopy(base), router="phatgoose")
    rows = [(prompt, CHOICES[i % 3]) for i, prompt in enumerate(PROMPTS)]
    shared = SharedPrompts(tails=True)
    for model in (base, routed, base, routed):
        assert shared.serve(model)
        with routing_for(model, PROMPTS) as before_pass:
            wanted = dict(choice_log_likelihoods(model, rows, 0, 100, before_pass))
            found = dict(choice_log_likelihoods(model, rows, 0, 40, before_pass, shared))
        for index, means in wanted.items():
            assert found[index] == pytest.approx(means, abs=1e-4)


@NO_ROOM
@pytest.mark.parametrize("kind", ["llama", "gpt2"], indirect=True)
@pytest.mark.usefixtures("without_room")
def test_answers_are_generated_as_without(base, pool):
    texts = ("count:", "a longer prompt, count:", "one two", "a")
    task = Task("open", test=tuple(Example(text, "x") for text in texts))
    chosen = EvaluationSet.of(task, ScoringSettings(max_new_tokens=5))
    questions = chosen.questions(Encoder.of(base))
    plain = copy.deepcopy(base.model)
    routed = compose(ending(pool), base, router="phatgoose")
    shared = SharedPrompts(tails=True)
    for model in (plain, routed, plain, routed):
        wanted, found = score(model, chosen, questions), score(model, chosen, questions, shared)
        assert [p.answer for p in found.predictions] == [p.answer for p in wanted.predictions]
    assert bool(shared._held) == (shared_prompts.MOST_BYTES > 0)


def test_prompts_that_are_all_tail_are_answered_too(llama, llama_pool):
    task = Task("open", test=(Example("Hi", "x"), Example("A", "x")))
    model = compose(ending(llama_pool, (ActsOn(tail=12),) * 4), llama, router="discriminant")
    scored = evaluate(model, [task], tokenizer=llama.tokenizer, max_new_tokens=3)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SharedPrompts, "serve", lambda *_: False)
        alone = evaluate(model, [task], tokenizer=llama.tokenizer, max_new_tokens=3)
    answers = [[p.answer for p in each.scores[0].predictions] for each in (scored, alone)]
    assert answers[0] == answers[1] != []


@pytest.mark.parametrize("ends", [(None, *ENDS[1:]), (None,) * 3])
def test_ordinary_experts_go_their_own_way(llama, llama_pool, ends):
    shared = SharedPrompts(tails=True)
    assert not shared.serve(compose(ending(llama_pool, ends), llama, router="phatgoose"))


def answers_and_sites(comparison) -> dict[str, object]:
    rows = {**comparison.results, **comparison.experts}
    return {
        name: [(r.score, r.ties, [s.tolist() for s in r.sample.statistics]) for r in found.values()]
        for name, found in rows.items()
    }


@pytest.fixture
def at_ends(setting) -> Setting:
    tails = (ActsOn(tail=2), ActsOn(tail=3), ActsOn(tail=1))
    return replace(setting, pool=ending(setting.pool, tails))


METHODS = ["base", "phatgoose", "discriminant", "discriminant:per_block=1", "merged", "oracle"]


@pytest.mark.usefixtures("toy_embedder")
@pytest.mark.parametrize("routing", [Routing(router="phatgoose"), Routing(k=2, router="phatgoose")])
def test_a_comparison_reads_each_prompt_once(at_ends, tmp_path, monkeypatch, routing):
    with monkeypatch.context() as patch:
        patch.setattr(SharedPrompts, "serve", lambda *_: False)
        wanted = at_ends.run(tmp_path / "apart", METHODS, routing=routing)
    read, read_prompts = [], shared_prompts.read_prompts

    def counted(model, prompts, *arguments, **options):
        read.extend(prompt for prompt in prompts if prompt != [0])  # read for its size
        return read_prompts(model, prompts, *arguments, **options)

    for reader in (shared_prompts, prompt_router):
        monkeypatch.setattr(reader, "read_prompts", counted)
    found = at_ends.run(tmp_path / "together", METHODS, routing=routing)
    suites = [open_suite(suite).load() for suite in at_ends.suites]
    texts = {(t.name, e.input) for tasks in suites for t in tasks for e in t.test}
    assert len(read) == len(texts) > 0
    assert answers_and_sites(found) == answers_and_sites(wanted)


@pytest.mark.usefixtures("toy_embedder")
def test_what_has_no_room_together_is_read_in_portions(at_ends, tmp_path, monkeypatch, computed):
    base = load_base(at_ends.base, dtype="float32")
    whole = at_ends.run(tmp_path / "whole", METHODS)
    of_whole = list(computed)
    computed.clear()
    room = shared_prompts.MOST_BYTES // SharedPrompts.most_tokens(base.model) * 100
    monkeypatch.setattr(shared_prompts, "MOST_BYTES", room)
    portions = []

    def watched(*arguments):
        for portion in real(*arguments):
            portions.append(list(portion))
            yield portion

    real = module._portions
    monkeypatch.setattr(module, "_portions", watched)
    parts = at_ends.run(tmp_path / "parts", METHODS)
    assert len(portions) > 1
    assert sorted(computed) == sorted(of_whole)
    assert answers_and_sites(parts) == answers_and_sites(whole)


@pytest.mark.parametrize("record", [False, True])
def test_a_router_chooses_by_the_reading_that_the_answer_goes_on_with(llama, pool_of, record):
    pool = ending(pool_of("llama", (4, 4, 4)), (ActsOn(tail=2),) * 3)
    model = compose(pool, llama, router="discriminant")
    text = "a prompt that is long enough, and what comes of it:"
    length, passed = len(llama.tokenizer(text)["input_ids"]), list[int]()
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        ids = torch.tensor([llama.tokenizer(text)["input_ids"]])
        wanted = model.generate(ids, max_new_tokens=3, do_sample=False)[0].tolist()
    hook = embedding.register_forward_hook(lambda _, given, __: passed.append(given[0].numel()))
    answer = generate(model, llama.tokenizer, text, sampling=Sampling(3), record=record)
    assert passed == [length, length if record else 2, *[1] * (len(passed) - 2)]
    assert answer.tokens == wanted
    passed.clear()
    task = Task("open", test=(Example(text, "x"),))
    (score,) = evaluate(model, task, max_new_tokens=3).scores
    assert score.predictions[0].answer == answer.text
    assert passed[:2] == [length, 2]
    assert composition_of(model).prompt_router.remembered is None
    hook.remove()
