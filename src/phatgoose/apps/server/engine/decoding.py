"""Choosing the next token, and log-probabilities of alternatives."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

__all__ = ["Decoding", "Sampler", "TokenScores", "seed_of", "token_scores"]

COLDEST = 1e-4  # a temperature below is greedy: the best token's probability is 1 in any case
SEEDS = 1 << 63
LEAST = -9999.0  # stands for minus infinity, which JSON doesn't have


@dataclass(frozen=True)
class Decoding:
    """How an answer is generated.

    `temperature` 0 is greedy. With `ignores_end` only `max_tokens` and `stop` end it. `logprobs` is
    the number of alternatives reported with each token (None: no log-probabilities at all); with
    `echo` the prompt's tokens are reported too. `routing` reports each token's experts.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    echo: bool = False
    routing: bool = False
    ignores_end: bool = False

    @property
    def scores_prompt(self) -> bool:
        """True if the log-probabilities of the prompt's tokens are wanted."""
        return self.echo and self.logprobs is not None


class Alternative(NamedTuple):
    """A token and its log-probability at temperature 1."""

    token: int
    logprob: float


class TokenScores(NamedTuple):
    """A token with its log-probability, and the best alternatives, best first."""

    own: Alternative
    top: tuple[Alternative, ...]


class Sampler:
    """Chooses tokens with its own random generator, so that they don't depend on the batch."""

    def __init__(self, decoding: Decoding, device: torch.device) -> None:
        self._generator: torch.Generator | None = None
        self._warpers = LogitsProcessorList()
        if decoding.temperature < COLDEST:
            return
        self._generator = torch.Generator(device).manual_seed(decoding.seed)
        if decoding.temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(float(decoding.temperature)))
        if decoding.top_p < 1:
            self._warpers.append(TopPLogitsWarper(decoding.top_p))

    def __call__(self, logits: Tensor) -> int:
        """The token chosen by `logits` [V], float32."""
        if self._generator is None:
            return int(logits.argmax())
        scores = self._warpers(None, logits[None])
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self._generator))


def token_scores(logits: Tensor, tokens: list[int], most: int) -> list[TokenScores]:
    """The scores of each of the T `tokens` that followed `logits` [T, V], with `most` alternatives.

    Log-probabilities are computed in float32.
    """
    scores = torch.log_softmax(logits, dim=-1, dtype=torch.float32).clamp(min=LEAST)
    own = scores.gather(1, torch.tensor(tokens, device=scores.device)[:, None])[:, 0].tolist()
    best = scores.topk(most, dim=-1)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        TokenScores(Alternative(token, score), tuple(map(Alternative, ids, values)))
        for token, score, (ids, values) in zip(tokens, own, rows, strict=True)
    ]


def seed_of(seed: int | None, number: int) -> int:
    """The seed of answer `number` of a request that asked for `seed`; None draws one."""
    if seed is None:
        return secrets.randbelow(SEEDS)
    return (seed + number) % SEEDS
