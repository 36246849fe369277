"""The native kernel, `native.cpp`: shipped, or compiled and cached here, and called from torch.

A loaded library has all rights of its user. So one is taken from the cache only if it is in a
folder of the user's that others can't enter, is a file of the user's that others can't write to,
and has the SHA-256 that its name ends with; and the file that was checked is the one loaded,
whatever its name leads to by then. A damaged one is rebuilt. Where the cache is not private, the
library is built for this process alone, in a temporary folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import secrets
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ...errors import ConfigError, RoutingError
from ...files import one_line, user_cache
from .plain import belong_together, is_choice, misfit
from .shipped import LINKED, OPTIMISED, load_shipped

logger = logging.getLogger(__name__)

FLAGS = (*OPTIMISED, "-march=native", "-fopenmp")
MORE_FLAGS = (
    "PHATGOOSE_NATIVE_FLAGS"  # for sanitizers, in the environment (research/reliability.md)
)
SECONDS = 120  # for the compiler
OF_OTHERS, WRITABLE = 0o077, 0o022  # what group and others may do: anything, write
OPEN_FILES = Path("/proc/self/fd")  # where an open file has a name of its own
# What an open must not do, where the system knows it: follow links, stay open in other programs.
CAREFULLY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


def load_built(source: Path) -> ctypes.CDLL:
    """The library of the C++ file `source`, from the user's cache, or built now and kept there.

    Raises OSError or SubprocessError, in one line, when it can't be built or loaded.
    """
    command = os.environ.get("CXX") or "c++"
    compiler = shutil.which(command)
    if compiler is None:
        raise FileNotFoundError(f"there is no C++ compiler, {command!r}")
    more = shlex.split(os.environ.get(MORE_FLAGS, ""))
    # The compiler's macros name its version and this processor: both belong to the cache's key.
    macros = _run_compiler(compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull)
    compiling, linking = (*FLAGS, *more, "-c"), (*LINKED, *_named_openmp(macros), *more)
    content = source.read_bytes() + macros + " ".join((compiler, *compiling, *linking)).encode()
    begin = f"{source.stem}-{hashlib.sha256(content).hexdigest()[:16]}"
    with _cache() as cache:
        library = None if cache is None else _from(cache, begin)
        if library is not None:
            return library
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
            built, compiled = Path(work) / f"{begin}.so", str(Path(work) / f"{begin}.o")
            _run_compiler(compiler, *compiling, "-o", compiled, str(source), folder=work)
            _run_compiler(compiler, *linking, "-o", str(built), compiled, folder=work)
            if cache:
                with suppress(OSError):  # a full disk, say
                    return _loaded(_keep(built.read_bytes(), cache, begin), cache)
            return _loaded(str(built))


def _named_openmp(macros: bytes) -> tuple[str, ...]:
    # Loaded for all by torch already: naming it would bring in a second runtime (`shipped`).
    is_there = hasattr(ctypes.pythonapi, "GOMP_parallel")
    return () if is_there and b"__clang__" not in macros else ("-fopenmp",)


@dataclass(frozen=True)
class Cache:
    place: Path
    folder: int


@contextmanager
def _cache() -> Iterator[Cache | None]:
    folder = None
    try:
        place = user_cache() / "native"
        folder = _own_folder(place)
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows where ~ is
        logger.warning("The native kernel is built for this process alone: %s.", error)
    try:
        yield None if folder is None else Cache(place, folder)
    finally:
        if folder is not None:
            os.close(folder)


def _own_folder(place: Path) -> int:
    if not place.is_absolute():
        raise OSError(f"{place}, where it would be kept, is no absolute path")
    place.parent.mkdir(parents=True, exist_ok=True)
    # mkdir with its mode at once, not chmod after it: nobody can enter in between.
    with suppress(FileExistsError):
        place.mkdir(mode=0o700)
    # From here on the open folder is used, not its path, which could lead elsewhere by then.
    folder = os.open(place, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | CAREFULLY)
    info = os.fstat(folder)
    if not _is_own(info) or info.st_mode & OF_OTHERS:
        os.close(folder)
        raise PermissionError(
            f"{place}, where it would be kept, must be yours and open to nobody else (chmod 700)"
        )
    return folder


def _from(cache: Cache, begin: str) -> ctypes.CDLL | None:
    for name in os.listdir(cache.folder):
        if name.startswith(f"{begin}-"):
            with suppress(OSError):
                return _loaded(name, cache)
            with suppress(OSError):
                os.unlink(name, dir_fd=cache.folder)
    return None


def _keep(content: bytes, cache: Cache, begin: str) -> str:
    name = f"{begin}-{hashlib.sha256(content).hexdigest()}.so"
    unfinished, folder = f".{secrets.token_hex(8)}", cache.folder
    new = os.open(
        unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | CAREFULLY, 0o600, dir_fd=folder
    )
    try:
        with open(new, "wb") as file:
            file.write(content)
        # Complete before it has the name that others look for.
        os.rename(unfinished, name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        with suppress(OSError):
            os.unlink(unfinished, dir_fd=folder)
        raise
    return name


def _loaded(name: str, cache: Cache | None = None) -> ctypes.CDLL:
    file = os.open(name, os.O_RDONLY | CAREFULLY, dir_fd=cache.folder if cache else None)
    try:
        info = os.fstat(file)
        if not stat.S_ISREG(info.st_mode) or not _is_own(info) or info.st_mode & WRITABLE:
            raise PermissionError(f"{name} is no file of yours that nobody else can write to")
        with open(file, "rb", closefd=False) as opened:
            found = hashlib.sha256(opened.read()).hexdigest()
        if cache and not name.endswith(f"-{found}.so"):
            raise OSError(f"{name} is damaged")
        # Through /proc the loader gets the very file that was hashed, whatever its name means now.
        place = OPEN_FILES / str(file)
        if not place.exists():
            place = cache.place / name if cache else Path(name)
        library = ctypes.CDLL(str(place))
    except BaseException:
        os.close(file)
        raise
    return library  # its file stays open: the loader knows libraries by their names, /proc's too


def _is_own(info: os.stat_result) -> bool:
    return not hasattr(os, "geteuid") or info.st_uid == os.geteuid()


def _run_compiler(*command: str, folder: str | None = None) -> bytes:
    environment = os.environ if folder is None else {**os.environ, "TMPDIR": folder}
    mask = 0o077 if hasattr(os, "geteuid") else -1
    try:
        return subprocess.run(
            command, check=True, capture_output=True, timeout=SECONDS, env=environment, umask=mask
        ).stdout
    except subprocess.CalledProcessError as error:
        complaint = error.stderr.decode(errors="replace").strip().partition("\n")[0]
        raise OSError(f"{command[0]} failed: {complaint or error.returncode}") from error


# Wheels of a platform carry it compiled (`shipped`). Elsewhere, or with `PHATGOOSE_NATIVE=compile`
# in the environment, the machine's C++ compiler (`$CXX`, else c++) builds it once, in about two
# seconds, into the user's cache. Without a compiler the other kernels serve, more
# slowly, and one line says so. `PHATGOOSE_NATIVE=0` turns it off.
#
# The library takes addresses of contiguous CPU tensors through ctypes and trusts their sizes. So
# each call first checks the tensors' types, devices and shapes here, and indices in C++. It runs
# on torch's own OpenMP threads.

SOURCE = Path(__file__).with_suffix(".cpp")
TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
POINTER, INDEX = ctypes.c_void_p, ctypes.c_int64
ROUTING = (*[INDEX] * 4, ctypes.c_float, ctypes.c_int)  # tokens, n, E, k, eps, standardised
SIGNATURES = {
    "route": (*[POINTER] * 2, *ROUTING, *[POINTER] * 2),
    "update": (*[POINTER] * 6, *[INDEX] * 7),
    "routed_update": (*[POINTER] * 5, *ROUTING, *[INDEX] * 3),
}


def runs_natively(*tensors: Tensor) -> bool:
    """True when the library is there and can take `tensors`: one type, CPU, no gradients."""
    return (
        _are_of_one_type(tensors)
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and _library() is not None
    )


def native(u: Tensor, experts: Tensor, weights: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The routed product of `kernels.choice`, expert by expert, [T, d], without gradients.

    Raises ConfigError unless `runs_natively(u, A, B)`, RoutingError when shapes don't belong
    together or an index names no expert.
    """
    if not runs_natively(u, A, B):
        raise ConfigError(
            f"Kernel native needs a C++ compiler, float32 or bfloat16 on a CPU and "
            f"torch.no_grad(), but got {u.dtype} on {u.device}; use kernel auto."
        )
    if not (is_choice(u, experts, weights) and belong_together(u.shape[1], A.shape, B.shape)):
        raise misfit("native", u=u, experts=experts, weights=weights, A=A, B=B)
    (tokens, k), (E, r, n), d = experts.shape, A.shape, B.shape[2]
    # Addresses are of rows without gaps; these names also keep copies alive during the call.
    u, experts, A, B = u.contiguous(), experts.contiguous(), A.contiguous(), B.contiguous()
    weights = weights.float().contiguous()
    delta = torch.zeros(tokens, d, dtype=u.dtype)
    failed = _function("update", u.dtype)(
        *(t.data_ptr() for t in (delta, u, experts, weights, A, B)),
        *(tokens, k, E, r, n, d, torch.get_num_threads()),
    )
    # C++ found an index out of range, and wrote nothing.
    if failed:
        first, last = experts.min(), experts.max()
        raise RoutingError(f"Experts {first} to {last} were chosen; there are {E}, from 0 on.")
    return delta


