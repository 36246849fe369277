"""Routers that choose for whole prompts: what all promise, then retrieval's and discriminant's."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn.functional import pad
from transformers import PreTrainedModel

from attackers import attacked
from discriminants import scores_by_hand, trained_on
from phatgoose.errors import ConfigError, ExpertError, PoolError, RoutingError
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.experts.pool import Pool
from phatgoose.experts.statistics import PARTS, prompt_statistics_of
from phatgoose.reader import Reader, open_reader
from phatgoose.routing.choice import Choice
from phatgoose.routing.compose import compose, detach, load, routing_for, save
from phatgoose.routing.conversation import (
    MARGIN,
    MOST_LINES,
    MOST_SENTENCES,
    ChatTexts,
    ScoredText,
    Views,
    base_texts,
    deciding_text,
    helpers_class,
)
from phatgoose.routing.opening import open_chooser
from phatgoose.routing.routers import base_classes
from phatgoose.routing.routers.discriminant import Discriminant, Lines, Ready, line_of, room_of
from phatgoose.routing.routers.prompt import ByPrompt, Fallback, PromptChooser, Tables
from phatgoose.routing.routers.retrieval import Retrieval
from phatgoose.routing.saved import add_to_saved, remove_from_saved
from phatgoose.tasks.embeddings import DEFAULT_EMBEDDER
from routed_models import TOPICS, with_embeddings
from tiny import assert_same_logits, logits_of, make_ids, peft_model, random, small_reader
from topic_prompts import (
    CHOOSING,
    PROMPTS,
    batch_of,
    both_streams,
    by_single,
    experts_of,
    scores_of,
    tokens_of,
)
from toy_embedders import toy_embed

pytestmark = [pytest.mark.usefixtures("toy_embedder"), pytest.mark.filterwarnings("ignore:k is")]

BY_TEXT = ("retrieval", "centroid")
each_router = pytest.mark.parametrize("router", [*BY_TEXT, "discriminant:fallback=off"])


def assert_same(got, wanted) -> None:
    assert torch.equal(got.experts, wanted.experts)
    assert torch.equal(got.weights, wanted.weights)


@both_streams
@each_router
def test_beams_are_those_of_each_prompt_alone(base, pool, router):
    model = compose(with_embeddings(pool), base, router=router, k=2)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 3}
    ids, mask = batch_of(base, PROMPTS[:3])
    got = model.generate(ids, attention_mask=mask, **options)[:, -5:]
    for row, real, answer in zip(ids, mask.bool(), got, strict=True):
        alone = row[real][None]
        wanted = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
        assert torch.equal(answer, wanted[0, -5:])


def test_experts_of_other_embeddings_do_not_join(llama, llama_pool, tmp_path):
    pool = with_embeddings(llama_pool)
    save(compose(pool.select(["e0", "e1"]), llama, router="centroid"), tmp_path / "routed")
    other = changed(pool, 2, embedder="another/one").experts[2]
    with pytest.raises(PoolError, match=r"statistics are .*another/one.*, those there .*sent"):
        add_to_saved(tmp_path / "routed", Pool((other,)))
    short = replace(pool.experts[2], embeddings=pool.experts[2].embeddings[:, :8])
    with pytest.raises(PoolError, match=r"centroids': \[8\].* those there .*\[64\]"):
        add_to_saved(tmp_path / "routed", Pool((short,)))


# Without a composed model


@both_streams
@each_router
def test_alone_it_chooses_as_in_a_composed_model(base, pool, router, monkeypatch):
    model = compose(with_embeddings(pool), base, router=router, k=2)
    prompts, wanted = tokens_of(model, PROMPTS), experts_of(model, PROMPTS)
    detach(model)
    monkeypatch.delattr(PreTrainedModel, "from_pretrained")  # no weights are loaded
    chooser = open_chooser(with_embeddings(pool), base.tokenizer, router=router, k=2)
    assert chooser.experts == pool.names
    for asked in (prompts, PROMPTS, [ChatTexts.of([("user", text)]) for text in PROMPTS]):
        assert_same(chooser.choose(asked), wanted)


@each_router
def test_text_needs_no_tokenizer_and_tokens_do(llama, llama_pool, router):
    pool = with_embeddings(llama_pool)
    chooser, other = (open_chooser(pool, each, router=router) for each in (None, llama.tokenizer))
    assert_same(chooser.choose(PROMPTS), other.choose(PROMPTS))
    with pytest.raises(RoutingError, match="reads text, and was given tokens without the token"):
        chooser.choose([llama.tokenizer(PROMPTS[0])["input_ids"]])


NOTHING = ChatTexts.of([("user", " ")])


@each_router
def test_where_nothing_is_said_the_base_answers(llama, llama_pool, router):
    chooser = open_chooser(with_embeddings(llama_pool), llama.tokenizer, router=router)
    prompts = ["", PROMPTS[0], " \n", [], [1, 1], NOTHING]
    alone = chooser.choose(PROMPTS[:1]).named(chooser.experts)
    assert chooser.choose(prompts).named(chooser.experts) == [{}, *alone, {}, {}, {}, {}]
    with pytest.raises(RoutingError, match="there is no prompt"):
        chooser.choose([])
    with pytest.raises(RoutingError, match="an empty prompt, or none"):
        chooser.score(prompts)


@pytest.mark.parametrize("fallback", ["off", "0.1"])
def test_statistics_of_another_size_than_the_readers_are_refused_at_once(
    llama, llama_pool, fallback
):
    """Before a covariance of that size is made: a small file could name a huge one."""
    wide = {
        part: pad(each, (0, 1)) for part, each in llama_pool.experts[0].prompt_statistics.items()
    }
    pool = Pool((replace(llama_pool.experts[0], prompt_statistics=wide),))
    told = r"minilm:1-1 has states of \[1, 384\], the experts' prompt statistics are of \[1, 385\]"
    with pytest.raises(ConfigError, match=told):
        compose(pool, llama, router=f"discriminant:fallback={fallback}")


def test_auto_is_one_that_reads_prompts(llama, llama_pool):
    assert open_chooser(llama_pool, llama.tokenizer).name == "discriminant"
    bare = Pool(tuple(replace(each, prompt_statistics={}) for each in llama_pool.experts))
    with pytest.raises(PoolError, match="phatgoose stats"):
        open_chooser(bare, llama.tokenizer)


@pytest.mark.parametrize("router", ["phatgoose", "merged", "oracle", "retrieval:form=paper"])
def test_routers_that_need_more_than_a_prompt_are_refused(llama_pool, router):
    with pytest.raises(ConfigError, match=r"doesn't choose by a prompt alone|task's name|paper"):
        open_chooser(llama_pool, router=router)


# Embeddings


def changed(pool: Pool, z: int, **info: object) -> Pool:
    """The pool, of whose expert z the record says this."""
    experts = list(pool.experts)
    experts[z] = replace(experts[z], info=replace(experts[z].info, **info))
    return Pool(tuple(experts))


@pytest.mark.parametrize("router", BY_TEXT)
def test_pools_whose_embeddings_can_not_be_compared_are_refused(llama, llama_pool, router):
    pool = with_embeddings(llama_pool)
    short = replace(pool.experts[1], embeddings=pool.experts[1].embeddings[:, :8])
    cases = (
        (llama_pool, router, "'e0', .* have no embeddings: run 'phatgoose stats'"),
        (changed(pool, 0, embedder=None), router, "'e0' has no embeddings of prompts"),
        (changed(pool, 0, embedder="other/one"), router, "can.t be compared, .*other/one"),
        (Pool((pool.experts[0], short)), router, "can.t be compared, for they are of"),
        (with_embeddings(llama_pool, "paper"), router, "'e0' has no embeddings of prompts .*stats"),
        (pool, "retrieval:form=paper", "'e0' has no embeddings of inputs .*--embedding-form paper"),
    )
    for others, text, said in cases:
        with pytest.raises(PoolError, match=said):
            compose(others, llama, router=text)


@pytest.mark.parametrize("router", BY_TEXT)
def test_an_expert_adds_nothing_where_it_has_no_module(llama, uneven, router):
    wanted = peft_model(llama, uneven["e1"].directory)  # of queries only
    model, ids = compose(with_embeddings(uneven), llama, router=router, k=1), make_ids()
    with routing_for(model, tokens_of(model, PROMPTS[1:2])):
        assert_same_logits(logits_of(model, ids), logits_of(wanted, ids))


# Retrieval


def retriever_of(
    rows: torch.Tensor, owners: torch.Tensor, form: str | None = "prompt"
) -> PromptChooser:
    info = {"embedder": DEFAULT_EMBEDDER, "embedding_form": form}
    tables = Tables(tuple("abcde"), {"embeddings": rows, "owners": owners}, info)
    return PromptChooser(Retrieval(), tables)


def best_for(vectors: torch.Tensor, reader: PromptChooser) -> torch.Tensor:
    return reader.router.prompt_scores(vectors, reader.ready).argmax(dim=1)


def test_copies_of_all_others_win_no_more_than_two_experts_worth():
    rows = torch.nn.functional.normalize(random(32, 64), dim=-1)
    copied = torch.cat([rows, rows])  # expert 0 has them all, and first
    owners = torch.cat([torch.zeros(32).long(), torch.arange(1, 5).repeat_interleave(8)])
    first = best_for(rows + 0.01 * random(32, 64, seed=1), retriever_of(copied, owners))
    assert int((first == 0).sum()) <= 16
    assert torch.equal(first[first > 0], owners[32:][first > 0])


def test_all_embeddings_are_searched_and_kept_where_numbers_are_alike():
    rows = torch.nn.functional.normalize(random(18, 64), dim=-1)
    owners = torch.tensor([0] * 8 + [1] * 4 + [2] * 6)
    assert torch.equal(best_for(rows, retriever_of(rows, owners)), owners)
    longer = torch.cat([owners, torch.full((40,), 3)])
    flooded = retriever_of(torch.cat([rows, rows[:1].expand(40, -1)]), longer)
    assert len(flooded.ready.rows) == 18 + 14
    assert len(flooded.tables.saved()["lookup.embeddings"]) == 58  # one that grows has new bounds


def test_embeddings_of_other_texts_are_not_compared():
    with pytest.raises(RoutingError, match="embedder of prompts as the model reads them"):
        retriever_of(torch.eye(5, 64), torch.arange(5), "paper")
    with pytest.raises(RoutingError, match="sizes differ"):
        retriever_of(torch.eye(5, 8), torch.arange(5)).choose(["a"])


ASKED = ("e0", "e0", "e1", "e0", "e3")  # who is nearest to the inputs of CHOOSING alone
CHOSEN = ("e0", "e1", "e1", "e2", "e3")  # to the inputs behind their choices


@pytest.mark.parametrize(("form", "owners"), [("prompt", ASKED), ("paper", CHOSEN)])
@both_streams
def test_choices_are_ranked_by_the_expert_of_the_input(base, pool, form, owners):
    def ranked(model, row):
        return evaluate(model, replace(CHOOSING, test=CHOOSING.test[row : row + 1])).scores[0]

    alone = by_single(base, pool, owners, ranked)
    model = compose(with_embeddings(pool, form), base, router=f"retrieval:form={form}")
    (score,) = evaluate(model, CHOOSING, token_budget=150).scores
    for got, single in zip(score.predictions, alone, strict=True):
        assert got.scores == pytest.approx(single.predictions[0].scores, abs=1e-4)
        assert got.answer == single.predictions[0].answer


def test_the_paper_s_form_is_for_scoring_and_kept_with_a_model(llama, llama_pool, tmp_path):
    pool = with_embeddings(llama_pool, "paper")
    model = compose(pool, llama, router="retrieval:form=paper")
    scores = evaluate(model, CHOOSING).scores
    with pytest.raises(RoutingError, match="embeds answer choices, which a prompt alone doesn't"):
        logits_of(model, make_ids())
    save(model, tmp_path / "routed")
    loaded = load(tmp_path / "routed", dtype="float32")
    assert evaluate(loaded, CHOOSING).scores == scores


def test_several_nearest_experts_are_mixed_by_the_softmax_of_their_cosines(llama, llama_pool):
    pool = with_embeddings(llama_pool)
    model = compose(pool, llama, router="retrieval:temperature=0.3", k=3)
    for text, got in zip(PROMPTS, experts_of(model, PROMPTS).named(pool.names), strict=True):
        (query,) = toy_embed([text])
        nearest = {each.name: float((each.embeddings @ query).max()) for each in pool.experts}
        chosen = sorted(nearest, key=lambda name: -nearest[name])[:3]
        powers = {name: math.exp(nearest[name] / 0.3) for name in chosen}
        total = sum(powers.values())
        assert list(got) == chosen
        assert got == pytest.approx({name: power / total for name, power in powers.items()})


# Discriminant, against Gaussian log-likelihoods by brute force

OF_TOPICS = [text[:-2] for text in TOPICS]  # a prompt of each expert's own


@both_streams
@pytest.mark.parametrize(
    ("settings", "shrinkage", "task_variance"),
    [
        ("", 0.3, 1.0),
        (",task_variance=0", 0.3, 0.0),
        (",task_variance=0.5", 0.3, 0.5),
        (",shrinkage=0.9", 0.9, 1.0),
        (",shrinkage=1", 1.0, 1.0),
    ],
)
def test_scores_are_gaussian_log_likelihoods(base, pool, settings, shrinkage, task_variance):
    rows = [scores_by_hand(pool, text, shrinkage, task_variance) for text in PROMPTS]
    wanted = torch.stack(rows).mean(dim=1)  # over blocks
    model = compose(pool, base, router=f"discriminant:fallback=off{settings}")
    got = scores_of(model, PROMPTS)
    torch.testing.assert_close(got.double(), wanted, atol=2e-4, rtol=1e-3)
    chosen = experts_of(model, PROMPTS).experts[:, 0]
    assert torch.equal(chosen, wanted.argmax(dim=-1))


@both_streams
@pytest.mark.parametrize(
    ("attack", "strength"),
    [("scaled reading means", 0), ("scaled reading means", 1), ("masking covariance", 1)],
)
def test_prompts_of_a_task_go_to_its_expert_whatever_another_says(base, pool, attack, strength):
    """However far another's mean is, and when its covariance masks what tells the others apart."""
    plain, others = trained_on(pool), [0, 2, 3]

    def margins(pool: Pool) -> torch.Tensor:
        """How far the right one of the others is above the next of them."""
        scores = scores_of(compose(pool, base, router="discriminant:fallback=off"), OF_TOPICS)
        detach(base.model)
        assert scores.isfinite().all()
        assert scores.argmax(dim=1)[others].tolist() == others
        left = scores[others][:, others]
        return left.diagonal() - left.masked_fill(torch.eye(3).bool(), -torch.inf).amax(dim=1)

    usual, left = margins(plain), margins(attacked(plain, 1, attack, strength))
    assert attack == "scaled reading means" or (left > 0.1 * usual).all()


