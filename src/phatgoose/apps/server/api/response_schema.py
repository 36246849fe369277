"""The answers' JSON, as models that the schema is made of."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

__all__ = [
    "AssistantMessage",
    "ChatChoice",
    "ChatChunk",
    "ChatChunkChoice",
    "ChatLogprobs",
    "ChatReply",
    "ChatToken",
    "CompletionChoice",
    "CompletionReply",
    "Delta",
    "ErrorReply",
    "Health",
    "ModelCard",
    "ModelList",
    "Problem",
    "Routed",
    "Sites",
    "TextLogprobs",
    "TokenRouting",
    "TopToken",
    "Usage",
]

Finish = Literal["stop", "length"]


class Reply(BaseModel):
    """Exactly the fields that are told."""

    model_config = ConfigDict(extra="forbid")


class Problem(Reply):
    """What was wrong; `param` is the field to blame."""

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


class Routed(Reply):
    """Who served an answer's tokens.

    `trace` is there if it was asked for (docs/analysis.md). In a stream it comes once, and `more`
    holds the tokens that follow, one entry for each of its streams that has new ones.
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
    routing: Routed | None = None


class CompletionReply(Reply):
    """The answers to a prompt or several, or a chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopToken(Reply):
    """A token that might have been, with its bytes in UTF-8."""

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
    routing: Routed | None = None


class ChatReply(Reply):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
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
    routing: Routed | None = None


class ChatChunk(Reply):
    """A chunk of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Sites(Reply):
    """Layers and kinds of site that routing can be asked of."""

    layers: list[str]
    kinds: list[str]


class ModelCard(Reply):
    """A model that is served. What is None of a base alone is told of routed models."""

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
    """All models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(Reply):
    """How the server is."""

    status: Literal["ok", "failing"]
    waiting: int
    running: int
