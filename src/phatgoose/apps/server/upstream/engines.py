"""The engine behind a gateway: which adapters it holds, and how a request names experts to it.

One class for each engine's form. They talk to it here only to look and to load; answers pass
through `forwarding`. Forms are those of vLLM 0.32, llama.cpp b11549 and the sources of SGLang and
LoRAX (docs/engines.md says which of them were run).
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, ClassVar, NamedTuple
from urllib.parse import urlsplit

import httpx2

from ....errors import ConfigError, EngineAwayError, EngineRefusesError
from ....files import one_line, shortened

UPSTREAM_KEY = "PHATGOOSE_UPSTREAM_KEY"  # the environment's key for the engine
AUTO = "auto"
LOOKING = 10.0  # seconds for a question about what the engine has
LOADING = 300.0  # seconds for it to load one adapter
PAUSE = 0.5  # seconds between two tries while it is away
MOST_SHOWN = 200  # characters of what an engine says
MOST_READ = 8 << 20  # bytes of an answer to such a question

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Upstream:
    """Where an engine is, as an operator says it.

    `kind` is one of `ENGINES` or "auto". `experts_at` is the folder of the experts as the engine
    sees it, None where it is the same. The engine may take `wait` seconds to start.
    """

    url: str
    kind: str = AUTO
    key: str | None = field(default=None, repr=False)
    experts_at: str | None = None
    wait: float = 30.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ConfigError(
                f"--upstream is {shortened(without_key(self.url))}, but must be the address of an "
                f"engine, such as http://localhost:8000."
            )
        if parts.username or parts.password:
            raise ConfigError(
                f"--upstream must not hold a password; set {UPSTREAM_KEY} in the environment."
            )
        if self.kind not in (AUTO, *ENGINES):
            known = ", ".join((AUTO, *ENGINES))
            raise ConfigError(
                f"--upstream-kind is {shortened(self.kind)}, but must be one of {known}."
            )
        key = self.key or ""
        if not (key.isascii() and key.isprintable() and key == key.strip()):
            raise ConfigError(
                f"The key for the engine ({UPSTREAM_KEY}) has characters that no header can "
                f"carry, or a space around it."
            )

    @property
    def root(self) -> str:
        """The address without a slash, and without the "/v1" that OpenAI's clients want."""
        return self.url.rstrip("/").removesuffix("/v1")

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


def without_key(url: str) -> str:
    """`url` without what stands before an @, which may be a password."""
    before, at, after = url.rpartition("@")
    return f"{before.partition('//')[0]}//…@{after}" if at else url


class Adapter(NamedTuple):
    """An expert that the engine must have: its folder here, and its adapter's hash."""

    folder: str
    content: str


@dataclass(frozen=True)
class Adapters:
    """What an engine holds: adapters by the name that a request gives them, and its base.

    `places` are the files or folders that it says they are from.
    """

    base: str
    held: Mapping[str, str]
    context: int | None = None
    numbers: tuple[int, ...] = ()  # of all adapters, where a request names them so
    places: Mapping[str, str] = field(default_factory=dict)


