"""Files and folders appear whole or not at all, and nothing is written through a link."""

import os
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from odd_files import KEPT, everything, one_line_of
from phatgoose.errors import ExpertError, PhatgooseError
from phatgoose.files import new_directory, require_writable, user_cache, write_text


def test_a_link_in_the_place_of_a_result_is_replaced(tmp_path, victim):
    (tmp_path / "table.json").symlink_to(victim)
    write_text(tmp_path / "table.json", "mine", PhatgooseError)
    assert (tmp_path / "table.json").read_text() == "mine"
    assert not (tmp_path / "table.json").is_symlink()
    assert victim.read_text() == KEPT
    assert everything(tmp_path) == {"table.json", victim.name} or victim.parent != tmp_path


def test_of_two_that_write_one_folder_the_first_stays_and_the_other_is_told(tmp_path):
    target = tmp_path / "expert"

    def write(text: str, meanwhile: str | None = None, overwrite: bool = False) -> None:
        with new_directory(target, ExpertError, overwrite=overwrite) as work:
            (work / "file").write_text(text)
            if meanwhile is not None:
                write(meanwhile)

    assert "can't be written" in one_line_of(lambda: write("second", meanwhile="first"))
    assert "exists already" in one_line_of(lambda: write("second"))
    assert (target / "file").read_text() == "first"
    assert everything(tmp_path) == {"expert", "expert/file"}
    write("second", overwrite=True)
    assert (target / "file").read_text() == "second"


def test_new_folders_have_the_usual_permissions_and_replaced_ones_keep_theirs(tmp_path):
    os.umask(mask := os.umask(0))
    (tmp_path / "private").mkdir(0o700)
    for target, wanted in ((tmp_path / "new", 0o777 & ~mask), (tmp_path / "private", 0o700)):
        with new_directory(target, ExpertError, overwrite=True) as work:
            (work / "file").write_text("x")
        assert stat.S_IMODE(target.stat().st_mode) == wanted
        assert stat.S_IMODE((target / "file").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("exchanged", [True, False])
@pytest.mark.parametrize("way", [".", "../moods/../moods", "../link"])
def test_a_folder_is_replaced_by_any_path_that_leads_to_it(tmp_path, monkeypatch, way, exchanged):
    (tmp_path / "moods").mkdir()
    (tmp_path / "moods" / "old").touch()
    (tmp_path / "link").symlink_to("moods")
    monkeypatch.chdir(tmp_path / "moods")
    if not exchanged:  # names can't be, on this system
        monkeypatch.setattr("ctypes.CDLL", lambda _: None)
    with new_directory(Path(way), ExpertError, overwrite=True) as work:
        (work / "new").touch()
    replaced, kept = ("link", {"moods/old"}) if way == "../link" else ("moods", {"moods/new"})
    assert [path.name for path in (tmp_path / replaced).iterdir()] == ["new"]
    assert kept < everything(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"link", "moods"}


def test_a_replacement_that_fails_at_the_last_moment_keeps_the_old(tmp_path, monkeypatch):
    target, rename = tmp_path / "expert", os.rename
    target.mkdir()
    (target / "old").write_text(KEPT)

    def fail(source, place):
        if Path(place) == target and Path(source).name == "new":
            raise OSError(5, "Input/output error")
        rename(source, place)

    def replace() -> None:
        with new_directory(target, ExpertError, overwrite=True):
            pass

    with monkeypatch.context() as broken:
        broken.setattr("ctypes.CDLL", lambda _: None)
        broken.setattr("os.rename", fail)
        assert "Input/output error" in one_line_of(replace)
    assert (target / "old").read_text() == KEPT
    assert everything(tmp_path) == {"expert", "expert/old"}


KILLED = """
import sys
from functools import partial
from pathlib import Path
from phatgoose.errors import ExpertError
from phatgoose.files import new_directory
with new_directory(Path(sys.argv[1]), ExpertError, overwrite=True) as work:
    (work / "half").write_text("half")
    print("there", flush=True)
    sys.stdin.read()
"""


def test_a_run_that_is_killed_leaves_what_was_there(tmp_path):
    target = tmp_path / "expert"
    target.mkdir()
    (target / "old").write_text(KEPT)
    words = [sys.executable, "-c", KILLED, str(target)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout.readline() == b"there\n"
        running.kill()
    assert [path.name for path in target.iterdir()] == ["old"]
    (left,) = [path.name for path in tmp_path.iterdir() if path != target]
    assert left.startswith(".expert.unfinished-")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes in folders")
def test_pipes_and_devices_are_refused_and_stay(tmp_path):
    (tmp_path / "sink").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "sink", tmp_path / "pipe", Path("/dev/stdout")):
        for write in (partial(write_text, path, "mine"), partial(require_writable, path)):
            with pytest.raises(PhatgooseError, match="can't be written"):
                write(PhatgooseError)
    assert (tmp_path / "sink").is_symlink()
    assert (tmp_path / "pipe").is_fifo()
    assert everything(tmp_path) == {"sink", "pipe"}


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for place in ("folder", "file/new.json", "file/in/new.json"):
        with pytest.raises(PhatgooseError, match=f"{place} can't be written"):
            require_writable(tmp_path / place, PhatgooseError)
    require_writable(tmp_path / "new" / "folder" / "x.json", PhatgooseError)
    assert everything(tmp_path) == {"folder", "file"}


def test_the_cache_is_where_xdg_says_or_below_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for named, place in (("/absolute", Path("/absolute")), ("relative", tmp_path / ".cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", named)
        assert user_cache() == place / "phatgoose"