@pytest.mark.parametrize("groups", [[2, 1], [3, 1, 1], [5, 1, 1, 1], [6, 2, 2], [2, 2, 1]])
@pytest.mark.parametrize("noise", [0.0, 0.03, 1.0])
def test_experts_that_share_a_task_leave_the_others_theirs(groups, noise):
    """Their means lie together, and the bound must not move every other mean onto them."""
    d, tasks = 32, torch.arange(len(groups)).repeat_interleave(torch.tensor(groups))
    centres = 10 * torch.nn.functional.normalize(random(len(groups), d), dim=1)
    moments = {
        "mean": centres[tasks] + noise * random(len(tasks), d, seed=1) / d**0.5,
        "factor": torch.zeros(len(tasks), 2, d),
        "rest": torch.ones(len(tasks), d),
    }
    slopes, offsets = line_of(moments, 0.3, 0.0, "discriminant")
    prompts = centres.repeat_interleave(50, dim=0)
    prompts = prompts + random(*prompts.shape, seed=2)
    chosen = tasks[(prompts @ slopes + offsets).argmax(dim=1)]
    right = (chosen == torch.arange(len(groups)).repeat_interleave(50)).float().mean()
    assert right > 0.98


def test_prompt_statistics_that_can_not_be_compared_are_refused(llama, llama_pool):
    # Of one prompt each covariances are 0, so that that of all means can't be inverted.
    ones = [
        replace(expert, prompt_statistics=prompt_statistics_of(random(1, 1, 384, seed=z)))
        for z, expert in enumerate(llama_pool.experts)
    ]
    detach(compose(Pool(tuple(ones)), llama, router="discriminant:fallback=off,task_variance=0"))
    with pytest.raises(RoutingError, match=r"can't invert .* with more examples"):
        compose(Pool(tuple(ones)), llama, router="discriminant:fallback=off,task_variance=1")
    deep = replace(ones[0], prompt_statistics=prompt_statistics_of(random(5, 3, 384)))
    with pytest.raises(ExpertError, match=r"'e1', prompt_statistics: whole.mean is \(1, 384\)"):
        compose(Pool((deep, ones[1])), llama, router="discriminant:fallback=off")
    with pytest.raises(ConfigError, match=r"states of \[1, 384\], .* are of \[3, 384\]"):
        compose(Pool((deep,)), llama, router="discriminant:fallback=off")


