"""Targets of a fuzzer that follows coverage (Atheris): our readers, given a stranger's bytes.

    python tests/fuzz/readers.py all 600 [FOLDER]           all targets, this many seconds in sum
    python tests/fuzz/readers.py TARGET [FOLDERS OR FILE] [-max_total_time=60]      one of them

The second form takes libFuzzer's arguments. A target returns; if it raises anything, the fuzzer
writes the input to a file, and with that file the fault comes again. New inputs go to the first
folder named, so name one of your own before the corpus to keep that small.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from safetensors.torch import load as load_safetensors

if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["phatgoose"]):
        import phatgoose.apps.server.requests
        import phatgoose.routing.saved  # noqa: F401

from phatgoose.apps.server.protocol import ApiError, ChatRequest, CompletionRequest
from phatgoose.apps.server.requests import check_body, invalid
from phatgoose.errors import ExpertError, PhatgooseError
from phatgoose.experts.expert import LAYOUT, Expert, check_expert
from phatgoose.experts.peft_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from phatgoose.files import TensorFile, check_config, matching, read_json
from phatgoose.routing.saved import ROUTED_INFO, ROUTED_WEIGHTS, read_saved

MOST_CHARACTERS = 1500  # of a message
PARTS = b"\n----\n"  # between the files of a folder
EXPERT_PARTS = (LAYOUT.info, ADAPTER_CONFIG, ADAPTER_WEIGHTS, LAYOUT.vectors, LAYOUT.embeddings)
HASHED = dict(zip(("adapter", "vectors", "embeddings"), EXPERT_PARTS[2:], strict=True))
CORPUS = Path(__file__).parent / "corpus"
LIMITS = ("-timeout=20", "-rss_limit_mb=2500", "-verbosity=0", "-print_final_stats=1")
GOLDEN = Path(__file__).parents[1] / "golden" / "expert"
NAMES = ("a.b", "model.layers.0.q_proj", "model.layers.11.mlp.up_proj", "x", "lm_head", "A_1-2")


class FaultError(AssertionError):
    """What a reader of ours must not do."""


@cache
def _place() -> Path:
    """A folder of this process, in memory where there is such a thing."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None))


def _file(data: bytes, name: str) -> Path:
    path = _place() / name
    path.write_bytes(data)
    return path


def _folder(parts: dict[str, bytes]) -> Path:
    folder = _place() / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in parts.items():
        (folder / name).write_bytes(data)
    return folder


def _refused(error: Exception) -> None:
    """Nothing, where `error` is one printable line."""
    message = str(error)
    if not message or not message.isprintable() or len(message) > MOST_CHARACTERS:
        raise FaultError(f"a message that isn't one short line: {message[:2000]!r}") from error


def _wanted(holds: bool, what: str) -> None:
    if not holds:
        raise FaultError(what)


def strict_json(data: bytes) -> None:
    """What is read is what json reads."""
    try:
        content = read_json(_file(data, "a.json"))
    except ExpertError as error:
        return _refused(error)
    return _wanted(content == json.loads(data.decode()), "json reads something else")


def tensor_file(data: bytes) -> None:
    """Tensors are those that safetensors reads, and finite when they are said to be."""
    path = _file(data, "a.safetensors")
    try:
        file = TensorFile(path)
    except ExpertError as error:
        return _refused(error)
    _wanted(file.sha256() == hashlib.sha256(data).hexdigest(), "another hash")
    known = load_safetensors(data)
    _wanted(set(file) == set(known), "other names")
    for name, tensor in file.items():
        same = tensor.dtype == known[name].dtype and tensor.shape == known[name].shape
        _wanted(same and _bits(tensor) == _bits(known[name]), f"another tensor {name!r}")
    finite = all(bool(torch.isfinite(t).all()) for t in known.values() if t.is_floating_point())
    try:
        file.check_finite()
        _wanted(finite, "a value that is not finite passed")
    except ExpertError as error:
        _wanted(not finite, "finite values were refused")
        return _refused(error)
    return None


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def expert(data: bytes) -> None:
    """A folder whose hashes are right, so that the fuzzer gets behind them."""
    parts = dict(zip(EXPERT_PARTS, data.split(PARTS), strict=False))
    parts = {name: part for name, part in parts.items() if part}
    described = _json(parts.get(LAYOUT.info, b""))
    if isinstance(described, dict):
        for key, name in HASHED.items():
            if described.get(f"{key}_sha256") is not None and name in parts:
                described[f"{key}_sha256"] = hashlib.sha256(parts[name]).hexdigest()
        parts[LAYOUT.info] = json.dumps(described).encode()
    folder = _folder(parts)
    problems = check_expert(folder)
    try:
        loaded = Expert.load(folder)
    except ExpertError as error:
        _wanted(bool(problems), "refused, but `check` finds nothing")
        return _refused(error)
    _wanted(problems == [], "loaded, but `check` finds something")
    for module in loaded.modules.values():
        for tensor in (t for t in vars(module).values() if isinstance(t, torch.Tensor)):
            _wanted(bool(torch.isfinite(tensor).all()) and tensor.numel() > 0, "an odd tensor")
    return None


