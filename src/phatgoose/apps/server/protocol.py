"""OpenAI's protocol: errors, and the bodies of requests, with our fields for routing.

Fields that aren't declared are kept: whoever answers refuses them by name (`check_known`), unless
they ask for nothing, or forwards them. Docstrings of bodies are part of /openapi.json.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ...config import closest
from ...errors import ConfigError
from ...files import one_line, shortened
from ...routing.routers.registry import AUTO, MOST_WEIGHT
from ...routing.routers.router import all_routers, canonical
from ...untrusted_text import UntrustedText

if TYPE_CHECKING:
    pass

MOST_SHOWN = 500  # characters of an error
SHOWN = 60  # characters of a field's name that an error repeats
INVALID = "invalid_request"

Fields: TypeAlias = dict[str, Any]  # of an object in JSON
Weights: TypeAlias = dict[str, float]  # of experts by name, best first; none of the base

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
        headers: Mapping[str, str] | None = None,
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        usual = "server_error" if status >= 500 else "invalid_request_error"
        kind = KINDS.get(status, usual)
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @property
    def reply(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def busy(message: str, seconds: int = 1) -> ApiError:
    """The error 429; the client may try again after `seconds`."""
    return ApiError(429, message, code="overloaded", headers={"Retry-After": str(seconds)})


def for_clients(error: object) -> str:
    """An error of the library as clients see it: one line, shortened, without absolute paths."""
    return without_paths(one_line(error, MOST_SHOWN))


def without_paths(message: str) -> str:
    """`message` with the last part of each path alone: clients needn't know our folders."""
    return PATH.sub(lambda path: re.split(r"[/\\]", path[0])[-1], message)


ANY_MODEL = "auto"  # the first model of a gateway

# Requests.