def test_statistics_of_bases_and_of_different_readers_are_refused(llama, llama_pool):
    # Earlier releases recorded no reader: the base had read the prompts.
    for named in (None, "minilm"):
        with pytest.raises(
            PoolError, match=r"'e1' .* its base made, .*phatgoose stats .*e1 --task"
        ):
            open_chooser(changed(llama_pool, 1, reader=None), router="discriminant", reader=named)
    other = replace(small_reader().reference, first=2, last=2)
    told = r"different readers, or .* \('minilm:1-1' of e3, 'minilm:2-2' of e1\); run 'phatgoose st"
    with pytest.raises(PoolError, match=told):
        compose(changed(llama_pool, 1, reader=other), llama, router="discriminant")


# Who answers a chat, and what the base answers alone. Scores are of experts a and b, and of the
# base's classes.

CLASSES = (
    "general",
    "polite_requests",
    "code",
    "neutral",
    "politeness",
    "helpers",
    "frames",
    "follow_ups",
)


def scores(a: float, b: float, **classes: float) -> list[float]:
    """The scores of a text; those of classes that aren't given are low."""
    return [a, b, *(classes.get(name, -1.0) for name in CLASSES)]


A, B = scores(0.5, -0.5), scores(-0.5, 0.5)
GENERAL, NEUTRAL = scores(-0.5, -0.5, general=0.5), scores(-0.5, -0.5, neutral=0.5)
FOLLOWS = scores(-0.5, -0.5, general=0, follow_ups=-0.2)
LIKE_A = scores(-0.1, -0.5, general=0.1, follow_ups=-0.8)
HELPER = scores(0.1, -0.5, general=0, helpers=0.8)
CHATS = {  # system prompt, messages (each its wholes, and then its parts): the expert that answers
    "one of an expert": ((), [[A]], 0),
    "one that fits nobody": ((), [[GENERAL]], None),
    "a passage": ((), [[NEUTRAL]], None),
    "an expert's behind a passage": ((), [[NEUTRAL, NEUTRAL, B]], 1),
    "an expert's sentence in a passage": ((), [([NEUTRAL], [NEUTRAL, B])], 1),
    "a sentence of general talk": ((), [([A], [GENERAL])], 0),
    "politeness": ((), [[scores(-0.5, -0.5, politeness=0.5)]], None),
    "an agent's frame": ((), [[scores(-0.5, -0.5, frames=0.5)]], None),
    "the base a little ahead": ((), [[scores(0.1, -0.5, general=0.15, neutral=0)]], 0),
    "the base further ahead": ((), [[scores(0.1, -0.5, general=0.25, neutral=0)]], None),
    "a follow-up of nothing": ((), [[FOLLOWS]], None),
    "follow-ups of nothing": ((), [[FOLLOWS], [FOLLOWS]], None),
    "perhaps a follow-up, of nothing": ((), [[scores(0.5, -0.5, follow_ups=0.7)]], 0),
    "perhaps a follow-up": ((), [[B], [scores(0.5, -0.5, follow_ups=0.7)]], 1),
    "hardly what an interface asks": ((), [[scores(0.2, -0.5, helpers=0.25)]], 0),
    "less ahead than what an interface asks": ((), [[scores(0.5, -0.5, helpers=0.55)]], 0),
    "a follow-up": ((), [[A], [FOLLOWS]], 0),
    "two follow-ups": ((), [[B], [A], [FOLLOWS], [FOLLOWS]], 0),
    "a follow-up of a general one": ((), [[A], [GENERAL], [FOLLOWS]], None),
    "a sentence like a follow-up": ((), [[A], ([GENERAL], [FOLLOWS])], None),
    "another topic": ((), [[A], [B]], 1),
    "a general one after a task": ((), [[A], [GENERAL]], None),
    "an input after its instruction": ((), [[A], [LIKE_A]], 0),
    "the same after another task": ((), [[B], [LIKE_A]], None),
    "what an interface asks": ((), [[HELPER]], None),
    "the same after a task": ((), [[A], [HELPER]], None),
    "a task after the same": ((), [[HELPER], [A]], 0),
    "a follow-up of the same": ((), [[A], [HELPER], [FOLLOWS]], None),
    "a sentence like that of an interface": ((), [([A], [HELPER])], 0),
    "what an interface asks under a task": ([A], [[HELPER]], None),
    "a task in the system prompt": ([A], [[LIKE_A]], 0),
    "a follow-up of a task in the system prompt": ([A], [[FOLLOWS]], 0),
    "a persona": ([LIKE_A], [[LIKE_A]], None),
    "a system prompt like a follow-up": ([FOLLOWS], [[GENERAL]], None),
}


