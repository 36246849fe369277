"""Files and folders written whole or not at all, and what killed runs leave behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from links import KEPT, hidden
from phatgoose import files
from phatgoose.errors import ExpertError, PhatgooseError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.files import (
    is_there,
    new_directory,
    new_file,
    require_writable,
    temporary_folder,
    user_cache,
    write_text,
)
from phatgoose.training.train_expert import finished_expert
from small_disks import everything, told


def test_a_link_in_the_place_of_a_result_is_replaced(tmp_path, victim):
    for name in ("table.json", ".table.json.unfinished"):
        (tmp_path / name).symlink_to(victim)
    write_text(tmp_path / "table.json", "mine", PhatgooseError)
    assert (tmp_path / "table.json").read_text() == "mine"
    assert not (tmp_path / "table.json").is_symlink()
    assert victim.read_text() == KEPT


def test_of_two_that_write_one_expert_the_first_stays_and_the_other_is_told(llama_pool, tmp_path):
    first, second = llama_pool.experts[:2]
    target = tmp_path / "expert"

    def late() -> None:
        with new_directory(target, ExpertError) as work:
            (work / "half").write_text("of the second")
            first.save(target)

    assert "exists already" in told(late)
    assert Expert.load(target).name == first.name
    assert everything(tmp_path) == {"expert", *(f"expert/{p.name}" for p in target.iterdir())}
    assert "exists already" in told(lambda: second.save(target))
    assert second.save(target, overwrite=True).name == second.name


def test_folders_in_a_new_directory_can_be_entered_by_others(tmp_path):
    target = tmp_path / "new"
    with new_directory(target, ExpertError) as work:
        (work / "inner").mkdir()
        (work / "inner" / "file").write_text("x")
    os.umask(mask := os.umask(0))
    modes = [path.stat().st_mode & 0o777 for path in (target, target / "inner")]
    assert modes[0] == modes[1] == 0o777 & ~mask
    assert (target / "inner" / "file").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("way", ["../moods", ".", "../moods/../moods"])
def test_a_folder_is_replaced_by_any_path_that_leads_to_it(tmp_path, monkeypatch, way):
    (tmp_path / "moods").mkdir()
    (tmp_path / "moods" / "old").touch()
    monkeypatch.chdir(tmp_path / "moods")
    with new_directory(Path(way), ExpertError, overwrite=True) as work:
        (work / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["moods"]
    assert [path.name for path in (tmp_path / "moods").iterdir()] == ["new"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes in folders")
def test_what_no_file_can_replace_is_written_into(tmp_path):
    """So that `--json /dev/stdout` prints, and a superuser keeps the link of that name."""
    (tmp_path / "sink").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("sink", "pipe"):
        require_writable(tmp_path / name, PhatgooseError)
        write_text(tmp_path / name, "mine", PhatgooseError)
    assert os.read(reader, 100) == b"mine"
    os.close(reader)
    assert (tmp_path / "sink").is_symlink()
    assert (tmp_path / "pipe").is_fifo()
    assert everything(tmp_path) == {"sink", "pipe"}


@pytest.mark.parametrize("place", ["folder", "file/new.json", "file/in/new.json"])
def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(PhatgooseError, match=f"{place} can't be written"):
        require_writable(tmp_path / place, PhatgooseError)
    require_writable(tmp_path / "new" / "folder" / "x.json", PhatgooseError)
    assert everything(tmp_path) == {"folder", "file"}


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files have no names here")
def test_an_open_file_by_name_is_added_to_whatever_it_is(tmp_path):
    """As /dev/stdout is by the shell's `>`."""
    with (tmp_path / "out.txt").open("w") as out:
        (tmp_path / "stdout").symlink_to(f"/proc/self/fd/{out.fileno()}")
        out.write("before\n")
        out.flush()
        write_text(tmp_path / "stdout", "mine", PhatgooseError)
    assert (tmp_path / "stdout").is_symlink()
    assert (tmp_path / "out.txt").read_text() == "before\nmine"


def test_a_name_that_has_no_room_for_a_temporary_one_is_told_before_the_work(tmp_path):
    with pytest.raises(PhatgooseError, match="too long"):
        require_writable(tmp_path / f"{'n' * 240}.json", PhatgooseError)


