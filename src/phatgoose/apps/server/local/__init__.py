"""The backend that computes answers here: one thread that generates all, a step of each batch.

Its requests become sequences, which wait in one queue for all models; clients take turns.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ....analysis.distribution import PARTS
from ....analysis.measures import heaviest
from ....analysis.traces import Trace, chosen_for_whole, join_streams
from ....config import Serving
from ....errors import PhatgooseError
from ....routing.choice import ALONE, PromptRouting
from ....routing.compose import composition_of
from ..backend import Backend, Served, State
from ..guards import Metrics
from ..protocol import AnyRequest, ApiError, bad_request, check_known, for_clients
from ..replies import Progress, Reply, Weights, routing_report
from ..requests import Asked
from ..service import FairQueue, Turns
from .batches import ActiveSequence, Batch
from .json_form import Calls, Forms
from .runner import MIB, LoadedModel, ModelRunner, PrefixStore

LOOKUPS = 2  # requests for which experts are looked up at once
MOST_READ = 2048  # prompt tokens read between two steps, unless a single prompt is longer
SHARE = 3  # a client may hold three times the tokens left free: alone three quarters of all
FAILED = "The answer could not be computed; the server's log says more."
STOPPED = "The server was stopped."

log = logging.getLogger(__name__)


class LocalBackend(Backend[ModelRunner]):
    """The engine, which answers with `models`."""

    def __init__(
        self, models: Mapping[str, LoadedModel], limits: Serving, metrics: Metrics
    ) -> None:
        self.models = models
        self._limits = limits
        words = "Answers in a batch when it read prompts or made a step."
        batch = metrics.histogram("batch_rows", words, buckets=[2**i for i in range(9)])
        self.engine = engine = GenerationEngine(limits, batch.observe)
        kept = metrics.gauge("prefix_bytes", "Bytes of prompts' beginnings that are kept.")
        kept.set_function(lambda: engine.prefixes.bytes)
        self._lookups = Turns(LOOKUPS, limits.max_queue)
        self._forms = Forms(limits.max_queue)

    def start(self) -> None:
        self.engine.start()
        templates = [each.runner.tokenizer.chat_template for each in self.models.values()]
        if any("tools" not in str(each or "tools") for each in templates):
            log.warning("A base's chat template has no tools: only forced calls of tools work.")

    async def close(self) -> None:
        self.engine.stop()

    @property
    def limits(self) -> Serving:
        return self._limits

    @property
    def state(self) -> State:
        return State(self.engine.is_alive, self.engine.waiting, len(self.engine.running))

    def check(self, request: AnyRequest, model: Served[ModelRunner]) -> None:
        check_known(request)
        if request.routing and not model.experts:
            message = f"{request.model!r} is a base model alone; it has no routing."
            raise bad_request(message, "routing")

    async def begin(self, asked: Asked, runner: ModelRunner) -> tuple[Reply, list[Weights] | None]:
        calls = Calls.of(asked.request, runner)

        def chosen(_: float = 0) -> Sequence[PromptRouting | None]:
            tokens, read = zip(*((each.tokens, each.asked) for each in asked.prompts), strict=True)
            known = {"allowed": asked.experts, "client": asked.client}
            return runner.routings_of(tokens, read, asked.mixture, **known)

        if asked.mixture is None and runner.frame.looks_prompts_up:
            routed = await self._lookups.run(asked.client, asked.deadline, chosen)
        else:
            routed = chosen()
        json_form = await self._forms.of(asked, calls, runner)
        reporter = Reporter(runner, asked, routed)
        reply = Reply(asked.builder(asked, reporter), asked.deadline)
        in_loop: Any = asyncio.get_running_loop().call_soon_threadsafe
        deliver = partial(in_loop, reply.events.put_nowait)  # called in the engine's thread
        sequences = [
            ActiveSequence(runner, answer, deliver, asked.client, routed[answer.row])
            for answer in asked.answers
        ]
        for each in sequences:
            each.form, each.calls = json_form and json_form.copy(), calls
        self.engine.submit(sequences)
        reply.at_end.callback(self.engine.cancel, sequences)
        return reply, reporter.chosen


class Reporter:
    """Reports the routing of the tokens that answers come to, as a request wants it."""

    def __init__(
        self, runner: ModelRunner, asked: Asked, routed: Sequence[PromptRouting | None]
    ) -> None:
        self._runner, self._asked, self._routed = runner, asked, routed
        choices = [each.choice for each in routed if each and each.choice]
        # Each prompt's experts; None where they are chosen by token.
        named = [each.named(composition_of(runner.model).experts)[0] for each in choices]
        self.chosen = named or None
        # Each expert's share of the tokens so far.
        self._sums = defaultdict[int, Counter[str]](Counter)
        self._tokens: Counter[int] = Counter()

    def __call__(self, progress: Progress) -> dict[str, Any] | None:
        if not progress.routing:
            return None
        choice, streams = progress.choice, join_streams(progress.routing)
        parts, sums = composition_of(self._runner.model), self._sums[choice]
        mine, tokens = self._asked.experts, list[dict[str, Any]]()
        names = tuple(name if name in mine else f"#{z}" for z, name in enumerate(parts.experts))
        for stream in streams:
            shares = stream.shares(len(names))
            for text, part, row in zip(stream.tokens, stream.parts, shares, strict=True):
                best = {names[z]: round(float(row[z]), 4) for z in heaviest(row, len(row))}
                where = {"part": PARTS[part], "stream": stream.name}
                tokens.append({"token": text, **where, "experts": best})
                sums.update(best)
                self._tokens[choice] += bool(best)
        count, row = self._tokens[choice], self._asked.answers[choice].row
        alone = ALONE if self.chosen and not self.chosen[row] else {}
        router, known = parts.router.text, [name for name in names if name in mine]
        summary = {name: round(total / count, 4) for name, total in sums.most_common()} or alone
        report = routing_report(router, parts.router.k or None, known, tokens, summary)
        if self._asked.request.routing == "trace":
            routed = self._routed[row]
            whole = chosen_for_whole(parts, routed.choice if routed else None)
            report["trace"] = Trace(names, router, tuple(streams), whole).to_dict()
        return report


class GenerationEngine:
    """Computes sequences in batches, each of one model and routing.

    Sequences wait in one queue for all models, and clients take turns. One is admitted while the
    tokens that all batches will hold stay within the limit. `count` is told the rows of each pass.
    Methods but `admit` may be called from any thread.
    """

    def __init__(self, limits: Serving, count: Callable[[int], object] = lambda rows: None) -> None:
        self._limits, self._count = limits, count
        self.prefixes = PrefixStore(limits.prefix_cache * MIB)
        self._queue = FairQueue[ActiveSequence]()
        self.batches: list[Batch] = []
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
        client = sequences[0].client
        with self._changed:
            most = 0 if self._stopping else self._limits.max_queue
            self._queue.check_room(client, len(sequences), most)
            for each in sequences:
                self._queue.add(client, each)
            self._changed.notify()

    def cancel(self, sequences: Sequence[ActiveSequence]) -> None:
        with self._changed:
            for each in sequences:
                each.is_cancelled = True
                self._queue.remove(each.client, each)
            self._changed.notify()

    @property
    def running(self) -> list[ActiveSequence]:
        # A copy of the list, which the engine's thread may change meanwhile.
        return [each for batch in list(self.batches) for each in batch.running]

    @property
    def waiting(self) -> int:
        with self._changed:
            return len(self._queue)

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait():
                    self.admit()
                    for batch in self.batches:
                        self._guarded(batch, batch.step)
                    self.batches = [batch for batch in self.batches if batch.sequences]
        finally:
            with self._changed:
                self._stopping = True
                left = [*self.running, *self._queue]
                self.batches.clear()
                self._queue = FairQueue()
            _fail(left, STOPPED)

    def _wait(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self.batches or self._stopping)
            return not self._stopping

    def admit(self) -> None:
        read = 0
        while read < MOST_READ and (group := self._next_group(MOST_READ - read)):
            read += _padded_tokens(group)
            batch = self._batch_for(group[0].runner)
            if batch not in self.batches:
                self.batches.append(batch)
            self._guarded(batch, partial(batch.join, group), group)

    def _next_group(self, most_read: int) -> list[ActiveSequence]:
        group: list[ActiveSequence] = []
        with self._changed:
            while (head := self._next(group, most_read)) is not None:
                self._queue.take(head.client)
                group.append(head)
        return group

    def _next(self, group: Sequence[ActiveSequence], most_read: int) -> ActiveSequence | None:
        # While a sequence doesn't fit, clients with running ones get no more, and if its client has
        # none, nobody does: it would be passed over for ever.
        is_short = False
        for client, head in self._queue.heads():
            together = [*group, head]
            fits = _padded_tokens(together) <= most_read
            if group and not (head.runner is group[0].runner and fits):
                continue
            running = [each for each in (*self.running, *group) if each.client == client]
            if running and is_short:
                continue
            batch = self._batch_for(head.runner)
            others = sum(each.tokens_with() for each in self.batches if each is not batch)
            free = self._limits.max_batch_tokens - others - batch.tokens_with(together)
            taken = sum(each.most_tokens for each in running)
            if free < 0:
                if not running:
                    return None
                is_short = True
            elif not taken or taken + head.most_tokens <= SHARE * free:
                return head
        return None

    def _batch_for(self, runner: ModelRunner) -> Batch:
        batches = (batch for batch in self.batches if batch.runner is runner)
        return next(batches, None) or Batch(runner, self.prefixes)

    def _guarded(
        self, batch: Batch, work: Callable[[], None], joining: Sequence[ActiveSequence] = ()
    ) -> None:
        concerned = [*batch.running, *joining]
        if concerned:
            self._count(len(concerned))
        try:
            work()
        except Exception as error:
            failed = joining or concerned  # what runs is as it was before some joined
            log.exception("A batch of %d answers failed.", len(failed))
            batch.sequences = batch.sequences if joining else []
            _fail(failed, for_clients(error) if isinstance(error, PhatgooseError) else FAILED)


def _padded_tokens(sequences: Sequence[ActiveSequence]) -> int:
    return len(sequences) * max(len(each.prompt) for each in sequences)


def _fail(sequences: Iterable[ActiveSequence], message: str) -> None:
    for each in sequences:
        if not each.is_over:
            each.is_cancelled = True
            each.deliver(ApiError(500, message))
