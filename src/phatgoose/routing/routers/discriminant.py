"""Discriminant: the experts whose training prompts the base reads most like this one.

Not in the paper. A decoder knows its task only when it has seen the whole prompt, so this router
reads prompts with the base alone and chooses for the whole input. Experts share the mean and
covariance of what each block of the base makes of their training prompts (`statistics`), and new
prompts are told apart by Fisher's linear discriminant over them: directions in which prompts of
one task differ count little, wording among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import PoolError, RoutingError
from ...experts.pool import Pool
from ...experts.statistics import PARTS, PLACES, PromptStates
from ...files import is_finite
from ...sites import blocks_of
from ...tasks.prompt_passes import PromptReading
from .prompt_router import BaseRouter, ByPrompt, Prompt, PromptRouter, Tables
from .router import Scores

READ = "whole"  # of `PLACES`: the mean over a prompt's tokens
SMALLEST = 1e-6  # of the mean variance: what every direction varies by at least
MOST_BYTES = 2**30  # of remembered states: some 7,000 prompts of a base of 30 blocks of 576 numbers

Line = tuple[Tensor, Tensor]  # slopes [d, E] and offsets [E] of scores
States = dict[tuple[int, ...], Tensor]  # of all blocks [2, blocks, d], by a prompt's tokens


class Discriminant(ByPrompt):
    """Router discriminant."""

    # b blocks of size h, and f rows of a covariance's factor
    prompt_form: ClassVar[Mapping[str, str]] = {
        f"readings.{READ}.{part}": letters
        for part, letters in (("mean", "Ebh"), ("factor", "Ebfh"), ("rest", "Ebh"))
    }

    def check(self, pool: Pool) -> None:
        super().check(pool)
        first = pool.experts[0]
        wanted = {part: tensor.shape for part, tensor in first.readings.items()}
        for expert in pool.experts:
            for part, tensor in expert.readings.items():
                if tensor.shape != wanted[part]:
                    raise PoolError(
                        f"Expert {expert.name!r} has readings {part} of shape "
                        f"{tuple(tensor.shape)}, {first.name!r} of {tuple(wanted[part])}: they "
                        f"can't be of one base; measure them again."
                    )

    def tables(
        self, pool: Pool, scores: Scores | None = None, embedder: str | None = None
    ) -> Tables:
        stacked = {
            name: torch.stack([e.readings[name.removeprefix("readings.")] for e in pool.experts])
            for name in Discriminant.prompt_form
        }
        return Tables(pool.names, stacked)

    def chooser(self, tables: Tables) -> PromptRouter:
        return self.discriminant(tables)

    def discriminant(self, tables: Tables) -> PromptDiscriminant:
        return PromptDiscriminant(tables, self.line, self.config.per_block)

    def line(self, moments: Mapping[str, Tensor]) -> Line:
        return line_of(moments, self.config.shrinkage, self.config.task_variance, self.spec.name)


def line_of(
    moments: Mapping[str, Tensor], shrinkage: float, task_variance: float, router: str
) -> Line:
    """The slopes [d, E] and offsets [E] of s_z, as PromptDiscriminant has it, as functions of x.

    `moments` are `mean` [E, d], `factor` [E, f, d] and `rest` [E, d] of the experts' training
    prompts (`experts.statistics`). What an expert adds to the means over experts is bounded
    (`bounded_means`). Raises RoutingError, naming `router`, where the covariance can't be
    inverted, or what comes of it is not finite.
    """
    # Some activations are a thousand times the others, and their squares are inverted.
    means, factors, rests = (moments[part].double() for part in PARTS)
    # No bound below the prompts' own spread: where most experts share a task their means hardly
    # differ, and another task's must not be moved onto theirs.
    deviation = (factors.square().sum(dim=(1, 2)) + rests.sum(dim=1)).quantile(0.5).sqrt()
    means = bounded_means(means, least=len(means) * float(deviation))
    factors, rests = bounded_variances(means, factors, rests)
    rows = factors.flatten(0, 1)
    shared = rows.T @ rows / len(means) + torch.diag(rests.mean(dim=0))
    diagonal = shared.diagonal()
    least = SMALLEST * diagonal.mean() + torch.finfo(torch.float32).tiny
    spread = (1 - shrinkage) * shared + torch.diag(shrinkage * diagonal + least)
    centre = means.mean(dim=0)
    away = means - centre  # d_z
    apart = _within(away.square().sum(dim=1))
    spread += task_variance / len(away) * (away.T * apart) @ away
    # _ex doesn't raise: what failed is reported below, in the router's words.
    root, failed = torch.linalg.cholesky_ex(spread)
    slopes = torch.cholesky_solve(away.T, root)
    distances = (away * slopes.T).sum(dim=1)
    scale = (_within(distances) * distances).mean().clamp(min=torch.finfo(torch.float32).tiny)
    # The m of x - m is in here, so that scores are one product with x.
    offsets = -0.5 * distances - centre @ slopes
    line = (slopes / scale).float(), (offsets / scale).float()
    if failed or not all(map(is_finite, line)):
        raise RoutingError(
            f"Router {router} can't invert the covariance of the experts' prompts: they "
            f"vary too little beside how far the experts lie apart. Run 'phatgoose stats' on "
            f"each with more examples, set task_variance to 0, or use another router."
        )
    return line


def _within(values: Tensor) -> Tensor:
    return torch.where(values > bound_of(values), bound_of(values) / values, 1.0)


class PromptDiscriminant(BaseRouter):
    """Scores an expert z by the discriminants of all blocks, on average.

    With x the mean over the prompt's tokens of what a block makes of them, m_z the mean of the same
    over z's training prompts, m and S the means over experts of the m_z and of their covariances,
    d_z = m_z - m, B the mean of d_z d_zᵀ, and Σ = (1 - λ) S + λ diag(S) + τ B for the shrinkage λ
    and the task variance τ:

        s_z = (d_zᵀ Σ⁻¹ (x - m) - ½ d_zᵀ Σ⁻¹ d_z) / D,  D the mean over experts of d_zᵀ Σ⁻¹ d_z

    The numerator is z's log-likelihood but for what all experts share. D makes blocks and pools
    alike: prompts of z's own task score about ½, those of all tasks -½ on average. With τ the
    mean of an unseen task is taken to lie around m_z, by a share of how far tasks lie around m, so
    that what tells the experts' own tasks apart most can't outweigh everything else. What one
    expert adds to m, S, B and D is bounded by the pool's median (`bounded_variances`).

    With `per_block` c > 0 each block has scores of its own, c s_zb + (1 - c) s_z for its
    discriminant s_zb.
    """

    name = "discriminant"
    remembered: States | None = None  # None: every prompt is read when it comes

    def __init__(self, tables: Tables, line: Callable[..., Line], per_block: float = 0.0) -> None:
        """`line` is `line_of` with its settings."""
        super().__init__(tables)
        self.per_block = per_block
        moments = {part: tables.tensors[f"readings.{READ}.{part}"] for part in PARTS}
        self.depth, self.size = moments["mean"].shape[1:]
        lines = [
            line({part: of_blocks[:, block] for part, of_blocks in moments.items()})
            for block in range(self.depth)
        ]
        self.slopes, self.offsets = (torch.stack(parts) for parts in zip(*lines, strict=True))

    def remember(self, states: States) -> None:
        self.remembered = states

    def reading(self, base: PreTrainedModel) -> PromptReading:
        text = base.config.get_text_config()
        depth, size = len(blocks_of(base)), getattr(text, "hidden_size", self.size)
        if (depth, size) != (self.depth, self.size):
            raise RoutingError(
                f"Router {self.name} has readings of {self.depth} blocks of {self.size} numbers; "
                f"the model has {depth} of {size}."
            )
        return PromptStates(base)

    def features(self, prompts: Sequence[Prompt], base: PreTrainedModel | None = None) -> Tensor:
        if self.remembered is None or base is None:
            return super().features(prompts, base)
        known = self.remembered
        asked = [tuple(prompt) for prompt in self.tokens(prompts)]
        new = [prompt for prompt in dict.fromkeys(asked) if prompt not in known]
        read = dict(zip(new, self.read(new, base) if new else (), strict=True))
        for prompt, states in read.items():
            if (len(known) + 1) * states.nbytes <= MOST_BYTES:
                known[prompt] = states.clone()  # not a view, which would keep all
        return torch.stack([known[each] if each in known else read[each] for each in asked])

    def scores(self, features: Tensor) -> Tensor:
        read = features[:, PLACES.index(READ)]  # [prompts, blocks, d]
        own = torch.einsum("pbd,bde->pbe", read, self.slopes) + self.offsets
        scores: Tensor = own.mean(dim=1)
        return torch.lerp(scores[:, None], own, self.per_block) if self.per_block else scores

    def score(self, prompts: Sequence[Prompt], base: PreTrainedModel | None = None) -> Tensor:
        if self.remembered is None:
            return super().score(prompts, base)
        return self.scores(self.features(prompts, base))


# Bounds on what one expert adds to the statistics that a pool shares.
#
# Anybody may contribute an expert, and its statistics may be anything. A mean over E experts is
# moved as far as one likes by one of them, so each contribution counts for at most E times the
# pool's median: then one alone adds no more to the mean than the median expert is worth. Variances
# along a direction may be VARIED times that, because honest experts' differ so much: where most
# prompts end in one word, one expert's that don't vary a thousand times as much there. (Of 1, 3,
# 10, 30 and 100, 30 was the least that left honest pools' choices as they were.) What lies within
# its bound is not changed by a bit. Pools of one or two experts have no bounds.

VARIED = 30
COMPARED = 32  # experts at most whose median a direction's bound is made of
LEAST_BOUND = 1e-6  # of the means' own spread: no bound is nearer to 0


def bound_of(values: Tensor) -> Tensor:
    """The most that any of `values` [E, ..] may count for, float64 [..]: E times their median."""
    return len(values) * values.double().quantile(0.5, dim=0)


def bounded_means(means: Tensor, least: float = 0.0) -> Tensor:
    """`means` [E, n], each moved towards the median until its distance is within its bound."""
    exact = means.double()
    middle = exact.quantile(0.5, dim=0)
    away = exact - middle
    distance = away.norm(dim=1, keepdim=True)
    bound = bound_of(distance).clamp(min=least)
    nearer = middle + away * (bound / distance.clamp(min=torch.finfo(torch.float64).tiny))
    return torch.where(distance > bound, nearer.to(means.dtype), means)


def bounded_variances(means: Tensor, factor: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """`factor` [E, f, d] and `rest` [E, d], float64, within bounds along each row and axis."""
    least = LEAST_BOUND * (means - means.mean(dim=0)).square().mean()
    squares, most = factor.square(), VARIED * len(factor)
    own, variances = squares.sum(dim=2), squares.sum(dim=1) + rest  # [E, f], [E, d]
    within = torch.minimum(rest, VARIED * bound_of(variances) + least)
    some = torch.linspace(0, len(factor) - 1, min(len(factor), COMPARED)).round().long()
    # What others vary by in `rest` alone is at most all that they vary by. It costs little, and few
    # rows are beyond even that bound.
    floor = (squares.flatten(0, 1) @ rest[some].T).quantile(0.5, dim=1).view_as(own) / own
    doubtful = own > most * floor + least
    if not doubtful.any():
        return factor, within
    rows = factor[doubtful]
    along = _along(torch.nn.functional.normalize(rows, dim=1), factor[some], rest[some])
    share = ((most * along + least) / own[doubtful]).clamp(max=1)
    return factor.index_put((doubtful,), rows * share.sqrt()[:, None]), within


def _along(rows: Tensor, factor: Tensor, rest: Tensor) -> Tensor:
    """The median over experts [E, ..] of their variance along each of `rows` [R, d]."""
    along = (factor @ rows.T).square().sum(dim=1) + rest @ rows.T.square()  # [E, R]
    return along.quantile(0.5, dim=0)