class Engine:
    """One engine's form: `look` at it, `load` into it, and the `fields` that choose experts.

    `mixes` says whether a request may name several adapters with weights. `plain` are the fields
    that turn off what the engine would otherwise do to the probabilities.
    """

    kind: ClassVar[str]
    label: ClassVar[str]
    mixes: ClassVar[bool] = False
    takes_tokens: ClassVar[bool] = True  # as a prompt
    plain: ClassVar[Mapping[str, Any]] = {}
    remedy: ClassVar[str]

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.adapters = Adapters("", {})
        self.contents: dict[str, str] = {}  # hashes of the adapters that it holds
        self.lock = threading.Lock()  # for whoever prepares it

    def look(self, client: httpx2.Client) -> Adapters:
        """The adapters that the engine holds now. Raises EngineAwayError, ConfigError."""
        raise NotImplementedError

    def load(self, client: httpx2.Client, name: str, folder: str, *, again: bool) -> bool:
        """Have the engine load the adapter in `folder`; False if it can't at run time.

        `again` is for an adapter whose name it holds already.
        """
        return False

    def fields(self, weights: Mapping[str, float]) -> dict[str, Any]:
        """The fields of a request that has these experts, by name; the base's for none."""
        raise NotImplementedError

    def adapted(self, body: dict[str, Any], *, is_chat: bool) -> dict[str, Any]:
        """A request of OpenAI's protocol as this engine takes it."""
        return {**self.plain, **body}

    def logprobs(self, found: Any, offset: int, *, is_chat: bool, most: int) -> Any:
        """An answer's log-probabilities in OpenAI's form; `offset` is where its text begins."""
        return found

    def prepare(self, wanted: Mapping[str, Adapter]) -> None:
        """Look again, and load the experts that the engine lacks, or holds otherwise.

        Otherwise is from another place, or as they were before they changed. Raises
        EngineAwayError, and EngineRefusesError that names every expert that isn't there after all.
        """
        refused: dict[str, str] = {}
        with client_of(self.upstream) as client:
            found = self._looked(client)
            differing = {name: self._differs(name, each, found) for name, each in wanted.items()}
            for name, why in differing.items():
                if why is not None:
                    said = self._try_to_load(client, name, wanted[name].folder, again=bool(why))
                    if said is not None:
                        refused[name] = said
            if any(why is not None for why in differing.values()):
                found = self._looked(client)
        self.adapters = found
        missing = [name for name in wanted if name not in found.held]
        others = [name for name in refused if differing[name] and name not in missing]
        names = frozenset([*missing, *others])
        self.contents |= {n: each.content for n, each in wanted.items() if n not in names}
        faults = []
        if missing:
            said = next((refused[name] for name in missing if refused.get(name)), "")
            faults.append(f"lacks {', '.join(missing)}{f' ({said})' if said else ''}")
        for name in others:
            said = f": {refused[name]}" if refused[name] else ""
            faults.append(f"holds another {name} ({differing[name]}{said})")
        if faults:
            where = f"{self.label} at {self.upstream.root}"
            raise EngineRefusesError(f"{where} {', '.join(faults)}. {self.remedy}", names)

    def _looked(self, client: httpx2.Client) -> Adapters:
        try:
            return self.look(client)
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"What answers at {self.upstream.root} has not the form of {self.label}: "
                f"{type(error).__name__} {one_line(error, MOST_SHOWN)}."
            ) from error

    def _differs(self, name: str, wanted: Adapter, found: Adapters) -> str | None:
        """Why an expert must be loaded: "" for one that isn't held, None where it needn't be."""
        if name not in found.held:
            return ""
        if self.contents.get(name, wanted.content) != wanted.content:
            return "from before it changed"
        place, at = found.places.get(name, ""), self.seen_at(wanted.folder)
        if self.is_same(name, place, at):
            return None
        return f"from {one_line(place, MOST_SHOWN)}, not from {at}"

    def is_same(self, name: str, place: str, at: str) -> bool:
        """Whether an adapter that the engine has from `place` is the one `at` our folder.

        A relative path is to the engine's working directory, so only its end can be compared.
        """
        one, other = ([part for part in _parts(each) if part != ".."] for each in (place, at))
        ends = min(len(one), len(other))
        is_end = one[-ends:] == other[-ends:]
        return not ends or is_end or os.path.realpath(place) == os.path.realpath(at)

    def _try_to_load(
        self, client: httpx2.Client, name: str, folder: str, *, again: bool
    ) -> str | None:
        try:
            return None if self.load(client, name, self.seen_at(folder), again=again) else ""
        except ConfigError as error:
            return one_line(error, MOST_SHOWN)

    def seen_at(self, folder: str) -> str:
        """Where the engine sees an expert's `folder`."""
        if self.upstream.experts_at is None:
            return folder
        return f"{self.upstream.experts_at.rstrip('/')}/{_last(folder)}"