@dataclass(frozen=True)
class Written(ByPrompt):
    """A router whose prompts are their scores."""

    usual_k = 1
    fallback: Fallback = 0.1

    def ready(self, tables: Tables) -> Tables:
        return tables

    def helpers_score(self, ready):
        return 0.5

    def features(self, chooser, texts):
        return torch.tensor(list(map(json.loads, texts)))

    def prompt_scores(self, features, ready):
        return features


def written_chooser() -> PromptChooser:
    return PromptChooser(Written(), Tables(("a", "b")))


def views_of(message) -> Views:
    wholes, parts = message if isinstance(message, tuple) else (message, [])
    return Views(tuple(map(json.dumps, wholes)), tuple(map(json.dumps, parts)))


def chat_of(system, messages) -> ChatTexts:
    return ChatTexts(views_of(system) if system else None, tuple(map(views_of, messages)))


def scored(message, allowances: torch.Tensor) -> ScoredText:
    wholes, parts = message if isinstance(message, tuple) else (message, [])
    alone = ScoredText(torch.tensor(wholes), allowances, None, 0.5)
    if alone.lead > MARGIN:  # parts aren't read then
        return alone
    return ScoredText(torch.tensor([*wholes, *parts]), allowances, len(wholes), 0.5)


def test_scores_by_hand_have_the_base_s_classes():
    assert tuple(base_texts()) == CLASSES
    assert CLASSES[helpers_class()] == "helpers"


