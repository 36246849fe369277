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
from ..replies import Progress, ScoredToken
from ..requests import Answer, Decoding
from .json_form import Calls, JsonForm, beginning_of, calls_begin
from .runner import Cache, ModelRunner, PrefixStore, Reader, begin_with, joined

COLDEST = 1e-4  # a temperature below is greedy: the best token's probability is 1 in any case
LEAST = -9999.0  # stands for minus infinity, which JSON doesn't have
PROMPT, ANSWER = 0, 1  # parts of a trace


class AnswerPenalty(LogitsProcessor):  # type: ignore[misc]  # transformers has no such class
    """OpenAI's frequency and presence penalties: of tokens after the first `begin`."""

    def __init__(self, frequency: float, presence: float, begin: int) -> None:
        self._frequency, self._presence, self._begin = frequency, presence, begin

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
        self._bias = {int(number): bias for number, bias in decoding.logit_bias.items() if bias}
        if self._bias:
            steps.append(SequenceBiasLogitsProcessor({(n,): v for n, v in self._bias.items()}))
        if decoding.repetition_penalty != 1:
            steps.append(RepetitionPenaltyLogitsProcessor(float(decoding.repetition_penalty)))
        penalties = decoding.frequency_penalty, decoding.presence_penalty
        if any(penalties):
            steps.append(AnswerPenalty(*penalties, len(prompt)))
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
        last, why = max(self._bias, default=0), ""
        if last >= len(logits):
            why = f"logit_bias names token {last}; there are {len(logits)}."
        elif not logits.max().isfinite():  # which would fail all that share a batch
            why = "The model's numbers overflow; weights nearer to 0 may not."
        if why:
            raise EngineError(why)
        scores = logits[None]
        if self._processors:
            before = [] if self._prompt is None else [*self._prompt, *generated]
            scores = self._processors(torch.tensor([before], device=logits.device), scores)
        if self._generator is None:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self._generator))


class ActiveSequence:
    """One answer: its prompt, the tokens generated so far, and who receives its events.

    `deliver` is called from the engine's thread. `client` is who has asked, `routed` what the
    model's context found for the prompt, `form` what an answer in JSON keeps to, `calls` those that
    may be in it.
    """

    form: JsonForm | None = None
    calls: Calls | None = None

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
        self.most_tokens = len(self.prompt) + self.decoding.max_tokens
        self.client, self.routed = client, routed
        self.is_cancelled = False
        self.finish: Finish | None = None
        self.generated: list[int] = []
        self.shown: list[str] = []  # each generated token as text
        self.routing: list[TraceStream] = []  # of tokens that passed the model, for the next event
        self._ends = () if self.decoding.ignores_end else runner.ends
        self._sampler = Sampler(self.decoding, runner.device, self.prompt)
        self._detokeniser = Detokeniser(runner.tokenizer, self.prompt)
        self._text, self._sent = "", 0  # all text so far, and how much of it was delivered
        self._unsent: list[tuple[int, ScoredToken]] = []  # (end in the text, token)

    @property
    def reader(self) -> Reader:
        return self.runner.reader_of(self.prompt, self.routed, self.client)

    @property
    def is_over(self) -> bool:
        return self.is_cancelled or self.finish is not None

    def advance(self, logits: Tensor) -> None:
        """Choose the next token by `logits` [V], and deliver what can be."""
        form, is_whole = self.form, False
        try:
            scores = logits if form is None else form.allowed(logits)
            token = self._sampler(scores, self.generated)
            is_whole = form is not None and token not in self._ends and form.add(token)
        except EngineError as error:  # of the form, a client's; others in the batch go on
            self.is_cancelled = True
            self.deliver(bad_request(str(error)))
            return
        self.generated.append(token)
        piece, begin = self._detokeniser.add(token), len(self._text)
        if self.calls:
            piece += self.calls.hidden.get(token, "")
        self._text += piece
        self.shown.append(shown_as(self.runner.tokenizer, token, piece))
        self._unsent.append((len(self._text), self._scored(token, begin, logits)))
        if token in self._ends or is_whole:
            self.finish = "stop"
        elif len(self.generated) >= self.decoding.max_tokens:
            self.finish = "length"
        if self.finish is not None:
            self._text += self._detokeniser.rest()
        self._cut_at_stop(len(self._text) - begin)
        self._emit()

    def _scored(self, token: int, place: int, logits: Tensor) -> ScoredToken:
        shown, most = self.shown[-1], self.decoding.logprobs
        if most is None:
            return ScoredToken(shown, place)
        scores = torch.log_softmax(logits, dim=-1, dtype=torch.float32).clamp(min=LEAST)
        best = scores.topk(most)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        tokenizer = self.runner.tokenizer
        top = ((shown if each == token else text_of(tokenizer, each), p) for each, p in pairs)
        return ScoredToken(shown, place, float(scores[token]), tuple(top))

    def _cut_at_stop(self, new: int) -> None:
        stops = self.decoding.stop
        longest = max((len(stop) for stop in stops), default=0)
        begin = max(self._sent, len(self._text) - new - longest, 0)
        cuts = [cut for stop in stops if (cut := self._text.find(stop, begin)) >= 0]
        if cuts:
            cut = min(cuts)
            self._text, self.finish = self._text[:cut], "stop"
            self._unsent = [each for each in self._unsent if each[1].place < cut]

    def _emit(self) -> None:
        waiting = 0 if self.finish else beginning_of(self.decoding.stop, self._text)
        safe = len(self._text) - waiting
        if self.calls and not self.finish:
            safe = min(safe, self._sent + calls_begin(self._text[self._sent :]))
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
        if (text or ready or routing or self.finish) and not self.is_cancelled:
            tokens = tuple(token for _, token in ready)
            generated = len(self.generated)
            new = Progress(self.choice, text, tokens, routing, self.finish, generated)
            self.deliver(self.calls.parsed(new) if self.calls and self.finish else new)


