"""The backend that computes answers here: the engine, its batches, and what they keep."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from ....analysis.distribution import PARTS
from ....analysis.measures import heaviest
from ....analysis.traces import Trace, TraceStream, chosen_for_whole, join_streams
from ....config import Serving
from ....errors import PhatgooseError
from ....routing.choices import PromptRouting
from ....routing.composition import composition_of
from ..guards import Metrics
from ..protocol import (
    AnyRequest,
    ApiError,
    RoutingReport,
    TokenRouting,
    bad_request,
    for_clients,
)
from ..replies import Builder, Progress, Reply
from ..requests import Asked
from ..service import Backend, Readers, State, in_thread
from .engine import GenerationEngine
from .json_form import JsonForm, form_of
from .runner import LoadedModel, ModelRunner
from .sequences import ActiveSequence

LOOKUPS = 2  # requests for which experts are looked up at once


class LocalBackend(Backend):
    """The engine, which answers with `models`."""

    def __init__(self, models: dict[str, LoadedModel], limits: Serving, metrics: Metrics) -> None:
        self.models = models
        words = "Answers in a batch when it read prompts or made a step."
        batch = metrics.histogram("batch_rows", words, (1, 2, 4, 8, 16, 32, 64, 128, 256))
        self.engine = engine = GenerationEngine(limits, batch.observe)
        # Rounded: the exact number would tell how much of a prompt was known.
        words = "Prompt tokens not read again, since a prompt before began so; whole thousands."
        reused = metrics.gauge("prefix_tokens_reused", words)
        reused.set_function(lambda: engine.prefixes.tokens_reused // 1000 * 1000)
        kept = metrics.gauge("prefix_bytes", "Bytes of prompts' beginnings that are kept.")
        kept.set_function(lambda: engine.prefixes.bytes)
        self._lookups = Readers(LOOKUPS)

    def start(self) -> None:
        self.engine.start()

    async def close(self) -> None:
        self.engine.stop()

    @property
    def state(self) -> State:
        return State(self.engine.is_alive, self.engine.waiting, self.engine.running)

    @property
    def readers(self) -> list[Readers]:
        return [self._lookups]

    async def reopened(self, name: str) -> LoadedModel:
        return await in_thread(self.models[name].reopened)

    def check(self, request: AnyRequest, model: LoadedModel) -> None:
        if request.routing and model.parts is None:
            message = f"{request.model!r} is a base model alone; it has no routing."
            raise bad_request(message, "routing")

    def prepare(self, request: AnyRequest, runner: ModelRunner) -> JsonForm | None:
        form = request.response_format
        if form is None or (schema := form.schema_asked) is None:
            return None
        return form_of(schema, runner.tokenizer, runner.vocabulary, runner.ends)

    async def begin(
        self, asked: Asked, runner: ModelRunner, form: JsonForm | None
    ) -> tuple[Reply, dict[str, str]]:
        if asked.mixture is None and runner.frame.looks_prompts_up:
            routed = await self._lookups.run(
                asked.client, asked.deadline, lambda _: self._routed(asked, runner)
            )
        else:
            routed = self._routed(asked, runner)
        report = Reporter(runner, asked, routed)
        reply = Reply(Builder(asked, report), asked.deadline)
        loop, events = asyncio.get_running_loop(), reply.events

        def deliver(event: Progress | ApiError) -> None:
            # Called in the engine's thread.
            loop.call_soon_threadsafe(events.put_nowait, event)

        sequences = [
            ActiveSequence(runner, answer, deliver, asked.client, routed[answer.row])
            for answer in asked.answers
        ]
        for each in sequences:
            each.form = form and form.copy()
        self.engine.submit(sequences)
        reply.on_close.append(
            lambda: self.engine.cancel([each for each in sequences if each.finish is None])
        )
        return reply, {}

    def _routed(self, asked: Asked, runner: ModelRunner) -> Sequence[PromptRouting | None]:
        """What the model's context finds for each prompt. Raises ApiError."""
        try:
            return runner.routings_of(
                [prompt.tokens for prompt in asked.prompts],
                self.engine.prefixes,
                [prompt.asked for prompt in asked.prompts],
                asked.client,
                asked.mixture,
            )
        except PhatgooseError as error:
            raise ApiError(500, for_clients(error)) from error


class Reporter:
    """Reports the routing of the tokens that answers come to, as a request wants it."""

    def __init__(
        self, runner: ModelRunner, asked: Asked, routed: Sequence[PromptRouting | None]
    ) -> None:
        self._runner, self._asked, self._routed = runner, asked, routed
        self._streams: dict[int, tuple[str, ...]] = {}  # of each answer's trace, once it was sent
        self._sums: dict[int, Counter[str]] = {}  # each expert's share of the tokens so far
        self._tokens: Counter[int] = Counter()

    def __call__(self, progress: Progress) -> RoutingReport | None:
        if not progress.routing:
            return None
        choice = progress.choice
        parts = composition_of(self._runner.model)
        streams = join_streams(progress.routing)
        tokens = [token for stream in streams for token in _token_routings(stream, parts.experts)]
        sums = self._sums.setdefault(choice, Counter())
        for token in tokens:
            sums.update(token.experts)
            self._tokens[choice] += bool(token.experts)
        count = self._tokens[choice]
        report = RoutingReport(
            router=parts.router.recorded.router,
            k=parts.router.k or None,
            experts=list(parts.experts),
            tokens=tokens,
            summary={name: round(total / count, 4) for name, total in sums.most_common()},
        )
        if self._asked.request.wants_trace and choice in self._streams:
            sent = self._streams[choice]
            report.more = [
                {"stream": sent.index(stream.name), **stream.tokens_dict()} for stream in streams
            ]
        elif self._asked.request.wants_trace:
            self._streams[choice] = tuple(stream.name for stream in streams)
            routed = self._routed[self._asked.answers[choice].row]
            whole = chosen_for_whole(parts, routed.choice if routed else None)
            trace = Trace(parts.experts, parts.router.recorded.router, tuple(streams), whole)
            report.trace = trace.to_dict()
        return report


def _token_routings(stream: TraceStream, experts: Sequence[str]) -> list[TokenRouting]:
    shares = stream.shares(len(experts))
    return [
        TokenRouting(
            token=token,
            part=PARTS[part],
            stream=stream.name,
            experts={experts[z]: round(float(row[z]), 4) for z in heaviest(row, len(row))},
        )
        for token, part, row in zip(stream.tokens, stream.parts, shares, strict=True)
    ]
