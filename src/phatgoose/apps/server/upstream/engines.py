"""Engines: their forms, and the way to each.

A form says which adapters an engine holds, and how a request names experts to it. Forms are those
of vLLM 0.32 and llama.cpp b11549 (docs/engines.md says what was run), and of any engine where an
expert is a model's name.

Each answer is one request to the engine, so that prompts of one request may have different experts.
Once some of it has come it is never sent again: with sampling, a second answer would go on
otherwise. What an engine that breaks off has said so far is not taken back: the stream ends with
the error.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Collection, Mapping, Set
from contextlib import aclosing, suppress
from hashlib import blake2b
from pathlib import PurePath
from typing import Annotated, Any, ClassVar, NamedTuple, TypeAlias, TypeVar

import httpx2
from pydantic import AliasPath, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from ....base.smollm2 import SMOLLM2_ON_HUB
from ....errors import ConfigError
from ....files import first_line, one_line, shortened
from ....names import SMOLLM2
from ..protocol import (
    NO_LIMIT,
    AnyRequest,
    ApiError,
    ChatRequest,
    Fields,
    Weights,
    bad_request,
    for_clients,
)
from ..replies import Progress, written
from ..requests import PreparedRequest
from ..settings import BASE_PLACE, EXPERT_PLACE, UPSTREAM_KEY, Upstream

CONNECTING = 5.0  # seconds for a connection
LOOKING = 10.0  # seconds for a question about what the engine has
LOADING = 300.0  # seconds for it to load one adapter
MOST_SHOWN = 200  # characters of what an engine says
MOST_READ = 8 << 20  # bytes of an answer to a question about the engine
MOST_EVENT = 1 << 20  # bytes of an event in a stream, or of an error
MOST_TOKEN = 512  # bytes that a token may take in a whole answer
BROKEN = "upstream_broken"
FAILED = "upstream_failed"
AWAY = "upstream_unavailable"
IS_AWAY = "The engine behind this server is away; try again."
BROKE_OFF = "The engine broke off its answer."
CUT = ("abort", "error")  # reasons that end an answer before its end
SECRET = secrets.token_bytes(32)  # for salts that nobody can guess

# Fields that this server reads for an engine, or says in another way.
NOT_FORWARDED = {
    "model",
    "n",
    "router",
    "k",
    "weights",
    "keep",
    "leave_out",
    "routing",
    "messages",
    "prompt",
    "max_tokens",
    "max_completion_tokens",
    "logprobs",
    "top_logprobs",
    "route_by",
}


Events: TypeAlias = asyncio.Queue[Progress | ApiError]
Form = TypeVar("Form")


class TooMuchError(httpx2.HTTPError):
    """An answer of more bytes than it may have."""

    def __init__(self, most: int) -> None:
        super().__init__(f"The engine answers more than {most} bytes.")


class BrokenOffError(httpx2.HTTPError):
    """An answer that ends before its end."""


class AwayError(ApiError):
    """An engine has given nothing of its answer, so that another may give it."""

    def __init__(self, message: str = IS_AWAY, status: int = 503, code: str = AWAY) -> None:
        super().__init__(status, message, code=code, headers={"Retry-After": "1"})


def client_of(upstream: Upstream) -> httpx2.AsyncClient:
    """Connections to an engine; a proxy of the environment is not for what stands behind us."""
    headers = {"Authorization": f"Bearer {upstream.key}"} if upstream.key else {}
    headers["Content-Type"] = "application/json"
    return httpx2.AsyncClient(
        base_url=upstream.root,
        headers=headers,
        timeout=httpx2.Timeout(None, connect=CONNECTING),
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=256),
        trust_env=False,
        follow_redirects=False,
    )


async def content_of(reply: httpx2.Response, most: int) -> bytes:
    """A response's body of at most `most` bytes. Raises HTTPError."""
    content = bytearray()
    try:
        async for piece in reply.aiter_bytes():
            content += piece
            if len(content) > most:
                raise TooMuchError(most)
    finally:
        with suppress(httpx2.HTTPError):
            await asyncio.shield(reply.aclose())
    return bytes(content)


