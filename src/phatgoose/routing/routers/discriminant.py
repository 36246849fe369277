"""Discriminant: the experts whose training prompts the base reads most like this one.

Not in the paper. A decoder knows its task only when it has seen the whole prompt, so this router
reads prompts with the base alone and chooses for the whole input. Experts share the mean and
covariance of what each block of the base makes of their training prompts (`experts.readings`), and
new prompts are told apart by Fisher's linear discriminant over them: directions in which prompts of
one task differ count little, wording among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...base.blocks import blocks_of
from ...errors import ConfigError, PoolError, RoutingError
from ...experts.pool import Pool
from ...experts.readings import PARTS, PLACES, PromptStates
from ...files.tensor_file import is_finite
from ...tasks.prompt_passes import PromptReading
from .bounds import bound_of, bounded_means, bounded_variances
from .configs import Reading
from .prompt_router import BaseReader, LookedUp, RememberedStates
from .router import Lookup, SavedLookup, Scores

PREFIX = "readings."  # before a part's name, among the lookup's tensors
READINGS = f"lookup.{PREFIX}"  # and in files
SMALLEST = 1e-6  # of the mean variance: what every direction varies by at least

Readings = Mapping[str, Tensor]  # by part: [E, ..], the rest as `experts.readings` has it


class Discriminant(LookedUp):
    """Router discriminant."""

    def check(self, pool: Pool) -> None:
        """Raise PoolError when experts lack readings, or theirs are of other sizes."""
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

    @property
    def lookup_form(self) -> Mapping[str, str]:
        """The readings of each expert: b blocks of size h, and f rows of a covariance's factor."""
        letters = {"mean": "Ebh", "factor": "Ebfh", "rest": "Ebh"}
        return {f"{PREFIX}{p}.{part}": letters[part] for p in PLACES for part in letters}

    def lookup_rows(self, pool: Pool, info: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The readings of the experts of `pool`."""
        return {f"{READINGS}{part}": tensor for part, tensor in readings_in(pool).items()}

    def lookup_of(
        self, pool: Pool, scores: Scores | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> Lookup:
        """The discriminant of the pool. Raises ConfigError without `tokenizer`."""
        return self._reader(readings_in(pool), tokenizer)

    def saved_lookup(self, saved: SavedLookup, tokenizer: PreTrainedTokenizerBase | None) -> Lookup:
        """The same, from a saved model."""
        return self._reader(self.readings_from(saved), tokenizer)

    def readings_from(self, saved: SavedLookup) -> Readings:
        """The experts' readings in a saved model."""
        parts = [f"{place}.{part}" for place in PLACES for part in PARTS]
        return {part: saved.tensors[f"{READINGS}{part}"] for part in parts}

    def _reader(
        self, readings: Readings, tokenizer: PreTrainedTokenizerBase | None
    ) -> PromptDiscriminant:
        asked = self.needed(tokenizer), self.input_k, self.input_temperature
        return PromptDiscriminant(readings, self.config, *asked)


def readings_in(pool: Pool) -> Readings:
    """The readings of all experts of `pool`, which have them, by part: [E, ..]."""
    parts = pool.experts[0].readings
    return {part: torch.stack([each.readings[part] for each in pool.experts]) for part in parts}


def joined_moments(old: Readings, new: Readings, what: str = "readings") -> Readings:
    """Those of all experts, old ones first. Raises PoolError when the `new` don't fit."""
    for part, tensor in old.items():
        if tensor.shape[1:] != new[part].shape[1:]:
            raise PoolError(
                f"The new experts' {what} {part} have shape {tuple(new[part].shape[1:])}, "
                f"those of the pool {tuple(tensor.shape[1:])}; measure them again."
            )
    return {part: torch.cat([tensor, new[part]]) for part, tensor in old.items()}


def line_of(moments: Mapping[str, Tensor], config: Reading) -> tuple[Tensor, Tensor]:
    """The slopes [d, E] and offsets [E] of s_z, as PromptDiscriminant has it, as functions of x.

    `moments` are `mean` [E, d], `factor` [E, f, d] and `rest` [E, d] of the experts' training
    prompts (`experts.readings`); of `config` count `shrinkage` and `task_variance`. What an expert
    adds to the means over experts is bounded (`routers.bounds`). Raises RoutingError where the
    covariance can't be inverted, or what comes of it is not finite.
    """
    means, factors, rests = (moments[part].double() for part in PARTS)
    deviation = (factors.square().sum(dim=(1, 2)) + rests.sum(dim=1)).quantile(0.5).sqrt()
    means = bounded_means(means, least=len(means) * float(deviation))
    factors, rests = bounded_variances(means, factors, rests)
    rows = factors.flatten(0, 1)
    shared = rows.T @ rows / len(means) + torch.diag(rests.mean(dim=0))
    diagonal = shared.diagonal()
    least = SMALLEST * diagonal.mean() + torch.finfo(torch.float32).tiny
    spread = (1 - config.shrinkage) * shared + torch.diag(config.shrinkage * diagonal + least)
    centre = means.mean(dim=0)
    away = means - centre  # d_z
    apart = _within(away.square().sum(dim=1))
    spread += config.task_variance / len(away) * (away.T * apart) @ away
    root, failed = torch.linalg.cholesky_ex(spread)
    slopes = torch.cholesky_solve(away.T, root)
    distances = (away * slopes.T).sum(dim=1)
    scale = (_within(distances) * distances).mean().clamp(min=torch.finfo(torch.float32).tiny)
    offsets = -0.5 * distances - centre @ slopes
    line = (slopes / scale).float(), (offsets / scale).float()
    if failed or not all(map(is_finite, line)):
        raise RoutingError(
            "Router discriminant can't invert the covariance of the experts' prompts: they vary "
            "too little beside how far the experts lie apart. Run 'phatgoose measure' on each with "
            "more examples, set task_variance to 0, or use another router."
        )
    return line


def _within(values: Tensor) -> Tensor:
    """The shares, at most 1, of `values` [E] that are within their bound."""
    return torch.where(values > bound_of(values), bound_of(values) / values, 1.0)


class PromptDiscriminant(BaseReader):
    """Scores an expert z by the discriminants of the blocks and places that are read, on average.

    With x what a block makes of the prompt at a place, m_z the mean of the same over z's training
    prompts, m and S the means over experts of the m_z and of their covariances, d_z = m_z - m, B
    the mean of d_z d_zᵀ, and Σ = (1 - λ) S + λ diag(S) + τ B for the shrinkage λ and the task
    variance τ:

        s_z = (d_zᵀ Σ⁻¹ (x - m) - ½ d_zᵀ Σ⁻¹ d_z) / D,  D the mean over experts of d_zᵀ Σ⁻¹ d_z

    The numerator is z's log-likelihood but for what all experts share. D makes blocks, places and
    pools alike: prompts of z's own task score about ½, those of all tasks -½ on average. With τ the
    mean of an unseen task is taken to lie around m_z, by a share of how far tasks lie around m, so
    that what tells the experts' own tasks apart most can't outweigh everything else. What one
    expert adds to m, S, B and D is bounded by the pool's median (`routers.bounds`).
    """

    name = "discriminant"
    remembered: RememberedStates | None = None  # None: every prompt is read when it comes

    def __init__(
        self,
        readings: Readings,
        config: Reading,
        tokenizer: PreTrainedTokenizerBase,
        k: int = 1,
        temperature: float = 1.0,
    ) -> None:
        """`readings` are those of all experts; `config` says how they are used.

        Raises ConfigError when no block lies between `first` and `last`.
        """
        super().__init__(tokenizer, k, temperature)
        self.readings, self.config = readings, config
        self.depth, self.size = readings["end.mean"].shape[1:]
        self.blocks = _blocks_between(config.first, config.last, self.depth)
        chosen = PLACES if config.place == "both" else (config.place,)
        self.places = [PLACES.index(place) for place in chosen]
        found = [[self._line(place, block) for block in self.blocks] for place in chosen]
        self.slopes = torch.stack([torch.stack([slopes for slopes, _ in row]) for row in found])
        self.offsets = torch.stack([torch.stack([offsets for _, offsets in row]) for row in found])

    def _line(self, place: str, block: int) -> tuple[Tensor, Tensor]:
        """The scores' slopes [d, E] and offsets [E] as functions of x at one place and block."""
        moments = {part: self.readings[f"{place}.{part}"][:, block] for part in PARTS}
        return line_of(moments, self.config)

    def tensors(self) -> dict[str, Tensor]:
        """The readings of all experts."""
        return {f"{READINGS}{part}": tensor for part, tensor in self.readings.items()}

    def grown(self, pool: Pool, first: int) -> PromptDiscriminant:
        """The discriminant of the experts of `pool` too. Raises PoolError when they don't fit."""
        return self._of(joined_moments(self.readings, readings_in(pool)))

    def shrunk(self, place: Tensor) -> PromptDiscriminant:
        """The discriminant of the experts that stay."""
        return self._of({part: tensor[place >= 0] for part, tensor in self.readings.items()})

    def _of(self, readings: Readings) -> PromptDiscriminant:
        return PromptDiscriminant(readings, self.config, self.tokenizer, self.k, self.temperature)

    def reading(self, model: PreTrainedModel) -> PromptReading:
        """The discriminant at work. Raises RoutingError when `model` isn't what experts read."""
        self._check(model)
        return _Scored(self.blocks, self._score)

    def scores(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The score of each prompt and expert, float32 [prompts, E]."""
        if self.remembered is None:
            return super().scores(prompts)
        self._check(self._attached)
        states = self.remembered.of(prompts, self._states_of)
        return self.scores_of_states(states)

    def _states_of(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """What all blocks make of the prompts, [texts, 2, blocks, d]."""
        return self._read_alone(prompts, PromptStates(self._attached))

    def scores_of_states(self, states: Tensor) -> Tensor:
        """The scores [texts, E] of `states` [texts, 2, blocks, d] of all blocks."""
        return self._score(states[:, :, self.blocks])

    def _score(self, states: Tensor) -> Tensor:
        """The mean over places and blocks of the scores [texts, E] of `states` of both places."""
        read = states[:, self.places]  # [texts, places, blocks, d]
        scores = torch.einsum("tpbd,pbde->tpbe", read, self.slopes) + self.offsets
        return scores.mean(dim=(1, 2))

    def _check(self, model: PreTrainedModel) -> None:
        """Raise RoutingError when `model` isn't what experts read."""
        text = model.config.get_text_config()
        depth, size = len(blocks_of(model)), getattr(text, "hidden_size", self.size)
        if (depth, size) != (self.depth, self.size):
            raise RoutingError(
                f"Router {self.name} has readings of {self.depth} blocks of {self.size} numbers; "
                f"the model has {depth} of {size}."
            )


class _Scored(PromptStates):
    """The scores of a batch of prompts, by what the `blocks` make of them."""

    def __init__(self, blocks: Sequence[int], score: Callable[[Tensor], Tensor]) -> None:
        self.blocks, self._score = blocks, score

    def found(self) -> Tensor:
        """Each prompt's and expert's score, [texts, E]."""
        return self._score(super().found())


def _blocks_between(first: float, last: float, depth: int) -> list[int]:
    """The blocks that lie, as shares of the `depth`, from `first` to `last`."""
    blocks = [block for block in range(depth) if first <= (block + 1) / depth <= last]
    if not blocks:
        raise ConfigError(
            f"No block of {depth} lies between first={first:g} and last={last:g}, as "
            f"shares of the depth; choose them further apart."
        )
    return blocks
