"""Router discriminant, against Gaussian log-likelihoods by brute force."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from discriminants import scores_by_hand, trained_on
from phatgoose.errors import PoolError, RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.experts.statistics import readings_of
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.routers.discriminant import (
    line_of,
)
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
    wanted = torch.stack([scores_by_hand(base, pool, text, (0, 1), *how) for text in PROMPTS])
    model = compose(pool, base, router=text_of("discriminant", **settings))
    got = scores_of(model, PROMPTS)
    torch.testing.assert_close(got.double(), wanted, atol=2e-4, rtol=1e-3)


@both_streams
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_each_block_chooses_by_its_own_reading(base, pool, share):
    by_hand = [
        torch.stack([scores_by_hand(base, pool, text, blocks, 0.3, 1.0) for text in PROMPTS])
        for blocks in ((0,), (1,), (0, 1))
    ]
    wanted = share * torch.stack(by_hand[:2], dim=1) + (1 - share) * by_hand[2][:, None]
    model = compose(pool, base, router=text_of("discriminant", per_block=share))
    got = scores_of(model, PROMPTS)
    torch.testing.assert_close(got.double(), wanted, atol=2e-4, rtol=1e-3)
    chosen = experts_of(model, PROMPTS).experts[..., 0]
    assert torch.equal(chosen, wanted.argmax(dim=-1))
    assert (chosen[:, 0] != chosen[:, 1]).any() or share < 1  # blocks differ somewhere


@both_streams
def test_prompts_of_a_task_go_to_its_expert(base, pool):
    model = compose(trained_on(base, pool), base, router="discriminant")
    mixtures = experts_of(model, [text[:-2] for text in TOPICS])
    assert mixtures.experts[:, 0].tolist() == [0, 1, 2, 3]


def test_experts_that_were_measured_on_one_prompt_each_are_refused(llama, llama_pool):
    """Their covariances are 0, so that of all means can't be inverted."""
    experts = []
    for seed, expert in enumerate(llama_pool.experts):
        states = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(seed))
        experts.append(replace(expert, readings=readings_of(states)))
    pool = Pool(tuple(experts))
    assert compose(pool, llama, router="discriminant:task_variance=0")
    detach(llama.model)
    with pytest.raises(RoutingError, match=r"can't invert .* with more examples"):
        compose(pool, llama, router="discriminant:task_variance=1")


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


def test_readings_of_several_bases_are_refused(llama, llama_pool):
    first, second = llama_pool.experts[:2]
    deep = {part: tensor[:1] for part, tensor in second.readings.items()}
    with pytest.raises(PoolError, match=r"different shapes .*can't be of one base"):
        compose(Pool((first, replace(second, readings=deep))), llama, router="discriminant")


# Bounds on single contributions to statistics of a pool


@pytest.mark.parametrize("groups", [[2, 1], [3, 1, 1], [5, 1, 1, 1], [6, 2, 2], [2, 2, 1]])
@pytest.mark.parametrize("noise", [0.0, 0.03, 1.0])
def test_experts_that_share_a_task_leave_the_others_theirs(groups, noise):
    """Their means lie together, and the bound must not move every other mean onto them."""
    draw = torch.Generator().manual_seed(len(groups))
    d, tasks = 32, torch.arange(len(groups)).repeat_interleave(torch.tensor(groups))
    centres = 10 * torch.nn.functional.normalize(torch.randn(len(groups), d, generator=draw), dim=1)
    means = centres[tasks] + noise * torch.randn(len(tasks), d, generator=draw) / d**0.5
    moments = {
        "mean": means,
        "factor": torch.zeros(len(tasks), 2, d),
        "rest": torch.ones(len(tasks), d),
    }
    slopes, offsets = line_of(moments, 0.3, 0.0, "discriminant")
    prompts = centres.repeat_interleave(50, dim=0)
    prompts = prompts + torch.randn(len(prompts), d, generator=draw)
    found = tasks[(prompts @ slopes + offsets).argmax(dim=1)]
    right = (found == torch.arange(len(groups)).repeat_interleave(50)).float().mean()
    assert right > 0.98
