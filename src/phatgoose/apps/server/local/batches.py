"""Answers while they are generated, and batches of them that pass through a model together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ....analysis.traces import TraceKeeper, TraceStream
from ....base.detokenising import Detokeniser, shown_as, text_of, texts_of
from ....errors import EngineError
from ....routing.choice import PromptRouting
from ....tasks.batching import pad_left
from ..protocol import ApiError, Finish, bad_request
from ..replies import Progress, ScoredToken, beginning_of
from ..requests import Answer, Decoding
from .json_form import Calls, JsonForm, calls_begin
from .runner import Cache, ModelRunner, Prefix, PrefixScope, PrefixStore, begin_with, joined

COLDEST = 1e-4  # a temperature below is greedy: the best token's probability is 1 in any case
LEAST = -9999.0  # stands for minus infinity, which JSON doesn't have
# Parts of a trace.
PROMPT = 0
ANSWER = 1


class AnswerPenalty(LogitsProcessor):  # type: ignore[misc]  # transformers has no such class
    """OpenAI's frequency and presence penalties: of tokens after the first `begin`."""

    def __init__(self, frequency: float, presence: float, begin: int) -> None:
        self._frequency = frequency
        self._presence = presence
        self._begin = begin

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        counts = input_ids[0, self._begin :].bincount(minlength=scores.shape[-1])
        return scores - self._frequency * counts - self._presence * (counts > 0)


class Sampler:
    """Chooses tokens by a random generator of its own, so that they don't depend on the batch.

    Penalties look at the `prompt`, and at what was generated.
    """

    def __init__(
        self, decoding: Decoding, device: torch.device, prompt: Sequence[int] = ()
    ) -> None:
        self._generator: torch.Generator | None = None
        self._processors = steps = LogitsProcessorList()
        biases = {(int(token),): bias for token, bias in decoding.logit_bias.items() if bias}
        self._last_biased = max(biases, default=(0,))[0]
        if biases:
            steps.append(SequenceBiasLogitsProcessor(biases))
        if decoding.repetition_penalty != 1:
            steps.append(RepetitionPenaltyLogitsProcessor(float(decoding.repetition_penalty)))
        frequency = decoding.frequency_penalty
        presence = decoding.presence_penalty
        if frequency or presence:
            steps.append(AnswerPenalty(frequency, presence, len(prompt)))
        self._prompt = prompt if steps else None  # which warpers don't look at
        if decoding.temperature < COLDEST:
            return
        self._generator = torch.Generator(device).manual_seed(decoding.seed)
        if decoding.temperature != 1:
            steps.append(TemperatureLogitsWarper(float(decoding.temperature)))
        if decoding.top_k > 0:
            steps.append(TopKLogitsWarper(decoding.top_k))
        if decoding.top_p < 1:
            steps.append(TopPLogitsWarper(decoding.top_p))
        if decoding.min_p > 0:
            steps.append(MinPLogitsWarper(decoding.min_p))

    def __call__(self, logits: Tensor, generated: Sequence[int] = ()) -> int:
        last = self._last_biased
        if last >= len(logits):
            raise EngineError(f"logit_bias names token {last}; there are {len(logits)}.")
        if not logits.max().isfinite():  # which would fail all that share a batch
            raise EngineError("The model's numbers overflow; weights nearer to 0 may not.")
        scores = logits[None]
        if self._processors:
            before = [] if self._prompt is None else [*self._prompt, *generated]
            scores = self._processors(torch.tensor([before], device=logits.device), scores)
        if self._generator is None:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self._generator))


