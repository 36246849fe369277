"""OpenAI's protocol: errors, and the bodies of requests and responses, with our fields for routing.

Unknown fields are refused by name. Fields of OpenAI's that aren't supported are accepted with the
value that asks for nothing. Docstrings of bodies are part of /openapi.json.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import HTTPException
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ...config import closest
from ...errors import ConfigError
from ...files import one_line
from ...routing.routers.registry import (
    AUTO,
    MOST_WEIGHT,
    WEIGHTS,
    all_routers,
    canonical,
)

MOST_SHOWN = 500  # characters of an error

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
PART = r"[^/\\'\":;,]*[^/\\'\":;,\s]"  # of a path; names may have spaces
PATH = re.compile(rf"(?<![\w.:/-])(?:~|[A-Za-z]:)?(?:[/\\]{PART})+")  # an absolute one
CLIENT_GONE = 499  # nginx's status of a request whose client has disconnected


class ApiError(HTTPException):
    """Why a request is not answered; `param` is the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.body = error_body(status, message, code, param)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def busy(message: str, seconds: int = 1) -> ApiError:
    """The error 429; the client may try again after `seconds`."""
    return ApiError(429, message, code="overloaded", headers={"Retry-After": str(seconds)})


def error_body(
    status: int, message: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def for_clients(error: object) -> str:
    """An error of the library as clients see it: one line, shortened, without absolute paths."""
    return without_paths(one_line(error, MOST_SHOWN))


def without_paths(message: str) -> str:
    """`message` with the last part of each path alone: clients needn't know our folders."""
    return PATH.sub(lambda path: re.split(r"[/\\]", path[0])[-1], message)


@dataclass(frozen=True)
class Deadline:
    """A request may take `seconds`, until the event loop's clock shows `end`."""

    seconds: float
    end: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(seconds, asyncio.get_running_loop().time() + seconds)

    @property
    def left(self) -> float:
        return max(0.0, self.end - asyncio.get_running_loop().time())

    def missed(self) -> ApiError:
        message = f"The answer took longer than {self.seconds:g} seconds."
        return ApiError(504, message, code="timeout")


ANY_MODEL = "auto"  # the first model of a gateway

# Requests.

MOST_ANSWERS = 64  # to one request
MOST_MIXED = 64  # experts of a request's own mixture
SEED = 1 << 63
# Not those that need a task, or a file: which files the server reads is not a client's to say.
REQUESTABLE_ROUTERS = (
    AUTO,
    *(
        name
        for name, kind in all_routers().items()
        if name != WEIGHTS and not {"task", "examples"} & {*kind.given}
    ),
)
Name = Annotated[str, Field(min_length=1, max_length=512)]
Names = Annotated[list[Name], Field(max_length=5_000, fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Alternatives = Annotated[int, Field(ge=0, le=20)]


def _refusal(why: str) -> PydanticCustomError:
    return PydanticCustomError("routing", "{why}", {"why": why})


def _requestable(router: str) -> str:
    name = router.partition(":")[0]
    try:
        if name not in REQUESTABLE_ROUTERS:
            hint = closest(name, REQUESTABLE_ROUTERS)
            raise ConfigError(f"Input should be one of {', '.join(REQUESTABLE_ROUTERS)}.{hint}")
        return router if router == AUTO else canonical(router)
    except ConfigError as error:  # of a ValueError pydantic would say "Value error, ..."
        raise PydanticCustomError("router", "{why}", {"why": str(error)}) from error


Router = Annotated[str, Field(min_length=1, max_length=512), AfterValidator(_requestable)]
Weight = Annotated[float, Field(ge=-MOST_WEIGHT, le=MOST_WEIGHT)]
Mixture = Annotated[dict[Name, Weight], Field(min_length=1, max_length=MOST_MIXED)]


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


# One form inside, so that an error is of the form that a field has.
Stops = Annotated[
    list[Stop],
    Field(max_length=16, fail_fast=True),
    BeforeValidator(_one_or_many, json_schema_input_type=Stop | list[Stop]),
]
Prompts = Annotated[
    list[str],
    Field(min_length=1, max_length=MOST_ANSWERS, fail_fast=True),
    BeforeValidator(_one_or_many, json_schema_input_type=str | list[str]),
]
Nothing = Annotated[list[Any], Field(max_length=0, fail_fast=True)]
ANY_OBJECT: dict[str, Any] = {"type": "object"}
JSON_SCHEMAS = {"text": None, "json_object": ANY_OBJECT}
Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class RoutingOverride:
    """What a request changes of its model's routing; None leaves a setting as it is served."""

    router: str | None = None
    k: int | None = None
    keep: tuple[str, ...] | None = None
    leave_out: tuple[str, ...] | None = None


class Strict(BaseModel):
    """No unknown fields, no text where a number is wanted, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """What a stream has besides the answer."""

    include_usage: bool = Field(False, description="End with a chunk that counts tokens.")


class RoutingDetail(Strict):
    """How the routing is reported."""

    trace: bool = Field(False, description="Every site too, as in docs/analysis.md.")


def _detail(value: Any) -> Any:
    return ({} if value else None) if isinstance(value, bool) else value


Detail = Annotated[
    RoutingDetail | None,
    BeforeValidator(_detail, json_schema_input_type=bool | RoutingDetail | None),
]


class JsonSchema(Strict):
    """A JSON schema that the answer keeps to."""

    name: Name = Field("answer", description="Ignored.")
    description: str | None = Field(None, description="Ignored.")
    schema_: dict[str, Any] = Field(ANY_OBJECT, alias="schema")
    strict: bool | None = Field(None, description="Ignored: answers always keep to it.")


class ResponseFormat(Strict):
    """The form of an answer: text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise _refusal("json_schema, with the schema in it, is for the type json_schema.")
        return self

    @property
    def schema_asked(self) -> dict[str, Any] | None:
        """The schema that an answer keeps to; None for text."""
        return self.json_schema.schema_ if self.json_schema else JSON_SCHEMAS[self.type]


class GenerationRequest(Strict):
    """The fields of both kinds of request."""

    model: Name = Field(description="A name from /v1/models.")
    max_tokens: int | None = Field(None, ge=1, description="Tokens to generate at most.")
    temperature: float | None = Field(1, ge=0, le=2, description="0 is greedy.")
    top_p: float | None = Field(1, ge=0, le=1, description="Total probability to sample from.")
    n: int | None = Field(1, ge=1, le=MOST_ANSWERS, description="Answers to each prompt.")
    seed: int | None = Field(None, ge=-SEED, lt=SEED, description="The same seed, the same answer.")
    stop: Stops | None = Field(None, description="Texts that end the answer; not part of it.")
    stream: bool | None = Field(False, description="Answer in server-sent events.")
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Ignored.")
    frequency_penalty: float | None = Field(0, ge=0, le=0, description="Not supported.")
    presence_penalty: float | None = Field(0, ge=0, le=0, description="Not supported.")
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = Field(
        None, description="Not supported."
    )
    response_format: ResponseFormat | None = Field(None, description="Text or JSON.")
    ignore_eos: bool | None = Field(False, description="Continue after the end (for benchmarks).")
    router: Router | None = Field(
        None,
        description="Instead of the router that it is served with: "
        f"{', '.join(REQUESTABLE_ROUTERS)}; settings follow, as in arrow:form=peft.",
    )
    weights: Mixture | None = Field(None, description="A mixture of your own, for a router's.")
    k: int | None = Field(None, ge=1, le=1 << 16, description="Experts per token, or per input.")
    keep: Names | None = Field(None, description="Use only these experts.")
    leave_out: Names | None = Field(None, description="Leave out these experts.")
    routing: Detail = Field(None, description="Report tokens' experts.")

    @property
    def wants_trace(self) -> bool:
        return self.routing is not None and self.routing.trace

    @model_validator(mode="after")
    def _weights_alone(self) -> GenerationRequest:
        if self.weights is not None and self.override != RoutingOverride():
            raise _refusal("weights name their experts; leave out router, k, keep and leave_out.")
        return self

    @property
    def override(self) -> RoutingOverride:
        keep, leave_out = (
            None if names is None else tuple(names) for names in (self.keep, self.leave_out)
        )
        return RoutingOverride(self.router, self.k, keep, leave_out)


class CompletionRequest(GenerationRequest):
    """A request to /v1/completions."""

    prompt: Prompts = Field(description="A text, or a list of them.")
    logprobs: Alternatives | None = Field(None, description="Alternatives to each token.")
    echo: Literal[False] | None = Field(False, description="Not supported.")
    best_of: int | None = Field(None, ge=1, le=1, description="Not supported.")
    suffix: Annotated[str, Field(max_length=0)] | None = Field(None, description="Not supported.")

    @model_validator(mode="after")
    def _few(self) -> CompletionRequest:
        if len(self.prompt) * (self.n or 1) > MOST_ANSWERS:
            raise _refusal(f"Prompts times n may be {MOST_ANSWERS} answers.")
        return self


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


def _parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


MOST_MESSAGES = 5_000  # of a conversation, or parts of a message
Content = Annotated[
    list[TextPart],
    Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True),
    BeforeValidator(_parts, json_schema_input_type=str | list[TextPart]),
]


class Message(Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = Field(None, description="Handed to the template.")
    refusal: None = Field(None, description="As in answers, which may be sent back.")
    audio: None = Field(None, description="Not supported.")
    function_call: None = Field(None, description="Not supported.")
    tool_calls: Nothing | None = Field(None, description="Not supported.")
    annotations: Nothing | None = Field(None, description="Not supported.")

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    """A request to /v1/chat/completions."""

    messages: Annotated[
        list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    ]
    max_completion_tokens: int | None = Field(None, ge=1, description="Replaces max_tokens.")
    logprobs: bool | None = Field(False, description="Report each token's log-probability.")
    top_logprobs: Alternatives | None = Field(None, description="Alternatives to each token.")
    tools: Nothing | None = Field(None, description="Not supported.")
    tool_choice: Literal["none", "auto"] | None = Field(None, description="There are no tools.")

    @model_validator(mode="after")
    def _alternatives_to_something(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise _refusal("top_logprobs needs logprobs to be true.")
        return self

    @property
    def plain_messages(self) -> list[dict[str, str]]:
        """The messages as chat templates know them, texts only."""
        return [
            # OpenAI's newer name, and the one that templates know.
            {"role": "system" if each.role == "developer" else each.role, "content": each.text}
            | ({"name": each.name} if each.name else {})
            for each in self.messages
        ]


AnyRequest = CompletionRequest | ChatRequest

# Responses.


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
    """A token and its experts, by name, with the mean of their weights over all sites.

    `part` is prompt or answer. The last token of an answer has no experts: it never passed the
    model.
    """

    token: str
    part: str
    stream: str
    experts: dict[str, float]


class RoutingReport(Reply):
    """Which experts served an answer's tokens.

    `summary` has each expert's share of them, by name. Behind a gateway tokens are the pieces in
    which an engine sends an answer, and `chosen` are the experts of a choice of which only the
    first could be sent. `trace` is present if it was asked for (docs/analysis.md). In a stream it
    comes once; `more` has the tokens that follow, one entry for each of the trace's streams that
    has new ones.
    """

    router: str
    k: int | None
    experts: list[str]
    tokens: list[TokenRouting]
    summary: dict[str, float] = {}
    chosen: dict[str, float] | None = None
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
    """A message of the model; an engine behind a gateway may have fields of its own."""

    model_config = ConfigDict(extra="allow")

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: Any = None


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
    """What is new of a message; an engine behind a gateway may have fields of its own."""

    model_config = ConfigDict(extra="allow")

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


class ModelCard(Reply):
    """A served model; router and k are None for a base alone. `traces` can be asked for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "phatgoose"
    base: str
    router: str | None = None
    k: int | None = None
    experts: list[str] = []
    traces: bool = False
    context: int | None = None
    chat: bool = False


class ModelList(Reply):
    """All served models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(Reply):
    """Whether the server works, how many prompts are read, and how many answers wait and run.

    `upstream` is the engine behind a gateway.
    """

    status: Literal["ok", "failing"]
    reading: int
    waiting: int
    running: int
    upstream: Literal["ok", "away"] | None = None
