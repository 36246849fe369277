"""An engine's form: which adapters it holds, and how a request names experts to it.

One class for each engine. Forms are those of vLLM 0.32, llama.cpp b11549 and the sources of SGLang
(docs/engines.md says which of them were run).
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, ClassVar, NamedTuple

import httpx2

from ....errors import ConfigError, EngineAwayError
from ....files import one_line, shortened
from ..settings import AUTO, ENGINES, UPSTREAM_KEY, Upstream

CONNECTING = 5.0  # seconds for a connection
LOOKING = 10.0  # seconds for a question about what the engine has
LOADING = 300.0  # seconds for it to load one adapter
PAUSE = 0.5  # seconds between two tries while it is away
MOST_SHOWN = 200  # characters of what an engine says
MOST_READ = 8 << 20  # bytes of an answer to such a question
OWNERS = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp"}  # owned_by of models

log = logging.getLogger(__name__)


class TooMuchError(Exception):
    """An answer of more bytes than it may have."""


def client_of(upstream: Upstream) -> httpx2.AsyncClient:
    """Connections to an engine; a proxy of the environment is not for what stands behind us."""
    return httpx2.AsyncClient(
        base_url=upstream.root,
        headers=upstream.headers,
        timeout=httpx2.Timeout(None, connect=CONNECTING),
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=256),
        trust_env=False,
        follow_redirects=False,
    )


async def content_of(reply: httpx2.Response, most: int) -> bytes:
    """A response's body of at most `most` bytes. Raises TooMuchError, HTTPError."""
    content = bytearray()
    try:
        async for piece in reply.aiter_bytes():
            content += piece
            if len(content) > most:
                raise TooMuchError
    finally:
        with suppress(httpx2.HTTPError):
            await reply.aclose()
    return bytes(content)


def said_by(content: bytes, key: str | None) -> str:
    """What an engine says in an error, on one line: OpenAI's form, a message, or the text.

    It may repeat what it was sent: the `key` is left out.
    """
    try:
        said = json.loads(content)
    except (ValueError, RecursionError):
        said = content.decode(errors="replace")
    while isinstance(said, Mapping):
        keys = ("error", "message", "detail", "error_message")
        said = next((said[key] for key in keys if key in said), json.dumps(dict(said)))
    text = str(said)
    for each in (key, json.dumps(key)[1:-1]) if key else ():
        text = text.replace(each, "…")
    return one_line(text, MOST_SHOWN)


class Adapter(NamedTuple):
    """An expert that the engine must have: its folder here, and its adapter's hash."""

    folder: str
    content: str


class Adapters(NamedTuple):
    """What an engine holds: adapters by the name that a request gives them, and its base."""

    base: str
    ids: Mapping[str, str]
    context: int | None = None
    numbers: tuple[int, ...] = ()  # of all adapters, where a request names them so


