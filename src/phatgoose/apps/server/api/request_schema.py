"""The requests that are understood: OpenAI's fields, and ours for routing.

Whatever is not here is refused by name rather than ignored. Fields of OpenAI's that can't be served
are accepted with the value that asks for nothing. Lists are looked through to their first fault
alone: to tell all of a long one would take longer than any answer.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["ChatRequest", "CompletionRequest", "Message", "RoutingDetail", "StreamOptions"]

MOST_LOGPROBS = 20
MOST_PROMPTS = MOST_MESSAGES = 5_000  # of one request
SEED = 1 << 63
MOST_TOKENS = 1 << 20  # in a prompt; how many a model can hold is seen later
Name = Annotated[str, Field(min_length=1, max_length=512)]
Names = Annotated[list[Name], Field(max_length=5_000, fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Tokens = Annotated[list[Token], Field(min_length=1, max_length=MOST_TOKENS, fail_fast=True)]
# All but oracle, which goes by the name of a task: a request has none.
Router = Literal[
    "phatgoose",
    "phatgoose-input",
    "average-activation",
    "arrow",
    "uniform-top-k",
    "retrieval",
    "merged",
    "single",
    "best-individual",
    "random",
]
Nothing = Annotated[list[Any], Field(max_length=0, fail_fast=True)]


class Strict(BaseModel):
    """No unknown fields, no text where a number is wanted, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """What a stream has beside the answer."""

    include_usage: bool = Field(False, description="End with a chunk that counts tokens.")


class RoutingDetail(Strict):
    """Which part of the routing is told."""

    layer: str | None = Field(default=None, description="Of the sites of this layer; null: of all.")
    kind: str | None = Field(
        default=None,
        description="Of the sites of this kind, by its last words (q_proj); null: of all.",
    )
    trace: bool = Field(
        default=False, description="Tell every site, in the form of docs/analysis.md."
    )


class Sampled(Strict):
    """What both kinds of request have in common."""

    model: Name = Field(description="A name from /v1/models.")
    max_tokens: int | None = Field(None, ge=0, description="Tokens to generate at most.")
    temperature: float | None = Field(1, ge=0, le=2, description="0 is greedy.")
    top_p: float | None = Field(1, ge=0, le=1, description="Sample from this share of the best.")
    n: int | None = Field(1, ge=1, le=128, description="Answers to each prompt.")
    seed: int | None = Field(None, ge=-SEED, lt=SEED, description="The same seed, the same answer.")
    stop: Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)] | None = Field(
        None, description="Texts at which the answer ends, without them."
    )
    stream: bool | None = Field(False, description="Answer in server-sent events.")
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Ignored.")
    frequency_penalty: float | None = Field(0, ge=0, le=0, description="Not supported.")
    presence_penalty: float | None = Field(0, ge=0, le=0, description="Not supported.")
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = Field(
        None, description="Not supported."
    )
    ignore_eos: bool | None = Field(
        False, description="Go on after the token that ends an answer: for measuring."
    )
    router: Router | None = Field(None, description="Another router than it is served with.")
    k: int | None = Field(None, ge=1, le=1 << 16, description="Experts per token at each site.")
    keep: Names | None = Field(None, description="Names of experts to use alone.")
    leave_out: Names | None = Field(None, description="Names of experts to do without.")
    routing: bool | RoutingDetail | None = Field(
        False, description="Tell each token's experts and their weights."
    )


class CompletionRequest(Sampled):
    """A request to /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
    ) = Field(description="A text, its tokens, or a list of either.")
    logprobs: int | None = Field(
        None, ge=0, le=MOST_LOGPROBS, description="So many alternatives to each token."
    )
    echo: bool | None = Field(False, description="Begin with the prompt.")
    best_of: int | None = Field(None, ge=1, le=1, description="Not supported.")
    suffix: Annotated[str, Field(max_length=0)] | None = Field(None, description="Not supported.")


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: (
        str
        | Annotated[list[TextPart], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    )
    name: str | None = Field(None, description="Ignored.")

    @property
    def text(self) -> str:
        """All that the message says."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ResponseFormat(Strict):
    """The form of an answer."""

    type: Literal["text"]


class ChatRequest(Sampled):
    """A request to /v1/chat/completions."""

    messages: Annotated[
        list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    ]
    max_completion_tokens: int | None = Field(None, ge=1, description="Stands for max_tokens.")
    logprobs: bool | None = Field(False, description="Tell the log-probability of each token.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MOST_LOGPROBS, description="So many alternatives to each token."
    )
    response_format: ResponseFormat | None = Field(None, description="Text alone is supported.")
    tools: Nothing | None = Field(None, description="Not supported.")
    tool_choice: Literal["none", "auto"] | None = Field(None, description="There are no tools.")