def top_experts(u: Tensor, vectors: Tensor, k: int, eps: float | None) -> tuple[Tensor, Tensor]:
    """The k experts of the highest affinity for each token of u [T, n], and their weights.

    `vectors` [E, n] are those of the experts, in the type of `u`. With `eps` the affinity is
    v̄ᵀu / (sqrt(var(u) + eps) √n) (`PhatgooseRouter`), with None |vᵀu| (`ArrowRouter`). Returns
    experts [T, k] int64, best first, of equals the first, and weights [T, k] float32: the softmax.
    Raises RoutingError when shapes or types don't belong together, or k is not from 1 to E.
    """
    if not (_are_of_one_type((u, vectors)) and u.dim() == vectors.dim() == 2):
        raise misfit("native", k, u=u, vectors=vectors)
    (tokens, features), (E, n) = u.shape, vectors.shape
    if not (features == n > 0 and 1 <= k <= E):
        raise misfit("native", k, u=u, vectors=vectors)
    u, vectors = u.contiguous(), vectors.contiguous()
    experts = torch.empty(tokens, k, dtype=torch.int64)
    weights = torch.empty(tokens, k)
    _function("route", u.dtype)(
        *(u.data_ptr(), vectors.data_ptr(), tokens, n, E, k),
        # Without eps nothing is standardised; the flag says so, since ctypes has no None of a
        # float.
        *(eps or 0.0, eps is not None, experts.data_ptr(), weights.data_ptr()),
    )
    return experts, weights