def saved(data: bytes) -> None:
    """A saved model whose hash is right."""
    described, _, file = data.partition(PARTS)
    content = _json(described)
    if isinstance(content, dict):
        content["weights_sha256"] = hashlib.sha256(file).hexdigest()
        described = json.dumps(content).encode()
    folder = _folder({ROUTED_INFO: described, ROUTED_WEIGHTS: file})
    try:
        model = read_saved(folder)
    except PhatgooseError as error:
        return _refused(error)
    _wanted(len(model.names) == len(set(model.names)) > 0, "names of experts")
    for tensor in model.tensors.values():
        _wanted(bool(torch.isfinite(tensor.float()).all()), "a number that isn't finite")
    for site in model.sizes:
        acting = model.tensors[f"experts.{site}"]
        least, most = acting.aminmax()
        _wanted(0 <= int(least) <= int(most) < len(model.names), "an expert that isn't there")
    return None


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def patterns(data: bytes) -> None:
    """What passes matches in RE2 what it matches in Python: short ones, which Python can finish."""
    pattern = data[:24].decode("utf-8", "ignore")
    try:
        check_config({"target_modules": pattern}, "it")
    except ExpertError as error:
        return _refused(error)
    if sum(map(pattern.count, "*+{")) > 3:  # Python might take for ever
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sets that may come to mean something else
            python = re.compile(pattern)
    except (re.error, OverflowError):
        return None  # PEFT can't read such an adapter; nothing is compared
    if re.fullmatch(r"[\w.-]*", pattern):
        return None  # a name, which is compared otherwise
    wanted = [name for name in NAMES if python.fullmatch(name)]
    _wanted(matching(pattern, NAMES) == wanted, f"{pattern!r} matches {wanted} in Python")
    return None


def completion(data: bytes) -> None:
    """A body of /v1/completions."""
    _request(CompletionRequest, data)


def chat(data: bytes) -> None:
    """A body of /v1/chat/completions."""
    _request(ChatRequest, data)


def _request(kind: Any, data: bytes) -> None:
    try:
        request = parsed(kind, data)
    except (ValueError, RecursionError):  # which FastAPI answers
        return
    except ApiError as error:
        _wanted(error.status_code == 400, f"status {error.status_code}")
        _wanted(len(json.dumps(error.body).encode()) < MOST_CHARACTERS, "a long message")
        json.dumps(error.body, ensure_ascii=False).encode()  # no half of a surrogate pair
        return
    _ = request.override, [m.text for m in getattr(request, "messages", ())]
    again = parsed(kind, request.model_dump_json(exclude_unset=True).encode())
    _wanted(again == request, "written and read again it differs")


def parsed(kind: Any, data: bytes) -> Any:
    check_body(data)
    value = json.loads(data)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        faults = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise invalid(RequestValidationError(faults)) from error


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (strict_json, tensor_file, expert, saved, patterns, completion, chat)
}


def _fuzz(target: str, arguments: list[str]) -> None:
    """Fuzz one target; never returns."""
    atheris.Setup(["readers.py", *arguments], TARGETS[target])
    atheris.Fuzz()


def _fuzz_all(seconds: int, folder: Path) -> int:
    """Fuzz each target in turn, each in a process of its own; 0 when none found anything."""
    failed = 0
    for target in TARGETS:
        found = folder / target
        found.mkdir(parents=True, exist_ok=True)
        sys.stderr.write(f"== {target}\n")
        child = os.fork()  # what takes longest, importing, is done once
        if not child:
            time = f"-max_total_time={max(seconds // len(TARGETS), 1)}"
            _fuzz(target, [str(found), str(CORPUS / target), time, *LIMITS])
        failed += os.waitpid(child, 0)[1] != 0
    return failed


if __name__ == "__main__":
    torch.set_num_threads(1)
    Expert.load(GOLDEN)  # whatever is imported late is imported now
    _place()
    chosen, *rest = sys.argv[1:]
    if chosen == "all":
        found_in = Path(rest[1] if len(rest) > 1 else tempfile.mkdtemp(prefix="corpus-"))
        failed_targets = _fuzz_all(int(rest[0]), found_in)
        shutil.rmtree(_place(), ignore_errors=True)
        sys.exit(failed_targets)
    _fuzz(chosen, rest)
