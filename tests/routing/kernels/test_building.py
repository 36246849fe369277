"""The compiled library's cache."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

import phatgoose.routing.kernels.native as building
from phatgoose.routing.kernels.native import load_built

SOURCE = 'extern "C" int answer() { return 42; }\n'
pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


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


def built(source: Path, folder: Path) -> list[Path]:
    """What the cache holds after loading."""
    assert load_built(source).answer() == 42
    return list(folder.iterdir())


def test_a_library_is_built_once_into_a_folder_of_ones_own(source, folder):
    before = os.umask(0)
    try:
        (kept,) = built(source, folder)
        made = kept.stat()
        assert built(source, folder) == [kept]
    finally:
        os.umask(before)
    assert kept.stat().st_mtime_ns == made.st_mtime_ns
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_damaged_library_is_built_anew(source, folder):
    (kept,) = built(source, folder)
    kept.unlink()
    kept.write_bytes(b"not a library")
    assert built(source, folder) == [kept]


@pytest.mark.parametrize("way", ["mode", "owner", "link", "file"])
def test_a_folder_that_others_could_write_to_is_not_used(source, folder, tmp_path, way, caplog):
    (kept,) = built(source, folder)
    kept.unlink()
    kept.mkdir()  # nothing that could be loaded
    if way == "mode":
        folder.chmod(0o777)
    elif way == "owner":
        if os.geteuid() != 0:
            pytest.skip("only root can give folders away")
        os.chown(folder, 65534, 65534)
    elif way == "link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        shutil.rmtree(folder)
        folder.write_text("a file")
    caplog.clear()
    assert load_built(source).answer() == 42
    (line,) = caplog.messages
    assert "built for this process alone" in line
    assert "\n" not in line