def add_routed(
    y: Tensor,
    u: Tensor,
    vectors: Tensor,
    A: Tensor,
    B: Tensor,
    k: int,
    eps: float | None,
) -> None:
    """Fused top-k and LoRA update, added to y [.., d] in place.

    All tensors are contiguous and of one type. Raises RoutingError as `top_experts` and `native`.
    """
    # Shapes are asked for once: decoding calls this at every layer for every token.
    sizes, outer = A.shape, B.shape
    E, n, d = sizes[0], sizes[-1], outer[-1]
    numbers = u.numel()
    if not (
        belong_together(n, sizes, outer)
        and vectors.shape == (E, n)
        and 1 <= k <= E
        and u.shape[-1] == n
        and y.shape[-1] == d
        and numbers * d == y.numel() * n
        and _are_of_one_type((y, u, vectors, A, B))
        and y.is_contiguous()
        and u.is_contiguous()
        and vectors.is_contiguous()
        and A.is_contiguous()
        and B.is_contiguous()
    ):
        raise misfit("native", k, y=y, u=u, vectors=vectors, A=A, B=B)
    _function("routed_update", u.dtype)(
        *(y.data_ptr(), u.data_ptr(), vectors.data_ptr(), A.data_ptr(), B.data_ptr()),
        *(numbers // n, n, E, k, eps or 0.0, eps is not None, sizes[1], d),
        torch.get_num_threads(),
    )


def _are_of_one_type(tensors: Iterable[Tensor]) -> bool:
    kind = None
    for tensor in tensors:
        kind = kind or tensor.dtype
        if tensor.dtype is not kind or not tensor.is_cpu:
            return False
    return kind in TYPES


@cache
def _function(name: str, dtype: torch.dtype) -> ctypes._CFuncPtr:  # type: ignore[name-defined]
    function = getattr(_library(), f"{name}_{TYPES[dtype]}")
    function.argtypes = SIGNATURES[name]
    function.restype = ctypes.c_int if name == "update" else None  # 1: an index out of range
    return function


@cache
def _library() -> ctypes.CDLL | None:
    told = os.environ.get("PHATGOOSE_NATIVE")
    if told == "0":
        return None
    compiled_here = told == "compile" or bool(os.environ.get(MORE_FLAGS))
    try:
        return (None if compiled_here else load_shipped(SOURCE)) or load_built(SOURCE)
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("The native kernel can't be built, slower ones serve: %s.", one_line(error))
        return None
