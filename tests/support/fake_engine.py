"""An engine for tests of the gateway: it speaks an engine's form, says who answers, and fails."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OWNERS = {"vllm": "vllm", "llama.cpp": "llamacpp", "other": "someone"}
BASE = "the-base"
PIECES = 6  # of every answer


class FakeEngine:
    """Answers "NAME 0 1 2 3 4 5": whose adapters a request named, and six pieces.

    `mode` is what happens to answers: well, slow (none comes until `go_on` is set), broken (the
    connection is cut after `pieces`), unfinished (it ends in good order there), refusing, busy,
    failing, aborting, repeating (an error with the request's headers), endless, or odd (it answers
    `content`); "loading slowly" is of adapters alone. `requests` are the bodies of all that were
    asked. `adapters` have their numbers, or the folders that they are from.
    """

    def __init__(self, kind: str, adapters: dict[str, str], *, loads: bool = True) -> None:
        self.kind, self.adapters, self.loads = kind, dict(adapters), loads
        self.mode, self.pieces, self.key = "well", 3, None
        self.requests: list[dict[str, Any]] = []
        self.loaded: list[dict[str, Any]] = []
        self.content, self.listed = b"<html>", None  # what llama.cpp lists, if not `adapters`
        self.open = 0  # answers that are being given
        self.sent = 0  # events of an endless one
        self.go_on = threading.Event()
        self.port = 0
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        handler = type("Handler", (_Handler,), {"engine": self})
        self._server = _Server(("127.0.0.1", self.port), handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True).start()

    def stop(self) -> None:
        """As if it were killed: no more connections, and those that are open are cut."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server.cut()
            self._server = None

    def names(self, body: dict[str, Any]) -> str:
        """Whose adapters a request named."""
        if self.kind == "llama.cpp":
            numbers = {int(number): name for name, number in self.adapters.items()}
            assert {each["id"] for each in body["lora"]} == set(numbers), "all must be listed"
            used = {numbers[e["id"]]: e["scale"] for e in body["lora"] if e["scale"]}
            return "+".join(f"{name}*{scale:.3g}" for name, scale in used.items()) or BASE
        return body["model"]


