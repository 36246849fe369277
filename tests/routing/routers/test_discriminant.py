"""Router discriminant, against Gaussian log-likelihoods by brute force."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from discriminants import scores_by_hand, trained_on
from phatgoose.errors import RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.experts.statistics import readings_of
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.routers.discriminant import line_of
from routed_models import TOPICS
from tiny import random
from topic_prompts import PROMPTS, both_streams, experts_of, scores_of

OF_TOPICS = [text[:-2] for text in TOPICS]  # a prompt of each expert's own


@both_streams
@pytest.mark.parametrize(
    ("settings", "shrinkage", "task_variance", "share"),
    [
        ("", 0.3, 1.0, 0.0),
        (":task_variance=0", 0.3, 0.0, 0.0),
        (":task_variance=0.5", 0.3, 0.5, 0.0),
        (":shrinkage=0.9", 0.9, 1.0, 0.0),
        (":shrinkage=1", 1.0, 1.0, 0.0),
        (":per_block=0.25", 0.3, 1.0, 0.25),
        (":per_block=1", 0.3, 1.0, 1.0),
    ],
)
def test_scores_are_gaussian_log_likelihoods(base, pool, settings, shrinkage, task_variance, share):
    rows = [scores_by_hand(base, pool, text, shrinkage, task_variance) for text in PROMPTS]
    by_block = torch.stack(rows)  # [prompts, blocks, E]
    wanted = by_block.mean(dim=1)
    if share:  # each block chooses by its own
        wanted = torch.lerp(wanted[:, None], by_block, share)
    model = compose(pool, base, router=f"discriminant{settings}")
    got = scores_of(model, PROMPTS)
    torch.testing.assert_close(got.double(), wanted, atol=2e-4, rtol=1e-3)
    chosen = experts_of(model, PROMPTS).experts[..., 0]
    assert torch.equal(chosen, wanted.argmax(dim=-1))
    assert share < 1 or (chosen[:, 0] != chosen[:, 1]).any()  # blocks differ somewhere


def turned(pool: Pool, z: int, change) -> Pool:
    """The pool whose expert z has its readings changed by their names."""
    expert = pool.experts[z]
    readings = {name: change(name, part) for name, part in expert.readings.items()}
    return Pool((*pool.experts[:z], replace(expert, readings=readings), *pool.experts[z + 1 :]))


@both_streams
@pytest.mark.parametrize("by", [1.0, 100.0, 1e30])
def test_prompts_of_a_task_go_to_its_expert_however_far_another_s_mean_is(base, pool, by):
    attacked = turned(
        trained_on(base, pool), 1, lambda name, part: by * part if name.endswith("mean") else part
    )
    model = compose(attacked, base, router="discriminant")
    assert scores_of(model, OF_TOPICS).isfinite().all()
    first, attacker, *others = experts_of(model, OF_TOPICS).experts[:, 0].tolist()
    assert [first, *others] == [0, 2, 3]
    assert by > 1 or attacker == 1


@both_streams
def test_a_covariance_that_masks_the_others_leaves_them_their_prompts(base, pool):
    plain = trained_on(base, pool)

    def masking(name: str, part: torch.Tensor) -> torch.Tensor:
        if not name.endswith("factor"):
            return part
        means = [expert.readings[name.replace("factor", "mean")] for expert in plain.experts]
        others = torch.stack([means[z] for z in (0, 2, 3)], dim=1)  # [b, 3, d]
        changed = part.clone()
        changed[:, :3] = 100 * (others - others.mean(dim=1, keepdim=True))
        return changed

    def margins(pool: Pool) -> torch.Tensor:
        """How far the right one of the others is above the next of them."""
        scores = scores_of(compose(pool, base, router="discriminant"), OF_TOPICS)
        detach(base.model)
        assert [scores.argmax(dim=1)[z].item() for z in (0, 2, 3)] == [0, 2, 3]
        left = scores[[0, 2, 3]][:, [0, 2, 3]]
        return left.diagonal() - left.masked_fill(torch.eye(3).bool(), -torch.inf).amax(dim=1)

    assert (margins(turned(plain, 1, masking)) > 0.1 * margins(plain)).all()


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


def test_readings_that_can_not_be_compared_are_refused(llama, llama_pool):
    # Of one prompt each covariances are 0, so that that of all means can't be inverted.
    ones = [
        replace(expert, readings=readings_of(random(1, 2, 32, seed=z)))
        for z, expert in enumerate(llama_pool.experts)
    ]
    detach(compose(Pool(tuple(ones)), llama, router="discriminant:task_variance=0"))
    with pytest.raises(RoutingError, match=r"can't invert .* with more examples"):
        compose(Pool(tuple(ones)), llama, router="discriminant:task_variance=1")
