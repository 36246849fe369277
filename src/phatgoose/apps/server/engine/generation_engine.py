"""The engine: one thread that generates all answers, a step of every batch in turn.

Sequences wait in one queue for all models, and clients take turns. A sequence is admitted while the
tokens that all batches will hold stay within the limit; a client who has some running already gets
more only while enough is left for others. A batch has sequences of one model and routing only.
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
from .fair_queue import FairQueue
from .model_runner import ModelRunner
from .sequences import ActiveSequence, Failure

__all__ = ["GenerationEngine"]

MOST_READ = 2048  # prompt tokens read between two steps, unless a single prompt is longer
SHARE = 3  # a client may hold three times the tokens left free: alone three quarters of all
FAILED = "The answer could not be computed; the server's log says more."
STOPPED = "The server was stopped."

log = logging.getLogger(__name__)


class GenerationEngine:
    """Computes sequences; all public methods may be called from any thread."""

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
        """End at the next step; unfinished sequences fail."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """True while answers are computed."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, sequences: Sequence[ActiveSequence]) -> None:
        """Queue the `sequences` of one request, all or none.

        Raises ApiError when the queue is full, the client has enough in it, or it can never take so
        many sequences or such long ones.
        """
        limits, new = self._limits, len(sequences)
        longest = max(each.most_tokens for each in sequences)
        if longest > limits.max_batch_tokens:
            raise bad_request(
                f"Prompt and answer have {longest} tokens together; at most "
                f"{limits.max_batch_tokens} can be computed here.",
                "max_tokens",
                "context_length_exceeded",
            )
        most = min(limits.max_queue, limits.max_client_queue)
        if new > most:
            raise bad_request(f"{new} answers were asked for at once; at most {most} can wait.")
        with self._changed:
            if self._stopping:
                raise busy(STOPPED)
            if len(self._queue) + new > limits.max_queue:
                raise busy(f"{len(self._queue)} answers are waiting already; try again in a while.")
            own = self._queue.count(sequences[0].client)
            if own + new > limits.max_client_queue:
                raise busy(f"{own} answers of yours are waiting already; try again in a while.")
            self._queue.add(sequences)
            self._changed.notify()
        self._update_metrics()

    def cancel(self, sequences: Sequence[ActiveSequence]) -> None:
        """Stop computing `sequences`; their places are free from the next step on."""
        with self._changed:
            for each in sequences:
                each.is_cancelled = True
            self._queue.drop_cancelled()
            self._changed.notify()
        self._update_metrics()

    @property
    def running(self) -> int:
        """How many sequences are being computed."""
        return len(self._running())

    @property
    def waiting(self) -> int:
        """How many sequences are in the queue."""
        with self._changed:
            return len(self._queue)

    def _running(self) -> list[ActiveSequence]:
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
                    self._update_metrics()
        finally:
            with self._changed:
                self._stopping = True
                left = [*self._running(), *self._queue]
                self._batches.clear()
                self._queue = FairQueue()
            _fail(left, STOPPED)

    def _wait(self) -> bool:
        """Wait for something to do; False when the engine is to stop."""
        with self._changed:
            while not (self._queue or self._batches or self._stopping):
                self._changed.wait()
            return not self._stopping

    def _drop_empty(self) -> None:
        self._batches = [batch for batch in self._batches if batch.sequences]

    def _admit(self) -> None:
        """Drop cancelled sequences and admit others from the queue."""
        for batch in self._batches:
            batch.drop_finished()
        self._drop_empty()
        read = 0
        while read < MOST_READ and (group := self._next_group(MOST_READ - read)):
            read += _padded(group)
            batch = self._batch_for(group[0].runner)
            self._guarded(batch, partial(batch.join, group), group)

    def _next_group(self, most_read: int) -> list[ActiveSequence]:
        """Sequences of one model from the queue, as many as may be admitted together."""
        group: list[ActiveSequence] = []
        with self._changed:
            while (head := self._next(group, most_read)) is not None:
                self._queue.take(head)
                group.append(head)
        return group

    def _next(self, group: Sequence[ActiveSequence], most_read: int) -> ActiveSequence | None:
        """The sequence that joins `group` next, None if none may.

        While one doesn't fit, clients with running sequences get no more, so that it isn't passed
        over for ever.
        """
        is_short = False
        for head in self._queue.heads():
            together = [*group, head]
            if group and (head.runner is not group[0].runner or _padded(together) > most_read):
                continue
            held = self._held_by(head.client, group)
            if held and is_short:
                continue
            free = self._limits.max_batch_tokens - self._tokens_with(together)
            if free < 0:
                is_short = True
            elif not held or held + head.most_tokens <= SHARE * free:
                return head
        return None

    def _held_by(self, client: str, group: Sequence[ActiveSequence]) -> int:
        """Tokens of the sequences of `client` that are running or in `group`."""
        own = (each for each in (*self._running(), *group) if each.client == client)
        return sum(each.most_tokens for each in own)

    def _tokens_with(self, group: Sequence[ActiveSequence]) -> int:
        """Tokens that all batches hold if `group` joins."""
        batch = self._batch_for(group[0].runner)
        others = sum(each.tokens_with() for each in self._batches if each is not batch)
        return others + batch.tokens_with(group)

    def _batch_for(self, runner: ModelRunner) -> Batch:
        """The batch that sequences of `runner` join; a new one if none is open."""
        for batch in self._batches:
            if batch.runner is runner and batch.is_open:
                return batch
        return Batch(runner)

    def _guarded(
        self, batch: Batch, work: Callable[[], None], joining: Sequence[ActiveSequence] = ()
    ) -> None:
        """Do `work` for `batch`; if it fails, so do the batch's sequences and no others."""
        if batch not in self._batches:
            self._batches.append(batch)
        size = len(batch.sequences) + len(joining)
        self._metrics.count_batch(size)
        try:
            work()
        except Exception as error:
            log.exception("A batch of %d answers failed.", size)
            concerned, batch.sequences = [*batch.sequences, *joining], []
            _fail(concerned, for_clients(error) if isinstance(error, PhatgooseError) else FAILED)

    def _update_metrics(self) -> None:
        self._metrics.set_load(self.waiting, self.running)


def _padded(sequences: Sequence[ActiveSequence]) -> int:
    """Tokens of the prompts of `sequences`, padding included."""
    return len(sequences) * max(len(each.prompt) for each in sequences)


def _fail(sequences: Iterable[ActiveSequence], message: str) -> None:
    for each in sequences:
        if not each.is_over:
            each.is_cancelled = True
            each.deliver(Failure(message))
