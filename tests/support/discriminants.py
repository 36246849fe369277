"""What discriminants score, by log-likelihoods of Gaussians, one prompt and expert at a time."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from phatgoose.experts.pool import Pool
from phatgoose.experts.statistics import prompt_states, readings_of
from phatgoose.sites import blocks_of
from phatgoose.tasks.batching import read_prompts
from phatgoose.tasks.encoding import Encoder
from routed_models import TOPICS


def states_of(base, text: str) -> Tensor:
    """What each block makes of a text, the mean over its tokens, float64 [blocks, d]."""
    seen: list[Tensor] = []

    def keep(_, __, output) -> None:
        seen.append((output if isinstance(output, Tensor) else output[0])[0].double())

    handles = [block.register_forward_hook(keep) for block in blocks_of(base.model)]
    stack = base.model.get_encoder() if base.is_encoder_decoder else base.model.base_model
    with torch.no_grad():
        stack(input_ids=torch.tensor([base.tokenizer(text)["input_ids"]]))
    for handle in handles:
        handle.remove()
    return torch.stack(seen).mean(dim=1)


def bounded(means: Sequence[Tensor], spreads: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The means, and the mean covariance, of which no expert adds more than 30 medians are worth.

    One direction of one expert's covariance after the other.
    """
    E, middle = len(means), torch.stack(list(means)).quantile(0.5, dim=0)
    distances = torch.stack([(mean - middle).norm() for mean in means])
    most = E * distances.quantile(0.5)
    near = [
        mean if distance <= most else middle + (mean - middle) * most / distance
        for mean, distance in zip(means, distances, strict=True)
    ]
    centre = torch.stack(near).mean(dim=0)
    least = 1e-6 * torch.stack([(mean - centre) ** 2 for mean in near]).mean()
    total = torch.zeros_like(spreads[0])
    for spread in spreads:
        for row in parted(spread):
            own = row @ row
            if own < 1e-12 * spread.trace():
                continue
            unit = row / own.sqrt()
            along = torch.stack([unit @ each @ unit for each in spreads])
            bound = 30 * E * along.quantile(0.5) + least
            total += torch.outer(row, row) * min(1.0, float(bound / own))
    return near, total / E


def parted(spread: Tensor) -> Tensor:
    """The directions of a covariance times their deviations; the tests' have no more than 16."""
    assert torch.linalg.matrix_rank(spread, hermitian=True, rtol=1e-6) <= 16
    values, vectors = torch.linalg.eigh(spread)
    return (vectors[:, -16:] * values[-16:].clamp(min=0).sqrt()).T


def gaussian_scores(
    x: Tensor,
    means: Sequence[Tensor],
    spreads: Sequence[Tensor],
    shrinkage: float = 0.3,
    task_variance: float = 0.0,
) -> Tensor:
    """log N(x; m_z, Σ) - log N(x; m, Σ), over D, of each expert's mean and covariance.

    An expert nearer to m than 3/4 of the median is taken to be that far away.
    """
    means, spread = bounded(means, spreads)
    own = torch.diag(spread.diagonal())
    spread = (1 - shrinkage) * spread + shrinkage * own
    spread = spread + 1e-6 * own.trace() / len(own) * torch.eye(len(own))
    centre = torch.stack(list(means)).mean(dim=0)
    between = torch.stack([torch.outer(m - centre, m - centre) for m in means])
    spread = spread + task_variance * between.mean(dim=0)
    usual = MultivariateNormal(centre, spread).log_prob(x)
    inverse = torch.linalg.inv(spread)
    distances = torch.stack([(m - centre) @ inverse @ (m - centre) for m in means])
    distance = distances.clamp(max=len(means) * distances.quantile(0.5)).mean()
    logs = torch.stack([MultivariateNormal(m, spread).log_prob(x) for m in means])
    unpaid = (0.75 * distances.quantile(0.5) - distances).clamp(min=0)
    return (logs - usual - 0.5 * unpaid) / distance


def scores_by_hand(base, pool: Pool, text: str, shrinkage: float, task_variance: float) -> Tensor:
    """Each expert's scores by its readings, [blocks, E]."""
    scores = []
    for block, states in enumerate(states_of(base, text)):
        means, factors, rests = (
            [expert.readings[f"whole.{part}"][block].double() for expert in pool.experts]
            for part in ("mean", "factor", "rest")
        )
        spreads = [
            rows.T @ rows + torch.diag(rest) for rows, rest in zip(factors, rests, strict=True)
        ]
        scores.append(gaussian_scores(states, means, spreads, shrinkage, task_variance))
    return torch.stack(scores)


def trained_on(base, pool: Pool) -> Pool:
    """The pool whose experts have read texts of one of TOPICS each."""
    encoder, experts = Encoder.of(base), []
    for expert, topic in zip(pool.experts, TOPICS, strict=False):
        words = topic.split()
        texts = [" ".join(words[i:] + words[:i]) for i in range(len(words))]
        prompts = [encoder.prompt(text) for text in texts]
        states = read_prompts(base.model.eval(), prompts, prompt_states(base.model))
        experts.append(replace(expert, readings=readings_of(states)))
    return Pool(tuple(experts))
