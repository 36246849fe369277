"""A Hugging Face Hub on this machine: the endpoints that huggingface_hub uses, over HTTP.

Repositories are histories of commits, each a folder of files in memory. It can be told to fail.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

LARGE = (".safetensors", ".bin")  # uploaded as LFS objects, as the real Hub wants them


@dataclass
class Repository:
    """Branches and tags by name, and the files of every commit."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: Mapping[str, bytes], message: str, branch: str = "main") -> str:
        content = json.dumps([len(self.commits), sorted(files), message]).encode()
        sha = hashlib.sha1(content + b"".join(files[name] for name in sorted(files))).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def find(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None


@dataclass
class FakeHub:
    """What the server holds, and what it has been asked."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)  # told of files, in place of the true ones
    fail_on: str | None = None  # requests whose "METHOD path" holds this are answered with 403
    url: str = ""

    def add(self, repo: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        """The id of a new commit of `files` to the repository `repo`, made if need be."""
        return self.repositories.setdefault(repo, Repository()).commit(files, "added", branch)


@contextmanager
def serving_hub() -> Iterator[FakeHub]:
    """A fake hub that answers at its `url` while the context is open."""
    hub = FakeHub()
    server = _Server(
        ("127.0.0.1", 0),
        lambda *given: _Handler(hub, *given),  # type: ignore[arg-type]
    )
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that were killed in the middle of a request."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body needs not wait until its headers are acknowledged

    def __init__(self, hub: FakeHub, *given: Any) -> None:
        self.hub = hub
        super().__init__(*given)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self._read_chunks()
        quoted = urlsplit(self.path).path
        path = unquote(quoted)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        if self.hub.fail_on is not None and self.hub.fail_on in request:
            return self._send(403, {"error": "told to fail"})
        # Repositories of datasets stand among the others, by their names.
        parts = [unquote(part) for part in quoted.replace("/datasets/", "/", 1)[1:].split("/")]
        if parts[0] == "objects":
            return self._store(parts[1], body)
        if parts[:3] == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if parts[:2] == ["api", "validate-yaml"]:
            return self._send(200, {"errors": [], "warnings": []})
        if parts[:2] == ["api", "models"]:
            return self._api("/".join(parts[2:4]), parts[4:], body)
        if parts[0] == "api":
            return self._api("/".join(parts[1:3]), parts[3:], body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        if len(parts) > 4 and parts[2] == "resolve":
            return self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return self._send(404, {"error": f"unknown request {request}"})

    do_HEAD = do_GET = do_POST = do_PUT = _answer  # noqa: N815

    def _read_chunks(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        chunks = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            chunks += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return chunks

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if name in self.hub.repositories:
            return self._send(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repositories[name] = repository = Repository(private)
        repository.commit({".gitattributes": b""}, "initial commit")
        return self._send(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def _api(self, name: str, rest: list[str], body: bytes) -> None:
        what, revision = (rest[0], rest[1]) if len(rest) > 1 else ("revision", "main")
        if (found := self._find(name, revision)) is None:
            return None
        repository, sha = found
        if what == "revision":
            return self._send(200, self._info(name, repository, sha))
        if what == "tree":
            return self._send(200, _tree(_inside(repository, sha), "/".join([*rest[2:], ""])))
        if what == "preupload":
            return self._send(200, {"files": [_mode(file) for file in json.loads(body)["files"]]})
        if what == "commit":
            return self._commit(name, repository, revision, body)
        return self._send(404, {"error": f"unknown request {what}"})

    def _info(self, name: str, repository: Repository, sha: str) -> dict[str, Any]:
        sized = "blobs=" in self.path
        siblings = [
            {"rfilename": path} | ({"size": self.hub.sizes.get(path, len(data))} if sized else {})
            for path, data in _inside(repository, sha)
        ]
        return {"id": name, "sha": sha, "private": repository.private, "siblings": siblings}

    def _commit(self, name: str, repository: Repository, branch: str, body: bytes) -> None:
        files, message = dict(repository.commits[repository.branches[branch]]), ""
        for line in body.decode().splitlines():
            key, value = (json.loads(line)[part] for part in ("key", "value"))
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(files, message, branch)
        url = f"{self.hub.url}/{name}/commit/{sha}"
        return self._send(200, {"commitUrl": url, "commitOid": sha, "success": True})

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = []
        for each in wanted["objects"]:
            answer = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.hub.objects:
                href = f"{self.hub.url}/objects/{each['oid']}"
                answer["actions"] = {"upload": {"href": href, "header": {}}}
            objects.append(answer)
        return self._send(200, {"transfer": "basic", "objects": objects})

    def _store(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._send(400, {"error": "wrong hash"})
        self.hub.objects[oid] = body
        return self._send(200, {})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        if (found := self._find(name, revision)) is None:
            return None
        repository, sha = found
        data = repository.commits[sha].get(path)
        if data is None:
            return self._send(404, {"error": "no such file"}, code="EntryNotFound", sha=sha)
        return self._send(200, data, sha=sha, etag=hashlib.sha256(data).hexdigest())

    def _find(self, name: str, revision: str) -> tuple[Repository, str] | None:
        """The repository and commit; None where there is none, which is answered."""
        repository = self.hub.repositories.get(name)
        sha = repository.find(revision) if repository else None
        if repository is None or sha is None:
            missing = "Revision" if repository else "Repo"
            return self._send(404, {"error": "no such thing"}, code=f"{missing}NotFound")
        return repository, sha

    def _send(
        self,
        status: int,
        content: Any,
        *,
        code: str | None = None,
        sha: str | None = None,
        etag: str | None = None,
    ) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        headers = {"X-Error-Code": code, "X-Repo-Commit": sha, "ETag": etag and f'"{etag}"'}
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for key, value in headers.items():
            if value:
                self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _inside(repository: Repository, sha: str) -> list[tuple[str, bytes]]:
    return sorted(repository.commits[sha].items())


def _tree(files: list[tuple[str, bytes]], folder: str) -> list[dict[str, Any]]:
    """What is listed of a `folder` ("" or "a/b/"): all files below it, and its own folders."""
    inside = [(path, data) for path, data in files if path.startswith(folder)]
    below = [path.removeprefix(folder).split("/") for path, _ in inside]
    names = sorted({parts[0] for parts in below if len(parts) > 1})
    folders = [{"type": "directory", "path": folder + name, "oid": "0"} for name in names]
    return folders + [_entry(path, data) for path, data in inside]


def _entry(path: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob}
    if path.endswith(LARGE):
        digest = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
    return entry


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    mode = "lfs" if file["path"].endswith(LARGE) else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}


def use_hub(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT, HF_HUB_CACHE, … would do; huggingface_hub reads them when imported."""
    files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def pushed_now(hub: FakeHub) -> str:
    return hub.repositories["me/reviews"].branches["main"]