def test_the_shipped_statistics_of_the_base_s_classes_are_those_of_the_texts():
    """After a change: python -m phatgoose.routing.routers.base_classes e5, then this digest."""
    digest = hashlib.sha256(repr(base_texts()).encode()).hexdigest()
    assert digest[:16] == "e7c185e91f36efb7"
    shipped = load_file(Path(base_classes.__file__).with_name("base_classes") / "e5.safetensors")
    assert [len(shipped[part]) for part in PARTS] == [len(CLASSES)] * len(PARTS)


@pytest.mark.parametrize("chat", CHATS)
def test_who_answers_a_chat(chat):
    system, messages, wanted = CHATS[chat]
    choice = written_chooser().choose([chat_of(system, messages)])
    assert choice.named(["a", "b"]) == [{} if wanted is None else {"ab"[wanted]: 1.0}]


each_score = st.sampled_from([-0.9, -0.6, -0.4, -0.1, 0.0, 0.1, 0.4])
some_scores = st.lists(each_score, min_size=2 + len(CLASSES), max_size=2 + len(CLASSES))
some_views = st.tuples(
    st.lists(some_scores, min_size=1, max_size=3), st.lists(some_scores, max_size=2)
)
some_texts = st.lists(some_views, min_size=1, max_size=4)


FAR_AHEAD = ([scores(0.1, -0.9, general=-0.9)], [scores(-0.4, 0.9)])  # the part by far more


