"""From progress to JSON: whole answers and chunks of a stream, for completions and for chats."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ....analysis.traces import Trace, TraceStream, join_streams
from ....routing.composition import composition_of
from ..engine.model_runner import ModelRunner
from ..engine.sequences import Progress, ScoredToken
from .request_prompts import RequestPrompt
from .request_schema import ChatRequest, CompletionRequest, RoutingDetail
from .response_schema import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatReply,
    ChatToken,
    CompletionChoice,
    CompletionReply,
    Delta,
    Routed,
    TextLogprobs,
    TokenRouting,
    TopToken,
    Usage,
)

__all__ = ["ChatResponseBuilder", "CompletionResponseBuilder", "ResponseBuilder"]

PART_NAMES = ("prompt", "answer")


@dataclass
class ChoiceState:
    """What was told of one answer so far."""

    prompt: RequestPrompt
    is_begun: bool = False
    offset: int = 0  # characters of all tokens told
    streams: tuple[str, ...] = ()  # of the routing told, in their order


class ResponseBuilder:
    """All answers to one request. Prompt i has those from i n to (i + 1) n - 1."""

    prefix = ""

    def __init__(
        self,
        request: CompletionRequest | ChatRequest,
        runner: ModelRunner,
        prompts: Sequence[RequestPrompt],
    ) -> None:
        self.request, self.runner, self.prompts = request, runner, list(prompts)
        self.identity: dict[str, Any] = {
            "id": self.prefix + secrets.token_hex(12),
            "created": int(time.time()),
            "model": request.model,
        }
        self._choices = [ChoiceState(prompt) for prompt in prompts for _ in range(request.n or 1)]
        self.generated = [0] * len(self._choices)

    @property
    def number(self) -> int:
        """How many answers there are."""
        return len(self._choices)

    def prompt_of(self, choice: int) -> RequestPrompt:
        """The prompt of an answer."""
        return self._choices[choice].prompt

    @property
    def usage(self) -> Usage:
        """Tokens until now."""
        given = sum(len(prompt.tokens) for prompt in self.prompts)
        made = sum(self.generated)
        return Usage(prompt_tokens=given, completion_tokens=made, total_tokens=given + made)

    def opening(self) -> list[CompletionReply | ChatChunk]:
        """The chunks that a stream begins with."""
        return []

    def chunk(self, progress: Progress) -> CompletionReply | ChatChunk:
        """What is new, as a chunk of a stream."""
        raise NotImplementedError

    def whole(self, told: Sequence[Sequence[Progress]]) -> CompletionReply | ChatReply:
        """Everything, when `told` holds all progress of each answer."""
        raise NotImplementedError

    def closing(self) -> CompletionReply | ChatChunk:
        """The chunk that counts tokens."""
        raise NotImplementedError

    def _joined(self, told: Sequence[Progress]) -> Progress:
        last = told[-1]
        return Progress(
            last.choice,
            "".join(each.text for each in told),
            tuple(token for each in told for token in each.tokens),
            tuple(stream for each in told for stream in each.routing),
            last.finish,
            last.generated,
        )

    def _routed(self, progress: Progress) -> Routed | None:
        """The routing in `progress`: a whole trace the first time, then what follows it."""
        if not progress.routing:
            return None
        wish = self.request.routing
        wish = wish if isinstance(wish, RoutingDetail) else RoutingDetail()
        parts = composition_of(self.runner.model)
        streams = join_streams(progress.routing)
        routed = Routed(
            router=parts.routing.router,
            k=parts.routing.k,
            experts=list(parts.experts),
            tokens=[
                token
                for stream in streams
                if stream.has(wish.layer, wish.kind)
                for token in _summaries(stream, parts.experts, wish)
            ],
        )
        if wish.trace:
            state = self._choices[progress.choice]
            if not state.streams:
                state.streams = tuple(stream.name for stream in streams)
                whole = Trace(parts.experts, parts.routing.router, tuple(streams))
                routed.trace = whole.to_dict()
            else:
                routed.more = [
                    {"stream": state.streams.index(stream.name), **stream.tokens_dict()}
                    for stream in streams
                ]
        return routed


def _summaries(
    stream: TraceStream, experts: Sequence[str], wish: RoutingDetail
) -> list[TokenRouting]:
    shares = stream.shares(len(experts), wish.layer, wish.kind)
    return [
        TokenRouting(
            token=token,
            part=PART_NAMES[part],
            stream=stream.name,
            experts={
                experts[z]: round(float(row[z]), 4)
                for z in (-row).argsort(kind="stable")
                if row[z] > 0
            },
        )
        for token, part, row in zip(stream.tokens, stream.parts, shares, strict=True)
    ]


class CompletionResponseBuilder(ResponseBuilder):
    """Answers of /v1/completions."""

    prefix = "cmpl-"
    request: CompletionRequest

    def chunk(self, progress: Progress) -> CompletionReply:
        """A chunk with what is new of one answer."""
        return CompletionReply(**self.identity, choices=[self._choice(progress)])

    def whole(self, told: Sequence[Sequence[Progress]]) -> CompletionReply:
        """All answers."""
        choices = [self._choice(self._joined(each)) for each in told]
        return CompletionReply(**self.identity, choices=choices, usage=self.usage)

    def closing(self) -> CompletionReply:
        """No answers, but usage."""
        return CompletionReply(**self.identity, choices=[], usage=self.usage)

    def _choice(self, progress: Progress) -> CompletionChoice:
        state = self._choices[progress.choice]
        self.generated[progress.choice] = progress.generated
        echoed = state.prompt.text if self.request.echo and not state.is_begun else ""
        state.is_begun = True
        asked = self.request.logprobs is not None
        return CompletionChoice(
            index=progress.choice,
            text=echoed + progress.text,
            logprobs=_text_logprobs(progress.tokens, state) if asked else None,
            finish_reason=progress.finish,
            routing=self._routed(progress),
        )


def _text_logprobs(tokens: Sequence[ScoredToken], state: ChoiceState) -> TextLogprobs:
    offsets = []
    for token in tokens:
        offsets.append(state.offset)
        state.offset += len(token.text)
    return TextLogprobs(
        tokens=[token.text for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[_by_text(token) for token in tokens],
        text_offset=offsets,
    )


def _by_text(token: ScoredToken) -> dict[str, float] | None:
    """The best tokens and the chosen one by text; of two with one text the likelier is told."""
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for text, logprob in (*token.top, (token.text, token.logprob)):
        found.setdefault(text, logprob)
    return found


class ChatResponseBuilder(ResponseBuilder):
    """Answers of /v1/chat/completions."""

    prefix = "chatcmpl-"
    request: ChatRequest

    def opening(self) -> list[CompletionReply | ChatChunk]:
        """Who speaks, for each answer."""
        return [
            ChatChunk(
                **self.identity,
                choices=[ChatChunkChoice(index=i, delta=Delta(role="assistant", content=""))],
            )
            for i in range(self.number)
        ]

    def chunk(self, progress: Progress) -> ChatChunk:
        """A chunk with what is new of one answer."""
        self.generated[progress.choice] = progress.generated
        choice = ChatChunkChoice(
            index=progress.choice,
            delta=Delta(content=progress.text) if progress.text else Delta(),
            logprobs=self._logprobs(progress),
            finish_reason=progress.finish,
            routing=self._routed(progress),
        )
        return ChatChunk(**self.identity, choices=[choice])

    def whole(self, told: Sequence[Sequence[Progress]]) -> ChatReply:
        """All answers."""
        choices = []
        for progress in map(self._joined, told):
            self.generated[progress.choice] = progress.generated
            choices.append(
                ChatChoice(
                    index=progress.choice,
                    message=AssistantMessage(content=progress.text),
                    logprobs=self._logprobs(progress),
                    finish_reason=progress.finish or "stop",
                    routing=self._routed(progress),
                )
            )
        return ChatReply(**self.identity, choices=choices, usage=self.usage)

    def closing(self) -> ChatChunk:
        """No answers, but usage."""
        return ChatChunk(**self.identity, choices=[], usage=self.usage)

    def _logprobs(self, progress: Progress) -> ChatLogprobs | None:
        if not self.request.logprobs:
            return None
        return ChatLogprobs(content=[_chat_token(token) for token in progress.tokens])


def _chat_token(token: ScoredToken) -> ChatToken:
    best = [TopToken(token=t, logprob=p, bytes=list(t.encode())) for t, p in token.top]
    own = token.logprob if token.logprob is not None else 0.0
    return ChatToken(
        token=token.text, logprob=own, bytes=list(token.text.encode()), top_logprobs=best
    )