class ByModel(Engine):
    """Engines whose requests name one adapter in `model`, and whose models list adapters."""

    plain: ClassVar[Mapping[str, Any]] = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    loads_at: ClassVar[str]
    loads_again: ClassVar[bool] = False  # an adapter whose name it holds

    def look(self, client: httpx2.Client) -> Adapters:
        cards = _cards(_asked(client, "GET", "/v1/models"))
        bases = [card for card in cards if not card.get("parent")]
        base = (bases or cards)[0]
        context = base.get("max_model_len")
        by_name = {str(card["id"]).removeprefix(f"{base['id']}:"): card for card in cards}
        del by_name[str(base["id"])]
        held = {name: str(card["id"]) for name, card in by_name.items()}
        places = {name: str(card.get("root") or "") for name, card in by_name.items()}
        context = context if isinstance(context, int) else None
        return Adapters(str(base["id"]), held, context, places=places)

    def load(self, client: httpx2.Client, name: str, folder: str, *, again: bool) -> bool:
        if again and not self.loads_again:
            return False
        body: dict[str, Any] = {"lora_name": name, "lora_path": folder}
        steps = [(self.loads_at, body)]
        if again:
            # What vLLM has loaded in place it reads again at every step (its issue 33791), also
            # what has changed since. So that only shows that it can have the adapter.
            unloads = (self.loads_at.replace("load_", "unload_"), {"lora_name": name})
            steps = [(self.loads_at, {**body, "load_inplace": True}), unloads, *steps]
        for path, content in steps:
            reply = _sent(client, "POST", path, json=content, timeout=LOADING)
            if reply.status_code in (404, 405, 403):
                return False
            if reply.is_error:
                raise ConfigError(_said(reply))
        return True

    def fields(self, weights: Mapping[str, float]) -> dict[str, Any]:
        (name,) = weights or (None,)
        return {"model": self.adapters.base if name is None else self.adapters.held[name]}


class Vllm(ByModel):
    kind = "vllm"
    label = "vLLM"
    loads_at = "/v1/load_lora_adapter"
    loads_again = True
    remedy = (
        "Start it with --enable-lora and --lora-modules NAME=FOLDER for each, or with "
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment so that they can be loaded now "
        "(phatgoose export --engine vllm writes the command); where it sees the experts in "
        "another folder, name that with --upstream-experts."
    )

    def fields(self, weights: Mapping[str, float]) -> dict[str, Any]:
        # vLLM knows cached beginnings by the adapter's name alone (its issue 42125): one that was
        # loaded again in place would go on from what the one before has read.
        salts = [self.contents[name] for name in weights if name in self.contents]
        return super().fields(weights) | ({"cache_salt": salts[0]} if salts else {})


class Sglang(ByModel):
    kind = "sglang"
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

    kind = "llama.cpp"
    label = "llama.cpp"
    mixes = True
    plain: ClassVar[Mapping[str, Any]] = {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}
    remedy = (
        "Start llama-server with --lora NAME.gguf,NAME.gguf for all of them and "
        "--lora-init-without-apply; a file is found by its name (phatgoose export --engine "
        "llama.cpp writes files and command)."
    )

    def look(self, client: httpx2.Client) -> Adapters:
        listed = _asked(client, "GET", "/lora-adapters")
        if not isinstance(listed, list):
            raise ConfigError(f"{self.label} lists no adapters, but {shortened(listed)}.")
        held: dict[str, str] = {}
        places: dict[str, str] = {}
        for each in listed:
            path = PurePosixPath(str(each["path"]).replace("\\", "/"))
            held.setdefault(path.parent.name, str(each["id"]))
            places.setdefault(path.parent.name, str(path))
            held[path.stem] = str(each["id"])  # a file's own name counts before its folder's
            places[path.stem] = str(path)
        props = _asked(client, "GET", "/props")
        context = dict(props.get("default_generation_settings") or {}).get("n_ctx")
        cards = _cards(_asked(client, "GET", "/v1/models"))
        context = context if isinstance(context, int) else None
        numbers = tuple(int(each["id"]) for each in listed)
        return Adapters(str(cards[0]["id"]), held, context, numbers, places)

    def is_same(self, name: str, place: str, at: str) -> bool:
        # It has converted files, which may lie anywhere: beside the experts, as export writes them,
        # or in their folder. Nothing in such a file says of which weights it was made.
        beside = str(PurePosixPath(at.replace("\\", "/")).parent.parent)
        if PurePosixPath(place).is_absolute() and not PurePosixPath(place).is_relative_to(beside):
            log.warning(
                "llama.cpp has %s from %s, which is not beside %s: nothing here can tell whether "
                "it holds the same weights.",
                *(name, one_line(place, MOST_SHOWN), at),
            )
        return True

    def fields(self, weights: Mapping[str, float]) -> dict[str, Any]:
        scales = {int(self.adapters.held[name]): weight for name, weight in weights.items()}
        # All of them: of an empty list the server takes its own scales, by default 1 for each.
        numbers = self.adapters.numbers
        lora = [{"id": number, "scale": scales.get(number, 0.0)} for number in numbers]
        return {"model": self.adapters.base, "lora": lora}

    def adapted(self, body: dict[str, Any], *, is_chat: bool) -> dict[str, Any]:
        body = super().adapted(body, is_chat=is_chat)
        if not is_chat and "logprobs" in body:
            body["logprobs"] = max(1, body["logprobs"])  # 0 would mean none at all
        elif is_chat and body.get("logprobs"):
            body["top_logprobs"] = max(1, body.get("top_logprobs") or 0)
        return body

    def logprobs(self, found: Any, offset: int, *, is_chat: bool, most: int) -> Any:
        rows = found.get("content") if isinstance(found, Mapping) else None
        if not isinstance(rows, list):
            return found
        if is_chat:
            return {"content": [_chat_row(row, most) for row in rows], "refusal": None}
        places = [offset]
        for row in rows:
            places.append(places[-1] + len(row["token"]))
        return {
            "tokens": [row["token"] for row in rows],
            "token_logprobs": [row["logprob"] for row in rows],
            "top_logprobs": [_best(row, most) for row in rows],
            "text_offset": places[:-1],
        }