@given(st.lists(st.tuples(st.none() | some_views, some_texts), min_size=1, max_size=3))
@example([(None, [FAR_AHEAD])])
def test_a_chat_read_backwards_is_answered_as_one_read_whole(chats):
    answers = written_chooser().deciding_scores([chat_of(*chat) for chat in chats], {})
    allowances = torch.tensor([0.1, 0.1])
    for (system, messages), answer in zip(chats, answers, strict=True):
        first = [scored(system, allowances)] if system else []
        wanted = deciding_text([scored(message, allowances) for message in messages], *first)
        assert torch.equal(
            answer, wanted.scores if wanted else torch.full((2 + len(CLASSES),), -torch.inf)
        )


def test_prompts_are_left_to_the_base_whatever_is_in_a_batch():
    chats = [chat_of((), [[text]]) for text in (A, GENERAL)]
    alone = [written_chooser().choose([chat]) for chat in chats]
    for choice in (written_chooser().choose(chats), Choice.joined(alone)):
        assert choice.named(["a", "b"]) == [{"a": 1.0}, {}]
        assert choice.of([1]).named(["a", "b"]) == alone[1].named(["a", "b"]) == [{}]


def test_allowed_experts_alone_are_chosen():
    chooser, only_a, either = written_chooser(), scores(0.5, -1.1), scores(0.5, 0.4)
    chat = [chat_of((), [[text]]) for text in (only_a, either)]
    choice = chooser.choose(chat, allowed={"b"})
    assert choice.named(["a", "b"]) == [{}, {"b": 1.0}]
    assert (
        chooser.choose(chat).named(["a", "b"]) == [{"a": 1.0}] * 2
    )  # others' keys stay as they are


@pytest.mark.parametrize(
    ("turns", "texts"),
    [
        ([("user", "x")], (None, [["x"]])),
        ([("system", "s"), ("user", "x"), ("tool", "y"), ("user", "z")], (["s"], [["x"], ["z"]])),
        ([("user", "x \n\ny "), ("user", "z  ")], (None, [["x \n\ny ", "x ", "y"], ["z  "]])),
        ([("developer", "s"), ("system", "t"), ("user", "x")], (["s\n\nt", "s", "t"], [["x"]])),
        ([("user", "a\nb\n \t\nc\n\n\nd\n\n")], (None, [["a\nb\n \t\nc\n\n\nd\n\n", "a\nb", "d"]])),
        ([("user", "x"), ("user", " \n"), ("tool", "42")], (None, [["x"]])),
        ([("system", "s" * 2000)], (["s" * 1000], [["s" * 2000]])),
        ([("assistant", "y")], (None, [["y"]])),
        ([], (None, [])),
        ([("user", str(i)) for i in range(20)], (None, [[str(i)] for i in range(12, 20)])),
    ],
)  # fmt: skip
def test_each_text_of_a_chat_is_read_by_itself(turns, texts):
    read = ChatTexts.of(turns)
    said = [views and list(views.wholes) for views in (read.system, *read.messages)]
    assert (said[0], said[1:]) == texts
    assert not any(views.parts for views in read.messages)  # none has three words


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("What is the time in Oslo?", []),
        ("Hi there! What is the time in Oslo?", []),  # one that says something, which is the whole
        (
            "I hope you are well. What is the time?  Thanks! Please be quick about it",
            ["I hope you are well.", "What is the time?", "Please be quick about it"],
        ),
        ("Sum these up\n12 and 7 and 3\n\nWhole numbers only", [
            "Sum these up", "12 and 7 and 3", "Whole numbers only",
        ]),
        ("3.14 is about pi, isn't it? e.g. 22/7 is so", [
            "3.14 is about pi, isn't it?", "22/7 is so",
        ]),
        ("你好。请把下面这句话翻译成英文。今天天气非常好！", [
            "请把下面这句话翻译成英文。", "今天天气非常好！",
        ]),
    ],
)  # fmt: skip
def test_sentences_are_read_by_themselves(text, parts):
    assert Views.of(text).parts == tuple(parts)


