"""Discriminant: the experts whose training prompts a reader finds most like this one.

Not in the paper. A decoder knows its task only when it has seen the whole prompt, so this router
chooses for the whole input, by what a reader makes of it (`reader`). Experts share the mean and
covariance of what each of its blocks makes of their training prompts (`statistics`), and new
prompts are told apart by Fisher's linear discriminant over them: directions in which prompts of one
task differ count little, wording among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from pydantic import TypeAdapter
from torch import Tensor

from ...config import NOT_NEGATIVE, RATIO
from ...errors import PoolError, RoutingError
from ...experts.adapter_files import check_parts
from ...experts.expert import Expert
from ...experts.pool import Pool
from ...experts.statistics import PARTS, WHOLE
from ...files import is_finite, shortened
from ...reader import Reader, ReaderReference, open_reader, usable_reader
from ..conversation import base_texts, helpers_class
from .base_classes import moments_of_base
from .phatgoose import Temperature
from .prompt import ByPrompt, Fallback, PromptChooser, Tables
from .router import Scores

COUNTS = "readings.prompts"  # among tables, of how many prompts statistics are
ROOM = 0.5  # by how much a usual general request must be ahead of experts, for the base to wait
FEW = 3  # prompts: an expert of these is allowed twice as much, one of thirty a tenth more
SMALLEST = 1e-6  # of the mean variance: what every direction varies by at least


class Lines(NamedTuple):
    """Scores as functions of x: slopes [.., d, E] and offsets [.., E]."""

    slopes: Tensor
    offsets: Tensor


class Ready(NamedTuple):
    """What a discriminant scores with: functions of what the reader makes of a text."""

    lines: Lines
    reader: Reader
    helpers: float  # what a text in the middle of the helpers' class scores
    room: float  # by how much a general request in the middle of its class is ahead, beyond ROOM


@dataclass(frozen=True)
class Discriminant(ByPrompt):
    """Router discriminant: scores an expert z by the discriminants of all blocks, on average.

    With x the mean over the prompt's tokens of what a block makes of them, m_z the mean of the same
    over z's training prompts, m and S the means over experts of the m_z and of their covariances,
    d_z = m_z - m, B the mean of d_z d_zᵀ, and Σ = (1 - λ) S + λ diag(S) + τ B for the shrinkage λ
    and the task variance τ:

        s_z = (d_zᵀ Σ⁻¹ (x - m) - ½ d_zᵀ Σ⁻¹ d_z) / D,  D the mean over experts of d_zᵀ Σ⁻¹ d_z

    The numerator is z's log-likelihood but for what all experts share. D makes blocks and pools
    alike: prompts of z's own task score about ½, those of all tasks -½ on average. With τ the
    mean of an unseen task is taken to lie around m_z, by a share of how far tasks lie around m, so
    that what tells the experts' own tasks apart most can't outweigh everything else. What one
    expert adds to m, S, B and D is bounded by the pool's median (`bounded_variances`), and no
    d_zᵀ Σ⁻¹ d_z in a numerator is below LEAST_PAID times the median.

    Unless `fallback` is off, the base's classes are among the z, with statistics of their texts.
    """

    name, label, needs, usual_k = "discriminant", "Discriminant", ("prompt_statistics",), 1
    # b blocks of size h, and f rows of a covariance's factor
    prompt_sizes: ClassVar[Mapping[str, str]] = {
        f"readings.{WHOLE}.{part}": letters
        for part, letters in (("mean", "Ebh"), ("factor", "Ebfh"), ("rest", "Ebh"))
    } | {COUNTS: "E"}
    shrinkage: Annotated[
        float, "How far the experts' covariance is shrunk to its diagonal.", RATIO
    ] = 0.3
    task_variance: Annotated[
        float,
        "Assumed distance of a new wording or task from an expert's own, as a share of the "
        "distance between the experts' tasks.",
        NOT_NEGATIVE,
    ] = 1.0
    temperature: Temperature = 0.1
    fallback: Fallback = 0.3

    def tables(self, pool: Pool, scores: Scores | None = None) -> Tables:
        readers = {_reader_of(expert): expert.name for expert in pool.experts}
        if len(readers) > 1:
            named = ", ".join(sorted(f"{shortened(str(r))} of {n}" for r, n in readers.items()))
            raise PoolError(
                f"The experts' prompts were read by different readers, or versions of one ({named}"
                f"); run 'phatgoose stats' on those of one of them."
            )
        parts = [f"{WHOLE}.{part}" for part in PARTS]
        forms = {part: pool.experts[0].prompt_statistics[part].shape for part in parts}
        for expert in pool.experts:
            where = f"Expert {expert.name!r}, prompt_statistics"
            check_parts(where, forms, expert.prompt_statistics, (torch.float32,))
        rows = {
            f"readings.{part}": torch.stack(
                [expert.prompt_statistics[part] for expert in pool.experts]
            )
            for part in parts
        }
        rows[COUNTS] = torch.tensor([float(e.info.prompts_read or 0) for e in pool.experts])
        return Tables(pool.names, rows, {"reader": asdict(next(iter(readers)))})

    def ready(self, tables: Tables) -> Ready:
        reader = open_reader(usable_reader(_recorded(tables.info), self.reader), self.reader_device)
        moments = {part: tables.tensors[f"readings.{WHOLE}.{part}"] for part in PARTS}
        reader.check_fits(moments["mean"])
        if not self.falls_back:
            return Ready(self.lines(moments), reader, float("inf"), 0.0)
        of_base = moments_of_base(reader, rank=moments["factor"].shape[2])
        moments = {part: torch.cat([moments[part], of_base[part]]) for part in PARTS}
        lines = self.lines(moments)
        means = moments["mean"]
        return Ready(lines, reader, middle_of_helpers(lines, means), room_of(lines, means))

    def helpers_score(self, ready: Ready) -> float:
        return ready.helpers

    def lines(self, moments: Mapping[str, Tensor]) -> Lines:
        """The lines of all blocks, of the moments [E, blocks, ..] of experts and classes."""
        blocks = range(moments["mean"].shape[1])
        lines = [self.line({part: moments[part][:, block] for part in PARTS}) for block in blocks]
        slopes = torch.stack([line.slopes for line in lines])
        offsets = torch.stack([line.offsets for line in lines])
        return Lines(slopes, offsets)

    def allowances(self, tables: Tables, ready: Ready) -> Tensor:
        """`fallback` times the room that the experts leave: none where they are a hundred.

        An expert's mean over n prompts lies off by a share of 1/√n, and scores less for it.
        """
        counts = tables.tensors[COUNTS]  # 0: not known
        few = torch.where(counts > 0, FEW / counts.clamp(min=FEW), 0.0)
        return super().allowances(tables, ready) * ready.room * (1 + few)

    def line(self, moments: Mapping[str, Tensor]) -> Lines:
        return line_of(moments, self.shrinkage, self.task_variance, self.name)

    def features(self, chooser: PromptChooser, texts: Sequence[str]) -> Tensor:
        ready: Ready = chooser.ready
        return ready.reader.states(texts)

    def prompt_scores(self, features: Tensor, ready: Ready) -> Tensor:
        return scores_by(ready.lines, features)


def scores_by(lines: Lines, states: Tensor) -> Tensor:
    """The score s_z of each of the `states` [texts, blocks, d], [texts, E]."""
    by_block = torch.einsum("pbd,bde->pbe", states, lines.slopes) + lines.offsets
    return by_block.mean(dim=1)


def middle_of_helpers(lines: Lines, means: Tensor) -> float:
    """What the middle of the helpers' class scores, by the `means` of experts and classes."""
    at = helpers_class() - len(base_texts())
    return float(scores_by(lines, means[at:][:1])[0, at])


