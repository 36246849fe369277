"""A Hugging Face Hub in this process: it answers the requests of huggingface_hub's own client.

Repositories are histories of commits, each a folder of files in memory. It can be told to fail.
"""

import base64
import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from huggingface_hub import constants, get_session, set_client_factory
from huggingface_hub.utils._http import default_client_factory

HTTPX = importlib.import_module(type(get_session()).__module__.partition(".")[0])  # of its version
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
        self.commits[sha], self.branches[branch] = dict(files), sha
        self.messages.append(message)
        return sha


@dataclass
class FakeHub:
    """What the hub holds, and what it has been asked."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    fail_on: str | None = None  # requests whose "METHOD path" holds this are answered with 403
    url: str = "http://hub.test"

    def add(self, repo: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        """The id of a new commit of `files` to the repository `repo`, made if need be."""
        return self.repositories.setdefault(repo, Repository()).commit(files, "added", branch)

    def answer(self, request: Any) -> Any:
        quoted, body = request.url.raw_path.decode().partition("?")[0], request.read()
        asked = f"{request.method} {unquote(quoted)}"
        self.requests.append(asked)
        if self.fail_on is not None and self.fail_on in asked:
            return _reply({"error": "told to fail"}, 403)
        # Repositories of datasets stand among the others, by their names.
        quoted = quoted.replace("/datasets/", "/", 1).replace("/api/models/", "/api/", 1)
        match [unquote(part) for part in quoted[1:].split("/")]:
            case ["objects", oid]:
                self.objects[oid] = body
                return _reply({}, 200 if hashlib.sha256(body).hexdigest() == oid else 400)
            case ["api", "repos", "create"]:
                return self._created(json.loads(body))
            case ["api", "validate-yaml"]:
                return _reply({"errors": [], "warnings": []})
            case [_, _, "info", "lfs", "objects", "batch"]:
                return _reply({"transfer": "basic", "objects": self._uploads(json.loads(body))})
            case ["api", owner, name]:
                return self._of_repository(f"{owner}/{name}", "revision", "main", [], body)
            case ["api", owner, name, what, revision, *rest]:
                return self._of_repository(f"{owner}/{name}", what, revision, rest, body)
            case [owner, name, "resolve", revision, *rest]:
                return self._of_repository(f"{owner}/{name}", "resolve", revision, rest, body)
        return _reply({"error": f"unknown request {asked}"}, 404)

    def _created(self, wanted: dict[str, Any]) -> Any:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        made = {"url": f"{self.url}/{name}", "name": name}
        if name in self.repositories:
            return _reply({"error": "exists", **made}, 409)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.repositories[name] = Repository(private)
        self.repositories[name].commit({".gitattributes": b""}, "initial commit")
        return _reply(made)

    def _uploads(self, wanted: dict[str, Any]) -> list[dict[str, Any]]:
        def action(oid: str) -> dict[str, Any]:
            upload = {"href": f"{self.url}/objects/{oid}", "header": {}}
            return {} if oid in self.objects else {"actions": {"upload": upload}}

        return [{**each, **action(each["oid"])} for each in wanted["objects"]]

    def _of_repository(
        self, name: str, what: str, branch: str, rest: list[str], body: bytes
    ) -> Any:
        repository = self.repositories.get(name, Repository())
        sha = repository.branches.get(branch, branch)
        if sha not in repository.commits:
            missing = "Revision" if name in self.repositories else "Repo"
            return _reply({"error": "nothing"}, 404, {"X-Error-Code": f"{missing}NotFound"})
        files, path = repository.commits[sha], "/".join(rest)
        match what:
            case "revision":
                inside = [{"rfilename": f, "size": len(files[f])} for f in sorted(files)]
                told = {"id": name, "sha": sha, "private": repository.private, "siblings": inside}
                return _reply(told)
            case "tree":
                return _reply(_tree(files, f"{path}/" if path else ""))
            case "preupload":
                return _reply({"files": [_mode(file) for file in json.loads(body)["files"]]})
            case "commit":
                sha = self._committed(repository, branch, body)
                url = f"{self.url}/{name}/commit/{sha}"
                return _reply({"commitUrl": url, "commitOid": sha, "success": True})
        about = {"X-Repo-Commit": sha}
        if path not in files:
            return _reply({}, 404, {**about, "X-Error-Code": "EntryNotFound"})
        return _reply(
            files[path], 200, {**about, "ETag": f'"{hashlib.sha256(files[path]).hexdigest()}"'}
        )

    def _committed(self, repository: Repository, branch: str, body: bytes) -> str:
        files, message = dict(repository.commits[repository.branches[branch]]), ""
        for line in body.decode().splitlines():
            match json.loads(line):
                case {"key": "header", "value": value}:
                    message = value["summary"]
                case {"key": "file", "value": value}:
                    files[value["path"]] = base64.b64decode(value["content"])
                case {"key": "lfsFile", "value": value}:
                    files[value["path"]] = self.objects[value["oid"]]
                case {"key": "deletedFile", "value": value}:
                    del files[value["path"]]
        return repository.commit(files, message, branch)


def _reply(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Any:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return HTTPX.Response(status, headers=dict(headers or {}), content=body)


def _tree(files: Mapping[str, bytes], folder: str) -> list[dict[str, Any]]:
    """What is listed of a `folder` ("" or "a/b/"): all files below it, and its own folders."""
    inside = sorted(path for path in files if path.startswith(folder))
    below = [path.removeprefix(folder).split("/") for path in inside]
    names = sorted({parts[0] for parts in below if len(parts) > 1})
    entries = [{"type": "directory", "path": folder + name, "oid": "0"} for name in names]
    for path in inside:
        data = files[path]
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entries.append({"type": "file", "path": path, "size": len(data), "oid": blob})
        if path.endswith(LARGE):
            lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            entries[-1]["lfs"] = lfs
    return entries


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    mode = "lfs" if file["path"].endswith(LARGE) else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}


@contextmanager
def using_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with an empty `cache`, online; huggingface_hub reads its variables when imported."""
    hub = FakeHub()
    files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_URL_HOSTS", {"hub.test"}, raising=False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    hooks, transport = default_client_factory().event_hooks, HTTPX.MockTransport(hub.answer)
    set_client_factory(
        lambda: HTTPX.Client(transport=transport, event_hooks=hooks, follow_redirects=True)
    )
    try:
        yield hub
    finally:
        set_client_factory(default_client_factory)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def pushed_now(hub: FakeHub) -> str:
    return hub.repositories["me/reviews"].branches["main"]