class ActiveSequence:
    """One answer: its prompt, the tokens generated so far, and who receives its events.

    `deliver` is called from the engine's thread. `client` is who has asked, `routed` the experts of
    the prompt, `traces` what those of each token were, if the request wants that reported. `form`
    is what an answer in JSON keeps to, `calls` those that may be in it.
    """

    form: JsonForm | None = None
    calls: Calls | None = None

    def __init__(
        self,
        runner: ModelRunner,
        answer: Answer,
        deliver: Callable[[Progress | ApiError], object],
        client: str = "",
        routed: PromptRouting | None = None,
    ) -> None:
        self.runner = runner
        self.number = answer.number
        self.decoding = answer.decoding
        self.prompt = answer.prompt.tokens
        self.most_tokens = len(self.prompt) + self.decoding.max_tokens
        self.deliver = deliver
        self.client = client
        self.routed = routed
        self.is_cancelled = False
        self.finish: Finish | None = None
        self.generated: list[int] = []
        self.shown: list[str] = []  # each generated token as text
        self.traces: list[TraceStream] = []  # of tokens that passed the model, for the next event
        self._ends = () if self.decoding.ignores_end else runner.ends
        self._sampler = Sampler(self.decoding, runner.device, self.prompt)
        self._detokeniser = Detokeniser(runner.tokenizer, self.prompt)
        self._text = ""  # all so far
        self._sent = 0  # how much of it was delivered
        self._unsent: list[tuple[int, ScoredToken]] = []  # (end in the text, token)

    @property
    def prefix_scope(self) -> PrefixScope:
        return self.runner.prefix_scope(self.prompt, self.routed, self.client)

    @property
    def is_over(self) -> bool:
        return self.is_cancelled or self.finish is not None

    def advance(self, logits: Tensor) -> None:
        """Choose the next token by `logits` [V], and deliver what can be."""
        form = self.form
        is_complete = False
        try:
            scores = logits if form is None else form.allowed(logits)
            token = self._sampler(scores, self.generated)
            is_end = token in self._ends
            if form is not None and not is_end:
                is_complete = form.add(token)
        except EngineError as error:  # of the form, a client's; others in the batch go on
            self.is_cancelled = True
            self.deliver(bad_request(str(error)))
            return
        self.generated.append(token)
        piece = self._detokeniser.add(token)
        begin = len(self._text)
        if self.calls:
            piece += self.calls.hidden.get(token, "")
        self._text += piece
        self.shown.append(shown_as(self.runner.tokenizer, token, piece))
        self._unsent.append((len(self._text), self._scored(token, begin, logits)))
        if is_end or is_complete:
            self.finish = "stop"
        elif len(self.generated) >= self.decoding.max_tokens:
            self.finish = "length"
        if self.finish is not None:
            self._text += self._detokeniser.rest()
        self._cut_at_stop(len(self._text) - begin)
        self._emit()

    def _scored(self, token: int, place: int, logits: Tensor) -> ScoredToken:
        shown = self.shown[-1]
        most = self.decoding.logprobs
        if most is None:
            return ScoredToken(shown, place)
        scores = torch.log_softmax(logits, dim=-1, dtype=torch.float32).clamp(min=LEAST)
        best = scores.topk(most)
        top = []
        for other, score in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            text = shown if other == token else text_of(self.runner.tokenizer, other)
            top.append((text, score))
        return ScoredToken(shown, place, float(scores[token]), tuple(top))

    def _cut_at_stop(self, new: int) -> None:
        stops = self.decoding.stop
        longest = max(map(len, stops), default=0)
        begin = max(self._sent, len(self._text) - new - longest, 0)
        cuts = [self._text.find(stop, begin) for stop in stops]
        cut = min((cut for cut in cuts if cut >= 0), default=None)
        if cut is not None:
            self._text = self._text[:cut]
            self.finish = "stop"
            self._unsent = [pair for pair in self._unsent if pair[1].place < cut]

    def _emit(self) -> None:
        waiting = 0 if self.finish else beginning_of(self.decoding.stop, self._text)
        safe = len(self._text) - waiting
        if self.calls and not self.finish:
            safe = min(safe, self._sent + calls_begin(self._text[self._sent :]))
        ready = [pair for pair in self._unsent if self.finish or pair[0] <= safe]
        if ready and not self.finish:
            safe = ready[-1][0]
        self._unsent = self._unsent[len(ready) :]
        text = self._text[self._sent : safe] if ready or self.finish else ""
        self._sent += len(text)
        if self.finish and self.traces and self.shown:
            # Each token passes the model one step after it was chosen, so the last one never does.
            self.traces.append(self.traces[-1].without_experts(self.shown[-1], ANSWER))
        traces = tuple(self.traces)
        self.traces = []
        is_news = text or ready or traces or self.finish
        if is_news and not self.is_cancelled:
            tokens = tuple(token for _, token in ready)
            generated = len(self.generated)
            new = Progress(self.number, text, tokens, traces, self.finish, generated)
            if self.calls and self.finish:
                new = self.calls.parsed(new)
            self.deliver(new)