def message_in(content: bytes, key: str | None) -> str:
    """What an engine says in an error, on one line: OpenAI's form, a message, or the text.

    It may repeat what it was sent: the `key` is left out.
    """
    message: object = content.decode(errors="replace")
    with suppress(ValueError, RecursionError):
        message = json.loads(content)
    for name in ("error", "message", "detail"):
        if isinstance(message, dict):
            message = message.get(name, message)
    text = message if isinstance(message, str) else json.dumps(message)
    if key:
        text = text.replace(key, "…").replace(json.dumps(key)[1:-1], "…")
    return one_line(text, MOST_SHOWN).rstrip(".")


# What is read of an engine's answers; anything may stand beside it.


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Card(_Form):
    id: str
    root: str | None = None
    parent: str | None = None
    owned_by: str = ""
    max_model_len: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return self.id, self.root or self.id


class _Cards(_Form):
    data: list[_Card] = Field(min_length=1)


class _Numbered(_Form):
    id: int
    path: str


class _Props(_Form):
    n_ctx: int | None = Field(validation_alias=AliasPath("default_generation_settings", "n_ctx"))


class _Function(_Form):
    name: str | None = None
    arguments: str | None = None


class _Call(_Form):
    index: int | None = None
    function: _Function | None = None


class _Message(_Form):
    role: object = None
    content: str | None = None
    tool_calls: list[_Call] | None = None


class _Token(_Form):
    token: str
    logprob: float
    top_logprobs: list[_Token] = []


class _Logprobs(_Form):
    content: list[_Token] | None = None


class _Choice(_Form):
    text: str | None = None
    logprobs: _Logprobs | None = None
    message: _Message | None = None
    delta: _Message | None = None
    finish_reason: str | None = None

    @property
    def new(self) -> _Message:
        return self.delta or self.message or _Message(content=self.text)


Count = Annotated[int, Field(ge=0, le=1 << 40)]


class _Usage(_Form):
    completion_tokens: Count | None = None
    prompt_tokens: Count | None = None
    total_tokens: Count | None = None


class _Answer(_Form):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None


class Adapter(NamedTuple):
    """An expert's folder, "" if only engines have it, and its base, "" if that isn't known."""

    folder: str
    base: str


Adapters: TypeAlias = Mapping[str, Adapter]  # by the experts' names


def last_part(base: str) -> str:
    """The end of a base's name, which experts and engines have in common."""
    known_as = SMOLLM2_ON_HUB if base == SMOLLM2 else base
    return PurePath(known_as).name.casefold()


def is_called(base: str, names: Collection[str], wanted: Collection[str]) -> bool:
    """Whether a base has one of these `names`, by its end unless several that are `wanted` have."""
    last = last_part(base)
    alike = [other for other in wanted if last_part(other) == last]
    return base in names or (len(alike) < 2 and last in map(last_part, names))


class Engine(ABC):
    """One engine's form: `look` at it, `load` into it, and the `fields` that choose experts.

    `owner` is whose its models are, as it says itself. `mixes` says whether a request may name
    several adapters with weights. `plain` are the fields that turn off what the engine would
    otherwise do to the probabilities; `names` has its own for other fields. `salt` is the field
    that keeps clients' cached prompts apart, "" where it has none. `health` is a path that answers
    while it is well, and `remedy` is for one that lacks experts. After a look there are the name of
    its `base`, all `base_names`, its `context`, and the `ids` of its adapters by name, of which
    those are `held` that are for its base. `wanted` are the bases of all experts.
    """

    label: ClassVar[str]
    owner: ClassVar[str]
    mixes: ClassVar[bool] = False
    plain: ClassVar[Mapping[str, Any]]
    names: ClassVar[Mapping[str, str]] = {}
    salt: ClassVar[str] = ""
    health: ClassVar[str] = "/health"
    base: str
    base_names: tuple[str, ...]
    context: int | None
    ids: Mapping[str, str | int]
    held: Set[str]
    wanted: Collection[str] = ()

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    @abstractmethod
    async def look(self, client: httpx2.AsyncClient) -> None:
        """See what the engine holds now. Raises HTTPError, ConfigError."""

    async def load(self, client: httpx2.AsyncClient, name: str, folder: str) -> str:
        """Have the engine load the adapter in a `folder`; why it doesn't, or ""."""
        return "it reads adapters when it starts"

    def fields(self, weights: Weights) -> Fields:
        """The fields of a request that has these experts, by name; the base's for none."""
        for name in weights:
            return {"model": self.ids[name]}
        return {"model": self.base}

    @property
    def remedy(self) -> str:
        return f"Start it as phatgoose export --engine {self.label.lower()} writes it."

    def on(self, card: _Card) -> None:
        """Take this model for the engine's base."""
        base = self._upstream.base
        self.base = card.id
        self.base_names = (base,) if base else card.names
        self.context = card.max_model_len

    def has(self, base: str) -> bool:
        """Whether it has the base that experts call so; one that isn't known it has."""
        return not base or is_called(base, self.base_names, self.wanted)

    async def see(self, client: httpx2.AsyncClient, adapters: Adapters) -> None:
        """Look, for these experts. Raises HTTPError, ConfigError."""
        self.wanted = {adapter.base for adapter in adapters.values() if adapter.base}
        await self.look(client)
        bases = {base for base in self.wanted if not self.has(base)}
        foreign = {name for name, adapter in adapters.items() if adapter.base in bases}
        self.held = self.ids.keys() - foreign

    async def prepare(self, client: httpx2.AsyncClient, adapters: Adapters) -> str:
        """Look, and load those of the experts for its base that the engine lacks.

        Returns which it lacks after all, and why; "" for none. Raises HTTPError, ConfigError.
        """
        await self.see(client, adapters)
        why = "it says no reason"
        own = [name for name, adapter in adapters.items() if self.has(adapter.base)]
        new = [name for name in own if name not in self.ids]
        for name in new:
            folder = adapters[name].folder
            if folder:
                why = await self.load(client, name, folder) or why
            else:
                why = "no adapter is here, only its prompts"
        if new:
            await self.see(client, adapters)
        lacking = ", ".join(name for name in own if name not in self.held)
        if not lacking:
            return ""
        return f"{self.label} at {self._upstream.root} lacks {lacking} ({why}). {self.remedy}"


