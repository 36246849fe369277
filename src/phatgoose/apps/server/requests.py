"""A request's bytes become prompts as tokens and decoding settings, at bounded cost.

A body of 1 MiB can hold hundreds of thousands of lists and objects. Creating them takes seconds,
since Python's garbage collector scans all of them again and again, and validating each against
every form that a field may have takes minutes and gigabytes. So they are counted first.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json
from transformers import PreTrainedTokenizerBase

from ...config import Serving
from ...errors import BaseModelError, EngineError, PhatgooseError, PoolError
from ...files import shortened
from ...routing.choices import PromptRouting
from ...tasks.task import question_of
from ...untrusted_text import MOST_SECONDS, UntrustedText
from .local.json_form import JsonForm, json_form
from .local.prefixes import PrefixStore
from .local.runner import ModelRunner
from .local.sequences import Decoding, seed_of
from .protocol import AnyRequest, ApiError, ChatRequest, CompletionRequest, bad_request, for_clients

MOST_CONTAINERS = 10_000  # objects and lists in one request
MOST_FIELDS = 20_000  # of all objects together
SHOWN = 60  # characters of a field's name that an error repeats

Wanted = TypeVar("Wanted", bound=BaseModel)


def parsed(wanted: type[Wanted], body: bytes) -> Wanted:
    """The request in `body`. Raises ApiError: names of fields, and a router's refusal cut short."""
    _check_size(body)
    try:
        value = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise _invalid(f"The body is not JSON: {error}.") from None
    json.loads(body, object_pairs_hook=_check_keys)  # from_json silently takes the last of two
    try:
        return wanted.model_validate(value)
    except ValidationError as error:
        raise _first_of(error, value) from None


def _check_size(body: bytes) -> None:
    def is_small(text: bytes) -> bool:
        containers = text.count(b"[") + text.count(b"{")
        return containers <= MOST_CONTAINERS and text.count(b":") <= MOST_FIELDS

    if not is_small(body):
        # Brackets in strings count only where that decides: counting without them takes longer.
        without_escapes = body.replace(b"\\\\", b"").replace(b'\\"', b"")
        if not is_small(b"".join(without_escapes.split(b'"')[::2])):  # outside of strings
            raise _invalid(
                f"The body has more than {MOST_CONTAINERS} objects and lists or {MOST_FIELDS} "
                f"fields."
            )


def _check_keys(pairs: list[tuple[str, Any]]) -> None:
    if len({key for key, _ in pairs}) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        shown = shortened(key, SHOWN)[1:-1]
        raise _invalid(f"The key {shown} appears twice in one object.", shown)


