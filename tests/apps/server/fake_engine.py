"""An engine for tests of the gateway, which speaks an engine's form and fails; and gateways to it.

Whose adapters a request named it says in the answer: "NAME 0 1 2 3 4 5", a name and six pieces.
"""

import json
import socket
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import serving
from phatgoose.apps.server import ServedModel, Upstream, create_app
from phatgoose.config import Routing
from phatgoose.experts.pool import Pool
from phatgoose.routing.opening import open_chooser

NAMES = ("e0", "e1", "e2", "e3")
ASK = {**serving.GREEDY, "model": "auto"}
OWNERS = {"vllm": "vllm", "llama.cpp": "llamacpp", "other": "someone"}
BASE = "the-base"
PIECES = 6  # of every answer
BREAKS = 3  # pieces of one that breaks off
CACHED = {"cached_tokens": 8}  # what usage tells beside its counts


def numbered(names=NAMES):
    return {name: str(number) for number, name in enumerate(names)}


class FakeEngine:
    """An engine with `adapters`, which have their numbers, or the folders that they are from.

    `mode` is what happens to answers: well, slow (none comes until `go_on` is set), stalled (it
    waits so amid a stream, after `breaks` pieces), broken (the connection is cut there), unfinished
    (it ends in good order there), cut (before they begin), one of `refusals`, aborting, endless, or
    odd (it answers `content`); "loading slowly" is of adapters alone. `requests` are the bodies of
    all that were asked, `loaded` of those for adapters; `listed` is what llama.cpp lists, if not
    `adapters`.
    """

    def __init__(self, kind, adapters, loads):
        self.kind, self.adapters, self.loads = kind, dict(adapters), loads
        self.mode, self.key, self.content, self.listed = "well", None, b"<html>", None
        self.requests, self.loaded, self.go_on = [], [], threading.Event()
        self.headers = []
        self.open = self.sent = self.port = 0  # answers being given; events of an endless one
        self.context, self.breaks, self.base = 512, BREAKS, BASE
        self.root = self.said = None  # of what its base is by its card, and by the operator

    def start(self):
        self.connections = set()
        address = ("127.0.0.1", self.port)
        self.server = Listening(address, type("Handler", (Handler,), {"engine": self}))
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()

    def stop(self):
        """As if it were killed: no more connections, and those that are open are cut."""
        self.server.shutdown()
        self.server.server_close()
        for each in list(self.connections):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def hanging(self, mode="stalled"):
        """Answers hang while the context is open."""
        self.mode, self.go_on = mode, threading.Event()
        yield
        self.mode = "well"
        self.go_on.set()

    def named(self, body):
        """Whose adapters a request named."""
        if self.kind != "llama.cpp":
            return body["model"]
        scales = {each["id"]: each["scale"] for each in body["lora"]}
        names = {int(number): name for name, number in self.adapters.items()}
        assert scales.keys() == names.keys(), "all must be listed"
        return "+".join(f"{names[i]}*{scale:.3g}" for i, scale in scales.items() if scale) or BASE

    def knows(self, model):
        """Whether it has a model; "other" engines also know BASE:ADAPTER, as SGLang does."""
        of_base = [f"{self.base}:{name}" for name in self.adapters if self.kind == "other"]
        return model in (self.base, *self.adapters, *of_base)

    def refusal(self, body):
        """Why a prompt is too long, as these engines have it; a byte is a token."""
        count = read_of(body)
        least = body.get("max_tokens", 1) if self.kind == "vllm" else 1  # llama.cpp's are cut
        if count + least > self.context:
            return f"{count} tokens and {least} more don't fit into {self.context}."
        return None

    def about(self, path):
        """What the engine says of itself."""
        card = {"owned_by": OWNERS[self.kind], "parent": BASE}
        base = {**card, "id": self.base, "parent": None, "max_model_len": self.context}
        base["root"] = self.root
        if self.kind != "llama.cpp":
            cards = [{"id": name, **card} for name in self.adapters]
            return {"/v1/models": {"data": [base, *cards]}}.get(path)
        listed = [{"id": int(i), "path": f"/x/{n}.gguf"} for n, i in self.adapters.items()]
        return {
            "/v1/models": {"data": [base]},
            "/lora-adapters": listed if self.listed is None else self.listed,
            "/props": {"default_generation_settings": {"n_ctx": self.context}},
        }.get(path)