class Engine(ABC):
    """One engine's form: `look` at it, `load` into it, and the `fields` that choose experts.

    `mixes` says whether a request may name several adapters with weights. `plain` are the fields
    that turn off what the engine would otherwise do to the probabilities.
    """

    label: ClassVar[str]
    mixes: ClassVar[bool] = False
    plain: ClassVar[Mapping[str, Any]] = {}
    remedy: ClassVar[str]

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.adapters = Adapters("", {})
        self.contents: dict[str, str] = {}  # hashes of the adapters that it holds
        self.lock = asyncio.Lock()  # for whoever prepares it

    @abstractmethod
    async def look(self, client: httpx2.AsyncClient) -> Adapters:
        """The adapters that the engine holds now. Raises EngineAwayError, ConfigError."""

    async def load(self, client: httpx2.AsyncClient, name: str, at: str, *, again: bool) -> bool:
        """Have the engine load the adapter `at` a folder; False if it can't at run time.

        `again` is for an adapter whose name it holds already.
        """
        return False

    @abstractmethod
    def fields(self, weights: Mapping[str, float]) -> dict[str, Any]:
        """The fields of a request that has these experts, by name; the base's for none."""

    def adapted(self, body: dict[str, Any], *, is_chat: bool) -> dict[str, Any]:
        """A request of OpenAI's protocol as this engine takes it."""
        return {**self.plain, **body}

    async def prepare(self, client: httpx2.AsyncClient, experts: Mapping[str, Adapter]) -> None:
        """Look again, and load the experts that the engine lacks, or has from before they changed.

        Raises EngineAwayError, and ConfigError that names every expert that isn't there after all.
        """
        here, refused = await self._looked(client), dict[str, str]()
        for name, adapter in experts.items():
            again = name in here.ids
            if again and self.contents.get(name, adapter.content) == adapter.content:
                continue
            try:
                if not await self.load(client, name, self.seen_at(adapter.folder), again=again):
                    refused[name] = ""
            except ConfigError as error:
                refused[name] = one_line(error, MOST_SHOWN)
        self.adapters = here = await self._looked(client)
        missing = [name for name in experts if name not in here.ids]
        changed = [name for name in refused if name not in missing]
        here_now = set(experts) - {*missing, *changed}
        self.contents |= {name: experts[name].content for name in here_now}
        faults = [f"lacks {', '.join(missing)}"] if missing else []
        faults += [f"has {', '.join(changed)} from before it changed"] if changed else []
        if faults:
            why = next((f" ({said})" for said in refused.values() if said), "")
            where = f"{self.label} at {self.upstream.root}"
            raise ConfigError(f"{where} {' and '.join(faults)}{why}. {self.remedy}")

    async def _looked(self, client: httpx2.AsyncClient) -> Adapters:
        try:
            return await self.look(client)
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"What answers at {self.upstream.root} has not the form of {self.label}: "
                f"{type(error).__name__} {one_line(error, MOST_SHOWN)}."
            ) from error

    def seen_at(self, folder: str) -> str:
        """Where the engine sees an expert's `folder`."""
        if self.upstream.experts_at is None:
            return folder
        name = PureWindowsPath(folder).name or PurePosixPath(folder).name
        return f"{self.upstream.experts_at.rstrip('/')}/{name}"


class ByModel(Engine):
    """Engines whose requests name one adapter in `model`, and whose models list adapters."""

    plain: ClassVar[Mapping[str, Any]] = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    loads_at: ClassVar[str]

    async def look(self, client: httpx2.AsyncClient) -> Adapters:
        cards = _cards(await _asked(client, "/v1/models"))
        bases = [card for card in cards if not card.get("parent")]
        base = (bases or cards)[0]
        by_name = {str(card["id"]).removeprefix(f"{base['id']}:"): card for card in cards}
        del by_name[str(base["id"])]
        ids = {name: str(card["id"]) for name, card in by_name.items()}
        return Adapters(str(base["id"]), ids, _number(base.get("max_model_len")))

    async def load(self, client: httpx2.AsyncClient, name: str, at: str, *, again: bool) -> bool:
        body = {"lora_name": name, "lora_path": at}
        return not again and await self._does(client, self.loads_at, body)

    async def _does(self, client: httpx2.AsyncClient, path: str, body: Mapping[str, Any]) -> bool:
        reply = await _sent(client, "POST", path, json=body, timeout=LOADING)
        if reply.status_code not in (403, 404, 405) and reply.is_error:
            raise ConfigError(_said(reply))
        return not reply.is_error

    def fields(self, weights: Mapping[str, float]) -> dict[str, Any]:
        (name,) = weights or (None,)
        return {"model": self.adapters.base if name is None else self.adapters.ids[name]}


