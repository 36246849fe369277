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

import torch

from ....analysis.distribution import PARTS
from ....analysis.measures import heaviest
from ....analysis.traces import Trace, chosen_for_whole, join_streams
from ....config import Serving
from ....errors import PhatgooseError
from ....routing.choice import BASE_ALONE, Chosen, PromptRouting
from ....routing.compose import composition_of
from ..backend import Backend, Served, State
from ..guards import Metrics
from ..protocol import (
    AnyRequest,
    ApiError,
    ChatRequest,
    Fields,
    bad_request,
    check_known,
    for_clients,
)
from ..replies import Progress, Reply, routing_report
from ..requests import PreparedRequest
from ..turns import FairQueue, Turns
from .batches import ActiveSequence, Batch
from .json_form import Calls, Forms, JsonForm
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
        self.engine = GenerationEngine(limits, batch.observe)
        prefixes = self.engine.prefixes
        kept = metrics.gauge("prefix_bytes", "Bytes of prompts' beginnings that are kept.")
        kept.set_function(lambda: prefixes.bytes)
        self.choosing = Turns(LOOKUPS, limits.max_queue)
        self.forms = Forms(limits.max_queue)

    def start(self) -> None:
        self.engine.start()
        for model in self.models.values():
            template = model.runner.tokenizer.chat_template
            if template and "tools" not in str(template):
                log.warning("A base's chat template has no tools: only forced calls of tools work.")
                return

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
        if isinstance(request, ChatRequest):
            calls_none = request.tool_choice in ("auto", "none")
            if not request.functions and not calls_none:
                message = (
                    "tool_choice is none, auto, required, or one function of the tools by name."
                )
                raise bad_request(message, "tool_choice")
        if request.routing and not model.experts:
            message = f"{request.model!r} is a base model alone; it has no routing."
            raise bad_request(message, "routing")

    async def begin(
        self, prepared: PreparedRequest, runner: ModelRunner
    ) -> tuple[Reply, list[Chosen] | None]:
        client = prepared.client
        request = prepared.request
        calls: Calls | None = None
        if isinstance(request, ChatRequest) and request.functions:
            calls = Calls.of(request, runner)

        if prepared.mixture is None and runner.frame.looks_prompts_up:
            route = partial(runner.routed, prepared)
            routed, chosen = await self.choosing.run(client, prepared.deadline, lambda _: route())
        else:
            routed, chosen = runner.routed(prepared)
        form: JsonForm | None = None
        if calls or request.schema_of_answers is not None:
            form = await self.forms.of(prepared, calls, runner)
        reporter = Reporter(runner, prepared, routed, chosen)
        reply = Reply(prepared.builder(prepared, reporter), prepared.deadline)
        in_loop: Callable[..., object] = asyncio.get_running_loop().call_soon_threadsafe
        # Called in the engine's thread.
        deliver = partial(in_loop, reply.events.put_nowait)
        sequences = []
        for answer in prepared.answers:
            sequence = ActiveSequence(runner, answer, deliver, client, routed[answer.row])
            sequence.form = form and form.copy()
            sequence.calls = calls
            sequences.append(sequence)
        self.engine.submit(sequences)
        reply.at_end.append(partial(self.engine.cancel, sequences))
        return reply, chosen


class Reporter:
    """Reports the routing of the tokens that answers come to, as a request wants it."""

    def __init__(
        self,
        runner: ModelRunner,
        prepared: PreparedRequest,
        routed: Sequence[PromptRouting | None],
        chosen: Sequence[Chosen] | None,
    ) -> None:
        self._runner = runner
        self._prepared = prepared
        self._choices = [None if routing is None else routing.choice for routing in routed]
        self._chosen = chosen
        # Each expert's share of the tokens so far, and how many tokens have any, by answer.
        self._sums = defaultdict[int, Counter[str]](Counter)
        self._tokens: Counter[int] = Counter()

    def __call__(self, progress: Progress) -> Fields | None:
        if not progress.routing:
            return None
        number = progress.number
        parts = composition_of(self._runner.model)
        allowed = self._prepared.experts
        names = [name if name in allowed else f"#{z}" for z, name in enumerate(parts.experts)]
        streams = join_streams(progress.routing)
        sums = self._sums[number]
        tokens = []
        for stream in streams:
            shares = stream.shares(len(names))
            for text, part, row in zip(stream.tokens, stream.parts, shares, strict=True):
                best = {names[z]: round(float(row[z]), 4) for z in heaviest(row, len(row))}
                tokens.append(
                    {"token": text, "part": PARTS[part], "stream": stream.name, "experts": best}
                )
                sums.update(best)
                self._tokens[number] += bool(best)
        count = self._tokens[number]
        summary = {name: round(total / count, 4) for name, total in sums.most_common()}
        row = self._prepared.answers[number].row
        if self._chosen and not self._chosen[row].weights:
            summary = summary or BASE_ALONE
        router = parts.router.text
        shown = [name for name in names if name in allowed]
        report = routing_report(router, parts.router.k or None, shown, tokens, summary)
        if self._prepared.request.routing == "trace":
            whole = chosen_for_whole(parts, self._choices[row])
            report["trace"] = Trace(tuple(names), router, tuple(streams), whole).to_dict()
        return report