MOST_ANSWERS = 64  # to one request
MOST_MIXED = 64  # experts of a request's own mixture
SEEDS = 1 << 63
# What a router can't get from a request: weights have a field of their own, and which files the
# server reads is not a client's to say.
LACKING = {"weights", "task", "examples"}
_complete = [name for name, rule in all_routers().items() if LACKING.isdisjoint(rule.given)]
REQUESTABLE_ROUTERS = AUTO, *_complete
Name = Annotated[str, Field(min_length=1, max_length=512)]
Names = Annotated[list[Name], Field(max_length=5_000, fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Alternatives = Annotated[int, Field(ge=0, le=20)]


def _wrong(why: str) -> PydanticCustomError:
    """An error of pydantic's that says why."""
    return PydanticCustomError("wrong", "{why}", {"why": why})


def _requestable(router: str) -> str:
    name = router.partition(":")[0]
    if name not in REQUESTABLE_ROUTERS:
        hint = closest(name, REQUESTABLE_ROUTERS)
        raise _wrong(f"Input should be one of {', '.join(REQUESTABLE_ROUTERS)}.{hint}")
    if router == AUTO:
        return router
    try:
        return canonical(router)
    except ConfigError as error:
        raise _wrong(str(error)) from error


Router = Annotated[str, Field(min_length=1, max_length=512), AfterValidator(_requestable)]
Weight = Annotated[float, Field(ge=-MOST_WEIGHT, le=MOST_WEIGHT)]
Mixture = Annotated[dict[Name, Weight], Field(min_length=1, max_length=MOST_MIXED)]


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


# One form inside, so that an error is of the form that a field has.
ONE_OR_MANY = BeforeValidator(_listed, json_schema_input_type=str | list[str])
Stops = Annotated[list[Stop], Field(max_length=16, fail_fast=True), ONE_OR_MANY]
Prompts = Annotated[
    list[str], Field(min_length=1, max_length=MOST_ANSWERS, fail_fast=True), ONE_OR_MANY
]
NO_LIMIT = 1 << 60  # tokens: as many as there may be, which clients write as -1
Tokens = Annotated[int, Field(ge=-1)]
MINUS_ONE = BeforeValidator(lambda value: NO_LIMIT if value == -1 else value, Tokens)
MostTokens = Annotated[int, Field(ge=1), MINUS_ONE]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Biases = Annotated[dict[TokenId, Bias], Field(max_length=1024)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
# What gives a template its chat: a client's would be read in place of the one that was routed.
NOT_VARIABLES = {
    "messages",
    *inspect.signature(UntrustedText.read).parameters,
    # Those of transformers' apply_chat_template.
    "conversation",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "sanitize_control_tokens",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
    "kwargs",
}


def _without_chats(variables: Fields) -> Fields:
    for name in NOT_VARIABLES & variables.keys():
        raise _wrong(f"{name} is not a variable of the template's that a request may set.")
    return variables


Variables = Annotated[dict[Name, object], AfterValidator(_without_chats)]
Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class RoutingOverride:
    """What a request changes of its model's routing; None leaves a setting as it is served.

    `allowed` are the experts that its client may use.
    """

    router: str | None = None
    k: int | None = None
    keep: Sequence[str] | None = None
    leave_out: Sequence[str] | None = None
    allowed: Sequence[str] | None = None


ANSWERED = {"annotations", "logprobs"}  # fields of a text that was an answer
# Undeclared fields that ask for nothing: the first with any value, the others with these values.
# Nor do nulls, empty lists and empty objects ask for anything.
IDLE = {
    "cache_control",
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "user",
    "truncation",
    "include_obfuscation",
    "client_metadata",
    *ANSWERED,
    "service_tier",
    "verbosity",
    "prediction",
    "reasoning_content",
    "prompt_cache_retention",
    "prompt_cache_options",
}
IDLE_VALUES: dict[str, tuple[object, ...]] = {
    "store": (False,),
    "modalities": (["text"],),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "tool_choice": ("none",),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    # Of other servers.
    "repeat_penalty": (1,),
    "typical_p": (1,),
    "min_tokens": (0,),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens"), (True,)),
}


class Strict(BaseModel):
    """No text where a number is wanted, no NaN; a null is as if it weren't there."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: object) -> object:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None}

    @property
    def extra(self) -> Fields:
        """The undeclared fields."""
        return self.model_extra or {}

    def undeclared(self, place: tuple[str, ...] = ()) -> Iterator[tuple[Strict, tuple[str, ...]]]:
        """(what it is a field of, where it is) of each undeclared field, here and inside."""
        for name in self.extra:
            yield self, (*place, name)
        for field in type(self).model_fields:
            inside = (*place, self.sent_as(field))
            value = getattr(self, field)
            if isinstance(value, Strict):
                yield from value.undeclared(inside)
            for number, part in enumerate(value if isinstance(value, list) else ()):
                if isinstance(part, Strict):
                    yield from part.undeclared((*inside, str(number)))

    @classmethod
    def sent_as(cls, field: str) -> str:
        """The name of a field in bodies."""
        return cls.model_fields[field].alias or field


class StreamOptions(Strict):
    """What a stream has besides the answer."""

    include_usage: bool | None = Field(False, description="End with a chunk that counts tokens.")


def _with_schema(form: Fields) -> Fields:
    if not isinstance(form.get("schema", {}), dict | None):
        raise ValueError("the schema must be an object")
    return form


class ResponseFormat(Strict):
    """The form of an answer: text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Annotated[Fields, AfterValidator(_with_schema)] | None = Field(
        None, description="With the schema in it."
    )


class GenerationRequest(Strict):
    """The fields of both kinds of request."""

    model: Name = Field(description="A name from /v1/models.")
    max_tokens: MostTokens | None = Field(None, description="Tokens at most; -1: no limit.")
    temperature: float | None = Field(1, ge=0, le=2, description="0 is greedy.")
    top_p: float | None = Field(1, ge=0, le=1, description="Total probability to sample from.")
    top_k: int | None = Field(0, ge=-1, description="Best tokens to sample from; 0, -1: all.")
    min_p: float | None = Field(0, ge=0, le=1, description="Least share of the best probability.")
    repetition_penalty: float | None = Field(1, ge=0.01, le=100, description="Prompt's included.")
    frequency_penalty: Penalty | None = Field(0, description="For each time in the answer.")
    presence_penalty: Penalty | None = Field(0, description="For tokens in the answer.")
    logit_bias: Biases | None = Field({}, description="Added to logits, by tokens' numbers.")
    n: int | None = Field(1, ge=1, le=MOST_ANSWERS, description="Answers to each prompt.")
    seed: int | None = Field(None, ge=-SEEDS, lt=SEEDS, description="Same seed, same answer.")
    stop: Stops | None = Field(None, description="Texts that end the answer; not part of it.")
    stream: bool | None = Field(False, description="Answer in server-sent events.")
    stream_options: StreamOptions | None = None
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
    route_by: str | None = Field(
        None, description="What a router by prompt reads, in place of the prompt or the chat."
    )
    routing: Literal[False, True, "trace"] | None = Field(
        False, description="Report tokens' experts; trace: at every site (docs/analysis.md)."
    )

    @property
    def schema_of_answers(self) -> Fields | None:
        """The schema that an answer keeps to; None for text."""
        form = self.response_format
        if form is None or form.type == "text":
            return None
        schema: Fields | None = (form.json_schema or {}).get("schema")
        return {"type": "object"} if schema is None else schema

    @property
    def override(self) -> RoutingOverride:
        return RoutingOverride(self.router, self.k, self.keep, self.leave_out)

    @property
    def changed(self) -> str | None:
        """The one field that changes the routing; None where there are several."""
        fields = self.model_fields_set & {"router", "k", "keep", "leave_out", "weights"}
        return fields.pop() if len(fields) == 1 else None


class CompletionRequest(GenerationRequest):
    """A request to /v1/completions."""

    asks: ClassVar[str] = "prompt"
    prompt: Prompts = Field(description="A text, or a list of them.")
    logprobs: Alternatives | None = Field(None, description="Alternatives to each token.")

    @model_validator(mode="after")
    def _few(self) -> CompletionRequest:
        if len(self.prompt) * (self.n or 1) > MOST_ANSWERS:
            raise _wrong(f"Prompts times n may be {MOST_ANSWERS} answers.")
        return self


OF_CHATS = "a chat"  # the forms of a request to /v1/route
OF_TEXTS = "a completion"


class TextPart(Strict):
    """A piece of a message; two of its types are those of responses."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class Function(Strict):
    """A function that an answer may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = Field(None, description="Handed to the template.")
    parameters: Fields | None = Field(None, description="The arguments' JSON schema.")
    strict: bool | None = Field(False, description="Its calls keep to the schema in any case.")


class Tool(Strict):
    """A tool; those of other types than function are for engines, and left out here."""

    type: Name
    function: Function | None = None


MOST_MESSAGES = 5_000  # of a conversation, or parts of a message


def _in_parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Content = Annotated[
    list[TextPart],
    Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True),
    BeforeValidator(_in_parts, json_schema_input_type=str | list[TextPart]),
]


class Message(Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = Field(None, description="Of an assistant it may be null.")
    name: str | None = Field(None, description="Handed to the template.")
    tool_calls: list[Fields] | None = Field(None, max_length=128, fail_fast=True)
    tool_call_id: Name | None = Field(None, description="Of a tool: the call that it answers.")

    @model_validator(mode="after")
    def _said(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise _wrong("Only an assistant's content may be null.")
        return self

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content or ())

    @property
    def plain(self) -> Fields:
        """The message as chat templates know it, text only."""
        more = self.model_dump(include={"name", "tool_calls", "tool_call_id"}, exclude_unset=True)
        # OpenAI's newer name, and the one that templates know.
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.text, **more}

    @property
    def sent(self) -> Fields:
        """The message as an engine is sent it: text as such, unless its parts say more."""
        message = self.model_dump(exclude_unset=True)
        message["role"] = self.plain["role"]
        if all(part.extra.keys() <= ANSWERED for part in self.content or ()):
            message["content"] = self.content and self.text
        return message


class ChatRequest(GenerationRequest):
    """A request to /v1/chat/completions."""

    asks: ClassVar[str] = "messages"  # the field of what is answered
    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    max_completion_tokens: MostTokens | None = Field(None, description="Replaces max_tokens.")
    logprobs: bool | None = Field(False, description="Report each token's log-probability.")
    top_logprobs: Alternatives | None = Field(None, description="Alternatives to each token.")
    reasoning_effort: Effort | None = Field(None, description="Handed to the template.")
    chat_template_kwargs: Variables | None = Field(None, description="Handed to the template.")
    tools: list[Tool] | None = Field(None, max_length=128, fail_fast=True)
    tool_choice: str | Fields | None = Field("auto", description="Or none, required, one.")
    parallel_tool_calls: bool | None = Field(True, description="Several calls in an answer.")

    @property
    def functions(self) -> list[Function]:
        """Those that the answer may call; empty where `tool_choice` is no valid one."""
        tools = [tool.function for tool in self.tools or () if tool.function]
        functions = {function.name: function for function in tools}
        if self.tool_choice in ("auto", "required"):
            return list(functions.values())
        for name, function in functions.items():
            if self.tool_choice == {"type": "function", "function": {"name": name}}:
                return [function]
        return []


AnyRequest = CompletionRequest | ChatRequest
RouteRequest = Annotated[
    Annotated[ChatRequest, Tag(OF_CHATS)] | Annotated[CompletionRequest, Tag(OF_TEXTS)],
    Discriminator(lambda body: OF_CHATS if "messages" in body else OF_TEXTS),
]


class CorrectionRequest(Strict):
    """A request to /v1/route/corrections: the expert that should have answered a prompt."""

    model: Name
    expert: Name
    prompt: Annotated[str, Field(pattern=r"\S", max_length=1 << 14)]  # a reader reads no more


def check_known(request: AnyRequest) -> None:
    """Raise ApiError for an undeclared field that asks for something."""
    for part, place in request.undeclared():
        name = place[-1]
        accepted = IDLE_VALUES.get(name, (None,))
        is_of_a_tool = place[0] == "tools" and name != "tools"
        asks_for_nothing = name in IDLE or part.extra[name] in ([], {}, *accepted)
        if is_of_a_tool or asks_for_nothing:
            continue
        supported = [part.sent_as(field) for field in type(part).model_fields]
        shown = [shortened(name, SHOWN)[1:-1] for name in place]
        only = " or ".join(map(json.dumps, accepted))
        raise bad_request(
            f"{'.'.join(shown)}: only {only} is accepted; supported are {', '.join(supported)}."
            f"{closest(name[:SHOWN], supported)}",
            shown[0],
            INVALID,
        )