def prefill(sequences: Sequence[ActiveSequence], prefixes: PrefixStore) -> tuple[Cache, Tensor]:
    """Read the prompts of `sequences` together, each distinct one once, after known `prefixes`.

    All get their first token. Returns their cache and its mask [rows, columns], 0 at padding.
    """
    runner = sequences[0].runner
    groups = dict[object, list[ActiveSequence]]()
    for sequence in sequences:
        groups.setdefault(_reading_of(sequence), []).append(sequence)
    firsts = [group[0] for group in groups.values()]
    runner.use([first.routed for first in firsts])
    scopes = [first.prefix_scope for first in firsts]
    known: list[tuple[Prefix | None, int]] = []
    for first, scope in zip(firsts, scopes, strict=True):
        # Whoever wants the routing of the prompt's tokens wants them to be read.
        reads_all = first.decoding.routing
        known.append((None, 0) if reads_all else prefixes.find(scope, first.prompt))
    # As many tokens of every row: windows and ALiBi count columns, so none may be padding between
    # what is known and what is read.
    pairs = zip(firsts, known, strict=True)
    most = max(len(first.prompt) - count for first, (_, count) in pairs)
    unread = [first.prompt[-most:] for first in firsts]
    counts = [max(0, len(first.prompt) - most) for first in firsts]
    cache = DynamicCache()
    before = begin_with(cache, [prefix for prefix, _ in known], counts)
    ids = pad_left(unread, runner.pad).to(runner.device)
    mask = torch.cat([before, pad_left([[1] * len(tokens) for tokens in unread], 0)], dim=1)
    mask = mask.to(runner.device)
    keeper = keeper_for(sequences)
    logits = runner.decode(ids, mask, cache, keeper)
    for row, (first, scope) in enumerate(zip(firsts, scopes, strict=True)):
        prefixes.keep(scope, first.prompt, cache, row, mask[row])
    if keeper is not None:
        _report_prompts(list(groups.values()), keeper, ids.shape[1])
    row_of = {reading: row for row, reading in enumerate(groups)}
    read_in = [row_of[_reading_of(sequence)] for sequence in sequences]
    rows = torch.tensor(read_in, device=runner.device)
    cache.batch_select_indices(rows)
    for sequence, scores in zip(sequences, logits[rows, -1].float(), strict=True):
        sequence.advance(scores)
    return cache, mask[rows]


def _report_prompts(
    groups: Sequence[Sequence[ActiveSequence]], keeper: TraceKeeper, columns: int
) -> None:
    """Give the sequences of each row the routing of their prompt, where they ask for it."""
    for row, group in enumerate(groups):
        first = group[0]
        if not first.decoding.routing:
            continue
        shown = texts_of(first.runner.tokenizer, first.prompt)
        count = len(first.prompt)
        end = (row + 1) * columns
        for stream in keeper.streams().values():
            part = stream.some(slice(end - count, end), shown, [PROMPT] * count)
            for sequence in group:
                sequence.traces.append(part)


def _reading_of(sequence: ActiveSequence) -> object:
    """What sequences have in common whose prompts are read alike."""
    choice = None if sequence.routed is None else sequence.routed.choice
    # Of one prompt the choice may differ: requests bring their own mixtures. What is known before
    # it is known to its client alone.
    key = choice and choice.key
    return sequence.client, sequence.prompt, key, sequence.decoding.routing