def test_lines_of_several_sentences_are_read_too():
    asked = "What is this about? Two sentences will do."
    last = "Another one is here. It has two sentences."
    text = f"{asked}\nOne line that was pasted.\n{last}\n\nThe end."
    views = Views.of(text)
    assert views.parts[-2:] == (asked, last)
    assert len(views.parts) == len(set(views.parts)) == 7
    # The whole and its paragraphs are read anyhow.
    assert Views.of(f"{asked}\n\nThese are the minutes").parts[-1] == "These are the minutes"
    lines = [f"Line {number} is here. It says little." for number in range(10)]
    assert Views.of("\n".join(lines)).parts[12:] == (*lines[:3], *lines[-3:])


@given(st.integers(0, 60))
def test_of_a_long_text_parts_of_both_ends_are_read(count):
    said = [f"This is sentence {number}." for number in range(count)]
    views = Views.of(" ".join(said))
    assert len(views.parts) <= MOST_SENTENCES
    if count > MOST_SENTENCES:
        assert views.parts == (*said[:6], *said[-6:])


def test_parts_are_read_where_the_whole_is_not_far_ahead(pool):
    chooser = open_chooser(trained_on(pool), router="discriminant")
    read = []

    class Noting:
        def states(self, texts):
            read.extend(texts)
            return small_reader().states(texts)

    chooser.ready = chooser.ready._replace(reader=Noting())
    sure = f"{TOPICS[1]}. {TOPICS[1]}, {TOPICS[1]}"
    assert chooser.choose([sure]).named(chooser.experts) == [{"e1": 1.0}]
    assert read == [sure]
    read.clear()
    unsure = f"I hope that you are well today. {TOPICS[1]}. Thank you so much for your help."
    chooser.choose([unsure])
    assert read == [unsure, *Views.of(unsure).parts]


def test_of_a_long_text_the_lines_ends_are_read_first():
    prose = " ".join(f"Sentence number {n} of the prose." for n in range(40))
    parts = Views.of(f"{prose}\nWrite the tests for it, please.\n{prose}").parts
    assert "Write the tests for it, please." in parts
    assert "Sentence number 39 of the prose." in parts
    assert "Sentence number 20 of the prose." not in parts


@given(st.text("ab .!?。\n今", max_size=400))
def test_views_are_of_the_text_and_few(text):
    views = Views.of(text)
    assert views.wholes[0] == text
    assert len(views.wholes) in (1, 3)
    assert len(views.parts) <= MOST_SENTENCES + MOST_LINES
    for part in (*views.wholes[1:], *views.parts):
        assert part.strip()
        assert "".join(part.split()) in "".join(text.split())


HELPED = (
    "### Task:\nWrite a short title of three to five words for this chat, with an emoji.\n"
    '### Output:\nJSON: { "title": "the title" }\n'
    "### Chat:\n<chat_history>\nUSER: apples, pears and plums\n</chat_history>"
)


@both_streams
def test_what_fits_nobody_is_answered_by_the_base(base, pool, tmp_path):
    texts = base_texts()
    trained, general = trained_on(pool), [*texts["general"][:6], *texts["neutral"][:6]]
    model = compose(trained, base, router="discriminant")
    chosen = experts_of(model, [*TOPICS, *general]).named(pool.names)
    assert chosen[:4] == [{name: 1.0} for name in pool.names]
    left = [text for text, weights in zip(general, chosen[4:], strict=True) if not weights]
    assert len(left) > 8  # one block of a small reader tells few things apart
    ids = torch.tensor(tokens_of(model, left[:1]))
    with_experts, wanted = logits_of(model, ids), logits_of(detach(model), ids)
    assert torch.equal(with_experts, wanted)
    save(compose(trained, base, router="discriminant"), tmp_path / "routed")
    detach(base.model)
    again = deepcopy(load(tmp_path / "routed", base))
    assert experts_of(again, [*TOPICS, *general]).named(pool.names) == chosen
    detach(base.model)
    remove_from_saved(tmp_path / "routed", pool.names[-1:])
    add_to_saved(tmp_path / "routed", trained.select(pool.names[-1:]))
    again = load(tmp_path / "routed", base)
    assert experts_of(again, [*TOPICS, *general]).named(pool.names) == chosen