class Vllm(ByModel):
    label = "vLLM"
    loads_at = "/v1/load_lora_adapter"
    remedy = (
        "Start it with --enable-lora and --lora-modules NAME=FOLDER for each, or with "
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment so that they can be loaded now "
        "(phatgoose export --engine vllm writes the command); where it sees the experts in "
        "another folder, name that with --upstream-experts."
    )

    async def load(self, client: httpx2.AsyncClient, name: str, at: str, *, again: bool) -> bool:
        body = {"lora_name": name, "lora_path": at}
        if again:
            # What vLLM has loaded in place it reads again at every step (its issue 33791), also
            # what has changed since. So that only shows that it can have the adapter.
            if not await self._does(client, self.loads_at, {**body, "load_inplace": True}):
                return False
            await self._does(client, "/v1/unload_lora_adapter", {"lora_name": name})
        return await self._does(client, self.loads_at, body)

    def fields(self, weights: Mapping[str, float]) -> dict[str, Any]:
        # vLLM knows cached beginnings by the adapter's name alone (its issue 42125): one that was
        # loaded again in place would go on from what the one before has read.
        salts = [self.contents[name] for name in weights if name in self.contents]
        return super().fields(weights) | ({"cache_salt": salts[0]} if salts else {})


class Sglang(ByModel):
    label = "SGLang"
    loads_at = "/load_lora_adapter"
    remedy = (
        "Start it with --enable-lora and --lora-paths NAME=FOLDER for each, or with "
        "--max-lora-rank and --lora-target-modules so that they can be loaded now (phatgoose "
        "export --engine sglang writes the command)."
    )

    def fields(self, weights: Mapping[str, float]) -> dict[str, Any]:
        (name,) = weights or (None,)
        base = self.adapters.base
        return {"model": base if name is None else f"{base}:{name}"}


class LlamaCpp(Engine):
    """llama-server: adapters have numbers, and a request gives each its scale."""

    label = "llama.cpp"
    mixes = True
    plain: ClassVar[Mapping[str, Any]] = {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}
    remedy = (
        "Start llama-server with --lora NAME.gguf,NAME.gguf for all of them and "
        "--lora-init-without-apply; a file is found by its name (phatgoose export --engine "
        "llama.cpp writes files and command)."
    )

    async def look(self, client: httpx2.AsyncClient) -> Adapters:
        listed = await _asked(client, "/lora-adapters")
        if not isinstance(listed, list):
            raise ConfigError(f"{self.label} lists no adapters, but {shortened(listed)}.")
        by_folder, by_file = dict[str, str](), dict[str, str]()
        for each in listed:
            path = PurePosixPath(str(each["path"]).replace("\\", "/"))
            by_folder.setdefault(path.parent.name, str(each["id"]))
            by_file[path.stem] = str(each["id"])  # a file's own name counts before its folder's
        props = await _asked(client, "/props")
        context = dict(props.get("default_generation_settings") or {}).get("n_ctx")
        cards = _cards(await _asked(client, "/v1/models"))
        numbers = tuple(int(each["id"]) for each in listed)
        return Adapters(str(cards[0]["id"]), {**by_folder, **by_file}, _number(context), numbers)

    def fields(self, weights: Mapping[str, float]) -> dict[str, Any]:
        scales = {int(self.adapters.ids[name]): weight for name, weight in weights.items()}
        # All of them: of an empty list the server takes its own scales, by default 1 for each.
        numbers = self.adapters.numbers
        lora = [{"id": number, "scale": scales.get(number, 0.0)} for number in numbers]
        return {"model": self.adapters.base, "lora": lora}

    def adapted(self, body: dict[str, Any], *, is_chat: bool) -> dict[str, Any]:
        body = super().adapted(body, is_chat=is_chat)
        name = "top_logprobs" if is_chat else "logprobs"
        if name in body:
            body[name] = max(1, body[name])  # 0 would mean none at all
        return body


FORMS: dict[str, type[Engine]] = dict(zip(ENGINES, (Vllm, Sglang, LlamaCpp), strict=True))


