"""Router discriminant, against Gaussian log-likelihoods by brute force."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from discriminants import scores_by_hand, trained_on
from phatgoose.errors import PoolError, RoutingError
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.experts.pool import Pool
from phatgoose.experts.statistics import readings_of
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from phatgoose.routing.recording import record
from phatgoose.tasks.task import Example, Task
from routed_models import TOPICS, text_of
from topic_prompts import PROMPTS, both_streams, experts_of, scores_of

# By what they change: shrinkage and task variance.
SETTINGS = {
    "default": ({}, 0.3, 1.0),
    "plain": ({"task_variance": 0.0}, 0.3, 0.0),
    "shrunk": ({"shrinkage": 0.9}, 0.9, 1.0),
    "diagonal": ({"shrinkage": 1.0}, 1.0, 1.0),
    "drawn": ({"task_variance": 0.5}, 0.3, 0.5),
}


@both_streams
@pytest.mark.parametrize("case", SETTINGS)
def test_scores_are_gaussian_log_likelihoods(base, pool, case):
    settings, *how = SETTINGS[case]
    wanted = torch.stack(
        [scores_by_hand(base, pool, text, ("whole",), (0, 1), *how) for text in PROMPTS]
    )
    model = compose(pool, base, router=text_of("discriminant", **settings))
    got = scores_of(model, PROMPTS)
    torch.testing.assert_close(got.double(), wanted, atol=2e-4, rtol=1e-3)


@both_streams
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_each_block_chooses_by_its_own_reading(base, pool, share):
    by_hand = [
        torch.stack(
            [scores_by_hand(base, pool, text, ("whole",), blocks, 0.3, 1.0) for text in PROMPTS]
        )
        for blocks in ((0,), (1,), (0, 1))
    ]
    wanted = share * torch.stack(by_hand[:2], dim=1) + (1 - share) * by_hand[2][:, None]
    model = compose(pool, base, router=text_of("discriminant", per_block=share))
    got = scores_of(model, PROMPTS)
    torch.testing.assert_close(got.double(), wanted, atol=2e-4, rtol=1e-3)
    chosen = experts_of(model, PROMPTS).experts[..., 0]
    assert torch.equal(chosen, wanted.argmax(dim=-1))
    assert (chosen[:, 0] != chosen[:, 1]).any() or share < 1  # blocks differ somewhere


@pytest.mark.parametrize("k", [1, 2])
def test_sites_follow_the_choice_of_their_block(llama, llama_pool, k):
    model = compose(llama_pool, llama, k=k, router="discriminant:per_block=1")
    prompt = llama.tokenizer(PROMPTS[0])["input_ids"]
    with record(model) as recording, torch.no_grad():
        model(torch.tensor([prompt]))
    choice = composition_of(model).prompt_router.choose([prompt], model)
    for site, (weights,) in recording.weights.items():
        here = choice.at(int(site.split(".")[2]))
        wanted = torch.zeros(4).scatter(0, here.experts[0], here.weights[0])
        torch.testing.assert_close(weights[0], wanted.expand(len(prompt), -1))


@both_streams
def test_prompts_of_a_task_go_to_its_expert(base, pool):
    model = compose(trained_on(base, pool), base, router="discriminant")
    mixtures = experts_of(model, [text[:-2] for text in TOPICS])
    assert mixtures.experts[:, 0].tolist() == [0, 1, 2, 3]


def test_experts_that_were_measured_on_one_prompt_each_are_refused(llama, llama_pool):
    """Their covariances are 0, so that of all means can't be inverted."""
    experts = []
    for seed, expert in enumerate(llama_pool.experts):
        states = torch.randn(1, 2, 2, 32, generator=torch.Generator().manual_seed(seed))
        experts.append(replace(expert, readings=readings_of(states)))
    pool = Pool(tuple(experts))
    assert compose(pool, llama, router="discriminant:task_variance=0")
    detach(llama.model)
    with pytest.raises(RoutingError, match=r"can't invert .* with more examples"):
        compose(pool, llama, router="discriminant:task_variance=1")


def test_training_prompts_score_a_half_for_their_expert(llama, llama_pool):
    """On average over each expert's own prompts and over experts, by the definition of D."""
    means = torch.stack([e.readings["whole.mean"][0] for e in llama_pool.experts])
    model = compose(llama_pool, llama, router="discriminant")
    router = composition_of(model).prompt_router
    scores = means @ router.slopes[0] + router.offsets[0]
    assert scores.diagonal().mean().item() == pytest.approx(0.5, abs=1e-4)
    assert (scores.sum() - scores.trace()).item() / 12 < 0