def room_of(lines: Lines, means: Tensor) -> float:
    """By how much the middle of the general class is ahead of all experts, beyond ROOM."""
    general = len(means) - len(base_texts())  # the first class, behind all experts
    scores = scores_by(lines, means[general][None])[0]
    ahead = float(scores[general] - scores[:general].max())
    return max(ahead - ROOM, 0.0)


def _reader_of(expert: Expert) -> ReaderReference:
    if expert.info.reader is None:
        raise PoolError(
            f"Expert {expert.name!r} has prompt statistics that its base made, as earlier releases "
            f"did; measure them again: phatgoose stats {expert.directory} --task ITS-DATA "
            f"--no-means, or --prompts with a few."
        )
    return expert.info.reader


def _recorded(info: Mapping[str, object]) -> ReaderReference:
    """The reader that a saved model names."""
    try:
        return TypeAdapter(ReaderReference).validate_python(info.get("reader"))
    except ValueError as error:
        raise RoutingError("routed.json names no reader of prompts.") from error


def line_of(
    moments: Mapping[str, Tensor], shrinkage: float, task_variance: float, router: str
) -> Lines:
    """The slopes [d, E] and offsets [E] of s_z, as Discriminant has it, as functions of x.

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
    # An expert whose prompts are said to lie about the centre would be near to everything.
    paid = distances.clamp(min=float(LEAST_PAID * distances.quantile(0.5)))
    # The m of x - m is in here, so that scores are one product with x.
    offsets = -0.5 * paid - centre @ slopes
    line = Lines((slopes / scale).float(), (offsets / scale).float())
    if failed or not all(map(is_finite, line)):
        raise RoutingError(
            f"Router {router} can't invert the covariance of the experts' prompts: they "
            f"vary too little beside how far the experts lie apart. Run 'phatgoose stats' on "
            f"each with more examples, set task_variance to 0, or use another router."
        )
    return line


def _within(values: Tensor) -> Tensor:
    return torch.where(values > bound_of(values), bound_of(values) / values, 1.0)


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
LEAST_PAID = 0.75  # of the median's distance from the centre
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
    unit = torch.nn.functional.normalize(rows, dim=1)
    variances = (factor[some] @ unit.T).square().sum(dim=1) + rest[some] @ unit.T.square()  # [E, R]
    along = variances.quantile(0.5, dim=0)  # the median over experts
    share = ((most * along + least) / own[doubtful]).clamp(max=1)
    return factor.index_put((doubtful,), rows * share.sqrt()[:, None]), within
