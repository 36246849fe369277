"""What killed runs leave behind, and who clears it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from links import KEPT, hidden
from phatgoose.errors import ExpertError, PhatgooseError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.files import atomic as left_overs
from phatgoose.files.atomic import is_there, new_directory, new_file, temporary_folder
from phatgoose.training.train_expert import finished_expert

KILLED = """
import os, sys
from pathlib import Path
from phatgoose.files.atomic import REPLACED, temporary_file, temporary_folder
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
        left_overs.clear_left_overs(target)  # too young to tell
        monkeypatch.setattr(left_overs, "YOUNG", -1)
        left_overs.clear_left_overs(target)  # and held
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
    monkeypatch.setattr(left_overs, "YOUNG", -1)
    monkeypatch.setattr(left_overs.os, "open", lambda *_: pytest.fail("opened"))
    os.mkfifo(tmp_path / ".routed.json.unfinished-pipe")
    left_overs.clear_left_overs(tmp_path / "routed.json")
    assert hidden(tmp_path) == [".routed.json.unfinished-pipe"]


def test_two_that_work_at_one_time_leave_each_other_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(left_overs, "YOUNG", -1)
    target = tmp_path / "a.json"
    with temporary_folder(target) as one, new_file(target) as two:
        left_overs.clear_left_overs(target)
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
        lambda place: finished_expert(place, {}, resume=True) or Expert.load(place),
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