class Vllm(Engine):
    """A request names one adapter in `model`, and models list adapters beside their base."""

    label = "vLLM"
    owner = "vllm"
    salt = "cache_salt"
    plain: ClassVar[Mapping[str, Any]] = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}

    async def look(self, client: httpx2.AsyncClient) -> None:
        cards = (await _read(client, "/v1/models", _Cards)).data
        base = next((card for card in cards if card.parent is None), cards[0])
        self.on(base)
        self.ids = {card.id: card.id for card in cards if card.id != base.id}

    async def load(self, client: httpx2.AsyncClient, name: str, folder: str) -> str:
        body = {"lora_name": name, "lora_path": folder}
        reply = await _sent(client, "POST", "/v1/load_lora_adapter", LOADING, body)
        return "" if reply.is_success else message_in(reply.content, self._upstream.key)


class LlamaCpp(Engine):
    """llama-server: adapters have numbers, and a request gives each its scale."""

    label = "llama.cpp"
    owner = "llamacpp"
    mixes = True
    plain: ClassVar[Mapping[str, Any]] = {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}
    names: ClassVar[Mapping[str, str]] = {"repetition_penalty": "repeat_penalty"}

    async def look(self, client: httpx2.AsyncClient) -> None:
        adapters = await _read(client, "/lora-adapters", list[_Numbered])
        props = await _read(client, "/props", _Props)
        cards = await _read(client, "/v1/models", _Cards)
        self.on(cards.data[0])
        self.context = props.n_ctx
        self.ids = {PurePath(adapter.path).stem: adapter.id for adapter in adapters}

    def fields(self, weights: Weights) -> Fields:
        scales = {self.ids[name]: weight for name, weight in weights.items()}
        # All of them: of an empty list the server takes its own scales, by default 1 for each.
        lora = [{"id": number, "scale": scales.get(number, 0.0)} for number in self.ids.values()]
        return {"model": self.base, "lora": lora}


