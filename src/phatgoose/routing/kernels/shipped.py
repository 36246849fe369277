"""Libraries that wheels carry: one for each level of processors, and which of them runs here.

`hatch_build.py` runs this file where neither phatgoose nor torch is installed: it imports nothing
of ours. Levels are libraries of their own, since the linker keeps only one copy of what C++ shares
between objects, such as a vector's functions, and might keep one that older processors can't run.
"""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# No -ffast-math: a library linked with it turns subnormal numbers off for the whole process.
# With -ffp-contract=off, native.cpp says itself which products are added in one step.
EXACTLY = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
OPTIMISED = ("-std=c++17", "-O3", *EXACTLY, "-fPIC")
PROCESSORS = Path("/proc/cpuinfo")
SECONDS = 120  # for a compiler

# OpenMP is asked for when compiling and not when linking. So the library names no runtime: it finds
# that which torch has loaded for all, whatever its file is called. Named, a second one would come
# in beside torch's, with threads of its own.
PARALLEL = ["-fopenmp"]
LINKED = ["-shared"]
if sys.platform == "darwin":
    PARALLEL = ["-Xpreprocessor", "-fopenmp"]
    LINKED = ["-dynamiclib", "-Wl,-undefined,dynamic_lookup"]


@dataclass(frozen=True)
class Level:
    """Processors that have `needs`, as Linux names what a processor can: compiled with `flags`."""

    name: str
    flags: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset()


V3 = frozenset(("cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3", "avx", "avx2"))
V3 |= {"bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
BF16 = ("-march=x86-64-v4", "-mavx512bf16")
ANY = Level("any")  # of the kind that the wheel is for
LEVELS = (  # of x86-64, best first
    Level("amx-bf16", (*BF16, "-mamx-tile", "-mamx-bf16"), V4 | {"avx512_bf16", "amx_bf16"}),
    Level("avx512-bf16", BF16, V4 | {"avx512_bf16"}),
    Level("avx512", ("-march=x86-64-v4",), V4),
    Level("avx2", ("-march=x86-64-v3",), V3),
    ANY,
)


def compile_levels(source: Path, folder: Path, compiler: str = "c++") -> Iterator[Path]:
    """The libraries of the C++ file `source` for processors of this kind, or OSError."""
    levels = LEVELS if platform.machine() == "x86_64" else (ANY,)
    with tempfile.TemporaryDirectory() as work:
        for level in levels:
            object_file = f"{work}/{level.name}.o"
            library = folder / _name(source, level)
            flags = (*OPTIMISED, *PARALLEL, *level.flags, "-Wno-psabi")
            run(compiler, *flags, "-c", str(source), "-o", object_file)
            run(compiler, *LINKED, object_file, "-o", str(library))
            yield library


def load_shipped(source: Path, processors: Path = PROCESSORS) -> ctypes.CDLL | None:
    """The best library for this processor beside `source`, None where none is or can be loaded.

    Linux tells in the file `processors` what this one can.
    """
    for level in _levels_of(processors):
        place = source.with_name(_name(source, level))
        if place.is_file():
            with suppress(OSError):
                return ctypes.CDLL(str(place))
    return None


def _name(source: Path, level: Level) -> str:
    return f"{source.stem}-{level.name}.so"


def _levels_of(processors: Path) -> Iterator[Level]:
    can = set[str]()
    with suppress(OSError):
        for line in processors.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("flags"):
                can = set(line.split())
                break
    return (level for level in LEVELS if level.needs <= can)


def run(*command: str) -> bytes:
    """What a compiler writes. Raises OSError, or SubprocessError after SECONDS."""
    done = subprocess.run(command, capture_output=True, timeout=SECONDS)
    if done.returncode:
        message = done.stderr.decode(errors="replace").strip()
        raise OSError(f"{command[0]} failed: {message or done.returncode}")
    return done.stdout