def prefill(sequences: Sequence[ActiveSequence], prefixes: PrefixStore) -> tuple[Cache, Tensor]:
    """Read the prompts of `sequences` together, each distinct one once, after known `prefixes`.

    All get their first token. Returns their cache and its mask [rows, columns], 0 at padding.
    """
    runner, groups = sequences[0].runner, dict[object, list[ActiveSequence]]()
    for each in sequences:
        groups.setdefault(_reading_of(each), []).append(each)
    firsts = [group[0] for group in groups.values()]
    runner.use([each.routed for each in firsts])
    readers = [each.reader for each in firsts]
    known = [
        # Whoever wants the routing of the prompt's tokens wants them to be read.
        None if each.decoding.routing else prefixes.find(reader, each.prompt)
        for each, reader in zip(firsts, readers, strict=True)
    ]
    # As many tokens of every row: windows and ALiBi count columns, so none may be padding between
    # what is known and what is read.
    most = max(len(e.prompt) - (p[1] if p else 0) for e, p in zip(firsts, known, strict=True))
    counts = [max(0, len(each.prompt) - most) for each in firsts]
    unread = [each.prompt[-most:] for each in firsts]
    cache, keeper = DynamicCache(), keeper_for(sequences)
    before = begin_with(cache, [pair and pair[0] for pair in known], counts)
    ids = pad_left(unread, runner.pad).to(runner.device)
    mask = torch.cat([before, pad_left([[1] * len(each) for each in unread], 0)], dim=1)
    mask = mask.to(runner.device)
    logits = runner.decode(ids, mask, cache, keeper)
    streams = keeper.streams().values() if keeper else ()
    for row, (first, group) in enumerate(zip(firsts, groups.values(), strict=True)):
        prefixes.keep(readers[row], first.prompt, cache, row, mask[row])
        end, count = (row + 1) * ids.shape[1], len(first.prompt)
        for stream in streams if first.decoding.routing else ():
            shown = texts_of(runner.tokenizer, first.prompt)
            part = stream.some(slice(end - count, end), shown, [PROMPT] * count)
            for each in group:
                each.routing.append(part)
    row_of = {reading: row for row, reading in enumerate(groups)}
    rows = torch.tensor([row_of[_reading_of(each)] for each in sequences], device=runner.device)
    cache.batch_select_indices(rows)
    for each, scores in zip(sequences, logits[rows, -1].float(), strict=True):
        each.advance(scores)
    return cache, mask[rows]


