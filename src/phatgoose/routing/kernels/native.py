"""The native kernel, `native.cpp`: shipped in wheels, or compiled and cached here, for CPUs.

Wheels of a platform carry it compiled (`shipped`). Elsewhere, or with `PHATGOOSE_NATIVE=compile` in
the environment, the machine's C++ compiler (`$CXX`, else c++) builds it once, in about two seconds,
into the user's cache; a folder that others could write to isn't used. Without a compiler the other
kernels serve, more slowly, and one line says so. `PHATGOOSE_NATIVE=0` turns it off.

The library takes addresses of contiguous CPU tensors through ctypes and trusts types and sizes:
those of experts and saved models were checked when their files were read. It runs on torch's own
OpenMP threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ...files import one_line, user_cache
from .shipped import LINKED, OPTIMISED, load_shipped, run

logger = logging.getLogger(__name__)

FLAGS = (*OPTIMISED, "-march=native", "-fopenmp")
# For sanitizers, in the environment (research/reliability.md).
MORE_FLAGS = "PHATGOOSE_NATIVE_FLAGS"
SOURCE = Path(__file__).with_suffix(".cpp")
TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
POINTER = ctypes.c_void_p
INDEX = ctypes.c_int64
ROUTING = [INDEX] * 4 + [ctypes.c_float, ctypes.c_int]  # tokens, n, E, k, eps, standardised
SIGNATURES = {
    "route": [POINTER] * 2 + ROUTING + [POINTER] * 2 + [INDEX],
    "update": [POINTER] * 6 + [INDEX] * 7,
    "routed_update": [POINTER] * 5 + ROUTING + [INDEX] * 3,
}


def load_built(source: Path) -> ctypes.CDLL:
    """The library of the C++ file `source`, from the user's cache, or built now and kept there.

    Raises OSError or SubprocessError when it can't be built or loaded.
    """
    command = os.environ.get("CXX") or "c++"
    compiler = shutil.which(command)
    if compiler is None:
        raise FileNotFoundError(f"there is no C++ compiler, {command!r}")
    more = shlex.split(os.environ.get(MORE_FLAGS, ""))
    # The compiler's macros name its version and this processor: both belong to the cache's key.
    macros = run(compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull)
    # Loaded for all by torch already: naming it would bring in a second runtime (`shipped`).
    is_loaded = hasattr(ctypes.pythonapi, "GOMP_parallel") and b"__clang__" not in macros
    linking = [*LINKED, *more] if is_loaded else [*LINKED, "-fopenmp", *more]
    compiling = (*FLAGS, *more, "-c")
    content = source.read_bytes() + macros + " ".join((compiler, *compiling, *linking)).encode()
    name = f"{source.stem}-{hashlib.sha256(content).hexdigest()[:16]}.so"
    folder = _private_cache()
    if folder and (folder / name).is_file():
        try:
            return ctypes.CDLL(str(folder / name))
        except OSError:  # damaged
            (folder / name).unlink()
    # Beside its place, so that it is complete before it has the name that others look for.
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as work:
        compiled = str(Path(work) / "compiled.o")
        built = Path(work) / name
        run(compiler, *compiling, "-o", compiled, str(source))
        run(compiler, *linking, "-o", str(built), compiled)
        if folder:
            built = built.rename(folder / name)
        return ctypes.CDLL(str(built))


def _private_cache() -> Path | None:
    """The folder for libraries, None where others than the user could write to it."""
    try:
        folder = user_cache() / "native"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = folder.lstat()
        is_own = not hasattr(os, "geteuid") or info.st_uid == os.geteuid()
        if is_own and not folder.is_symlink() and not info.st_mode & 0o077:
            return folder
        why = f"{folder} must be yours and open to nobody else (chmod 700)"
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows where ~ is
        why = one_line(error)
    logger.warning("The native kernel is built for this process alone: %s.", why)
    return None


def runs_natively(*tensors: Tensor) -> bool:
    """True when the library is there and can take `tensors`: one type, CPU, no gradients."""
    dtype = tensors[0].dtype
    for tensor in tensors:
        if tensor.dtype is not dtype or not tensor.is_cpu:
            return False
    if dtype not in TYPES or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return _library() is not None


def native(u: Tensor, experts: Tensor, weights: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The routed product of `kernels`, expert by expert, [T, d]; where `runs_natively(u, A, B)`."""
    tokens, k = experts.shape
    E, r, n = A.shape
    d = B.shape[2]
    delta = u.new_zeros(tokens, d)  # whatever torch's default device is
    # Addresses are of rows without gaps; this list also keeps copies alive during the call.
    tensors = [part.contiguous() for part in (delta, u, experts, weights.float(), A, B)]
    addresses = [part.data_ptr() for part in tensors]
    sizes = (tokens, k, E, r, n, d)
    if _function("update", u.dtype)(*addresses, *sizes, torch.get_num_threads()):
        raise IndexError(f"An index is not among the {E} experts.")  # found in C++
    return delta


def top_experts(u: Tensor, vectors: Tensor, k: int, eps: float | None) -> tuple[Tensor, Tensor]:
    """The k experts of the highest affinity for each token of u [T, n], and their weights.

    `vectors` [E, n] are those of the experts, in the type of `u`. With `eps` the affinity is
    v̄ᵀu / (sqrt(var(u) + eps) √n), with None |vᵀu|. Returns experts [T, k] int64, best first, of
    equals the first, and weights [T, k] float32: the softmax.
    """
    tokens, n = u.shape
    u = u.contiguous()
    vectors = vectors.contiguous()
    experts = u.new_empty(tokens, k, dtype=torch.int64)
    weights = u.new_empty(tokens, k, dtype=torch.float32)
    _function("route", u.dtype)(
        u.data_ptr(),
        vectors.data_ptr(),
        tokens,
        n,
        len(vectors),
        k,
        # Without eps nothing is standardised; the flag says so: ctypes has no None of a float.
        eps or 0.0,
        eps is not None,
        experts.data_ptr(),
        weights.data_ptr(),
        torch.get_num_threads(),
    )
    return experts, weights


Stacked = tuple[Tensor, Tensor, Tensor]  # the experts' vectors, A and B


def add_routed(y: Tensor, u: Tensor, stacked: Stacked, k: int, eps: float | None) -> None:
    """Fused top-k and LoRA update, added to y [.., d] in place; all contiguous and of one type."""
    vectors, A, B = stacked
    E, r, n = A.shape
    _function("routed_update", u.dtype)(
        y.data_ptr(),
        u.data_ptr(),
        vectors.data_ptr(),
        A.data_ptr(),
        B.data_ptr(),
        u.numel() // n,
        n,
        E,
        k,
        eps or 0.0,
        eps is not None,
        r,
        y.shape[-1],
        torch.get_num_threads(),
    )


@cache
def _function(name: str, dtype: torch.dtype) -> ctypes._CFuncPtr:  # type: ignore[name-defined]
    function = getattr(_library(), f"{name}_{TYPES[dtype]}")
    function.argtypes = SIGNATURES[name]
    function.restype = ctypes.c_int if name == "update" else None  # 1: an index out of range
    return function


@cache
def _library() -> ctypes.CDLL | None:
    mode = os.environ.get("PHATGOOSE_NATIVE")
    if mode == "0":
        return None
    is_built_here = mode == "compile" or os.environ.get(MORE_FLAGS)
    try:
        shipped = None if is_built_here else load_shipped(SOURCE)
        return shipped or load_built(SOURCE)
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("The native kernel can't be built, slower ones serve: %s.", one_line(error))
        return None
