"""Routers that look at no input: random, single, weights, those by scores, merged."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from odd_files import nested, one_line_of
from phatgoose.base.loading import load_base
from phatgoose.errors import ConfigError, PoolError, RoutingError
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.experts.lora import LoraStack
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, composition_of
from phatgoose.routing.layers import FoldedLinear, folded_weight
from phatgoose.routing.routers.fixed import Random, best_expert, best_expert_by_task, read_scores
from phatgoose.routing.routers.router import RouterAtSite
from routed_models import SCORES
from tiny import assert_same_logits, logits_of, make_ids, peft_model, random
from topic_prompts import CHOOSING, OPEN, both_streams, by_single


def random_router(seed: int = 0) -> RouterAtSite:
    return RouterAtSite(Random(seed=seed), "site", torch.arange(4), "abcd", {})


def test_every_set_of_experts_is_as_likely():
    decision = random_router()(torch.zeros(6000, 8))
    counts = Counter(tuple(sorted(row)) for row in decision.experts.tolist())
    assert len(counts) == 6
    assert all(abs(count - 1000) < 4 * (6000 / 6 * 5 / 6) ** 0.5 for count in counts.values())


def test_what_is_drawn_depends_on_the_seed_and_goes_on_until_it_starts_anew():
    u, router = torch.zeros(40, 8), random_router(seed=3)
    first, second = router(u).experts, router(u).experts
    assert not torch.equal(first, second)
    router.restart()
    halves = torch.cat([router(u[:10]).experts, router(u[10:]).experts])
    assert torch.equal(halves, first)  # by the number of tokens, not of passes
    state = torch.get_rng_state()
    assert torch.equal(random_router(seed=3)(u).experts, first)
    assert torch.equal(torch.get_rng_state(), state)  # chance elsewhere is left alone
    assert not torch.equal(random_router(seed=4)(u).experts, first)


def test_each_site_draws_for_itself_and_no_task_depends_on_those_before_it(llama, llama_pool):
    model = compose(llama_pool, llama, router="random:seed=1")
    layers = composition_of(model).layers.values()
    drawn = [layer.at_site(torch.zeros(40, 8)).experts.tolist() for layer in layers]
    assert all(drawn.count(each) == 1 for each in drawn)
    behind, alone = (
        evaluate(model, tasks, max_new_tokens=5).scores[-1] for tasks in ([CHOOSING, OPEN], [OPEN])
    )
    assert behind.predictions == alone.predictions


@pytest.mark.parametrize(
    ("chosen", "options"),
    [
        ("e2", {"router": "single:expert=e2"}),
        ("e3", {"router": "best-individual", "scores": SCORES}),
        ("e1", {"weights": {"e1": 1}}),
        (None, {"weights": {"e1": 0}}),  # a mixture of nothing is the base
    ],
)
def test_the_one_expert_is_that_expert_alone(base, pool, chosen, options):
    alone = peft_model(base, pool[chosen].directory) if chosen else base.model
    wanted = logits_of(alone, make_ids(rows=2))
    model = compose(pool, base, **options)
    assert composition_of(model).experts == (chosen or "e1",)
    assert_same_logits(logits_of(model, make_ids(rows=2)), wanted)


FEW = {name: SCORES[name] for name in ("e0", "e1", "e2")}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"router": "single"}, PoolError, "the name of its expert .*: one of e0, e1, e2, e3"),
        ({"router": "single:expert=e9"}, PoolError, "no expert 'e9'"),
        ({"weights": {"e9": 1}}, PoolError, "no expert 'e9'"),
        ({"weights": {"e0": math.nan}}, ConfigError, "numbers from -100 to 100"),
        ({"router": "oracle"}, ConfigError, "oracle needs the scores"),
        ({"router": "oracle", "scores": FEW}, PoolError, "'e3' lacks scores.* are of e0, e1, e2"),
    ],
)
def test_what_names_no_expert_is_refused(llama, llama_pool, options, error, message):
    with pytest.raises(error, match=message):
        compose(llama_pool, llama, **options)
    assert not hasattr(llama.model, "phatgoose")


# By scores


@both_streams
def test_the_oracle_scores_each_task_as_its_best_expert_and_nothing_else(base, pool):
    tasks = [replace(CHOOSING, name="first"), replace(OPEN, name="second")]

    def answers(model, place):
        (score,) = evaluate(model, tasks[place], max_new_tokens=5).scores
        return [(each.answer, pytest.approx(each.scores, abs=1e-4)) for each in score.predictions]

    wanted = by_single(base, pool, ("e1", "e2"), answers)
    model = compose(pool, base, router="oracle", scores=SCORES)
    scores = evaluate(model, tasks, max_new_tokens=5).scores
    assert [[(p.answer, p.scores) for p in score.predictions] for score in scores] == wanted
    with pytest.raises(RoutingError, match="no scores for task 'open'; it has them for first, sec"):
        evaluate(model, OPEN)
    with pytest.raises(RoutingError, match="goes by the task's name"):  # which is over
        logits_of(model, make_ids())


NO_SCORES = ["", "[]", '{"models": {}}', "\ud800", nested(100_000), '{"experts": {"e0": 0.5}}']


def test_the_scores_of_a_comparison_are_read_and_other_files_are_refused_in_a_line(tmp_path):
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps({"models": {"merged": 0.4}, "experts": SCORES, "tasks": []}))
    assert read_scores(path) == read_scores(str(path)) == SCORES
    for content in (*NO_SCORES, '{"experts": {"e0": {"t": NaN}}}'):
        path.write_text(content, encoding="utf-8", errors="surrogatepass")
        assert "comparison.json" in one_line_of(lambda: read_scores(path), PoolError)


def test_the_best_expert_has_the_best_mean_or_the_best_score_on_a_task():
    assert best_expert(SCORES, tuple(SCORES)) == "e3"
    assert best_expert(SCORES, ("e0", "e1", "e2")) == "e1"  # 0.45 each; the first of equals
    assert best_expert(SCORES, ("e2", "e1", "e0")) == "e2"
    assert best_expert_by_task(SCORES, tuple(SCORES)) == {"first": "e1", "second": "e2"}
    for odd in ({"first": 0.1}, {**SCORES["e0"], "third": 0.2}, {}):
        with pytest.raises(PoolError, match="'e2' lacks scores, or was scored on other tasks"):
            best_expert({**SCORES, "e2": odd}, ("e0", "e1", "e2"))


# Merged: the mean of all updates, added at the side or folded into the weights

LARGE = (24, 9, 20)  # ranks at which merging folds at every site of every tiny base
SITE = "model.layers.0.self_attn.q_proj"


def mean_update(pool: Pool, site: str) -> Tensor:
    """The mean of s B A over the pool, zero for those not at `site`, float64 [d, n]."""
    loras = [expert.lora[site] for expert in pool.experts if site in expert.lora]
    return sum(lora.scale * lora.B.double() @ lora.A.double() for lora in loras) / len(pool)


def merged(base, pool: Pool) -> dict[str, type]:
    """The type of each layer of `pool` merged, which is `base` with the mean in every weight."""
    by_hand = load_base(base.id, dtype="float32").model
    for site in pool.sites:
        layer, mean = by_hand.get_submodule(site), mean_update(pool, site)
        layer.weight.data += mean.T if isinstance(layer, Conv1D) else mean
    model, ids = compose(pool, base, router="merged"), make_ids(rows=2)
    assert_same_logits(logits_of(model, ids), logits_of(by_hand, ids))
    return {site: type(layer) for site, layer in composition_of(model).layers.items()}


@pytest.mark.parametrize("ranks", [(4, 4, 4, 4), LARGE], ids=["factored", "folded"])
def test_it_is_the_exact_mean_of_all_products(base, kind, pool_of, ranks):
    layers = merged(base, pool_of(kind, ranks))
    assert (set(layers.values()) == {FoldedLinear}) == (ranks == LARGE)


@pytest.mark.parametrize("rank", [2, 30])
@pytest.mark.parametrize("kind", ["llama", "gpt2"], indirect=True)
def test_an_expert_that_does_not_act_at_a_site_counts_as_zero_there(base, kind, make_expert, rank):
    few = ["q_proj", "down_proj"] if kind == "llama" else ["c_attn"]
    patterns = {"rank_pattern": {few[0]: 2 * rank}, "alpha_pattern": {few[0]: 5}}
    pool = Pool(
        (
            make_expert(base, "everywhere", rank=rank, **patterns),
            make_expert(base, "few", rank=rank + 1, seed=1, target_modules=few),
            make_expert(base, "other", rank=rank + 2, seed=2, use_rslora=True),
        )
    )
    assert {sum(site in each.modules for each in pool.experts) for site in pool.sites} == {2, 3}
    assert (FoldedLinear in merged(base, pool).values()) == (rank == 30)


class Doubling(nn.Linear):
    """A linear layer that is more than its weight, as those in 8-bit floats are."""

    def forward(self, u: Tensor) -> Tensor:
        return 2 * super().forward(u)


def test_a_layer_that_does_more_than_its_weight_is_not_folded(llama, pool_of):
    pool, u = pool_of("llama", LARGE), torch.ones(1, 32)
    attention = llama.model.get_submodule(SITE.rpartition(".")[0])
    doubling = Doubling(32, 32, bias=False)
    doubling.weight = attention.q_proj.weight
    attention.q_proj = doubling
    wanted = doubling(u) + u @ mean_update(pool, SITE).float().T
    got = composition_of(compose(pool, llama, router="merged")).layers[SITE](u)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("conv", [False, True])
def test_a_weight_in_bfloat16_is_rounded_once(conv):
    base = (Conv1D(48, 16) if conv else nn.Linear(16, 48)).bfloat16()
    stack = LoraStack(random(9, 4, 16).bfloat16(), random(9, 4, 48, seed=1).bfloat16())
    got = folded_weight(base, stack, 10)  # one expert isn't here
    weight = base.weight.double()
    products = stack.B.double().transpose(1, 2) @ stack.A.double()
    exact = (weight.T if conv else weight) + products.sum(dim=0) / 10
    assert (got.dtype, got.shape) == (torch.bfloat16, (48, 16))
    half_a_step = torch.finfo(torch.bfloat16).eps / 2
    assert ((got.double() - exact).abs() <= 1.01 * half_a_step * exact.abs() + 1e-6).all()