class _Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size, allow_reuse_address = True, 64, True

    def __init__(self, *arguments):
        self.connections = set()
        super().__init__(*arguments)

    def process_request(self, request, address):
        self.connections.add(request)
        super().process_request(request, address)

    def cut(self):
        for each in list(self.connections):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, address):
        pass  # cut by the test


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    engine: FakeEngine

    def log_message(self, *_):
        pass

    def reply(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode() if not isinstance(content, bytes) else content
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def allowed(self) -> bool:
        key = self.engine.key
        if key is not None and self.headers.get("Authorization") != f"Bearer {key}":
            self.reply(401, {"error": {"message": "wrong key"}})
            return False
        return True

    def do_GET(self):
        engine = self.engine
        if self.path == "/health":
            self.reply(200, {})
        elif self.allowed():
            status, content = self.told(engine)
            self.reply(status, content)

    def told(self, engine):
        if self.path == "/v1/models":
            owner = {"owned_by": OWNERS[engine.kind]}
            base = {"id": BASE, "parent": None, "max_model_len": 512, **owner}
            own = [] if engine.kind == "llama.cpp" else engine.adapters
            cards = [{"id": name, "parent": BASE, **owner} for name in own]
            return 200, {"data": [base, *cards]}
        if self.path == "/lora-adapters" and engine.kind == "llama.cpp":
            if engine.listed is not None:
                return 200, engine.listed
            listed = engine.adapters.items()
            return 200, [{"id": int(i), "path": f"/x/{n}.gguf", "scale": 1.0} for n, i in listed]
        if self.path == "/props" and engine.kind == "llama.cpp":
            return 200, {"default_generation_settings": {"n_ctx": 512}}
        return 404, {"detail": "Not Found"}

    def do_POST(self):
        engine = self.engine
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        if self.path == "/v1/load_lora_adapter" and engine.loads:
            engine.loaded.append(body)
            if engine.mode == "loading slowly":
                engine.go_on.wait(30)
            engine.adapters[body["lora_name"]] = body["lora_path"]
            self.reply(200, {"success": True})
        elif self.path in ("/v1/completions", "/v1/chat/completions"):
            engine.requests.append(body)
            engine.open += 1
            try:
                self.answer(body, is_chat="chat" in self.path)
            finally:
                engine.open -= 1
        else:
            self.reply(404, {"detail": "Not Found"})

    def answer(self, body: dict[str, Any], is_chat: bool) -> None:
        engine = self.engine
        refusals = {
            "refusing": (400, {"error": {"message": "max_tokens is\nodd"}}),
            "busy": (429, {"error": {"message": "full"}}),
            "failing": (500, b"Internal Server Error /secret/place"),
            "loading": (503, {"error": {"message": "Loading model"}}),
            "repeating": (400, {"error": {"message": f"bad request, {dict(self.headers)}"}}),
        }
        if engine.mode in refusals:
            self.reply(*refusals[engine.mode])
            return
        if engine.kind == "vllm" and engine.names(body) not in (BASE, *engine.adapters):
            self.reply(404, {"error": {"message": f"The model {body['model']} does not exist."}})
            return
        if engine.mode == "slow":
            engine.go_on.wait(30)
        if engine.mode == "cut":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        pieces = [engine.names(body), *(f" {n}" for n in range(PIECES))]
        if body.get("stream") or engine.mode == "endless":
            self.stream(body, pieces, is_chat)
        elif engine.mode == "odd":
            self.reply(200, engine.content)
        elif engine.mode == "broken":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"{")
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            finish = "abort" if engine.mode == "aborting" else "stop"
            choice = content_of("".join(pieces), is_chat, whole=True) | {"finish_reason": finish}
            choice |= logprobs_of(body, pieces)
            self.reply(200, {"choices": [choice], "usage": {"completion_tokens": len(pieces)}})

    def stream(self, body: dict[str, Any], pieces: list[str], is_chat: bool) -> None:
        engine = self.engine
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.event(": a comment")
        if engine.mode == "odd":
            self.event(f"data: {engine.content.decode()}")
        while engine.mode == "endless":
            self.event(f"data: {json.dumps({'choices': [content_of('x' * 65536, is_chat)]})}")
            engine.sent += 1
        for number, piece in enumerate(pieces):
            if engine.mode in ("broken", "unfinished", "stalled") and number == engine.pieces:
                if engine.mode == "stalled":
                    engine.go_on.wait(30)
                elif engine.mode == "broken":
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                else:
                    break
            choice = content_of(piece, is_chat) | {"index": 0, "finish_reason": None}
            choice |= logprobs_of(body, [piece])
            self.event(f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}")
        else:
            choice = content_of("", is_chat) | {"index": 0, "finish_reason": "length"}
            # Some engines write no space after the colon.
            self.event(f"data:{json.dumps({'choices': [choice]})}")
            if (body.get("stream_options") or {}).get("include_usage"):
                usage = {"choices": [], "usage": {"completion_tokens": len(pieces)}}
                self.event(f"data: {json.dumps(usage)}")
            self.event("data: [DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def event(self, text: str) -> None:
        content = f"{text}\n\n".encode()
        # In two pieces, so that events are put together again.
        for part in (content[:7], content[7:]):
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            self.wfile.flush()
        time.sleep(0.001)


def content_of(text: str, is_chat: bool, *, whole: bool = False) -> dict[str, Any]:
    if not is_chat:
        return {"text": text}
    return {"message" if whole else "delta": {"role": "assistant", "content": text}}


def logprobs_of(body, pieces):
    """Each piece is a token of log-probability -0.5, and the next best is "o" of -1.5."""
    if not body.get("logprobs"):
        return {}
    rows = [{"token": piece, "logprob": -0.5} for piece in pieces]
    tops = [{"top_logprobs": [row, {"token": "o", "logprob": -1.5}]} for row in rows]
    return {"logprobs": {"content": [row | top for row, top in zip(rows, tops, strict=True)]}}


@contextmanager
def engine_of(kind: str, adapters: dict[str, str], **options: Any) -> Iterator[FakeEngine]:
    engine = FakeEngine(kind, adapters, **options)
    engine.start()
    try:
        yield engine
    finally:
        engine.go_on.set()
        engine.stop()
