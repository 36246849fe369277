"""The native kernel's library: that of a wheel, by processor, or one built here and kept.

PHATGOOSE_TEST_SHIPPED=1 says that the package under test comes from such a wheel: then its library
has to serve, and the tests of kernels beside this file are tests of it.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from phatgoose.routing.kernels.shipped import LEVELS, compile_levels, load_shipped

native = importlib.import_module("phatgoose.routing.kernels.native")
of_a_wheel = os.environ.get("PHATGOOSE_TEST_SHIPPED") == "1"
needs_compiler = pytest.mark.skipif(
    sys.platform == "win32" or shutil.which("c++") is None, reason="no C++ compiler"
)
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
def source(tmp_path, monkeypatch) -> Path:
    """A small C++ file that uses OpenMP; the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "small.cpp").write_text(SMALL)
    return tmp_path / "small.cpp"


# Those of wheels


@needs_compiler
def test_what_is_compiled_serves_and_names_no_runtime_of_openmp(source, tmp_path):
    libraries = list(compile_levels(source, tmp_path))
    x86 = platform.machine() == "x86_64"
    names = [f"small-{level.name}.so" for level in LEVELS] if x86 else ["small-any.so"]
    assert [library.name for library in libraries] == names
    library = load_shipped(source)
    assert library is not None
    assert library.answer() == 42
    assert all(b"libgomp" not in each.read_bytes() for each in libraries)


FLAGS = {level.name: " ".join(sorted(level.needs)) for level in LEVELS}
EVERY = list(FLAGS)


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
    flags, there, tried, source, tmp_path, monkeypatch
):
    for name in there:
        source.with_name(f"small-{name}.so").write_text("")
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"vendor_id\t: X\nflags\t\t: {flags}\nbugs\t\t: y\n")
    loaded = []

    def refuse(place: str) -> None:
        loaded.append(Path(place).stem)
        raise OSError("an undefined symbol")

    monkeypatch.setattr("ctypes.CDLL", refuse)
    assert load_shipped(source, tmp_path / "cpuinfo") is None
    assert loaded == [f"small-{name}" for name in tried]


@pytest.mark.skipif(not of_a_wheel, reason="no such wheel")
def test_the_library_of_the_installed_wheel_serves(monkeypatch):
    monkeypatch.delattr(subprocess, "run")  # nothing is compiled here
    library = native._library.__wrapped__()
    assert Path(library._name).parent == Path(native.__file__).parent


# Those built here


@pytest.fixture
def build(source, monkeypatch):
    """Load the library, which is built if need be."""
    if of_a_wheel or shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    monkeypatch.delenv("CXX", raising=False)

    def load() -> list[Path]:
        assert native.load_built(source).answer() == 42
        folder = source.parent / "cache" / "phatgoose" / "native"
        return list(folder.iterdir()) if folder.is_dir() else []

    return load


def test_a_library_is_built_once_into_a_folder_of_ones_own_and_anew_when_damaged(build):
    before = os.umask(0)
    try:
        (kept,) = build()
        first = kept.stat()
        assert build() == [kept]
    finally:
        os.umask(before)
    assert kept.stat().st_mtime_ns == first.st_mtime_ns
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    kept.unlink()
    kept.write_bytes(b"not a library")
    assert build() == [kept]


@pytest.mark.parametrize("way", ["mode", "owner", "link", "file"])
def test_a_folder_that_others_could_write_to_is_not_used(build, tmp_path, way, caplog):
    (kept,) = build()
    folder = kept.parent
    kept.unlink()
    kept.mkdir()  # nothing that could be loaded
    if way == "mode":
        folder.chmod(0o777)
    elif way == "owner":
        if os.geteuid() != 0:
            pytest.skip("only root can give folders away")
        os.chown(folder, 65534, 65534)
    else:
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere") if way == "link" else folder.touch()
    caplog.clear()
    build()
    (line,) = caplog.messages
    assert "built for this process alone" in line
    assert "\n" not in line


def test_a_compiler_that_fails_is_no_error_and_one_line(monkeypatch, tmp_path, caplog):
    (tmp_path / "c++").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PHATGOOSE_NATIVE", "compile")
    for compiler in (str(tmp_path / "c++"), "no-such-compiler"):
        monkeypatch.setenv("CXX", compiler)
        assert native._library.__wrapped__() is None  # as in a fresh process
    assert [line.count("\n") for line in caplog.messages] == [0, 0]
    assert "there is no C++ compiler, 'no-such-compiler'" in caplog.messages[1]