def connected(upstream: Upstream, experts: Mapping[str, Adapter]) -> Engine:
    """The engine at `upstream`, which holds the `experts`, by name.

    It may take `upstream.wait` seconds to come up. Raises ConfigError when it doesn't, is none
    that is known, or lacks experts that it can't load now.
    """

    async def connect() -> Engine:
        end, is_said = time.monotonic() + upstream.wait, False
        async with client_of(upstream) as client:
            while True:
                try:
                    engine = FORMS[await _kind(upstream, client)](upstream)
                    await engine.prepare(client, experts)
                    return engine
                except EngineAwayError as error:
                    if time.monotonic() > end:
                        raise
                    if not is_said:
                        log.warning("Waiting for the engine: %s", one_line(error, MOST_SHOWN))
                    is_said = True
                    await asyncio.sleep(PAUSE)

    return asyncio.run(connect())


async def is_well(client: httpx2.AsyncClient) -> bool:
    """True where the engine says that it can answer."""
    try:
        async with client.stream("GET", "/health", timeout=LOOKING) as reply:  # unread
            return reply.is_success
    except httpx2.HTTPError:
        return False


async def _kind(upstream: Upstream, client: httpx2.AsyncClient) -> str:
    if upstream.kind != AUTO:
        return upstream.kind
    reply = await _sent(client, "GET", "/v1/models")
    owners = [str(c.get("owned_by")) for c in _cards(_json(reply))] if reply.is_success else []
    for owner in owners:
        if owner in OWNERS:
            return OWNERS[owner]
    raise ConfigError(
        f"What answers at {upstream.root} is no engine that is known; name it with "
        f"--upstream-kind: one of {', '.join(ENGINES)}."
    )


async def _asked(client: httpx2.AsyncClient, path: str) -> Any:
    reply = await _sent(client, "GET", path)
    if reply.is_error:
        raise ConfigError(f"The engine answered {path} by {reply.status_code}: {_said(reply)}")
    return _json(reply)


async def _sent(
    client: httpx2.AsyncClient, method: str, path: str, timeout: float = LOOKING, json: Any = None
) -> httpx2.Response:
    """An answer to a question about the engine, read. Raises EngineAwayError, ConfigError."""
    try:
        request = client.build_request(method, path, json=json, timeout=timeout)
        reply = await client.send(request, stream=True)
        content = await content_of(reply, MOST_READ)
    except TooMuchError as error:
        message = f"The engine answers {path} by more than {MOST_READ} bytes."
        raise ConfigError(message) from error
    except httpx2.HTTPError as error:
        why = one_line(error, MOST_SHOWN) or type(error).__name__
        raise EngineAwayError(f"The engine at {client.base_url} is away: {why}.") from error
    reply = httpx2.Response(reply.status_code, content=content, request=reply.request)
    if reply.status_code in (401, 403) and method == "GET":
        raise ConfigError(
            f"The engine at {client.base_url} refuses the key; set {UPSTREAM_KEY} to its own."
        )
    if reply.status_code == 503:
        raise EngineAwayError(f"The engine at {client.base_url} isn't ready: {_said(reply)}")
    return reply


def _json(reply: httpx2.Response) -> Any:
    try:
        return reply.json()
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"The engine answered {reply.url.path} by no JSON.") from error


def _cards(listed: Any) -> list[dict[str, Any]]:
    cards = listed.get("data") if isinstance(listed, Mapping) else None
    if not isinstance(cards, list) or not all(isinstance(c, dict) and "id" in c for c in cards):
        raise ConfigError(f"The engine's models are {shortened(listed)}; wanted a list of them.")
    if not cards:
        raise EngineAwayError("The engine has no model yet.")
    return cards


def _number(context: Any) -> int | None:
    return context if isinstance(context, int) else None


def _said(reply: httpx2.Response) -> str:
    return said_by(reply.content, reply.request.headers.get("Authorization", "")[len("Bearer ") :])