def _first_of(error: ValidationError, body: Any) -> ApiError:
    """The first error of a request, `body`."""
    found = [
        (_place_of(each, body), each)
        for each in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    # A field of several forms has an error for each. The one to report is of the form that the
    # value fits best: it lies deepest, and isn't about the type.
    at = len(found[0][0])
    same = [each for each in found if each[0][:at] == found[0][0] and len(each[1]["loc"]) > at]
    place, first = max(same or found[:1], key=_how_far)
    shown = [shortened(str(part), SHOWN)[1:-1] for part in place]
    message = f"{'.'.join(shown)}: {first['msg']}" if shown else str(first["msg"])
    return _invalid(message, shown[0] if shown else None)


def _place_of(error: ErrorDetails, body: Any) -> tuple[int | str, ...]:
    """Where in `body` an error is: its location without the names of the forms of a field."""
    place, value = [], body
    for part in error["loc"]:
        inside = isinstance(value, dict) and part in value
        if inside or (isinstance(value, list) and isinstance(part, int)):
            value = value[part]
        elif error["type"] != "missing" or part != error["loc"][-1]:
            continue
        place.append(part)
    return tuple(place)


def _how_far(found: tuple[tuple[int | str, ...], ErrorDetails]) -> tuple[int, int, bool]:
    """How far a value was right: depth of the error, item of its list, whether its type fits."""
    place, error = found
    item = place[-1] if place and isinstance(place[-1], int) else 0
    return len(place), item, not error["type"].endswith("_type")


def _invalid(message: str, param: str | None = None) -> ApiError:
    return bad_request(message, param, "invalid_request")


TOO_LONG, UNREADABLE = "context_length_exceeded", "prompt_unreadable"
CHARACTERS = 16  # a token; a text with more is refused before it is turned into tokens
DEFAULT_LENGTH = 16  # of a completion, as OpenAI has it


@dataclass(frozen=True)
class RequestPrompt:
    """A prompt's tokens, and the text that stands for them where a prompt is echoed.

    `asked` are the tokens that routers per prompt read.
    """

    tokens: tuple[int, ...]
    text: str
    asked: tuple[int, ...]


@dataclass(frozen=True)
class PreparedAnswer:
    """One answer to generate; `routed` is what the model's context found for its prompt, if any."""

    prompt: RequestPrompt
    decoding: Decoding
    routed: PromptRouting | None


@dataclass(frozen=True)
class PreparedRequest:
    """A request ready for the engine: its prompts, and its answers by number."""

    request: AnyRequest
    runner: ModelRunner
    prompts: list[RequestPrompt]
    answers: list[PreparedAnswer]


class ReadsPrompts(Protocol):
    """What a model is to those who read prompts for it: a `ModelRunner`, or an engine's frame."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @property
    def is_encoder_decoder(self) -> bool: ...

    @property
    def context(self) -> int | None: ...

    @property
    def vocabulary(self) -> int: ...

    @property
    def added(self) -> Any: ...  # tokens before and after a text's

    @property
    def positions(self) -> Any: ...  # that an encoder-decoder model has

    @property
    def looks_prompts_up(self) -> bool: ...  # a router reads them

    @property
    def in_chats(self) -> bool: ...  # the experts' were in the chat template


class RequestReader:
    """Reads requests to one model within the server's limits; refusals are ApiErrors.

    `texts` runs the base's chat template and tokenizer.
    """

    def __init__(
        self, runner: ReadsPrompts, limits: Serving, texts: UntrustedText | None = None
    ) -> None:
        self._runner, self._limits = runner, limits
        self._texts = texts or UntrustedText(runner.tokenizer)
        context = None if runner.is_encoder_decoder else runner.context
        self._most_tokens = min(limits.max_batch_tokens, context or limits.max_batch_tokens)

    def prompts(self, request: AnyRequest, seconds: float = MOST_SECONDS) -> list[RequestPrompt]:
        field = "messages" if isinstance(request, ChatRequest) else "prompt"
        seconds = min(seconds, MOST_SECONDS)
        try:
            if isinstance(request, ChatRequest):
                return [self._chat_prompt(request, seconds)]
            return self._completion_prompts(request, seconds)
        except BaseModelError as error:
            raise bad_request(for_clients(error), field, UNREADABLE) from error
        except EngineError as error:
            raise ApiError(503, for_clients(error)) from error

    def _completion_prompts(
        self, request: CompletionRequest, seconds: float
    ) -> list[RequestPrompt]:
        given, runner = request.prompt, self._runner
        is_one = isinstance(given, str) or isinstance(given[0], int)
        prompts = cast("list[str | list[int]]", [given] if is_one else given)
        self._check_number(len(prompts), request.n or 1)
        for prompt in prompts:
            self._check_length(prompt, "prompt")
        texts = [each for each in prompts if isinstance(each, str)]
        rows = [each for each in prompts if not isinstance(each, str)]
        if texts:
            tokens = [self._plain(each) for _, each in self._read(texts, "prompt", seconds)]
            return list(map(RequestPrompt, tokens, texts, tokens))
        for token in (token for row in rows for token in row if token >= runner.vocabulary):
            message = f"Token {token} is unknown; the model has {runner.vocabulary}."
            raise bad_request(message, "prompt")
        tokens = list(map(tuple, rows))
        plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        texts = [runner.tokenizer.decode(row, **plain) for row in rows]
        return list(map(RequestPrompt, tokens, texts, tokens))

    def _chat_prompt(self, request: ChatRequest, seconds: float) -> RequestPrompt:
        if not self._runner.tokenizer.chat_template:
            message = "The base model has no chat template; use /v1/completions."
            raise bad_request(message, "model", "no_chat_template")
        self._check_number(1, request.n or 1)
        self._check_length("".join(message.text for message in request.messages), "messages")
        messages = request.plain_messages
        asked: Any = question_of([(each["role"], each["content"]) for each in messages])
        if in_chats := self._runner.in_chats:
            asked = [{"role": "user", "content": asked}]
        wanted = [messages, asked] if self._runner.looks_prompts_up else [messages]
        (text, tokens), *found = self._read(wanted, "messages", seconds)
        if not found:
            return RequestPrompt(tuple(tokens), text, tuple(tokens))
        asked = tuple(found[0][1]) if in_chats else self._plain(found[0][1])
        self._check_length(asked, "messages")
        return RequestPrompt(tuple(tokens), text, asked)

    def _plain(self, tokens: Sequence[int]) -> tuple[int, ...]:
        before, after = self._runner.added
        return (*before, *tokens, *after) or (_first(self._runner.tokenizer),)

    def decoding(self, request: AnyRequest, number: int, prompt: RequestPrompt) -> Decoding:
        is_echo = isinstance(request, CompletionRequest) and bool(request.echo)
        if isinstance(request, ChatRequest):
            asked = request.max_completion_tokens or request.max_tokens
            logprobs = (request.top_logprobs or 0) if request.logprobs else None
            if request.top_logprobs and not request.logprobs:
                raise bad_request("top_logprobs needs logprobs to be true.", "top_logprobs")
        else:
            asked = DEFAULT_LENGTH if request.max_tokens is None else request.max_tokens
            logprobs = request.logprobs
            if is_echo and self._runner.is_encoder_decoder:
                raise bad_request("An encoder-decoder model doesn't echo its prompt.", "echo")
        stop = request.stop or []
        return Decoding(
            max_tokens=self._length(asked, prompt),
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=seed_of(request.seed, number),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            logprobs=logprobs,
            echo=is_echo,
            routing=bool(request.routing),
            ignores_end=bool(request.ignore_eos),
        )

    def _read(self, texts: list[Any], field: str, seconds: float) -> list[tuple[str, list[int]]]:
        most = self._most_tokens * CHARACTERS  # what exceeds less is refused with its answer
        found = self._texts.read(texts, seconds, most, add_generation_prompt=True)
        for _, characters, _ in found:
            self._check_count(characters, "characters", CHARACTERS, field)
        return [(text, tokens) for text, _, tokens in found]

    def _check_number(self, prompts: int, n: int) -> None:
        most = self._limits.max_choices
        if prompts * n > most:
            message = f"Prompts times n are {prompts * n} answers; one request may have {most}."
            raise bad_request(message, "n")

    def _check_length(self, given: str | Sequence[int], field: str) -> None:
        kind, each = ("characters", CHARACTERS) if isinstance(given, str) else ("tokens", 1)
        self._check_count(len(given), kind, each, field)

    def _check_count(self, count: int, kind: str, each: int, field: str) -> None:
        if count > self._most_tokens * each:
            message = f"The prompt has {count} {kind}; the model can hold {self._most_tokens}"
            raise bad_request(f"{message} tokens.", field, TOO_LONG)

    def _length(self, asked: int | None, prompt: RequestPrompt) -> int:
        limit = self._limits.max_tokens
        if asked is not None and asked > limit:
            message = f"max_tokens is {asked}; this server generates {limit} at most."
            raise bad_request(message, "max_tokens")
        self._check_positions(asked or 0, prompt)
        given, wanted = len(prompt.tokens), 1 if asked is None else asked
        room = self._most_tokens - given
        if room < wanted:
            raise bad_request(
                f"The prompt has {given} tokens and the answer {wanted}; the model can hold "
                f"{self._most_tokens} together.",
                {None: "messages", 0: "prompt"}.get(asked, "max_tokens"),
                TOO_LONG,
            )
        if self._runner.is_encoder_decoder and self._runner.positions.answer is not None:
            room = min(room, self._runner.positions.answer)
        return min(room, limit) if asked is None else asked

    def _check_positions(self, asked: int, prompt: RequestPrompt) -> None:
        if not self._runner.is_encoder_decoder:
            return
        given, positions = len(prompt.tokens), self._runner.positions
        if positions.prompt is not None and given > positions.prompt:
            held = f"the model's encoder can hold {positions.prompt}."
            raise bad_request(f"The prompt has {given} tokens; {held}", "prompt", TOO_LONG)
        if positions.answer is not None and asked > positions.answer:
            held = f"the model's decoder can hold {positions.answer}."
            raise bad_request(f"max_tokens is {asked}; {held}", "max_tokens", TOO_LONG)


class RequestPreparer(RequestReader):
    """Prepares requests for the engine."""

    def __init__(
        self,
        runner: ModelRunner,
        limits: Serving,
        texts: UntrustedText | None = None,
        prefixes: PrefixStore | None = None,
        client: str = "",
    ) -> None:
        super().__init__(runner, limits, texts)
        self._model, self._prefixes, self._client = runner, prefixes, client
        self._form: JsonForm | None = None

    def prompts(self, request: AnyRequest, seconds: float = MOST_SECONDS) -> list[RequestPrompt]:
        # Made here too, in a thread: a schema may take as long as a prompt.
        model = self._model
        asked = request.response_format
        self._form = json_form(asked, model.tokenizer, model.vocabulary, model.ends)
        return super().prompts(request, seconds)

    def prepare(
        self,
        request: AnyRequest,
        prompts: list[RequestPrompt],
        mixture: Mapping[str, float] | None = None,
    ) -> PreparedRequest:
        """What the engine needs; prompt i has the answers from i n to (i + 1) n - 1.

        A `mixture` stands for what the router would choose.
        """
        owners = [prompt for prompt in prompts for _ in range(request.n or 1)]
        decodings = [self.decoding(request, *pair) for pair in enumerate(owners)]
        if self._form is not None:
            decodings = [replace(each, form=self._form.copy()) for each in decodings]
        tokens = [prompt.tokens for prompt in prompts]
        try:
            if mixture is not None:
                found = self._model.mixed(mixture, tokens)
            else:
                asked = [prompt.asked for prompt in prompts]
                found = self._model.routings_of(tokens, self._prefixes, asked, self._client)
        except PoolError as error:
            raise bad_request(for_clients(error), "weights") from error
        except PhatgooseError as error:
            raise ApiError(500, for_clients(error)) from error
        routed = [each for each in found for _ in range(request.n or 1)]
        answers = list(map(PreparedAnswer, owners, decodings, routed))
        return PreparedRequest(request, self._model, prompts, answers)


def _first(tokenizer: PreTrainedTokenizerBase) -> int:
    bos = tokenizer.bos_token_id
    return int(tokenizer.eos_token_id if bos is None else bos)