class OpenAi(Engine):
    """Any engine with OpenAI's protocol: an expert is a model's name, by the upstream's template.

    It lists that name, or like SGLang the expert's own.
    """

    label = "The engine"
    owner = ""
    plain: ClassVar[Mapping[str, Any]] = {}
    health = "/v1/models"  # not all have another path

    async def look(self, client: httpx2.AsyncClient) -> None:
        cards = {card.id: card for card in (await _read(client, "/v1/models", _Cards)).data}
        default = self._upstream.default
        own = next(filter(self._is_wanted, cards.values()), None)
        called = own.id if own else self._upstream.base or ""
        base = default if default in cards or not called else called
        if base not in cards:
            listed = shortened(", ".join(cards), 300)[1:-1]
            raise ConfigError(
                f"It has no model {shortened(base)} for what fits no expert; it has {listed}. "
                f"Name one: --default MODEL."
            )
        self.on(own or cards[base])
        self.base = base
        template = str(self._upstream.model_name).replace(BASE_PLACE, called or base)
        before, _, after = template.partition(EXPERT_PLACE)
        ids = dict[str, str]()
        for name in cards.keys() - {self.base}:
            expert = name[len(before) : len(name) - len(after)]
            if f"{before}{expert}{after}" == name:
                ids[expert] = name
            else:
                ids.setdefault(name, f"{before}{name}{after}")
        self.ids = ids

    def _is_wanted(self, card: _Card) -> bool:
        base = self._upstream.base
        bases = [base] if base else self.wanted
        is_one = any(is_called(base, card.names, self.wanted) for base in bases)
        return is_one and card.parent is None

    @property
    def remedy(self) -> str:
        return f"Its models must list them as {self._upstream.model_name} (--model-name)."


FORMS: tuple[type[Engine], ...] = (Vllm, LlamaCpp)


async def engine_at(upstream: Upstream, client: httpx2.AsyncClient) -> Engine:
    """What answers at `upstream`, not looked at yet. Raises HTTPError, ConfigError."""
    owners = {card.owned_by for card in (await _read(client, "/v1/models", _Cards)).data}
    for form in FORMS:
        if form.owner in owners:
            return form(upstream)
    if upstream.model_name:
        return OpenAi(upstream)
    labels = " nor ".join(form.label for form in FORMS)
    raise ConfigError(
        f"What answers at {upstream.root} is neither {labels}. If it has OpenAI's protocol, say "
        f"what it calls an expert: --model-name, such as '{{base}}:{{expert}}'."
    )


async def _read(client: httpx2.AsyncClient, path: str, form: type[Form]) -> Form:
    """What the engine answers at `path`, of this form. Raises HTTPError, ConfigError."""
    reply = await _sent(client, "GET", path)
    try:
        return TypeAdapter(form).validate_json(reply.content)
    except ValidationError as error:
        first = error.errors()[0]
        status = reply.status_code
        why = ": ".join(["has another form", *map(str, first["loc"]), first["msg"]])
        if status in (401, 403):
            why = f"refuses the key; set {UPSTREAM_KEY} to the engine's own"
        raise ConfigError(f"{path} (status {status}) {one_line(why, MOST_SHOWN)}.") from error


async def _sent(
    client: httpx2.AsyncClient,
    method: str,
    path: str,
    seconds: float = LOOKING,
    body: Fields | None = None,
) -> httpx2.Response:
    """An answer to a question about the engine, read. Raises HTTPError."""
    request = client.build_request(method, path, json=body, timeout=seconds)
    reply = await client.send(request, stream=True)
    return httpx2.Response(reply.status_code, content=await content_of(reply, MOST_READ))


def _body(number: int, prepared: PreparedRequest, sent: Weights, engine: Engine) -> Fields:
    """What the engine is asked for an answer."""
    request = prepared.request
    answer = prepared.answers[number]
    decoding = answer.decoding
    body: Fields = {
        **request.model_dump(exclude_unset=True, exclude=NOT_FORWARDED),
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "seed": decoding.seed % (1 << 31),  # llama.cpp's have 32 bits, and one stands for none
        "stream": bool(request.stream),
    }
    options = body.pop("stream_options", {})  # an error without a stream
    if request.stream:
        body["stream_options"] = {**options, "include_usage": True}
    if not isinstance(request, ChatRequest):
        body["prompt"] = answer.prompt.text
    else:
        body["messages"] = [message.sent for message in request.messages]
        if decoding.logprobs is not None:  # 0 would mean none at all to llama.cpp
            body["logprobs"] = True
            body["top_logprobs"] = max(1, decoding.logprobs)
    if _is_limited(request) or _surely_fits(body, decoding.max_tokens, engine.context):
        body["max_tokens"] = decoding.max_tokens
    for name, engines_name in engine.names.items():
        if name in body:
            body.setdefault(engines_name, body.pop(name))  # a client may send both
    if engine.salt:
        salt = blake2b(prepared.client.encode(), key=SECRET, digest_size=32)
        body[engine.salt] = salt.hexdigest()
    return {**engine.plain, **body, **engine.fields(sent)}


def _is_limited(request: AnyRequest) -> bool:
    """Whether the client says how long an answer may be; a completion is short unless it does."""
    most = request.max_tokens or 0
    if isinstance(request, ChatRequest):
        most = request.max_completion_tokens or most or NO_LIMIT
    return most < NO_LIMIT


