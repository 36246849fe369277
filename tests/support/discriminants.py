"""What discriminants score, by log-likelihoods of Gaussians, one prompt and expert at a time."""

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from phatgoose.experts.expert import LAYOUT
from phatgoose.experts.pool import Pool
from phatgoose.names import MINILM, package_folder
from phatgoose.reader import Reader
from phatgoose.routing.conversation import base_texts
from routed_models import TOPICS
from tiny import small_reader


@cache
def minilm() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The whole model of which `small_reader` is a block, and its tokenizer."""
    folder = package_folder(MINILM) / "model"
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def states_of(text: str) -> Tensor:
    """What the small reader makes of a text, float64 [blocks, d], by its model's own outputs."""
    model, tokenizer = minilm()
    with torch.no_grad():
        hidden = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)[2]
    return hidden[2].double().mean(dim=1)  # the first is of what enters the blocks


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


def scores_by_hand(pool: Pool, text: str, shrinkage: float, task_variance: float) -> Tensor:
    """Each expert's scores by its prompt statistics, [blocks, E]."""
    scores = []
    for block, states in enumerate(states_of(text)):
        means, factors, rests = (
            [expert.prompt_statistics[f"whole.{part}"][block].double() for expert in pool.experts]
            for part in ("mean", "factor", "rest")
        )
        spreads = [
            rows.T @ rows + torch.diag(rest) for rows, rest in zip(factors, rests, strict=True)
        ]
        scores.append(gaussian_scores(states, means, spreads, shrinkage, task_variance))
    return torch.stack(scores)


def trained_on(pool: Pool, reader: Reader | None = None) -> Pool:
    """The pool whose experts have read texts of one of TOPICS each."""
    experts = []
    for expert, topic in zip(pool.experts, TOPICS, strict=False):
        words = topic.split()
        texts = [" ".join(words[i:] + words[:i]) for i in range(len(words))]
        experts.append(expert.with_prompts_read(reader or small_reader(), texts))
    return Pool(tuple(experts))


def taught_in(folder: Path, pool: Pool) -> Path:
    """A folder of `trained_on`, whose experts bring some of their prompts."""
    for expert, topic in zip(trained_on(pool).experts, TOPICS, strict=True):
        expert.save(folder / expert.name)
        lines = [f"{topic} {number}" for number in range(5)]
        (folder / expert.name / LAYOUT.prompts).write_text("\n".join(lines))
    return folder


FOLLOW_UP = "Shorter, please."


def some_chats(count: int) -> list[list[dict[str, str]]]:
    """Chats of topics, pastes, general texts and follow-ups."""
    draw = random.Random(5)
    general = [text for texts in base_texts().values() for text in texts]
    chats = []
    for _ in range(count):
        chat = []
        if draw.random() < 0.2:
            chat.append({"role": "system", "content": draw.choice([*TOPICS, *general])})
        for _ in range(draw.randint(1, 3)):
            text = draw.choice(TOPICS if draw.random() < 0.6 else general)
            if draw.random() < 0.3:
                text += "\n\n" + " ".join(draw.sample(general, 2))
            chat.append({"role": "user", "content": text})
            chat.append({"role": "assistant", "content": "Yes."})
        if draw.random() < 0.3:
            chat.append({"role": "user", "content": FOLLOW_UP})
        else:
            chat.pop()
        chats.append(chat)
    return chats
