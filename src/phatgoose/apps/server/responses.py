"""Progress to JSON: whole responses and chunks of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...analysis.measures import heaviest
from ...analysis.routing_distribution import PARTS
from ...analysis.traces import Trace, TraceStream, chosen_for_whole, join_streams
from ...base.loading import UNFINISHED
from ...routing.composition import composition_of
from .requests import PreparedRequest
from .schema import (
    AnswerReply,
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatReply,
    ChatRequest,
    ChatToken,
    CompletionChoice,
    CompletionReply,
    CompletionRequest,
    Delta,
    RoutingDetail,
    RoutingReport,
    TextLogprobs,
    TokenRouting,
    TopToken,
    Usage,
)
from .sequences import Progress, ScoredToken


@dataclass
class ChoiceState:
    """What of one answer was sent so far."""

    is_begun: bool = False
    streams: tuple[str, ...] = ()  # of the trace sent, in their order


class ResponseBuilder:
    """Builds the response to one request, whole or as chunks.

    Its subclasses say what differs between the two endpoints: the models of replies and choices.
    """

    prefix: str
    whole_model: type[AnswerReply]
    chunk_model: type[AnswerReply]

    def __init__(self, prepared: PreparedRequest) -> None:
        self.prepared, self.request = prepared, prepared.request
        self.identity: dict[str, Any] = {
            "id": self.prefix + secrets.token_hex(12),
            "created": int(time.time()),
            "model": self.request.model,
        }
        self._states = [ChoiceState() for _ in prepared.answers]
        self._generated = [0] * len(prepared.answers)

    @property
    def usage(self) -> Usage:
        """Tokens until now."""
        given = sum(len(prompt.tokens) for prompt in self.prepared.prompts)
        made = sum(self._generated)
        return Usage(prompt_tokens=given, completion_tokens=made, total_tokens=given + made)

    def opening(self) -> list[AnswerReply]:
        """The chunks that a stream begins with."""
        return []

    def chunk(self, progress: Progress) -> AnswerReply:
        """The chunk of a stream that says what is new of one answer."""
        self._generated[progress.choice] = progress.generated
        return self.chunk_model(**self.identity, choices=[self._chunk_choice(progress)])

    def closing(self) -> AnswerReply:
        """The chunk that counts tokens."""
        return self.chunk_model(**self.identity, choices=[], usage=self.usage)

    def whole(self, events: Sequence[Sequence[Progress]]) -> AnswerReply:
        """The whole response, given all progress of each answer."""
        joined = [_joined(each) for each in events]
        self._generated = [each.generated for each in joined]
        choices = [self._choice(each) for each in joined]
        return self.whole_model(**self.identity, choices=choices, usage=self.usage)

    def _choice(self, progress: Progress) -> Any:
        raise NotImplementedError

    def _chunk_choice(self, progress: Progress) -> Any:
        raise NotImplementedError

    def _routing(self, progress: Progress) -> RoutingReport | None:
        """The routing in `progress`: a whole trace the first time, then what follows it."""
        if not progress.routing:
            return None
        detail = self.request.routing_detail
        parts = composition_of(self.prepared.runner.model)
        streams = join_streams(progress.routing)
        report = RoutingReport(
            router=parts.routing.router,
            k=parts.router.k or None,
            experts=list(parts.experts),
            tokens=[
                token
                for stream in streams
                if stream.has(detail.layer, detail.kind)
                for token in _token_routings(stream, parts.experts, detail)
            ],
        )
        state = self._states[progress.choice]
        if detail.trace and state.streams:
            report.more = [
                {"stream": state.streams.index(stream.name), **stream.tokens_dict()}
                for stream in streams
            ]
        elif detail.trace:
            state.streams = tuple(stream.name for stream in streams)
            whole = chosen_for_whole(parts, self.prepared.answers[progress.choice].experts)
            trace = Trace(parts.experts, parts.routing.router, tuple(streams), whole)
            report.trace = trace.to_dict()
        return report


def builder_of(prepared: PreparedRequest) -> ResponseBuilder:
    """The builder for the endpoint of a request."""
    is_chat = isinstance(prepared.request, ChatRequest)
    return (ChatBuilder if is_chat else CompletionBuilder)(prepared)


def _joined(events: Sequence[Progress]) -> Progress:
    last = events[-1]
    return Progress(
        last.choice,
        "".join(each.text for each in events),
        tuple(token for each in events for token in each.tokens),
        tuple(stream for each in events for stream in each.routing),
        last.finish,
        last.generated,
    )


def _token_routings(
    stream: TraceStream, experts: Sequence[str], detail: RoutingDetail
) -> list[TokenRouting]:
    shares = stream.shares(len(experts), detail.layer, detail.kind)
    return [
        TokenRouting(
            token=token,
            part=PARTS[part],
            stream=stream.name,
            experts={experts[z]: round(float(row[z]), 4) for z in heaviest(row, len(row))},
        )
        for token, part, row in zip(stream.tokens, stream.parts, shares, strict=True)
    ]


class CompletionBuilder(ResponseBuilder):
    """Responses of /v1/completions."""

    prefix = "cmpl-"
    whole_model = chunk_model = CompletionReply
    request: CompletionRequest

    def _choice(self, progress: Progress) -> CompletionChoice:
        state = self._states[progress.choice]
        is_echo = self.request.echo and not state.is_begun
        prompt = self.prepared.answers[progress.choice].prompt.text if is_echo else ""
        state.is_begun = True
        asked = self.request.logprobs is not None
        return CompletionChoice(
            index=progress.choice,
            text=prompt + progress.text,
            logprobs=_text_logprobs(progress.tokens) if asked else None,
            finish_reason=progress.finish,
            routing=self._routing(progress),
        )

    _chunk_choice = _choice


def _text_logprobs(tokens: Sequence[ScoredToken]) -> TextLogprobs:
    return TextLogprobs(
        tokens=[token.text for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[_by_text(token) for token in tokens],
        text_offset=[token.place for token in tokens],
    )


def _by_text(token: ScoredToken) -> dict[str, float] | None:
    """Log-probabilities of the best tokens and the chosen one; the likelier of two of one text."""
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for text, logprob in (*token.top, (token.text, token.logprob)):
        found.setdefault(text, logprob)
    return found


class ChatBuilder(ResponseBuilder):
    """Responses of /v1/chat/completions."""

    prefix = "chatcmpl-"
    whole_model, chunk_model = ChatReply, ChatChunk
    request: ChatRequest

    def opening(self) -> list[AnswerReply]:
        """A chunk for each answer that says who speaks."""
        role = Delta(role="assistant", content="")
        return [
            ChatChunk(**self.identity, choices=[ChatChunkChoice(index=index, delta=role)])
            for index in range(len(self._states))
        ]

    def _choice(self, progress: Progress) -> ChatChoice:
        return ChatChoice(
            index=progress.choice,
            message=AssistantMessage(content=progress.text),
            logprobs=self._logprobs(progress),
            finish_reason=progress.finish or "stop",
            routing=self._routing(progress),
        )

    def _chunk_choice(self, progress: Progress) -> ChatChunkChoice:
        return ChatChunkChoice(
            index=progress.choice,
            delta=Delta(content=progress.text) if progress.text else Delta(),
            logprobs=self._logprobs(progress),
            finish_reason=progress.finish,
            routing=self._routing(progress),
        )

    def _logprobs(self, progress: Progress) -> ChatLogprobs | None:
        if not self.request.logprobs:
            return None
        return ChatLogprobs(content=[_chat_token(token) for token in progress.tokens])


def _chat_token(token: ScoredToken) -> ChatToken:
    best = [TopToken(token=t, logprob=p, bytes=_bytes_of(t)) for t, p in token.top]
    own = token.logprob if token.logprob is not None else 0.0
    return ChatToken(token=token.text, logprob=own, bytes=_bytes_of(token.text), top_logprobs=best)


def _bytes_of(text: str) -> list[int] | None:
    """The bytes of a token's text, None where it is part of a character, shown at its last one."""
    return None if UNFINISHED in text else list(text.encode())
