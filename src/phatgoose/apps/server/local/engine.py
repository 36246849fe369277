"""The engine: one thread that generates all answers, a step of every batch in turn."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ....analysis.traces import TraceKeeper, TraceStream
from ....base import texts_of
from ....config import Serving
from ....errors import PhatgooseError
from ....tasks.batching import pad_left
from ..protocol import ApiError, bad_request, busy, client_share, for_clients
from .prefixes import MIB, Prefix, PrefixStore, Reader, begin_with
from .runner import Cache, ModelRunner
from .sequences import ANSWER, PROMPT, ActiveSequence, TokenScores, token_scores


class FairQueue:
    """Each client's sequences in their order; the next turn is the client's served longest ago."""

    def __init__(self) -> None:
        self._by_client: dict[str, list[ActiveSequence]] = {}  # in the order of their turns

    def __len__(self) -> int:
        return sum(map(len, self._by_client.values()))

    def __iter__(self) -> Iterator[ActiveSequence]:
        return (each for line in self._by_client.values() for each in line)

    def count(self, client: str) -> int:
        return len(self._by_client.get(client, ()))

    def heads(self) -> list[ActiveSequence]:
        return [line[0] for line in self._by_client.values()]

    def add(self, sequences: Sequence[ActiveSequence]) -> None:
        for each in sequences:
            self._by_client.setdefault(each.client, []).append(each)

    def take(self, head: ActiveSequence) -> None:
        line = self._by_client.pop(head.client)
        if line[1:]:
            self._by_client[head.client] = line[1:]

    def drop_cancelled(self) -> None:
        waiting = [each for each in self if not each.is_cancelled]
        self._by_client = {}
        self.add(waiting)


# transformers' caches can drop rows; joining two caches and dropping columns is done here.


def join(one: Cache, other: Cache) -> None:
    """Add the rows of `other` to `one`, both padded on the left to the longer one's columns."""
    columns = max(one.get_seq_length(), other.get_seq_length())

    def together(*pair: Tensor) -> Tensor:  # [rows, heads, tokens, n] each
        return torch.cat([pad(each, (0, 0, columns - each.shape[-2], 0)) for each in pair])

    for mine, theirs in zip(one.layers, other.layers, strict=True):
        mine.keys = together(mine.keys, theirs.keys)
        mine.values = together(mine.values, theirs.values)


def drop_columns(cache: Cache, columns: int) -> None:
    """Drop the first `columns` tokens of every layer of `cache`, in place."""
    for layer in cache.layers:
        # A view would keep the dropped columns in memory.
        layer.keys = layer.keys[..., columns:, :].contiguous()
        layer.values = layer.values[..., columns:, :].contiguous()


# Most logits in one pass where prompts are scored; longer prompts are read in several passes.
MOST_LOGITS = 1 << 26


class Prefilled(NamedTuple):
    """What reading the prompts of some sequences gave, in their order.

    `mask` [rows, columns] is 0 at padding, `logits` [rows, V] are those after the last token.
    """

    cache: Cache
    mask: Tensor
    logits: Tensor


def prefill(
    runner: ModelRunner, sequences: Sequence[ActiveSequence], prefixes: PrefixStore | None = None
) -> Prefilled:
    """Read the prompts of `sequences` together, each distinct one once, after known `prefixes`."""
    groups: dict[object, list[ActiveSequence]] = {}
    for each in sequences:
        groups.setdefault(_reading_of(each), []).append(each)
    runner.use([group[0].routed for group in groups.values()])
    read = _Prompts(runner, list(groups.values()), prefixes).read()
    row_of = {reading: row for row, reading in enumerate(groups)}
    rows = torch.tensor([row_of[_reading_of(each)] for each in sequences], device=runner.device)
    read.cache.batch_select_indices(rows)
    return Prefilled(read.cache, read.mask[rows], read.logits[rows])


def _reading_of(sequence: ActiveSequence) -> object:
    """What sequences have in common whose prompts are read alike."""
    chosen = None if sequence.routed is None else sequence.routed.choice
    # Of one prompt these may differ: requests bring their own mixtures. What is known before it is
    # known to its client alone.
    return sequence.client, sequence.prompt, None if chosen is None else chosen.key