def _surely_fits(body: Mapping[str, Any], max_tokens: int, context: int | None) -> bool:
    """Whether an answer of so many tokens fits behind a prompt, none of whose bytes is two tokens.

    Engines refuse what might not fit, and end an answer without a limit where their context ends.
    """
    return context is None or len(written(body)) + max_tokens <= context


class Link:
    """The way to one engine, which may come later than the gateway, and be restarted.

    Where `is_shared`, clients don't trust each other.
    """

    client: httpx2.AsyncClient

    def __init__(self, upstream: Upstream, *, is_shared: bool = False) -> None:
        self.upstream = upstream
        self._is_shared = is_shared
        self.engine: Engine | None = None  # not while it is away: it may hold others then
        self.busy = 0  # answers that it was asked for
        self.base = upstream.base or ""  # as it was last known
        self.adapters: Adapters = {}  # of the experts that it was last prepared for
        self.problem = ""  # why it can't be used, or not for all of them
        self._lock = asyncio.Lock()  # for whoever prepares it

    def is_there(self) -> bool:
        return self.engine is not None

    def calls(self, base: str) -> bool:
        """Whether the engine is there and has the base that the operator or a client calls so."""
        return self.engine is not None and (self.engine.base == base or self.engine.has(base))

    def can(self, weights: Weights) -> bool:
        """Whether the engine is there, has these experts, and applies them with these weights."""
        if self.engine is None or not weights.keys() <= self.engine.held:
            return False
        return self.engine.mixes or list(weights.values()) in ([], [1.0])

    async def prepare(self, adapters: Adapters) -> str:
        """Have the engine load what it lacks of these experts; why it can't, or ""."""
        is_being_prepared = self._lock.locked() and adapters is self.adapters
        async with self._lock:
            self.adapters = adapters
            if self.engine and adapters.keys() <= self.engine.held:
                return ""  # others have prepared it
            if is_being_prepared:
                return self.problem  # others have found it just now
            try:
                engine = self.engine or await engine_at(self.upstream, self.client)
                problem = await engine.prepare(self.client, adapters)
            except Exception as error:
                return first_line(error)
            self.engine = engine
            self.base = engine.base_names[0]
            return problem

    async def check(self) -> None:
        """See whether the engine is still well."""
        with suppress(Exception):  # not all are HTTPErrors: whoever watches must not end
            if self.engine:
                reply = await _sent(self.client, "GET", self.engine.health)
                if reply.is_success:
                    await self.engine.see(
                        self.client, self.adapters
                    )  # another may have taken its place
                    return
        self.engine = None

    async def bring(
        self, number: int, prepared: PreparedRequest, weights: Weights, events: Events
    ) -> None:
        """Put into `events` what the engine answers with these experts.

        Raises ApiError when the engine refuses the request or fails, AwayError if it is away or
        fails before there is anything in `events`.
        """
        engine = self.engine
        if engine is None:
            raise AwayError
        is_chat = isinstance(prepared.request, ChatRequest)
        path = "/v1/chat/completions" if is_chat else "/v1/completions"
        has_begun = False
        self.busy += 1
        try:
            content = written(_body(number, prepared, weights, engine))
            request = self.client.build_request(
                "POST", path, content=content, headers=prepared.trace
            )
            try:
                response = await self.client.send(request, stream=True)
            except AttributeError as error:  # anyio's, where a connection is cut as it opens
                raise AwayError from error
            if response.is_error:
                raise await self._refusal(response)
            # Without a salt, counts tell which beginnings of prompts other clients have sent.
            tells = bool(engine.salt) or not self._is_shared
            async with aclosing(self._answered(response, number, prepared, tells)) as answered:
                async for progress in answered:
                    has_begun = True
                    await events.put(progress)
        except (httpx2.HTTPError, ValueError) as error:
            raise self._failure(error, has_begun) from error
        finally:
            self.busy -= 1

    async def _answered(
        self, response: httpx2.Response, number: int, prepared: PreparedRequest, tells: bool
    ) -> AsyncGenerator[Progress, None]:
        """What comes of an answer, with what the engine alone knows of it if it `tells`."""
        pieces = 0
        finish: str | None = None
        usage = _Usage()
        rest: Fields = {}
        decoding = prepared.answers[number].decoding
        most_top = decoding.logprobs or 0
        kind = response.headers.get("content-type", "")
        is_stream = prepared.request.stream and kind.startswith("text/event-stream")
        if is_stream:
            contents = _events(response)
        else:
            contents = _one(
                response, MOST_EVENT + MOST_TOKEN * decoding.max_tokens * (1 + most_top)
            )
        async with aclosing(contents):
            async for content in contents:
                answer = self._read(content)
                usage = answer.usage or usage
                if tells:
                    rest |= answer.model_extra or {}
                for choice in (answer.choices or [])[:1]:
                    finish = choice.finish_reason or finish
                    if finish in CUT:
                        raise BrokenOffError(BROKE_OFF)
                    new = choice.new
                    message = new.model_dump(exclude={"role", "content"}, exclude_unset=True)
                    beside = _beside(choice, most_top)
                    pieces += bool(new.content)
                    if new.content or any(message.values()) or any(beside.values()):
                        message["content"] = new.content
                        yield Progress(
                            number,
                            new.content or "",
                            generated=pieces,
                            message=message,
                            beside=beside,
                            reply=rest,
                        )
                        rest = {}  # once: a prompt's tokens in every chunk would be megabytes
        if finish is None and (is_stream or not pieces):  # it was ended, but not its answer
            raise BrokenOffError(BROKE_OFF)
        counted = None if tells else {*_Usage.model_fields}
        rest["usage"] = usage.model_dump(include=counted, exclude_unset=True, exclude_none=True)
        generated = usage.completion_tokens or pieces
        yield Progress(number, "", finish=finish or "stop", generated=generated, reply=rest)

    def _failure(self, error: Exception, has_begun: bool) -> ApiError:
        if isinstance(error, TooMuchError):
            return ApiError(502, str(error), code=FAILED)
        if isinstance(error, ValueError):
            message = "The engine's answer is no JSON, or has not the form of OpenAI's."
            return ApiError(502, message, code=BROKEN)
        if not isinstance(error, BrokenOffError):
            self.engine = None
        if isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout)):  # nothing was sent
            return AwayError()
        if has_begun:
            return ApiError(502, BROKE_OFF, code=BROKEN)
        return AwayError(BROKE_OFF, 502, BROKEN)

    async def _refusal(self, response: httpx2.Response) -> ApiError:
        content = b""
        with suppress(httpx2.HTTPError):  # broken off, or more than can be read
            content = await content_of(response, MOST_EVENT)
        status = response.status_code
        why = self._message_in(content)
        if status in (400, 413, 422):
            return bad_request(f"The engine refuses the request: {why}.", code="upstream_refused")
        if status in (429, 503):
            return AwayError(f"The engine can't take the request now: {why}.", status)
        if status == 404:  # it doesn't know the adapter any more
            self.engine = None
            return AwayError(f"The engine doesn't know the expert now: {why}.")
        return ApiError(502, f"The engine failed by {status}: {why}.", code=FAILED)

    def _message_in(self, content: bytes) -> str:
        return for_clients(message_in(content, self.upstream.key))

    def _read(self, content: bytes) -> _Answer:
        value = from_json(content, allow_inf_nan=False)
        if isinstance(value, dict) and "error" in value:
            raise ApiError(502, f"The engine failed: {self._message_in(content)}.", code=FAILED)
        return _Answer.model_validate(value)


def _beside(choice: _Choice, most_top: int) -> Fields:
    """What an engine says in a choice beside its message, with so many alternatives to a token."""
    beside = {name: value for name, value in (choice.model_extra or {}).items() if name != "index"}
    if choice.logprobs:
        for token in choice.logprobs.content or ():
            del token.top_logprobs[most_top:]
        beside["logprobs"] = choice.logprobs.model_dump(exclude_unset=True)
    return beside


async def _one(response: httpx2.Response, most: int) -> AsyncGenerator[bytes, None]:
    yield await content_of(response, most)


async def _events(response: httpx2.Response) -> AsyncGenerator[bytes, None]:
    """The data of server-sent events."""
    try:
        async for event in httpx2.EventSource(response, MOST_EVENT):
            if event.data == "[DONE]":
                return
            if event.data:  # else it is a name or a number alone
                yield event.data.encode()
    except httpx2.SSEError as error:
        raise TooMuchError(MOST_EVENT) from error
    finally:
        with suppress(httpx2.HTTPError):
            await asyncio.shield(response.aclose())