def test_what_an_interface_asks_about_a_task_is_answered_by_the_base(llama_pool):
    chooser = open_chooser(trained_on(llama_pool, open_reader("minilm")), router="discriminant")
    asked = HELPED.partition("USER: ")[2]
    assert chooser.choose([asked, HELPED]).named(llama_pool.names) == [{"e0": 1.0}, {}]


def test_a_follow_up_goes_to_whom_it_follows(llama_pool):
    chooser = open_chooser(trained_on(llama_pool), router="discriminant")
    for name, topic in zip(llama_pool.names, TOPICS, strict=True):
        turns = [("user", topic), ("assistant", "Yes."), ("user", "Shorter, please.")]
        assert chooser.choose([ChatTexts.of(turns)]).named(chooser.experts) == [{name: 1.0}]
    assert chooser.choose(["Shorter, please."]).named(chooser.experts) == [{}]


def test_experts_of_few_prompts_may_be_further_behind_the_base():
    counts = torch.tensor([0.0, 1.0, 3.0, 5.0, 1000.0])  # 0: not known
    tables = Tables(tuple("abcde"), {"readings.prompts": counts})
    ready = Ready(Lines(torch.zeros(1), torch.zeros(1)), small_reader(), 0.0, room=0.5)
    got = Discriminant(fallback=0.2).allowances(tables, ready).tolist()
    assert got == pytest.approx([0.1, 0.2, 0.2, 0.16, 0.1003])


@pytest.mark.parametrize(("ahead", "room"), [(1.0, 0.5), (0.75, 0.25), (0.5, 0.0), (-0.25, 0.0)])
def test_the_room_is_what_general_requests_are_ahead_of_the_best_expert_beyond_a_half(ahead, room):
    classes = len(base_texts())
    offsets = torch.tensor([[-2.0, 0.25, 0.25 + ahead, *[3.0] * (classes - 1)]])
    lines = Lines(torch.zeros(1, 4, 2 + classes), offsets)
    assert room_of(lines, torch.randn(2 + classes, 1, 4)) == room


def test_the_room_shrinks_as_a_pool_grows(llama_pool):
    chooser = open_chooser(trained_on(llama_pool), router="discriminant")
    assert 0.3 < chooser.ready.room < 1
    few = open_chooser(trained_on(llama_pool).select(llama_pool.names[:2]), router="discriminant")
    assert few.ready.room > chooser.ready.room


class Counting:
    """A reader that counts the texts it reads."""

    def __init__(self, reader: Reader) -> None:
        self._reader, self.texts = reader, 0

    def states(self, texts: Sequence[str]) -> torch.Tensor:
        self.texts += len(texts)
        return self._reader.states(texts)


def test_a_text_is_read_once(llama_pool):
    chooser = open_chooser(llama_pool, router="discriminant")
    reader = Counting(chooser.ready.reader)
    chooser.ready = chooser.ready._replace(reader=reader)
    asked = [[("user", PROMPTS[0]), ("user", text)] for text in PROMPTS[:3]]
    chats = list(map(ChatTexts.of, asked))
    before = chooser.choose(chats, client="a")
    # The views of three texts: the second has two sentences that say something.
    read = reader.texts
    assert read == len({view for text in PROMPTS[:3] for views in Views.of(text) for view in views})
    assert_same(chooser.choose(chats, client="a"), before)
    assert reader.texts == read
    assert_same(chooser.choose(chats, client="b"), before)
    assert reader.texts == 2 * read  # else the time would tell one client what others have asked


@pytest.mark.filterwarnings("ignore:.*few prompts:UserWarning")
def test_experts_of_one_prompt_can_be_compared_beside_the_base(llama_pool):
    ones = [
        expert.with_prompts_read(small_reader(), [topic])
        for expert, topic in zip(llama_pool.experts, TOPICS, strict=True)
    ]
    chooser = open_chooser(Pool(tuple(ones)), router="discriminant")
    chosen = chooser.choose(list(TOPICS)).named(chooser.experts)
    assert chosen == [{name: 1.0} for name in chooser.experts]
