"""The engine: one thread that computes all answers, a step of every batch in turn.

Rows wait in one queue for all models, and clients take turns. Rows are let in as long as the tokens
that all batches will hold stay within the limit, and those of a client who has some already only
while enough is left for others. A batch has rows of one model and routing only.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch

from ....config import Serving
from ....errors import PhatgooseError
from ..api_errors import bad_request, busy, for_clients
from ..metrics import Metrics
from .batches import Batch
from .fair_queue import FairQueue, QueuedSequence
from .model_runner import ModelRunner
from .sequences import ActiveSequence, Failure

__all__ = ["GenerationEngine"]

MOST_READ = 2048  # prompt tokens read between two steps, unless a single prompt is longer
SHARE = 3  # times as many tokens as are left free may one client hold: alone three quarters of all
FAILED = "The answer could not be computed; the server's log says more."
STOPPED = "The server was stopped."

log = logging.getLogger(__name__)


class GenerationEngine:
    """Computes rows; all public methods may be called from any thread."""

    def __init__(self, limits: Serving, metrics: Metrics) -> None:
        self._limits, self._metrics = limits, metrics
        self._queue = FairQueue()
        self._batches: list[Batch] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to compute, in a thread of its own."""
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="phatgoose-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End at the next step; rows that are not finished fail."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """True while answers are computed."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, runner: ModelRunner, rows: Sequence[ActiveSequence]) -> None:
        """Put the `rows` of one request, of one client, into the queue, all or none.

        Raises ApiError when the queue is full, or the client has enough in it, or it can never take
        so many rows or so long ones.
        """
        limits = self._limits
        longest = max(row.most_tokens for row in rows)
        if longest > limits.max_batch_tokens:
            raise bad_request(
                f"Prompt and answer have {longest} tokens together; at most "
                f"{limits.max_batch_tokens} can be computed here.",
                "max_tokens",
                "context_length_exceeded",
            )
        most = min(limits.max_queue, limits.max_client_queue)
        if len(rows) > most:
            raise bad_request(
                f"{len(rows)} answers were asked for at once; at most {most} can wait."
            )
        with self._changed:
            if self._stopping:
                raise busy(STOPPED)
            if len(self._queue) + len(rows) > limits.max_queue:
                raise busy(f"{len(self._queue)} answers are waiting already; try again in a while.")
            own = self._queue.of(rows[0].client)
            if own + len(rows) > limits.max_client_queue:
                raise busy(f"{own} answers of yours are waiting already; try again in a while.")
            self._queue.add([QueuedSequence(runner, row) for row in rows])
            self._changed.notify()
        self._tell_metrics()

    def cancel(self, rows: Sequence[ActiveSequence]) -> None:
        """Compute no more of `rows`; their place is free from the next step on."""
        with self._changed:
            for row in rows:
                row.is_cancelled = True
            self._queue.drop_cancelled()
            self._changed.notify()
        self._tell_metrics()

    @property
    def running(self) -> int:
        """Rows that are being computed."""
        return sum(len(batch.rows) for batch in list(self._batches))

    @property
    def waiting(self) -> int:
        """Rows in the queue."""
        with self._changed:
            return len(self._queue)

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait():
                    self._admit()
                    for batch in self._batches:
                        if batch.rows:
                            self._guarded(batch, batch.step)
                    self._batches = [batch for batch in self._batches if batch.rows]
                    self._tell_metrics()
        finally:
            with self._changed:
                self._stopping = True
                rows = [row for batch in self._batches for row in batch.rows]
                rows += [each.row for each in self._queue]
                self._batches.clear()
                self._queue = FairQueue()
            _fail(rows, STOPPED)

    def _wait(self) -> bool:
        """Wait for something to do; False when the engine is to stop."""
        with self._changed:
            while not (self._queue or self._batches or self._stopping):
                self._changed.wait()
            return not self._stopping

    def _admit(self) -> None:
        """Drop rows that were cancelled, and let others in from the queue."""
        for batch in self._batches:
            batch.drop_finished()
        self._batches = [batch for batch in self._batches if batch.rows]
        read = 0
        while read < MOST_READ and (group := self._next_group(MOST_READ - read)):
            rows = [each.row for each in group]
            read += _padded(rows)
            batch = self._batch_for(group[0].runner)
            self._guarded(batch, partial(batch.join, rows), rows)

    def _next_group(self, most_read: int) -> list[QueuedSequence]:
        """Rows of one model from the queue, as many as may be let in together."""
        group: list[QueuedSequence] = []
        with self._changed:
            while (head := self._next(group, most_read)) is not None:
                self._queue.take(head)
                group.append(head)
        return group

    def _next(self, group: Sequence[QueuedSequence], most_read: int) -> QueuedSequence | None:
        """The row that joins `group` next, None if nobody may.

        Where somebody's row doesn't fit, those who have rows running get no more until it does, so
        that it isn't passed over for ever.
        """
        is_short = False
        for head in self._queue.heads():
            rows = [*(each.row for each in group), head.row]
            if group and (head.runner is not group[0].runner or _padded(rows) > most_read):
                continue
            held = self._held_by(head.row.client, group)
            if held and is_short:
                continue
            free = self._limits.max_batch_tokens - self._tokens_with(head.runner, rows)
            if free < 0:
                is_short = True
            elif not held or held + head.row.most_tokens <= SHARE * free:
                return head
        return None

    def _held_by(self, client: str, group: Sequence[QueuedSequence]) -> int:
        """Tokens of the rows of `client` that are computed or in `group`."""
        rows = [row for batch in self._batches for row in batch.rows]
        rows += [each.row for each in group]
        return sum(row.most_tokens for row in rows if row.client == client)

    def _tokens_with(self, runner: ModelRunner, rows: Sequence[ActiveSequence]) -> int:
        """Tokens that all batches hold if `rows` join."""
        batch = self._batch_for(runner)
        others = sum(each.tokens_with() for each in self._batches if each is not batch)
        return others + batch.tokens_with(rows)

    def _batch_for(self, runner: ModelRunner) -> Batch:
        """The batch that rows of `runner` join; a new one where there is none that takes them."""
        for batch in self._batches:
            if batch.runner is runner and batch.takes_rows:
                return batch
        return Batch(runner)

    def _guarded(
        self, batch: Batch, work: Callable[[], None], joining: Sequence[ActiveSequence] = ()
    ) -> None:
        """Do a piece of `work`; if it fails, so do the rows that it was for, and no others."""
        if batch not in self._batches:
            self._batches.append(batch)
        self._metrics.computed(len(batch.rows) + len(joining))
        try:
            work()
        except Exception as error:
            log.exception("A batch of %d answers failed.", len(batch.rows) + len(joining))
            rows, batch.rows = [*batch.rows, *joining], []
            told = isinstance(error, PhatgooseError)
            _fail(rows, for_clients(error) if told else FAILED)

    def _tell_metrics(self) -> None:
        self._metrics.load(self.waiting, self.running)


def _padded(rows: Sequence[ActiveSequence]) -> int:
    """Tokens of the prompts of `rows`, padding included."""
    return len(rows) * max(len(row.prompt) for row in rows)


def _fail(rows: Iterable[ActiveSequence], message: str) -> None:
    for row in {id(row): row for row in rows}.values():
        if not row.is_over:
            row.is_cancelled = True
            row.deliver(Failure(message))