def turned(pool: Pool, z: int, change) -> Pool:
    """The pool whose expert z has its readings changed by their names."""
    expert = pool.experts[z]
    readings = {name: change(name, part) for name, part in expert.readings.items()}
    return Pool((*pool.experts[:z], replace(expert, readings=readings), *pool.experts[z + 1 :]))


@both_streams
@pytest.mark.parametrize("by", [100.0, 1e30])
def test_means_of_one_expert_that_are_far_away_leave_the_others_their_prompts(base, pool, by):
    own = trained_on(base, pool)
    attacked = turned(own, 1, lambda name, part: by * part if name.endswith("mean") else part)
    model = compose(attacked, base, router="discriminant")
    prompts = [text[:-2] for text in TOPICS]
    assert scores_of(model, prompts).isfinite().all()
    found = experts_of(model, prompts).experts[:, 0].tolist()
    assert [found[0], *found[2:]] == [0, 2, 3]


@both_streams
def test_a_covariance_that_masks_the_others_leaves_them_their_prompts(base, pool):
    own = trained_on(base, pool)
    prompts = [text[:-2] for text in TOPICS]
    plain = scores_of(compose(own, base, router="discriminant"), prompts)
    detach(base.model)

    def masking(name: str, part: torch.Tensor) -> torch.Tensor:
        if not name.endswith("factor"):
            return part
        means = [expert.readings[name.replace("factor", "mean")] for expert in own.experts]
        others = torch.stack([each for z, each in enumerate(means) if z != 1], dim=1)  # [b, 3, d]
        changed = part.clone()
        changed[:, :3] = 100 * (others - others.mean(dim=1, keepdim=True))
        return changed

    model = compose(turned(own, 1, masking), base, router="discriminant")
    scores = scores_of(model, prompts)
    assert [scores.argmax(dim=1)[z].item() for z in (0, 2, 3)] == [0, 2, 3]

    def margins(found: torch.Tensor) -> torch.Tensor:
        """How far the right one of the others is above the next of them."""
        left = found[[0, 2, 3]][:, [0, 2, 3]]
        return left.diagonal() - left.masked_fill(torch.eye(3).bool(), -torch.inf).amax(dim=1)

    assert (margins(scores) > 0.1 * margins(plain)).all()


@both_streams
def test_an_evaluation_is_that_of_each_inputs_expert(base, pool):
    task = Task(
        "choosing",
        test=tuple(Example(prompt, "yes", ("yes", "no, never", "plums")) for prompt in PROMPTS),
    )
    model = compose(pool, base, router="discriminant", k=1)
    owners = experts_of(model, PROMPTS).experts[:, 0].tolist()
    (routed,) = evaluate(model, task, tokenizer=base.tokenizer).scores
    detach(model)
    for place, owner in enumerate(owners):
        single = compose(pool, base, router=f"single:expert={pool.names[owner]}")
        (alone,) = evaluate(single, task, tokenizer=base.tokenizer).scores
        detach(single)
        torch.testing.assert_close(
            torch.tensor(routed.predictions[place].scores),
            torch.tensor(alone.predictions[place].scores),
            atol=1e-4,
            rtol=1e-4,
        )


def test_readings_of_another_base_are_refused(llama, llama_pool):
    first, second = llama_pool.experts[:2]
    deep = {part: tensor[:1] for part, tensor in second.readings.items()}
    with pytest.raises(PoolError, match=r"'e1' has readings end\.\w+ of shape \(1, .*'e0'"):
        compose(Pool((first, replace(second, readings=deep))), llama, router="discriminant")
    for cut, told in (((slice(1),), "1 blocks of 32 numbers"), ((..., slice(16)), "2 .* of 16")):
        both = [
            replace(e, readings={part: tensor[cut] for part, tensor in e.readings.items()})
            for e in (first, second)
        ]
        model = compose(Pool(tuple(both)), llama, router="discriminant")
        with pytest.raises(RoutingError, match=rf"readings of {told}.*; the model has 2 of 32"):
            scores_of(model, PROMPTS)
        detach(model)


def test_experts_that_all_read_alike_score_nothing(llama, llama_pool):
    """No direction tells them apart; nothing is divided by zero."""
    shared = llama_pool.experts[0].readings
    pool = Pool(tuple(replace(expert, readings=shared) for expert in llama_pool.experts))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = compose(pool, llama, router="discriminant")
    assert not scores_of(model, PROMPTS).any()