def _reading_of(sequence: ActiveSequence) -> object:
    """What sequences have in common whose prompts are read alike."""
    chosen = None if sequence.routed is None else sequence.routed.choice
    # Of one prompt the choice may differ: requests bring their own mixtures. What is known before
    # it is known to its client alone.
    key = None if chosen is None else chosen.key
    return sequence.client, sequence.prompt, key, sequence.decoding.routing


def keeper_for(sequences: Iterable[ActiveSequence]) -> TraceKeeper | None:
    """A keeper of routing decisions if any of `sequences` asks for them, else None."""
    return TraceKeeper() if any(each.decoding.routing for each in sequences) else None


class Batch:
    """Sequences of one model, a row each, with their keys and values; all get a token per step.

    Sequences join between two steps, once their prompts have been read. Those that are over leave
    before the next step.
    """

    def __init__(self, runner: ModelRunner, prefixes: PrefixStore | None = None) -> None:
        self.runner, self._prefixes = runner, prefixes or PrefixStore(0)
        self.sequences: list[ActiveSequence] = []
        self._cache: Cache = DynamicCache()
        self._mask = torch.ones(0, 0)  # [rows, columns]: of all tokens in the cache

    @property
    def running(self) -> list[ActiveSequence]:
        return [each for each in self.sequences if not each.is_over]

    def tokens_with(self, newcomers: Sequence[ActiveSequence] = ()) -> int:
        """Tokens in memory, padding included, when the longest ends, if `newcomers` join."""
        together = [*self.running, *newcomers]
        return len(together) * max((each.most_tokens for each in together), default=0)

    def join(self, newcomers: Sequence[ActiveSequence]) -> None:
        self._drop_finished()
        cache, mask = prefill(newcomers, self._prefixes)
        if self.sequences:
            for mine, theirs in zip(self._cache.layers, cache.layers, strict=True):
                mine.keys = joined(mine.keys, theirs.keys)
                mine.values = joined(mine.values, theirs.values)
            cache, mask = self._cache, joined(self._mask[..., None], mask[..., None])[..., 0]
        self._cache, self._mask = cache, mask
        self.sequences += newcomers

    def step(self) -> None:
        self._drop_finished()
        runner, sequences = self.runner, self.sequences
        if not sequences:
            return
        ids = torch.tensor([[each.generated[-1]] for each in sequences], device=runner.device)
        keeper = keeper_for(sequences)
        runner.use([each.routed for each in sequences])
        self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
        logits = runner.decode(ids, self._mask, self._cache, keeper)
        for stream in keeper.streams().values() if keeper else ():
            for row, sequence in enumerate(sequences):
                if sequence.decoding.routing:
                    last = stream.some(slice(row, row + 1), sequence.shown[-1:], [ANSWER])
                    sequence.routing.append(last)
        for sequence, scores in zip(sequences, logits[:, -1].float(), strict=True):
            sequence.advance(scores)

    def _drop_finished(self) -> None:
        before = self.sequences
        kept = [row for row, each in enumerate(before) if not each.is_over]
        if len(kept) == len(before):
            return
        self.sequences = [before[row] for row in kept]
        for row, each in enumerate(before):
            if each.finish is not None:
                self._keep(row, each)
        if not kept:
            self._cache = DynamicCache()
            return
        rows = torch.tensor(kept, device=self.runner.device)
        self._cache.batch_select_indices(rows)
        self._mask = self._mask[rows]
        unused = int(self._mask.any(dim=0).long().argmax())
        self._mask = self._mask[:, unused:]
        for layer in self._cache.layers if unused else ():
            # A view would keep the dropped columns in memory.
            layer.keys = layer.keys[..., unused:, :].contiguous()
            layer.values = layer.values[..., unused:, :].contiguous()

    def _keep(self, row: int, sequence: ActiveSequence) -> None:
        # The next turn of a conversation begins with this answer too, whose last token never passed
        # the model. To experts that act from a prompt's end on it will be a body, as to the base.
        reader = sequence.reader
        if reader.limit == len(sequence.prompt):
            tokens = (*sequence.prompt, *sequence.generated[:-1])
            whole = Reader(reader.key, len(tokens))
            self._prefixes.keep(whole, tokens, self._cache, row, self._mask[row])