class Listening(ThreadingHTTPServer):
    daemon_threads, request_queue_size, allow_reuse_address = True, 64, True

    def handle_error(self, request, address):
        pass  # cut by the test


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.engine.connections.add(self.connection)

    def log_message(self, *_):
        pass

    def reply(self, status, content, length=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        engine, key = self.engine, self.engine.key
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        has_health = self.path == "/health" and engine.kind != "other"
        told = {} if has_health else engine.about(self.path)
        if self.path != "/health" and key and self.headers["Authorization"] != f"Bearer {key}":
            self.reply(401, {"error": {"message": "wrong key"}})
        elif "completions" in self.path:
            engine.requests.append(body)
            engine.headers.append({name.lower(): text for name, text in self.headers.items()})
            engine.open += 1
            try:
                self.answer(body)
            finally:
                engine.open -= 1
        elif self.path == "/v1/load_lora_adapter" and engine.loads:
            engine.loaded.append(body)
            if engine.mode == "loading slowly":
                engine.go_on.wait(30)
            engine.adapters[body["lora_name"]] = body["lora_path"]
            self.reply(200, {"success": True})
        else:
            self.reply(*((404, {"detail": "Not Found"}) if told is None else (200, told)))

    def do_POST(self):
        self.do_GET()

    def answer(self, body):
        engine, name = self.engine, self.engine.named(body)
        refusals = {
            "refusing": (400, {"error": {"message": "max_tokens is\nodd"}}),
            "busy": (429, {"error": {"message": "full"}}),
            "failing": (500, b"Internal Server Error /secret/place"),
            "loading": (503, {"error": {"message": "Loading model"}}),
            "repeating": (400, {"error": {"message": f"bad request, {dict(self.headers)}"}}),
        }
        pieces = [name, *(f" {n}" for n in range(PIECES))]
        if engine.mode == "slow" or (engine.mode == "stalled" and not body["stream"]):
            engine.go_on.wait(30)
        if engine.mode in refusals:
            self.reply(*refusals[engine.mode])
        elif engine.kind != "llama.cpp" and not engine.knows(name):
            self.reply(404, {"error": {"message": f"The model {name} does not exist."}})
        elif (refusal := engine.refusal(body)) is not None:
            self.reply(400, {"error": {"message": refusal}})
        elif engine.mode == "cut":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif body["stream"] or engine.mode == "endless":
            self.stream(body, pieces)
        elif engine.mode == "odd":
            self.reply(200, engine.content)
        elif engine.mode == "broken":
            self.reply(200, b"{", length=1000)
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            finish = "abort" if engine.mode == "aborting" else "stop"
            choice = choice_of(body, "".join(pieces), finish, pieces, "message")
            self.reply(200, {"choices": [choice], "usage": usage_of(body, pieces)})

    def stream(self, body, pieces):
        mode = self.engine.mode
        broken = mode in ("broken", "unfinished", "stalled", "aborting")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.event(": a comment")
        if mode == "odd":
            self.event(f"data: {self.engine.content.decode()}")
        while mode == "endless":
            self.event(f"data: {json.dumps({'choices': [choice_of(body, 'x' * 65536)]})}")
            self.engine.sent += 1
        for piece in pieces[: self.engine.breaks if broken else None]:
            choices = [choice_of(body, piece, None, [piece])]
            self.event(f"data: {json.dumps({'choices': choices}, ensure_ascii=False)}")
        if mode == "broken":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif mode == "stalled":
            self.engine.go_on.wait(30)
        elif mode == "aborting":
            self.event(f"data: {json.dumps({'choices': [choice_of(body, '', 'abort')]})}")
        elif mode != "unfinished":
            # Some engines write no space after the colon.
            self.event(f"data:{json.dumps({'choices': [choice_of(body, '', 'length')]})}")
            self.event(f"data: {json.dumps({'choices': [], 'usage': usage_of(body, pieces)})}")
            self.event("data: [DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def event(self, text):
        content = f"{text}\n\n".encode()
        for part in (content[:7], content[7:]):  # so that events are put together again
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            self.wfile.flush()
        time.sleep(0.001)


def read_of(body):
    """How many tokens of a prompt an engine reads."""
    texts = [body.get("prompt"), *(each["content"] for each in body.get("messages", ()))]
    return sum(len(str(text).encode()) for text in texts if text)


def usage_of(body, pieces):
    read, written = read_of(body), len(pieces)
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    return {**usage, "prompt_tokens_details": CACHED}


def choice_of(body, text, finish=None, tokens=(), field="delta"):
    """Each token's log-probability is -0.5, and the next best is "o" of -1.5."""
    said = {field: {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
    choice = {**said, "index": 0, "finish_reason": finish}
    if body.get("logprobs"):
        rows = [{"token": t, "logprob": -0.5, "bytes": list(t.encode())} for t in tokens]
        tops = [{**row, "top_logprobs": [row, {"token": "o", "logprob": -1.5}]} for row in rows]
        choice["logprobs"] = {"content": tops}
    return choice


@contextmanager
def engine_of(kind="vllm", adapters=None, *, loads=True):
    engine = FakeEngine(kind, numbered() if adapters is None else adapters, loads)
    engine.start()
    try:
        yield engine
    finally:
        engine.go_on.set()
        engine.stop()


@contextmanager
def gateway(place, engine, limits=None, *, ready=True, listens=False, **options):
    """A client of a gateway to `engine`, one or several, once it is `ready` unless that is False.

    One that `listens` is under our uvicorn. `options` are its router, key to the engine, api_keys,
    and how an engine that is "other" calls its models.
    """
    router = options.get("router", "retrieval")
    models = [ServedModel("goose", str(place), Routing(router), dtype="float32")]
    engines, keys = engine if isinstance(engine, list) else [engine], options.get("api_keys", ())
    named = {name: options.get(name) for name in ("key", "model_name", "default")}
    upstreams = [Upstream(each.url, **named, base=each.said) for each in engines]
    app = create_app(models, limits, keys, upstreams=upstreams)
    hurry(app.state.service)
    near = serving.client_of(app, raise_server_exceptions=False)
    with serving.far_client_of(app) if listens else near as client:
        if ready:
            serving.until(lambda: client.get("/healthz").status_code == 200)
        yield client


def hurry(service, again=0.2):
    """Have a service look often at the files of its models, and at its engines if it has any."""
    service.looking = 0.05
    service.again = again
    if service.backend.upstream:
        service.backend.links.checking = 0.05


def chosen_by(place, prompt, router="retrieval"):
    """What the router alone chooses, by name."""
    chooser = open_chooser(Pool.open(place), router=router)
    return chooser.choose([prompt]).named(chooser.experts)[0]