class GenerationEngine:
    """Computes sequences in batches, each of one model and routing.

    Sequences wait in one queue for all models, and clients take turns. One is admitted while the
    tokens that all batches will hold stay within the limit (`_next`). `observe_rows` is called with
    the rows of each pass. Methods but `admit` may be called from any thread.
    """

    def __init__(
        self, limits: Serving, observe_rows: Callable[[int], object] = lambda rows: None
    ) -> None:
        self._limits = limits
        self._observe_rows = observe_rows
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
            for sequence in sequences:
                self._queue.add(client, sequence)
            self._changed.notify()

    def cancel(self, sequences: Sequence[ActiveSequence]) -> None:
        with self._changed:
            for sequence in sequences:
                sequence.is_cancelled = True
                self._queue.remove(sequence.client, sequence)
            self._changed.notify()

    @property
    def running(self) -> list[ActiveSequence]:
        # A copy of the list, which the engine's thread may change meanwhile.
        return [sequence for batch in list(self.batches) for sequence in batch.running]

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
                unfinished = [*self.running, *self._queue]
                self.batches.clear()
                self._queue = FairQueue()
            _fail(unfinished, STOPPED)

    def _wait(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self.batches or self._stopping)
            return not self._stopping

    def admit(self) -> None:
        """Let sequences join, in groups whose prompts are read together; in the engine's thread."""
        unread = MOST_READ
        while unread > 0:
            group = self._next_group(unread)
            if not group:
                return
            unread -= _padded_tokens(group)
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
        """The sequence that joins a `group` next, of the clients' first ones in turn; None if none.

        While one doesn't fit, clients with running ones get no more, and if its client has none,
        no one does: it would be passed over for ever.
        """
        is_short = False
        for client, head in self._queue.heads():
            together = [*group, head]
            is_of_group = head.runner is together[0].runner
            if group and not (is_of_group and _padded_tokens(together) <= most_read):
                continue  # it may begin the next group
            running = [*self.running, *group]
            clients_tokens = sum(row.most_tokens for row in running if row.client == client)
            if clients_tokens and is_short:
                continue
            free = self._free_with(together)
            if free < 0:
                if not clients_tokens:
                    return None
                is_short = True
            elif not clients_tokens or clients_tokens + head.most_tokens <= SHARE * free:
                return head
        return None

    def _free_with(self, newcomers: Sequence[ActiveSequence]) -> int:
        """Tokens left free in memory if these join their batch; negative if they don't fit."""
        batch = self._batch_for(newcomers[0].runner)
        free = self._limits.max_batch_tokens - batch.tokens_with(newcomers)
        return free - sum(other.tokens_with() for other in self.batches if other is not batch)

    def _batch_for(self, runner: ModelRunner) -> Batch:
        for batch in self.batches:
            if batch.runner is runner:
                return batch
        return Batch(runner, self.prefixes)

    def _guarded(
        self, batch: Batch, work: Callable[[], None], joining: Sequence[ActiveSequence] = ()
    ) -> None:
        concerned = [*batch.running, *joining]
        if concerned:
            self._observe_rows(len(concerned))
        try:
            work()
        except Exception as error:
            failed = joining or concerned  # what runs is as it was before some joined
            log.exception("A batch of %d answers failed.", len(failed))
            if not joining:
                batch.sequences = []
            _fail(failed, for_clients(error) if isinstance(error, PhatgooseError) else FAILED)


def _padded_tokens(sequences: Sequence[ActiveSequence]) -> int:
    return len(sequences) * max(len(sequence.prompt) for sequence in sequences)


def _fail(sequences: Iterable[ActiveSequence], message: str) -> None:
    for sequence in sequences:
        if not sequence.is_over:
            sequence.is_cancelled = True
            sequence.deliver(ApiError(500, message))
