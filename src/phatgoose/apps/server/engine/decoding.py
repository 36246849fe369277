"""How an answer is generated: which token comes next, and what is told about it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

__all__ = ["Alternative", "Decoding", "Sampler", "alternatives", "seed_of"]

COLDEST = 1e-4  # below that a temperature is greedy: the best token's share is 1 in any case
SEEDS = 1 << 63
LEAST = -9999.0  # told of tokens that the model rules out: JSON has no infinity


@dataclass(frozen=True)
class Decoding:
    """What a request wants of an answer.

    `temperature` 0 is greedy. With `ignores_end` only `max_tokens` and `stop` end it. `logprobs`
    tells so many alternatives of each token, None not even its own log-probability; with `echo`
    those of the prompt too. `routing` tells each token's experts.
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


@dataclass(frozen=True)
class Alternative:
    """A token and its log-probability under the model, temperature 1."""

    token: int
    logprob: float


class Sampler:
    """Chooses tokens with a generator of its own: the same ones in whatever company."""

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
        """A token by the `logits` [V], float32."""
        if self._generator is None:
            return int(logits.argmax())
        scores = self._warpers(None, logits[None])
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self._generator))


def alternatives(
    logits: Tensor, tokens: list[int], most: int
) -> list[tuple[Alternative, tuple[Alternative, ...]]]:
    """For each of the T `tokens` that followed `logits` [T, V]: itself, and the `most` best ones.

    Log-probabilities are computed in float32.
    """
    scores = torch.log_softmax(logits, dim=-1, dtype=torch.float32).clamp(min=LEAST)
    own = scores.gather(1, torch.tensor(tokens, device=scores.device)[:, None])[:, 0].tolist()
    best = scores.topk(most, dim=-1)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        (Alternative(token, score), tuple(map(Alternative, ids, values)))
        for token, score, (ids, values) in zip(tokens, own, rows, strict=True)
    ]


def seed_of(seed: int | None, number: int) -> int:
    """The seed of the `number`-th answer to a request; None draws one."""
    if seed is None:
        return secrets.randbelow(SEEDS)
    return (seed + number) % SEEDS
