"""The kernel that wheels carry: compiled for every level, and the one that this processor runs.

PHATGOOSE_TEST_SHIPPED=1 says that the package under test comes from such a wheel: then its library
has to serve, and the tests of the kernels beside this one are tests of it.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from phatgoose.routing.kernels import shipped
from phatgoose.routing.kernels.shipped import LEVELS, compile_levels, load_shipped

native_module = importlib.import_module("phatgoose.routing.kernels.native")
needs_compiler = pytest.mark.skipif(
    sys.platform == "win32" or shutil.which("c++") is None, reason="no C++ compiler"
)
FLAGS = {level.name: " ".join(sorted(level.needs)) for level in LEVELS}
SMALL = """
#include <vector>
extern "C" int answer() {
    std::vector<int> each(42, 0);
    int total = 0;
#pragma omp parallel for
    for (int i = 0; i < 42; i++) each[i] = 1;
    for (int one : each) total += one;
    return total;
}
"""


@pytest.fixture
def source(tmp_path) -> Path:
    """A small C++ file that uses OpenMP."""
    (tmp_path / "small.cpp").write_text(SMALL)
    return tmp_path / "small.cpp"


@pytest.fixture
def processor(tmp_path, monkeypatch):
    """Makes this processor one that can do what it is told."""
    place = tmp_path / "cpuinfo"
    monkeypatch.setattr(shipped, "PROCESSORS", place)
    return lambda flags: place.write_text(f"vendor_id\t: X\nflags\t\t: {flags}\nbugs\t\t: y\n")


@pytest.fixture
def loaded(monkeypatch) -> list[str]:
    """The names of libraries that were to be loaded, none of which can be."""
    names = []

    def refuse(place: str) -> None:
        names.append(Path(place).stem)
        raise OSError("an undefined symbol")

    monkeypatch.setattr(shipped.ctypes, "CDLL", refuse)
    return names


@needs_compiler
def test_what_is_compiled_serves_and_names_no_runtime_of_openmp(source, tmp_path):
    made = compile_levels(source, tmp_path)
    x86 = platform.machine().lower() in shipped.X86
    names = [f"small-{level.name}.so" for level in LEVELS] if x86 else ["small-any.so"]
    assert [library.name for library in made] == names
    library = load_shipped(source)
    assert library is not None
    assert library.answer() == 42
    assert all(b"libgomp" not in each.read_bytes() for each in made)


EVERY = [level.name for level in LEVELS]


@pytest.mark.parametrize(
    ("flags", "there", "tried"),
    [
        *((f"fpu {FLAGS[name]} sse", EVERY, EVERY[best:]) for best, name in enumerate(EVERY)),
        (FLAGS["avx512"].replace("fma ", ""), EVERY, ["any"]),  # one instruction short
        (None, ["avx2", "any"], ["any"]),  # an unknown processor
        (FLAGS["avx512-bf16"], [], []),
    ],
)
def test_the_best_level_that_a_processor_reaches_comes_first(
    flags, there, tried, source, processor, loaded
):
    for name in there:
        source.with_name(f"small-{name}.so").write_text("")
    if flags is not None:
        processor(flags)
    assert load_shipped(source) is None
    assert loaded == [f"small-{name}" for name in tried]


@pytest.mark.skipif(os.environ.get("PHATGOOSE_TEST_SHIPPED") != "1", reason="no such wheel")
def test_the_library_of_the_installed_wheel_serves(monkeypatch):
    def compile_nothing(*command: str) -> None:
        raise AssertionError("It would be compiled here.")

    monkeypatch.setattr(subprocess, "run", compile_nothing)
    library = native_module._library.__wrapped__()
    assert Path(library._name).parent == Path(native_module.__file__).parent