def reader_of(sequence: ActiveSequence) -> Reader:
    """Who reads its prompt, for its client alone."""
    reader = sequence.runner.reader_of(sequence.prompt, sequence.routed)
    return replace(reader, client=sequence.client)


def keeper_for(sequences: Iterable[ActiveSequence]) -> TraceKeeper | None:
    """A keeper of routing decisions if any of `sequences` asks for them, else None."""
    return TraceKeeper() if any(each.decoding.routing for each in sequences) else None


class _Prompts:
    """A row for each distinct prompt; `owners` are the sequences that begin with it.

    Columns of prefixes that were read before come first, those of what is left to read follow.
    """

    def __init__(
        self, runner: ModelRunner, owners: list[list[ActiveSequence]], prefixes: PrefixStore | None
    ) -> None:
        self._runner, self._owners, self._prefixes = runner, owners, prefixes
        self._everyone = [each for group in owners for each in group]
        self._readers = [reader_of(group[0]) for group in owners]
        known = [self._known(*pair) for pair in zip(owners, self._readers, strict=True)]
        rest = [
            list(group[0].prompt[each[1] if each else 0 :])
            for group, each in zip(owners, known, strict=True)
        ]
        self._cache = runner.new_cache()
        before = begin_with(self._cache, known)
        self._ids = pad_left(rest, runner.pad).to(runner.device)
        mask = torch.cat([before, pad_left([[1] * len(each) for each in rest], 0)], dim=1)
        self._mask, self._before = mask.to(runner.device), before.shape[1]
        self._padding = [self._ids.shape[1] - len(each) for each in rest]

    def _known(self, group: list[ActiveSequence], reader: Reader) -> tuple[Prefix, int] | None:
        # Whoever wants scores or routing of the prompt's tokens wants them to be read.
        if any(each.decoding.scores_prompt or each.decoding.routing for each in group):
            return None
        return self._prefixes.find(reader, group[0].prompt) if self._prefixes else None

    def read(self) -> Prefilled:
        runner, cache, (rows, columns) = self._runner, self._cache, self._ids.shape
        is_scored = any(each.decoding.scores_prompt for each in self._everyone)
        wide = max(1, MOST_LOGITS // (rows * runner.vocabulary)) if is_scored else columns
        scores: list[list[TokenScores]] = [[] for _ in self._owners]
        for begin in range(0, columns, wide):
            end = min(begin + wide, columns)
            keeper = keeper_for(self._everyone)
            ids, mask = self._ids[:, begin:end], self._mask[:, : self._before + end]
            logits = runner.decode(ids, mask, cache, keeper, all_logits=is_scored)
            for row, group in enumerate(self._owners):
                scores[row] += self._scores(row, logits[row], begin, end)
                for stream in keeper.streams().values() if keeper else ():
                    self._report(row, group, stream, begin, end)
        for row, group in enumerate(self._owners):
            for each in group:
                if each.decoding.scores_prompt:
                    each.emit_prompt(scores[row])
            if self._prefixes is not None:
                prompt, mask = group[0].prompt, self._mask[row]
                self._prefixes.keep(self._readers[row], prompt, cache, row, mask)
        return Prefilled(cache, self._mask, logits[:, -1].float())

    def _scores(self, row: int, logits: Tensor, begin: int, end: int) -> list[TokenScores]:
        if not any(each.decoding.scores_prompt for each in self._owners[row]):
            return []
        most = max(each.decoding.logprobs or 0 for each in self._owners[row])
        padding = self._padding[row]
        targets = self._ids[row, max(begin, padding) + 1 : end + 1].tolist()
        return token_scores(logits[max(0, padding - begin) :][: len(targets)], targets, most)

    def _report(
        self, row: int, group: list[ActiveSequence], stream: TraceStream, begin: int, end: int
    ) -> None:
        padding, width = self._padding[row], end - begin
        first = max(begin, padding)
        pieces = texts_of(self._runner.tokenizer, group[0].prompt)
        pieces = pieces[first - padding : max(0, end - padding)]
        chosen = slice(row * width + first - begin, (row + 1) * width)
        part = stream.some(chosen, pieces, [PROMPT] * len(pieces))
        for each in group:
            if each.decoding.routing and part.tokens:
                each.routing.append(part)


class Batch:
    """Sequences of one model, a row each, with their keys and values; all get a token per step.

    Sequences join between two steps, once their prompts have been read, and leave when finished.
    """

    def __init__(self, runner: ModelRunner, prefixes: PrefixStore | None = None) -> None:
        self.runner, self._prefixes = runner, prefixes
        self.sequences: list[ActiveSequence] = []
        self._cache = runner.new_cache()
        self._mask = torch.ones(0, 0)  # [rows, columns]: of all tokens held

    def tokens_with(self, newcomers: Sequence[ActiveSequence] = ()) -> int:
        """Tokens held, padding included, when the longest ends, if `newcomers` join."""
        together = [*self.sequences, *newcomers]
        return len(together) * max((each.most_tokens for each in together), default=0)

    def join(self, newcomers: Sequence[ActiveSequence]) -> None:
        read = prefill(self.runner, newcomers, self._prefixes)
        if self.sequences:
            join(self._cache, read.cache)
            columns = max(self._mask.shape[1], read.mask.shape[1])
            masks = (self._mask, read.mask)
            self._mask = torch.cat([pad(mask, (columns - mask.shape[1], 0)) for mask in masks])
        else:
            self._cache, self._mask = read.cache, read.mask
        self.sequences += newcomers
        for sequence, logits in zip(newcomers, read.logits, strict=True):
            sequence.advance(logits)
        self.drop_finished()

    def step(self) -> None:
        runner, sequences = self.runner, self.sequences
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
        self.drop_finished()

    def drop_finished(self) -> None:
        kept = [row for row, each in enumerate(self.sequences) if not each.is_over]
        if len(kept) == len(self.sequences):
            return
        before = self.sequences
        self.sequences = [before[row] for row in kept]
        for row, each in enumerate(before):
            if each.finish is not None:
                self._keep(row, each)
        if not kept:
            self._cache = self.runner.new_cache()
            return
        rows = torch.tensor(kept, device=self.runner.device)
        self._cache.batch_select_indices(rows)
        self._mask = self._mask[rows]
        unused = int(self._mask.any(dim=0).long().argmax())
        if unused:
            drop_columns(self._cache, unused)
            self._mask = self._mask[:, unused:]

    def _keep(self, row: int, sequence: ActiveSequence) -> None:
        # The next turn of a conversation begins with this answer too, whose last token never passed
        # the model. To experts that act from a prompt's end on it will be a body, as to the base.
        if self._prefixes is None:
            return
        reader = reader_of(sequence)
        if reader.limit == len(sequence.prompt):
            tokens = (*sequence.prompt, *sequence.generated[:-1])
            whole = replace(reader, limit=len(tokens))
            self._prefixes.keep(whole, tokens, self._cache, row, self._mask[row])


MOST_READ = 2048  # prompt tokens read between two steps, unless a single prompt is longer
SHARE = 3  # a client may hold three times the tokens left free: alone three quarters of all
FAILED = "The answer could not be computed; the server's log says more."
STOPPED = "The server was stopped."

log = logging.getLogger(__name__)


class GenerationEngine:
    """Computes sequences in batches, each of one model and routing.

    Sequences wait in one queue for all models, and clients take turns. One is admitted while the
    tokens that all batches will hold stay within the limit. `count` is told the rows of each pass.
    Public methods may be called from any thread.
    """

    def __init__(self, limits: Serving, count: Callable[[int], object] = lambda rows: None) -> None:
        self._limits, self._count = limits, count
        self.prefixes = PrefixStore(limits.prefix_cache * MIB)
        self._queue = FairQueue()
        self._batches: list[Batch] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="phatgoose-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End at the next step; unfinished sequences fail."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def submit(self, sequences: Sequence[ActiveSequence]) -> None:
        """Queue the `sequences` of one request, all or none, or raise ApiError."""
        limits, new = self._limits, len(sequences)
        longest = max(each.most_tokens for each in sequences)
        if longest > limits.max_batch_tokens:
            raise bad_request(
                f"Prompt and answer have {longest} tokens together; at most "
                f"{limits.max_batch_tokens} can be computed here.",
                "max_tokens",
                "context_length_exceeded",
            )
        most = client_share(limits.max_queue)
        if new > most:
            raise bad_request(f"{new} answers were asked for at once; at most {most} can wait.")
        with self._changed:
            if self._stopping:
                raise busy(STOPPED)
            if len(self._queue) + new > limits.max_queue:
                raise busy(f"{len(self._queue)} answers are waiting already; try again in a while.")
            own = self._queue.count(sequences[0].client)
            if own + new > most:
                raise busy(f"{own} answers of yours are waiting already; try again in a while.")
            self._queue.add(sequences)
            self._changed.notify()

    def cancel(self, sequences: Sequence[ActiveSequence]) -> None:
        with self._changed:
            for each in sequences:
                each.is_cancelled = True
            self._queue.drop_cancelled()
            self._changed.notify()

    @property
    def running(self) -> int:
        return len(self._running())

    @property
    def waiting(self) -> int:
        with self._changed:
            return len(self._queue)

    def _running(self) -> list[ActiveSequence]:
        # A copy of the list, which the engine's thread may change meanwhile.
        return [each for batch in list(self._batches) for each in batch.sequences]

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait():
                    self._admit()
                    for batch in self._batches:
                        if batch.sequences:
                            self._guarded(batch, batch.step)
                    self._drop_empty()
        finally:
            with self._changed:
                self._stopping = True
                left = [*self._running(), *self._queue]
                self._batches.clear()
                self._queue = FairQueue()
            _fail(left, STOPPED)

    def _wait(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._batches or self._stopping)
            return not self._stopping

    def _drop_empty(self) -> None:
        self._batches = [batch for batch in self._batches if batch.sequences]

    def _admit(self) -> None:
        for batch in self._batches:
            batch.drop_finished()
        self._drop_empty()
        read = 0
        while read < MOST_READ and (group := self._next_group(MOST_READ - read)):
            read += _padded_tokens(group)
            batch = self._batch_for(group[0].runner)
            self._guarded(batch, partial(batch.join, group), group)

    def _next_group(self, most_read: int) -> list[ActiveSequence]:
        group: list[ActiveSequence] = []
        with self._changed:
            while (head := self._next(group, most_read)) is not None:
                self._queue.take(head)
                group.append(head)
        return group

    def _next(self, group: Sequence[ActiveSequence], most_read: int) -> ActiveSequence | None:
        # While a sequence doesn't fit, clients with running ones get no more: it would be passed
        # over for ever.
        is_short = False
        for head in self._queue.heads():
            together = [*group, head]
            if group and (
                head.runner is not group[0].runner or _padded_tokens(together) > most_read
            ):
                continue
            running = [each for each in (*self._running(), *group) if each.client == head.client]
            if running and is_short:
                continue
            batch = self._batch_for(head.runner)
            others = sum(each.tokens_with() for each in self._batches if each is not batch)
            free = self._limits.max_batch_tokens - others - batch.tokens_with(together)
            taken = sum(each.most_tokens for each in running)
            if free < 0:
                is_short = True
            elif not taken or taken + head.most_tokens <= SHARE * free:
                return head
        return None

    def _batch_for(self, runner: ModelRunner) -> Batch:
        for batch in self._batches:
            if batch.runner is runner:
                return batch
        return Batch(runner, self.prefixes)

    def _guarded(
        self, batch: Batch, work: Callable[[], None], joining: Sequence[ActiveSequence] = ()
    ) -> None:
        if batch not in self._batches:
            self._batches.append(batch)
        size = len(batch.sequences) + len(joining)
        self._count(size)
        try:
            work()
        except Exception as error:
            log.exception("A batch of %d answers failed.", size)
            concerned, batch.sequences = [*batch.sequences, *joining], []
            _fail(concerned, for_clients(error) if isinstance(error, PhatgooseError) else FAILED)


def _padded_tokens(sequences: Sequence[ActiveSequence]) -> int:
    return len(sequences) * max(len(each.prompt) for each in sequences)


def _fail(sequences: Iterable[ActiveSequence], message: str) -> None:
    for each in sequences:
        if not each.is_over:
            each.is_cancelled = True
            each.deliver(ApiError(500, message))