KILLED = """
import os, sys
from pathlib import Path
from phatgoose.files import REPLACED, temporary_file, temporary_folder
target = Path(sys.argv[1])
with temporary_folder(target) as folder, temporary_file(target) as file:
    (folder / "half").write_text("half")
    with temporary_folder(target, REPLACED) as old:
        os.rename(target, old / target.name)
        print("there", flush=True)
        sys.stdin.read()
"""


def test_the_next_run_clears_what_a_killed_one_left_and_nothing_of_a_running_one(
    tmp_path, monkeypatch
):
    target = tmp_path / "expert"
    target.mkdir()
    (target / "old").write_text(KEPT)
    (tmp_path / ".expert.unfinished-notes").symlink_to(target)
    (tmp_path / ".expert-20240101").mkdir()
    words = [sys.executable, "-c", KILLED, str(target)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout.readline() == b"there\n"
        before = hidden(tmp_path)
        assert len(before) == 5
        files.clear_left_overs(target)  # too young to tell
        monkeypatch.setattr(files, "YOUNG", -1)
        files.clear_left_overs(target)  # and held
        assert hidden(tmp_path) == before
        running.kill()
        running.wait()
    with pytest.raises(ExpertError, match="exists already"), new_directory(target, ExpertError):
        (target / "old").read_text()  # came back: its successor never came
    assert hidden(tmp_path) == [".expert-20240101", ".expert.unfinished-notes"]
    with new_directory(target, ExpertError, overwrite=True) as work:
        (work / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert hidden(tmp_path) == [".expert-20240101", ".expert.unfinished-notes"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes in folders")
def test_a_pipe_among_the_left_overs_is_not_waited_for(tmp_path, monkeypatch):
    """Whoever opens one waits for somebody who writes, for ever in a stranger's folder."""
    monkeypatch.setattr(files, "YOUNG", -1)
    monkeypatch.setattr(files.os, "open", lambda *_: pytest.fail("opened"))
    os.mkfifo(tmp_path / ".routed.json.unfinished-pipe")
    files.clear_left_overs(tmp_path / "routed.json")
    assert hidden(tmp_path) == [".routed.json.unfinished-pipe"]


def test_two_that_work_at_one_time_leave_each_other_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "YOUNG", -1)
    target = tmp_path / "a.json"
    with temporary_folder(target) as one, new_file(target) as two:
        files.clear_left_overs(target)
        assert one.is_dir()
        two.write_text("new")
    assert target.read_text() == "new"
    assert hidden(tmp_path) == []


@pytest.mark.parametrize(
    "opened",
    [
        Expert.load,
        lambda place: Pool.open(place).experts[0],
        lambda place: Pool.open(place.parent).experts[0],
        lambda place: finished_expert(place, "example/base", {}, resume=True) or Expert.load(place),
    ],
    ids=["expert", "pool of one", "pool", "resumed"],
)
def test_an_expert_whose_replacement_was_killed_half_way_comes_back(golden_copy, opened):
    """Between the two renames it lies in a hidden folder, which belongs to nobody any more."""
    name = Expert.load(golden_copy).name
    words = [sys.executable, "-c", KILLED, str(golden_copy)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout.readline() == b"there\n"
        with pytest.raises(PhatgooseError, match=r"no expert dir|does not exist|is being replaced"):
            opened(golden_copy)  # its owner will put something in its place
        running.kill()
        running.wait()
    assert opened(golden_copy).name == name


def test_looking_for_one_result_touches_no_other(tmp_path):
    """In a folder of strangers, say; and what else is in there stays."""
    for name in (".other.replaced-x/other", ".mine.replaced-y/mine", ".mine.replaced-y/notes"):
        (tmp_path / name).mkdir(parents=True)
    assert is_there(tmp_path / "mine")
    assert not is_there(tmp_path / "nothing")
    assert hidden(tmp_path) == [".mine.replaced-y", ".other.replaced-x"]
    assert (tmp_path / ".mine.replaced-y" / "notes").is_dir()


@pytest.mark.parametrize("named", ["/absolute", None, "", "here/relative"])
def test_the_cache_is_where_xdg_says_or_below_home(tmp_path, monkeypatch, named):
    monkeypatch.setattr(Path, "expanduser", lambda path: tmp_path / path.relative_to("~"))
    if named is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", named)
    place = Path(named) if named == "/absolute" else tmp_path / ".cache"
    assert user_cache() == place / "phatgoose"
