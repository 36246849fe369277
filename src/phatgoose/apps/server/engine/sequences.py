"""Rows: answers on their way, each a row of a batch, and what they tell as they grow."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ....analysis.traces import TraceStream
from .decoding import Alternative, Decoding, Sampler, alternatives
from .detokeniser import Detokeniser, earliest, held_back

__all__ = ["ActiveSequence", "Failure", "Progress", "ScoredToken"]

PROMPT, ANSWER = 0, 1  # parts of a trace
Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class ScoredToken:
    """A token as text with its log-probability (None: not asked for, or nothing before it).

    `top` are the best alternatives, best first, each with its text.
    """

    text: str
    logprob: float | None = None
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Progress:
    """What is new of the answer number `choice`.

    `tokens` are those whose text this is. `routing` holds the tokens that passed the model since;
    each does so one step after it was chosen, and the last one never. `finish` None means that more
    is to come. `generated` counts all tokens of the answer so far.
    """

    choice: int
    text: str
    tokens: tuple[ScoredToken, ...] = ()
    routing: tuple[TraceStream, ...] = ()
    finish: Finish | None = None
    generated: int = 0

    @property
    def size(self) -> int:
        """Tokens that something is told of."""
        return len(self.tokens) + sum(len(stream.tokens) for stream in self.routing)


@dataclass(frozen=True)
class Failure:
    """The answer can't be computed, for a reason that is the server's; `message` is for people."""

    message: str


class ActiveSequence:
    """One answer: its prompt, what was generated, and who is told.

    `deliver` is called from the engine's thread. Whoever sets `is_cancelled` is told no more.
    `client` is who asked; `expert` the one that a looked-up router has found for the prompt.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        decoding: Decoding,
        deliver: Callable[[Progress | Failure], None],
        choice: int = 0,
        client: str = "",
        expert: int | None = None,
    ) -> None:
        self.prompt, self.decoding, self.choice = tuple(prompt), decoding, choice
        self.deliver, self.client, self.expert = deliver, client, expert
        self.is_cancelled = False
        self.finish: Finish | None = None
        self.generated: list[int] = []
        self.shown: list[str] = []  # each generated token as text
        self._routing: list[TraceStream] = []

    @property
    def most_tokens(self) -> int:
        """Tokens of prompt and answer together, at most."""
        return len(self.prompt) + self.decoding.max_tokens

    @property
    def is_over(self) -> bool:
        """True if nothing more is to be computed for it."""
        return self.is_cancelled or self.finish is not None

    def begin(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ends: Collection[int],
        device: torch.device,
        *,
        answers_alone: bool,
    ) -> None:
        """Get ready; `ends` are the tokens that end an answer.

        `answers_alone` says that the answer doesn't continue the prompt's text (encoder-decoder).
        """
        self._tokenizer = tokenizer
        self._ends = () if self.decoding.ignores_end else ends
        self._sampler = Sampler(self.decoding, device)
        self._detokeniser = Detokeniser(tokenizer, () if answers_alone else self.prompt)
        self._text, self._told = "", 0  # all text so far, and how much of it was delivered
        self._waiting: list[tuple[int, ScoredToken]] = []  # (end in the text, token)

    def tell_prompt(self, scores: Sequence[tuple[Alternative, tuple[Alternative, ...]]]) -> None:
        """Deliver the prompt's tokens, of which all but the first have `scores`."""
        pieces = self.pieces(self.prompt)
        tokens = [ScoredToken(pieces[0])]
        tokens += [
            self._scored(piece, *score) for piece, score in zip(pieces[1:], scores, strict=True)
        ]
        self._deliver(Progress(self.choice, "", tuple(tokens)))

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Each of `tokens` as text, special ones too."""
        detokeniser = Detokeniser(self._tokenizer)
        return [detokeniser.add(token) or self._named(token) for token in tokens]

    def passed(self, streams: Sequence[TraceStream]) -> None:
        """Remember who served tokens that passed the model just now."""
        self._routing += streams

    def advance(self, logits: Tensor) -> None:
        """Choose the next token by `logits` [V] and tell what is new."""
        if self.decoding.max_tokens == 0:
            self.finish = "length"
            self._tell()
            return
        token = self._sampler(logits)
        self.generated.append(token)
        piece = self._detokeniser.add(token)
        self._text += piece
        self.shown.append(piece or self._named(token))
        self._waiting.append((len(self._text), self._scored_answer(token, logits)))
        if token in self._ends:
            self.finish = "stop"
        elif len(self.generated) >= self.decoding.max_tokens:
            self.finish = "length"
        if self.finish is not None:
            self._text += self._detokeniser.rest()
        self._cut_at_stop(len(piece))
        self._tell()

    def _scored_answer(self, token: int, logits: Tensor) -> ScoredToken:
        shown = self.shown[-1]
        if self.decoding.logprobs is None:
            return ScoredToken(shown)
        return self._scored(shown, *alternatives(logits[None], [token], self.decoding.logprobs)[0])

    def _scored(self, text: str, own: Alternative, top: tuple[Alternative, ...]) -> ScoredToken:
        named = tuple(
            (text if each.token == own.token else self._named(each.token), each.logprob)
            for each in top[: self.decoding.logprobs]
        )
        return ScoredToken(text, own.logprob, named)

    def _named(self, token: int) -> str:
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def _cut_at_stop(self, new: int) -> None:
        stops = self.decoding.stop
        longest = max((len(stop) for stop in stops), default=0)
        place = earliest(self._text, stops, max(self._told, len(self._text) - new - longest))
        if place is not None:
            self._text, self.finish = self._text[:place], "stop"
            self._waiting = [
                (end, token)
                for (end, token), begin in zip(self._waiting, self._begins(), strict=True)
                if begin < place
            ]

    def _begins(self) -> list[int]:
        """Where each waiting token's text begins."""
        return [self._told, *(end for end, _ in self._waiting[:-1])]

    def _tell(self) -> None:
        """Deliver the text that no stop can take back any more, with its tokens."""
        held = 0 if self.finish else held_back(self._text, self.decoding.stop)
        safe = len(self._text) - held
        ready = [each for each in self._waiting if self.finish or each[0] <= safe]
        if ready and not self.finish:
            safe = ready[-1][0]
        self._waiting = self._waiting[len(ready) :]
        text = self._text[self._told : safe] if ready or self.finish else ""
        self._told += len(text)
        if self.finish and self._routing and self.shown:
            self._routing.append(self._routing[-1].without_experts(self.shown[-1], ANSWER))
        routing, self._routing = tuple(self._routing), []
        if text or ready or routing or self.finish:
            tokens = tuple(token for _, token in ready)
            self._deliver(
                Progress(self.choice, text, tokens, routing, self.finish, len(self.generated))
            )

    def _deliver(self, progress: Progress) -> None:
        if not self.is_cancelled:
            self.deliver(progress)
