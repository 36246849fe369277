"""Writing: complete or absent when disks are full or read-only, processes are killed or compete."""

from __future__ import annotations

import subprocess
import sys

import pytest
from filelock import FileLock

from phatgoose.errors import ConfigError, ExpertError
from phatgoose.training.train_expert import train_gates
from phatgoose.training.workdir import LocalFolder, discard_work, open_work, work_of
from small_disks import FEW, TASK, everything, told, train

HOLD = """
from filelock import FileLock
lock = FileLock({!r})
lock.acquire()
print("held", flush=True)
input()
"""


def test_one_process_at_a_time_is_at_a_piece_of_work(tmp_path):
    out = tmp_path / "expert"
    with open_work(out, {"a": 1}, resume=False, restart=False) as work:
        (work / "checkpoint").write_text("1")
    lock = str(tmp_path / ".expert.work" / "lock")
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    with other:
        assert other.stdout.readline() == b"held\n"
        for resume, restart in ((True, False), (False, True), (False, False)):
            with pytest.raises(ExpertError, match="Another process is at work"):  # noqa: SIM117
                with open_work(out, {"a": 1}, resume=resume, restart=restart):
                    pass
        assert (work / "checkpoint").exists()
        other.kill()
    with open_work(out, {"a": 1}, resume=True, restart=False) as again:
        assert (again / "checkpoint").read_text() == "1"


def test_unfinished_work_is_continued_or_thrown_away_as_asked(tmp_path):
    out = tmp_path / "expert"

    def opened(identity: int = 1, **how: bool) -> list[str]:
        given = {"resume": False, "restart": False, **how}
        with open_work(out, {"a": identity}, **given) as work:
            found = sorted(path.name for path in work.iterdir())
            (work / "folder").mkdir(exist_ok=True)
            return found

    assert opened() == ["lock", "run.json"]
    assert "resume" in told(opened)
    assert opened(resume=True) == ["folder", "lock", "run.json"]
    with pytest.raises(ConfigError, match="other settings"):
        opened(2, resume=True)
    assert opened(2, restart=True) == ["lock", "run.json"]
    discard_work(out)
    assert everything(tmp_path) == set()
    discard_work(out)


def test_the_work_is_removed_after_its_lock_is_free(tmp_path, monkeypatch):
    """NFS and Windows remove no file that is open."""
    out, free = tmp_path / "expert", []

    def discard(out):
        with FileLock(work_of(out) / "lock").acquire(timeout=0):
            free.append(True)
        discard_work(out)

    monkeypatch.setattr("phatgoose.training.workdir.discard_work", discard)
    with open_work(out, {}, resume=False, restart=False):
        out.mkdir()
    assert free
    assert everything(tmp_path) == {"expert"}


@pytest.mark.parametrize("how", ["resume", "restart", "neither"])
def test_what_a_killed_restart_left_is_nobody_s(tmp_path, monkeypatch, how):
    out = tmp_path / "expert"
    with open_work(out, {"a": 1}, resume=False, restart=False) as work:
        for number in (1, 2):
            (work / f"checkpoint-{number}").mkdir()

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("phatgoose.training.workdir.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):  # noqa: SIM117
            with open_work(out, {"a": 2}, resume=False, restart=True):
                pass
    assert sorted(path.name for path in work.iterdir()) == ["checkpoint-1", "checkpoint-2", "lock"]
    with open_work(out, {"a": 3}, resume=how == "resume", restart=how == "restart"):
        assert sorted(path.name for path in work.iterdir()) == ["lock", "run.json"]


def test_an_expert_that_another_process_has_made_meanwhile_is_not_made_again(tmp_path):
    (tmp_path / "expert").mkdir()
    for how in ("resume", "restart", "neither"):
        given = {"resume": how == "resume", "restart": how == "restart"}
        with (
            pytest.raises(ExpertError, match=r"Another process has made .*expert meanwhile"),
            open_work(tmp_path / "expert", {}, **given),
        ):
            pass


def train_again(base, out):
    train(base, out, resume=True)


def finished_in_folder(_, out):
    LocalFolder(out.parent).finished(out.name)


@pytest.mark.parametrize("finish", [train_again, finished_in_folder])
def test_work_beside_what_is_no_expert_stays(llama, tmp_path, finish):
    with open_work(tmp_path / "expert", {}, resume=False, restart=False) as work:
        (work / "checkpoint").touch()
    (tmp_path / "expert").mkdir()
    with pytest.raises(ExpertError, match="no expert directory"):
        finish(llama, tmp_path / "expert")
    assert (work / "checkpoint").exists()


def test_what_was_left_beside_a_finished_expert_is_tidied_up(llama, tmp_path):
    expert = train(llama, tmp_path / "expert")
    work_of(tmp_path / "expert").mkdir()
    assert train(llama, tmp_path / "expert", resume=True).info == expert.info
    assert {path.name for path in tmp_path.iterdir()} == {"expert"}
    gated = train_gates(llama, expert.directory, TASK, out=tmp_path / "gated", **FEW)
    work_of(tmp_path / "gated").mkdir()
    again = train_gates(llama, expert.directory, TASK, out=tmp_path / "gated", resume=True, **FEW)
    assert again.info == gated.info
    assert {path.name for path in tmp_path.iterdir()} == {"expert", "gated"}
