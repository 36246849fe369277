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
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import load as load_safetensors

if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["phatgoose"]):
        import phatgoose.routing.saved  # noqa: F401

from phatgoose.errors import ExpertError, PhatgooseError
from phatgoose.experts.adapter_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    check_config,
    matching,
)
from phatgoose.experts.expert import LAYOUT, Expert
from phatgoose.files import TensorFile, read_json
from phatgoose.names import ROUTED_INFO
from phatgoose.routing.saved import ROUTED_WEIGHTS, read_saved

MOST_CHARACTERS = 1500  # of a message
PARTS = b"\n----\n"  # between the files of a folder
EXPERT_PARTS = (LAYOUT.info, ADAPTER_CONFIG, ADAPTER_WEIGHTS, LAYOUT.vectors, LAYOUT.embeddings)
HASHED = dict(zip(("adapter", "vectors", "embeddings"), EXPERT_PARTS[2:], strict=True))
CORPUS = Path(__file__).parent / "corpus"
LIMITS = ("-timeout=20", "-rss_limit_mb=2500", "-verbosity=0", "-print_final_stats=1")
GOLDEN = Path(__file__).parents[1] / "golden" / "expert"
NAMES = ("a.b", "model.layers.0.q_proj", "model.layers.11.mlp.up_proj", "x", "lm_head", "A_1-2")


@contextmanager
def folder_of(parts: dict[str, bytes]) -> Iterator[Path]:
    """A folder of these files, in memory where there is such a thing."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as place:
        for name, data in parts.items():
            (Path(place) / name).write_bytes(data)
        yield Path(place)


def refuse(error: Exception) -> str:
    """The message of `error`, where that is one printable line."""
    message = str(error)
    if not message or not message.isprintable() or len(message) > MOST_CHARACTERS:
        raise AssertionError(f"a message that isn't one short line: {message[:2000]!r}") from error
    return message


def require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def strict_json(data: bytes) -> str | None:
    """What is read is what json reads."""
    with folder_of({"a.json": data}) as folder:
        try:
            content = read_json(folder / "a.json")
        except ExpertError as error:
            return refuse(error)
    return require(content == json.loads(data.decode()), "json reads something else")


def tensor_file(data: bytes) -> str | None:
    """Tensors are those that safetensors reads, and finite when they are said to be."""
    with folder_of({"a.safetensors": data}) as folder:
        try:
            file = TensorFile(folder / "a.safetensors")
        except ExpertError as error:
            return refuse(error)
        require(file.sha256() == hashlib.sha256(data).hexdigest(), "another hash")
        theirs = load_safetensors(data)
        require(set(file) == set(theirs), "other names")
        for name, tensor in file.items():
            same = tensor.dtype == theirs[name].dtype and tensor.shape == theirs[name].shape
            require(same and bits(tensor) == bits(theirs[name]), f"another tensor {name!r}")
        finite = all(t.isfinite().all() for t in theirs.values() if t.is_floating_point())
        try:
            file.check_finite()
        except ExpertError as error:
            require(not finite, "finite values were refused")
            return refuse(error)
    return require(finite, "a value that is not finite passed")


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def expert(data: bytes) -> str | None:
    """A folder whose hashes are right, so that the fuzzer gets behind them."""
    parts = dict(zip(EXPERT_PARTS, data.split(PARTS), strict=False))
    parts = {name: part for name, part in parts.items() if part}
    described = parsed(parts.get(LAYOUT.info, b""))
    if isinstance(described, dict):
        for key, name in HASHED.items():
            if described.get(f"{key}_sha256") is not None and name in parts:
                described[f"{key}_sha256"] = hashlib.sha256(parts[name]).hexdigest()
        parts[LAYOUT.info] = json.dumps(described).encode()
    with folder_of(parts) as folder:
        try:
            loaded = Expert.load(folder)
        except ExpertError as error:
            return refuse(error)
        for module in loaded.modules.values():
            for tensor in (t for t in vars(module).values() if isinstance(t, torch.Tensor)):
                require(bool(tensor.isfinite().all()) and tensor.numel() > 0, "an odd tensor")
    return None


def saved(data: bytes) -> str | None:
    """A saved model whose hash is right."""
    described, _, file = data.partition(PARTS)
    content = parsed(described)
    if isinstance(content, dict):
        content["weights_sha256"] = hashlib.sha256(file).hexdigest()
        described = json.dumps(content).encode()
    with folder_of({ROUTED_INFO: described, ROUTED_WEIGHTS: file}) as folder:
        try:
            model = read_saved(folder)
        except PhatgooseError as error:
            return refuse(error)
        require(len(model.names) == len(set(model.names)) > 0, "names of experts")
        for tensor in model.tensors.values():
            require(bool(tensor.float().isfinite().all()), "a number that isn't finite")
        for site in model.sizes:
            least, most = model.tensors[f"experts.{site}"].aminmax()
            require(0 <= int(least) <= int(most) < len(model.names), "an expert that isn't there")
    return None


def parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def patterns(data: bytes) -> str | None:
    """What passes matches in RE2 what it matches in Python: short ones, which Python can finish."""
    pattern = data[:24].decode("utf-8", "ignore")
    try:
        check_config({"target_modules": pattern}, "it")
    except ExpertError as error:
        return refuse(error)
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
    require(matching(pattern, NAMES) == wanted, f"{pattern!r} matches {wanted} in Python")
    return None


TARGETS: dict[str, Callable[[bytes], str | None]] = {  # each returns the refusal, if any
    target.__name__: target for target in (strict_json, tensor_file, expert, saved, patterns)
}


def fuzz(target: str, arguments: list[str]) -> None:
    """Fuzz one target; never returns."""
    atheris.Setup(["readers.py", *arguments], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    torch.set_num_threads(1)
    Expert.load(GOLDEN)  # whatever is imported late is imported now
    chosen, *rest = sys.argv[1:]
    if chosen != "all":
        fuzz(chosen, rest)
    failed = 0
    for name in TARGETS:
        new = Path(rest[1] if len(rest) > 1 else tempfile.mkdtemp(prefix="corpus-")) / name
        new.mkdir(parents=True, exist_ok=True)
        sys.stderr.write(f"== {name}\n")
        if not os.fork():  # what takes longest, importing, is done once
            time = f"-max_total_time={max(int(rest[0]) // len(TARGETS), 1)}"
            fuzz(name, [str(new), str(CORPUS / name), time, *LIMITS])
        failed += os.wait()[1] != 0
    sys.exit(failed)
