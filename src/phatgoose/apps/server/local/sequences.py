"""One answer while it is generated: its next token, what it reports, and where it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from ....analysis.traces import TraceStream
from ....base import Detokeniser, shown_as, text_of
from ....errors import EngineError
from ....routing.choices import PromptRouting
from ..protocol import ApiError, Finish, bad_request
from ..replies import Progress, ScoredToken
from ..requests import Answer, Decoding
from .json_form import JsonForm
from .runner import ModelRunner


def earliest(text: str, stops: Sequence[str], begin: int) -> int | None:
    """Where the first of `stops` to come begins, from `begin` on; None without one."""
    found = [index for stop in stops if (index := text.find(stop, max(0, begin))) >= 0]
    return min(found, default=None)


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `stops`."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0


COLDEST = 1e-4  # a temperature below is greedy: the best token's probability is 1 in any case
LEAST = -9999.0  # stands for minus infinity, which JSON doesn't have


class Alternative(NamedTuple):
    """A token and its log-probability at temperature 1."""

    token: int
    logprob: float


class TokenScores(NamedTuple):
    """A token with its log-probability, and the best alternatives, best first."""

    own: Alternative
    top: tuple[Alternative, ...]


class Sampler:
    """Chooses tokens by a random generator of its own, so that they don't depend on the batch."""

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
        if self._generator is None:
            return int(logits.argmax())
        scores = self._warpers(None, logits[None])
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self._generator))


def token_scores(logits: Tensor, tokens: list[int], most: int) -> list[TokenScores]:
    """Float32 scores of the T `tokens` that followed `logits` [T, V], with `most` alternatives."""
    scores = torch.log_softmax(logits, dim=-1, dtype=torch.float32).clamp(min=LEAST)
    own = scores.gather(1, torch.tensor(tokens, device=scores.device)[:, None])[:, 0].tolist()
    best = scores.topk(most, dim=-1)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        TokenScores(Alternative(token, score), tuple(map(Alternative, ids, values)))
        for token, score, (ids, values) in zip(tokens, own, rows, strict=True)
    ]


PROMPT, ANSWER = 0, 1  # parts of a trace


class ActiveSequence:
    """One answer: its prompt, the tokens generated so far, and who receives its events.

    `deliver` is called from the engine's thread. `client` is who has asked, `routed` what the
    model's context found for the prompt, `form` what an answer in JSON keeps to.
    """

    form: JsonForm | None = None

    def __init__(
        self,
        runner: ModelRunner,
        answer: Answer,
        deliver: Callable[[Progress | ApiError], None],
        client: str = "",
        routed: PromptRouting | None = None,
    ) -> None:
        self.choice, _, prompt, self.decoding = answer
        self.runner, self.prompt, self.deliver = runner, prompt.tokens, deliver
        self.client, self.routed, self._echoed = client, routed, answer.echoed
        self.is_cancelled = False
        self.finish: Finish | None = None
        self.generated: list[int] = []
        self.shown: list[str] = []  # each generated token as text
        self.routing: list[TraceStream] = []  # of tokens that passed the model, for the next event
        self._ends = () if self.decoding.ignores_end else runner.ends
        self._sampler = Sampler(self.decoding, runner.device)
        self._detokeniser = Detokeniser(runner.tokenizer, self.prompt)
        self._text, self._sent = "", 0  # all text so far, and how much of it was delivered
        self._unsent: list[tuple[int, ScoredToken]] = []  # (end in the text, token)

    @property
    def most_tokens(self) -> int:
        return len(self.prompt) + self.decoding.max_tokens

    @property
    def is_over(self) -> bool:
        return self.is_cancelled or self.finish is not None

    def emit_prompt(self, scores: Sequence[TokenScores]) -> None:
        first, *others = self._placed_pieces(self.prompt)
        scored = [self._scored(*each, own) for each, own in zip(others, scores, strict=True)]
        self._deliver(Progress(self.choice, "", (ScoredToken(*first), *scored)))

    def _placed_pieces(self, tokens: Sequence[int]) -> Iterator[tuple[str, int]]:
        detokeniser, end = Detokeniser(self.runner.tokenizer), 0
        for token in tokens:
            piece = detokeniser.add(token)
            text = shown_as(self.runner.tokenizer, token, piece)
            yield text, min(end, len(self._echoed))
            # Special tokens have no piece, but an echoed prompt may spell them.
            is_special = not piece and self._echoed.startswith(text, end)
            end += len(text) if is_special else len(piece)

    def advance(self, logits: Tensor) -> None:
        if self.decoding.max_tokens == 0:
            self.finish = "length"
            self._emit()
            return
        form, is_whole = self.form, False
        try:
            token = self._sampler(logits if form is None else form.allowed(logits))
            is_whole = form is not None and token not in self._ends and form.add(token)
        except EngineError as error:  # of the form, a client's; others in the batch go on
            self.is_cancelled = True
            self.deliver(bad_request(str(error)))
            return
        self.generated.append(token)
        piece, begin = self._detokeniser.add(token), len(self._text)
        self._text += piece
        self.shown.append(shown_as(self.runner.tokenizer, token, piece))
        place = len(self._echoed) + begin
        scored = ScoredToken(self.shown[-1], place)
        if self.decoding.logprobs is not None:
            (scores,) = token_scores(logits[None], [token], self.decoding.logprobs)
            scored = self._scored(self.shown[-1], place, scores)
        self._unsent.append((len(self._text), scored))
        if token in self._ends or is_whole:
            self.finish = "stop"
        elif len(self.generated) >= self.decoding.max_tokens:
            self.finish = "length"
        if self.finish is not None:
            self._text += self._detokeniser.rest()
        self._cut_at_stop(len(self._text) - begin)
        self._emit()

    def _scored(self, text: str, place: int, scores: TokenScores) -> ScoredToken:
        tokenizer, own = self.runner.tokenizer, scores.own.token
        top = tuple(
            (text if each.token == own else text_of(tokenizer, each.token), each.logprob)
            for each in scores.top[: self.decoding.logprobs]
        )
        return ScoredToken(text, place, scores.own.logprob, top)

    def _cut_at_stop(self, new: int) -> None:
        stops = self.decoding.stop
        longest = max((len(stop) for stop in stops), default=0)
        cut = earliest(self._text, stops, max(self._sent, len(self._text) - new - longest))
        if cut is not None:
            self._text, self.finish = self._text[:cut], "stop"
            begins = [self._sent, *(end for end, _ in self._unsent[:-1])]
            pairs = zip(begins, self._unsent, strict=True)
            self._unsent = [unsent for begin, unsent in pairs if begin < cut]

    def _emit(self) -> None:
        held = 0 if self.finish else held_back(self._text, self.decoding.stop)
        safe = len(self._text) - held
        ready = [each for each in self._unsent if self.finish or each[0] <= safe]
        if ready and not self.finish:
            safe = ready[-1][0]
        self._unsent = self._unsent[len(ready) :]
        text = self._text[self._sent : safe] if ready or self.finish else ""
        self._sent += len(text)
        if self.finish and self.routing and self.shown:
            # Each token passes the model one step after it was chosen, so the last one never does.
            self.routing.append(self.routing[-1].without_experts(self.shown[-1], ANSWER))
        routing, self.routing = tuple(self.routing), []
        if text or ready or routing or self.finish:
            tokens = tuple(token for _, token in ready)
            generated = len(self.generated)
            self._deliver(Progress(self.choice, text, tokens, routing, self.finish, generated))

    def _deliver(self, progress: Progress) -> None:
        if not self.is_cancelled:
            self.deliver(progress)
