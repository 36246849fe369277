"""The compiled library's cache: nobody else's code is loaded, and what is damaged is built anew."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
from hashlib import sha256
from pathlib import Path

import pytest

from phatgoose.routing.kernels import native as building
from phatgoose.routing.kernels.native import load_built

SOURCE = 'extern "C" int answer() { return 42; }\n'
EVIL = """
#include <cstdio>
struct Planted { Planted() { if (FILE* f = fopen("PLACE", "w")) fclose(f); } } planted;
extern "C" int answer() { return 666; }
"""
pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """A small C++ file; the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(building, "FLAGS", ("-fPIC",))  # quick
    (tmp_path / "small.cpp").write_text(SOURCE)
    return tmp_path / "small.cpp"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where the library is kept."""
    return tmp_path / "cache" / "phatgoose" / "native"


@pytest.fixture
def planted(tmp_path, source, folder) -> Path:
    """A library of somebody else's code in the place of ours, under the name that it should have.

    It leaves a mark when it is loaded.
    """
    (kept,) = built(source, folder)
    shutil.rmtree(folder)
    evil = tmp_path / "evil.cpp"
    evil.write_text(EVIL.replace("PLACE", str(tmp_path / "mark")))
    building._run_compiler("c++", "-shared", "-fPIC", "-o", str(tmp_path / "evil.so"), str(evil))
    digest = sha256((tmp_path / "evil.so").read_bytes()).hexdigest()
    folder.mkdir(mode=0o700)
    place = folder / f"{kept.name.rpartition('-')[0]}-{digest}.so"
    shutil.copyfile(tmp_path / "evil.so", place)
    place.chmod(0o600)
    return place


def built(source: Path, folder: Path) -> list[Path]:
    """What the cache holds after loading."""
    assert load_built(source).answer() == 42
    return list(folder.iterdir())


def assert_not_loaded(source: Path, tmp_path: Path) -> None:
    assert load_built(source).answer() == 42
    assert not (tmp_path / "mark").exists()


def test_a_library_is_built_once_and_is_nobody_elses_whatever_the_umask(source, folder):
    before = os.umask(0)
    try:
        (kept,) = built(source, folder)
        made = kept.stat()
        assert built(source, folder) == [kept]
    finally:
        os.umask(before)
    assert kept.stat().st_mtime_ns == made.st_mtime_ns
    assert stat.S_IMODE(made.st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert kept.stem.endswith(sha256(kept.read_bytes()).hexdigest())


def test_what_is_loaded_is_the_file_that_was_looked_at(source, folder, monkeypatch):
    (kept,) = built(source, folder)
    loaded = []

    def swapped(name):
        kept.unlink()  # and anything may stand there now
        loaded.append(name)
        return load(name)

    load = ctypes.CDLL
    monkeypatch.setattr(building.ctypes, "CDLL", swapped)
    assert load_built(source).answer() == 42
    assert len(loaded) == 1


def test_our_own_file_is_what_the_test_would_load(planted, source, tmp_path):
    assert load_built(source).answer() == 666  # the plant works where owner and modes are right
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("mode", [0o777, 0o701])
def test_a_folder_that_others_can_enter_is_not_used(
    planted, source, folder, tmp_path, mode, caplog
):
    folder.chmod(mode)
    assert_not_loaded(source, tmp_path)
    assert list(folder.iterdir()) == [planted]
    (line,) = caplog.messages
    assert f"{folder}, where it would be kept, must be yours and open to nobody else" in line


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_can_write_to_is_built_anew(planted, source, folder, tmp_path, mode):
    planted.chmod(mode)
    assert_not_loaded(source, tmp_path)
    assert planted not in built(source, folder)


@needs_root
@pytest.mark.parametrize("whose", ["folder", "file", "both"])
def test_what_belongs_to_somebody_else_is_not_loaded(planted, source, folder, tmp_path, whose):
    for place in {"folder": [folder], "file": [planted], "both": [folder, planted]}[whose]:
        os.chown(place, 65534, 65534)
    assert_not_loaded(source, tmp_path)


@pytest.mark.parametrize("what", ["folder", "file"])
def test_links_are_not_followed(planted, source, folder, tmp_path, what):
    place = folder if what == "folder" else planted
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    assert_not_loaded(source, tmp_path)


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "a folder"])
def test_a_damaged_library_is_built_anew(source, folder, damage):
    (kept,) = built(source, folder)
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.unlink()
    if damage == "a folder":
        kept.mkdir()
    else:
        kept.write_bytes({"cut": content[:100], "flipped": content, "emptied": b""}[damage])
    if damage == "a folder":
        assert load_built(source).answer() == 42  # for this process alone
    else:
        assert built(source, folder) == [kept]
        assert kept.stem.endswith(sha256(kept.read_bytes()).hexdigest())


def test_a_relative_cache_is_no_cache(source, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert load_built(source).answer() == 42
    assert list((tmp_path / "here").iterdir()) == []
    assert list((tmp_path / "home" / ".cache" / "phatgoose" / "native").iterdir())
    monkeypatch.setenv("HOME", "home")
    assert load_built(source).answer() == 42
    assert list((tmp_path / "here").iterdir()) == []


def test_where_nothing_can_be_kept_it_is_built_for_this_process(source, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    assert load_built(source).answer() == 42
    (line,) = caplog.messages
    assert "built for this process alone" in line
    assert "\n" not in line


@pytest.mark.skipif(
    not hasattr(ctypes.pythonapi, "GOMP_parallel"), reason="torch has no OpenMP like GNU's"
)
@pytest.mark.parametrize("is_clang", [False, True])
def test_no_second_openmp_is_named_beside_torchs(source, folder, monkeypatch, is_clang):
    run = building._run_compiler

    def told(*command: str, folder: str | None = None) -> bytes:
        asked = b"#define __clang__ 1\n" if is_clang and "-dM" in command else b""
        return run(*command, folder=folder) + asked

    monkeypatch.setattr(building, "_run_compiler", told)
    monkeypatch.setattr(building, "FLAGS", ("-fPIC", "-fopenmp"))
    source.write_text(
        'extern "C" int answer() {\n    int total = 0;\n'
        "#pragma omp parallel for reduction(+ : total)\n"
        "    for (int i = 0; i < 42; i++) total++;\n    return total;\n}\n"
    )
    (kept,) = built(source, folder)
    assert (b"libgomp" in kept.read_bytes()) == is_clang


def test_more_flags_make_another_library(source, folder, monkeypatch):
    (kept,) = built(source, folder)
    monkeypatch.setenv("PHATGOOSE_NATIVE_FLAGS", "-O1 -g")
    assert len(built(source, folder)) == 2
    monkeypatch.delenv("PHATGOOSE_NATIVE_FLAGS")
    assert kept in built(source, folder)
