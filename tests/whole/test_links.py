"""Nothing is written through a link that somebody put where a file of ours will be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from paths import GOLDENS
from phatgoose.errors import EvaluationError, ExpertError, PhatgooseError, RoutingError
from phatgoose.evaluation.comparison.result_store import ResultStore
from phatgoose.experts.hub import push
from phatgoose.files import left_overs
from phatgoose.files.atomic import new_directory, new_file, write_text
from phatgoose.files.left_overs import temporary_folder
from phatgoose.routing.compose import compose
from phatgoose.routing.saved.save import save
from phatgoose.routing.saved.segments import add_to_packed, remove_from_packed
from phatgoose.training.destination import expert_folder
from phatgoose.training.unfinished import open_work

KEPT = "what somebody else has written"


@pytest.fixture
def victim(tmp_path) -> Path:
    """A file that must stay as it is."""
    (tmp_path / "victim").write_text(KEPT)
    return tmp_path / "victim"


def test_a_received_routed_folder_writes_through_no_link(llama, llama_pool, tmp_path, victim):
    first = llama_pool.select(["e0", "e1"])
    folder = tmp_path / "routed"
    save(compose(first, llama), folder)
    for name in (".routed.json.unfinished", f".segment-{os.getpid()}.safetensors", ".segment"):
        (folder / name).symlink_to(victim)
    add_to_packed(folder, llama_pool.select(["e2"]))
    remove_from_packed(folder, ["e0"])
    assert victim.read_text() == KEPT
    (folder / ".lock").unlink()
    (folder / ".lock").symlink_to(victim)
    with pytest.raises(RoutingError, match="symbolic links"):
        remove_from_packed(folder, ["e1"])
    assert victim.read_text() == KEPT


def test_a_link_in_the_place_of_a_result_is_replaced(tmp_path, victim):
    for name in ("table.json", ".table.json.unfinished"):
        (tmp_path / name).symlink_to(victim)
    write_text(tmp_path / "table.json", "mine", PhatgooseError)
    assert (tmp_path / "table.json").read_text() == "mine"
    assert not (tmp_path / "table.json").is_symlink()
    assert victim.read_text() == KEPT


def test_results_are_not_added_to_what_a_link_leads_to(tmp_path, victim):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.jsonl").symlink_to(victim)
    with pytest.raises(EvaluationError, match=r"results\.jsonl is a symbolic link"):
        ResultStore(tmp_path / "out" / "results.jsonl")
    (tmp_path / "out" / "results.jsonl").unlink()
    store = ResultStore(tmp_path / "out" / "results.jsonl")
    (tmp_path / "out" / "results.jsonl").symlink_to(victim)
    with pytest.raises(EvaluationError, match="can't be written"):
        store.add({"a": 1}, {"b": 2})
    (tmp_path / "out" / ".lock").symlink_to(victim)
    with (
        pytest.raises(EvaluationError, match="symbolic links"),
        ResultStore.alone(tmp_path / "out" / "results.jsonl"),
    ):
        pass
    assert victim.read_text() == KEPT


@pytest.mark.parametrize("place", ["", "lock", "run.json", "checkpoint-1/trainable.safetensors"])
def test_unfinished_work_that_is_or_holds_a_link_is_refused(tmp_path, victim, place):
    work = tmp_path / ".expert.work"
    other = tmp_path / "other"
    other.mkdir()
    (other / "kept").write_text(KEPT)
    if place:
        (work / place).parent.mkdir(parents=True)
        (work / place).symlink_to(victim)
    else:
        work.symlink_to(other)
    for restart in (False, True):
        with (
            pytest.raises(ExpertError, match="symbolic link"),
            open_work(tmp_path / "expert", {}, resume=True, restart=restart),
        ):
            pass
    assert victim.read_text() == (other / "kept").read_text() == KEPT


def test_a_kept_training_that_names_files_elsewhere_is_not_fetched(tmp_path, victim):
    folder = expert_folder(f"file://{tmp_path}/bucket")
    kept = tmp_path / "bucket" / ".a.work"
    kept.mkdir(parents=True)
    (kept / "snapshot.json").write_text(json.dumps({"../../../planted": 1}))
    (tmp_path / "bucket" / "planted").write_text("x")
    context = folder.training("a", 0)
    place = context.__enter__()
    assert not list(place.out.parent.iterdir())
    assert context.__exit__(ExpertError, ExpertError("enough"), None) in (None, False)


def test_what_is_pushed_is_no_link_out_of_the_folder(tmp_path, victim):
    golden = GOLDENS / "expert"
    folder = shutil.copytree(golden, tmp_path / "golden")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(victim)
    with pytest.raises(ExpertError, match=r"README\.md is a symbolic link that leads out"):
        push(folder, "me/golden")


# What runs that were killed leave behind

KILLED = """
import os, sys
from pathlib import Path
from phatgoose.files.left_overs import REPLACED, temporary_file, temporary_folder
target = Path(sys.argv[1])
with temporary_folder(target) as folder, temporary_file(target) as file:
    (folder / "half").write_text("half")
    with temporary_folder(target, REPLACED) as old:
        os.rename(target, old / target.name)
        print("there", flush=True)
        sys.stdin.read()
"""


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


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