def keeper_for(sequences: Iterable[ActiveSequence]) -> TraceKeeper | None:
    """A keeper of routing decisions if any of `sequences` asks for them, else None."""
    return TraceKeeper() if any(sequence.decoding.routing for sequence in sequences) else None


class Batch:
    """Sequences of one model, a row each, with their keys and values; all get a token per step.

    Sequences join between two steps, once their prompts have been read. Those that are over leave
    before the next step.
    """

    def __init__(self, runner: ModelRunner, prefixes: PrefixStore | None = None) -> None:
        self.runner = runner
        self._prefixes = prefixes or PrefixStore(0)
        self.sequences: list[ActiveSequence] = []
        self._cache: Cache = DynamicCache()
        self._mask = torch.ones(0, 0)  # [rows, columns]: of all tokens in the cache

    @property
    def running(self) -> list[ActiveSequence]:
        return [sequence for sequence in self.sequences if not sequence.is_over]

    def tokens_with(self, newcomers: Sequence[ActiveSequence] = ()) -> int:
        """Tokens in memory, padding included, when the longest ends, if `newcomers` join."""
        together = [*self.running, *newcomers]
        longest = max((sequence.most_tokens for sequence in together), default=0)
        return len(together) * longest

    def join(self, newcomers: Sequence[ActiveSequence]) -> None:
        self._drop_finished()
        cache, mask = prefill(newcomers, self._prefixes)
        if self.sequences:
            for mine, theirs in zip(self._cache.layers, cache.layers, strict=True):
                mine.keys = joined(mine.keys, theirs.keys)
                mine.values = joined(mine.values, theirs.values)
            cache = self._cache
            mask = joined(self._mask[..., None], mask[..., None])[..., 0]
        self._cache = cache
        self._mask = mask
        self.sequences += newcomers

    def step(self) -> None:
        self._drop_finished()
        runner = self.runner
        sequences = self.sequences
        if not sequences:
            return
        last_tokens = [[sequence.generated[-1]] for sequence in sequences]
        ids = torch.tensor(last_tokens, device=runner.device)
        keeper = keeper_for(sequences)
        runner.use([sequence.routed for sequence in sequences])
        self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
        logits = runner.decode(ids, self._mask, self._cache, keeper)
        for stream in keeper.streams().values() if keeper else ():
            for row, sequence in enumerate(sequences):
                if sequence.decoding.routing:
                    last = stream.some(slice(row, row + 1), sequence.shown[-1:], [ANSWER])
                    sequence.traces.append(last)
        for sequence, scores in zip(sequences, logits[:, -1].float(), strict=True):
            sequence.advance(scores)

    def _drop_finished(self) -> None:
        before = self.sequences
        kept = [row for row, sequence in enumerate(before) if not sequence.is_over]
        if len(kept) == len(before):
            return
        self.sequences = [before[row] for row in kept]
        for row, sequence in enumerate(before):
            if sequence.finish is not None:
                self._keep(row, sequence)
        if not kept:
            self._cache = DynamicCache()
            return
        rows = torch.tensor(kept, device=self.runner.device)
        self._cache.batch_select_indices(rows)
        self._mask = self._mask[rows]
        unused = int(self._mask.any(dim=0).long().argmax())
        self._mask = self._mask[:, unused:]
        if not unused:
            return
        for layer in self._cache.layers:
            # A view would keep the dropped columns in memory.
            layer.keys = layer.keys[..., unused:, :].contiguous()
            layer.values = layer.values[..., unused:, :].contiguous()

    def _keep(self, row: int, sequence: ActiveSequence) -> None:
        # The next turn of a conversation begins with this answer too, whose last token never passed
        # the model. To experts that act from a prompt's end on it will be a body, as to the base.
        scope = sequence.prefix_scope
        if scope.limit == len(sequence.prompt):
            tokens = (*sequence.prompt, *sequence.generated[:-1])
            scope = PrefixScope(scope.key, len(tokens))
            self._prefixes.keep(scope, tokens, self._cache, row, self._mask[row])