class Lorax(Engine):
    """LoRAX: OpenAI's `model` is its adapter_id, and it loads what a request names."""

    kind = "lorax"
    label = "LoRAX"
    takes_tokens = False
    remedy = "LoRAX loads them with the first request."

    def look(self, client: httpx2.Client) -> Adapters:
        info = _asked(client, "GET", "/info")
        most = info.get("max_total_tokens")
        return Adapters(str(info.get("model_id", "")), {}, most if isinstance(most, int) else None)

    def prepare(self, wanted: Mapping[str, Adapter]) -> None:
        with client_of(self.upstream) as client:
            found = self._looked(client)
        held = {name: self.seen_at(each.folder) for name, each in wanted.items()}
        # Requests may still be on their way to an expert that has left its pool.
        self.adapters = Adapters(found.base, {**self.adapters.held, **held}, found.context)
        changed = [
            name
            for name, each in wanted.items()
            if self.contents.setdefault(name, each.content) != each.content
        ]
        if changed:
            raise EngineRefusesError(
                f"LoRAX keeps {', '.join(changed)} from before they changed: give them new names, "
                f"or restart LoRAX and this gateway.",
                frozenset(changed),
            )

    def fields(self, weights: Mapping[str, float]) -> dict[str, Any]:
        (name,) = weights or (None,)
        if name is None:
            return {"model": ""}
        return {"model": self.adapters.held[name], "adapter_source": "local"}

    def adapted(self, body: dict[str, Any], *, is_chat: bool) -> dict[str, Any]:
        body = super().adapted(body, is_chat=is_chat)
        if body.pop("ignore_eos", False):
            body["ignore_eos_token"] = True
        # Of completions n says that it samples, whatever it is; a temperature of 0 is refused.
        if body["temperature"] == 0:
            del body["temperature"]
        elif not is_chat:
            body["n"] = 1
        return body


FORMS: dict[str, type[Engine]] = {form.kind: form for form in (Vllm, Sglang, LlamaCpp, Lorax)}
ENGINES = tuple(FORMS)
OWNERS = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp"}  # owned_by of models


def connected(upstream: Upstream, wanted: Mapping[str, Adapter]) -> Engine:
    """The engine at `upstream`, which holds the `wanted` experts, by name.

    It may take `upstream.wait` seconds to come up. Raises ConfigError when it doesn't, is none
    that is known, or lacks experts that it can't load now.
    """
    end = time.monotonic() + upstream.wait
    while True:
        try:
            engine = FORMS[_kind(upstream)](upstream)
            engine.prepare(wanted)
            return engine
        except EngineAwayError:
            if time.monotonic() > end:
                raise
            time.sleep(PAUSE)


