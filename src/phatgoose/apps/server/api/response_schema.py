"""Response bodies."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ..engine.sequences import Finish

__all__ = ["AnswerReply", "AssistantMessage", "ChatChoice", "ChatChunk", "ChatChunkChoice"]
__all__ += ["ChatLogprobs", "ChatReply", "ChatToken", "CompletionChoice", "CompletionReply"]
__all__ += ["Delta", "ErrorReply", "Health", "ModelCard", "ModelList", "RoutingReport", "Sites"]
__all__ += ["TextLogprobs", "TokenRouting", "TopToken", "Usage"]


class Reply(BaseModel):
    """No unknown fields."""

    model_config = ConfigDict(extra="forbid")


class Problem(Reply):
    """What is wrong; `param` is the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Reply):
    """A request that was not answered."""

    error: Problem


class Usage(Reply):
    """Tokens of a request: prompts counted once each, answers with the token that ends them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TokenRouting(Reply):
    """A token and its experts, by name, with the mean of their weights over the sites asked for.

    `part` is prompt or answer. The last token of an answer has no experts: it never passed the
    model.
    """

    token: str
    part: str
    stream: str
    experts: dict[str, float]


class RoutingReport(Reply):
    """Which experts served an answer's tokens.

    `trace` is present if it was asked for (docs/analysis.md). In a stream it comes once; `more` has
    the tokens that follow, one entry for each of the trace's streams that has new ones.
    """

    router: str
    k: int
    experts: list[str]
    tokens: list[TokenRouting]
    trace: dict[str, Any] | None = None
    more: list[dict[str, Any]] | None = None


class TextLogprobs(Reply):
    """Log-probabilities of a completion, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Reply):
    """One answer, or what is new of it in a stream."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: Finish | None = None
    routing: RoutingReport | None = None


class AnswerReply(Reply):
    """The fields of every reply with answers."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Any]
    usage: Usage | None = None


class CompletionReply(AnswerReply):
    """The answers to a prompt or several, or a chunk of a stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class TopToken(Reply):
    """An alternative token, with its bytes in UTF-8, null where it is part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(TopToken):
    """A token that was chosen."""

    top_logprobs: list[TopToken]


class ChatLogprobs(Reply):
    """Log-probabilities of an answer, one entry a token."""

    content: list[ChatToken]
    refusal: None = None


class AssistantMessage(Reply):
    """A message of the model."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Reply):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish
    routing: RoutingReport | None = None


class ChatReply(AnswerReply):
    """The answers to a conversation."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class Delta(Reply):
    """What is new of a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Reply):
    """What is new of an answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None = None
    routing: RoutingReport | None = None


class ChatChunk(AnswerReply):
    """A chunk of a stream."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]


class Sites(Reply):
    """Layers and kinds of site whose routing can be asked for."""

    layers: list[str]
    kinds: list[str]


class ModelCard(Reply):
    """A served model; router, k and sites are None for a base alone."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "phatgoose"
    base: str
    router: str | None = None
    k: int | None = None
    experts: list[str] = []
    sites: Sites | None = None
    context: int | None = None
    chat: bool = False


class ModelList(Reply):
    """All served models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(Reply):
    """Whether the server works, how many answers wait and run, and how prompts are read.

    `reading` prompts are being turned into tokens or wait for it, the longest for `longest_reading`
    seconds. `readers_stuck` won't come back; `readers_ended` exceeded their limits and were
    replaced.
    """

    status: Literal["ok", "failing"]
    waiting: int
    running: int
    reading: int
    longest_reading: float
    readers_stuck: int
    readers_ended: int