def client_of(upstream: Upstream) -> httpx2.Client:
    """A client for questions; a proxy of the environment is not for what stands behind us."""
    return httpx2.Client(
        base_url=upstream.root, headers=upstream.headers, timeout=LOOKING, trust_env=False
    )


def is_well(client: httpx2.Client) -> bool:
    """True where the engine says that it can answer."""
    try:
        with client.stream("GET", "/health") as reply:  # unread, however much it is
            return reply.is_success
    except httpx2.HTTPError:
        return False


def _kind(upstream: Upstream) -> str:
    if upstream.kind != AUTO:
        return upstream.kind
    with client_of(upstream) as client:
        reply = _sent(client, "GET", "/v1/models")
        if reply.is_success:
            owners = {str(card.get("owned_by")) for card in _cards(_json(reply))}
            found = [OWNERS[owner] for owner in owners if owner in OWNERS]
            if found:
                return found[0]
        info = _sent(client, "GET", "/info")
        told = _json(info) if info.is_success else None
        if isinstance(told, Mapping) and "max_total_tokens" in told:
            return Lorax.kind
    raise ConfigError(
        f"What answers at {upstream.root} is no engine that is known; name it with "
        f"--upstream-kind: one of {', '.join(ENGINES)}."
    )


def _asked(client: httpx2.Client, method: str, path: str) -> Any:
    reply = _sent(client, method, path)
    if reply.is_error:
        raise ConfigError(f"The engine answered {path} by {reply.status_code}: {_said(reply)}")
    return _json(reply)


def _sent(client: httpx2.Client, method: str, path: str, **options: Any) -> httpx2.Response:
    content = b""
    try:
        with client.stream(method, path, **options) as reply:
            for piece in reply.iter_bytes():
                content += piece
                if len(content) > MOST_READ:
                    raise ConfigError(f"The engine answers {path} by more than {MOST_READ} bytes.")
    except httpx2.HTTPError as error:
        why = one_line(error, MOST_SHOWN) or type(error).__name__
        raise EngineAwayError(f"The engine at {client.base_url} is away: {why}.") from error
    reply = httpx2.Response(reply.status_code, content=content, request=reply.request)
    if reply.status_code in (401, 403) and path != "/info":
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


def said_by(content: bytes, key: str | None) -> str:
    """What an engine says in an error, on one line: OpenAI's form, a message, or the text.

    It may repeat what it was sent: the `key` is left out.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = content.decode(errors="replace")
    while isinstance(found, Mapping):
        keys = ("error", "message", "detail", "error_message")
        found = next((found[key] for key in keys if key in found), json.dumps(dict(found)))
    text = str(found)
    for each in (key, json.dumps(key)[1:-1]) if key else ():
        text = text.replace(each, "…")
    return one_line(text, MOST_SHOWN)


def _said(reply: httpx2.Response) -> str:
    return said_by(reply.content, reply.request.headers.get("Authorization", "")[len("Bearer ") :])


def _last(path: str) -> str:
    return PureWindowsPath(path).name or PurePosixPath(path).name


def _parts(path: str) -> tuple[str, ...]:
    return PurePosixPath(path.replace("\\", "/")).parts


def _best(row: Mapping[str, Any], most: int) -> dict[str, float]:
    found = {each["token"]: each["logprob"] for each in row.get("top_logprobs", [])[:most]}
    return {**found, row["token"]: row["logprob"]}


def _chat_row(row: Mapping[str, Any], most: int) -> dict[str, Any]:
    def token(each: Mapping[str, Any]) -> dict[str, Any]:
        return {key: each.get(key) for key in ("token", "logprob", "bytes")}

    return {**token(row), "top_logprobs": [token(e) for e in row.get("top_logprobs", [])[:most]]}


def first_of(weights: Mapping[str, float]) -> dict[str, float]:
    """The heaviest expert alone, with the weight 1."""
    best = max(weights, key=lambda name: weights[name])
    return {best: 1.0}


def names_of(weights: Mapping[str, float]) -> str:
    """Experts and weights as a header has them: reviews=0.71, trivia=0.29."""
    named = sorted(weights.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{name}={weight:.4g}" for name, weight in named)
