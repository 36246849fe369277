"""Work and experts, here and at URLs: complete or absent, whoever is killed or competes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import fsspec
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load

from phatgoose.base import Base
from phatgoose.errors import ConfigError, ExpertError
from phatgoose.experts.expert import LAYOUT
from phatgoose.experts.peft_files import ADAPTER_WEIGHTS
from phatgoose.training.pool_jobs import ExpertJob, _ExpertWorkshop, train_experts
from phatgoose.training.train_expert import train_gates
from phatgoose.training.workdir import (
    LocalFolder,
    discard_work,
    expert_folder,
    open_work,
    work_of,
)
from small_disks import FEW, TASK, everything, told, train
from training_jobs import LORA

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


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fsspec.filesystem("memory").rm("/", recursive=True) if request.param == "memory" else None
    return f"file://{tmp_path}/far" if request.param == "file" else "memory://far/experts"


def names_in(url: str) -> set[str]:
    files, root = fsspec.core.url_to_fs(url)
    return {path.rpartition("/")[2] for path in files.ls(root, detail=False)}


def train_to(base: Base, job: ExpertJob, out: str) -> list[Any]:
    return list(train_experts(base, [job], out=out, peft=LORA))


def bytes_of(url: str, name: str) -> dict[str, bytes]:
    files, root = fsspec.core.url_to_fs(url)
    found = files.ls(f"{root}/{name}", detail=False)
    return {path.rpartition("/")[2]: files.cat_file(path) for path in found}


def tensors_of(contents: dict[str, bytes]) -> dict[str, torch.Tensor]:
    return load(contents[ADAPTER_WEIGHTS]) | load(contents[LAYOUT.vectors])


class MachineLostError(BaseException):
    """The machine goes away."""


def test_a_training_for_a_url_goes_on_here_and_ends_there(url, job, llama, tmp_path, monkeypatch):
    def lost(*_, **__):
        raise MachineLostError

    work = work_of(expert_folder(url).path / "numbers")
    with monkeypatch.context() as patch:
        patch.setattr("phatgoose.training.train_expert._trained_gates", lost)
        with pytest.raises(MachineLostError):
            train_to(llama, job, url)
    assert (work / "adapter").is_dir()
    with pytest.raises(ExpertError, match="Unfinished work"):
        train_to(llama, job, url)
    (trained,) = train_to(llama, job.again(), url)
    assert trained.place == f"{url}/numbers"
    assert names_in(url) == {"numbers"}
    assert everything(work.parent) == set()
    train_to(llama, job, str(tmp_path / "here"))
    wanted = tensors_of(bytes_of(str(tmp_path / "here"), "numbers"))
    got = tensors_of(bytes_of(url, "numbers"))
    assert wanted.keys() == got.keys()
    assert all(got[name].equal(tensor) for name, tensor in wanted.items())
    assert train_to(llama, job.again(), url) == [trained]


def test_an_expert_is_at_a_url_whole_or_not_at_all(url, job, llama, monkeypatch):
    folder, place = expert_folder(url), f"{expert_folder(url).root}/numbers"
    for left in (LAYOUT.embeddings, "notes.txt"):
        folder.files.makedirs(place, exist_ok=True)
        folder.files.pipe_file(f"{place}/{left}", b"left")
    with monkeypatch.context() as patch:
        patch.setattr(type(folder.files), "mv", refuse)
        wanted = rf"^{url}/numbers can't be written: no credentials\. .* --resume uploads it\.$"
        with pytest.raises(ExpertError, match=wanted):
            train_to(llama, job, url)
    assert not folder.has("numbers")
    with pytest.raises(ExpertError, match=r"exists already; .* or resume to keep it"):
        train_to(llama, job, url)
    monkeypatch.setattr("phatgoose.training.train_expert.fit", refuse)  # it is only copied
    train_to(llama, job.again(), url)
    found = names_in(f"{url}/numbers")
    assert {LAYOUT.info, LAYOUT.vectors, ADAPTER_WEIGHTS, "notes.txt"} <= found
    assert LAYOUT.embeddings not in found
    assert not any("unfinished" in name for name in found)


def test_a_restart_takes_nothing_from_here_and_a_url_is_tried_before_the_work(
    url, job, llama, monkeypatch
):
    folder = expert_folder(url)
    with monkeypatch.context() as patch:
        patch.setattr(type(folder.files), "mv", refuse)
        with pytest.raises(ExpertError, match="--resume uploads it"):
            train_to(llama, job, url)
    kept = folder.path / "numbers"
    assert kept.is_dir()
    train_to(llama, replace(job, restart=True), url)
    assert folder.has("numbers")
    assert not kept.exists()
    folder.files.rm(f"{folder.root}/numbers", recursive=True)
    monkeypatch.setattr(type(folder.files), "pipe_file", refuse)
    monkeypatch.setattr("phatgoose.training.train_expert.fit", None)
    with pytest.raises(ExpertError, match="numbers can't be written: no credentials"):
        train_to(llama, job, url)


def test_several_processes_are_told_at_once_that_a_url_is_for_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"far is for one process; .* all of them see"):
        expert_folder("memory://far")


def test_an_expert_is_there_when_its_description_is(tmp_path):
    folder = expert_folder(f"file://{tmp_path}")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / ADAPTER_WEIGHTS).write_text("")
    assert not folder.has("half")
    (tmp_path / "half" / LAYOUT.info).write_text("{")
    assert folder.has("half")
    with pytest.raises(ExpertError, match="half can't be read"):
        folder.finished("half")


class StoreError(Exception):
    """What a store raises, by a name of its own."""


def refuse(*_, **__):
    raise StoreError("no credentials")


def test_a_store_that_cannot_be_read_is_told_before_the_work(url, job, llama, monkeypatch):
    monkeypatch.setattr(type(expert_folder(url).files), "exists", refuse)
    with pytest.raises(ExpertError, match=rf"^{url}/numbers can't be read: no credentials\.$"):
        train_to(llama, job, url)


def test_a_folder_that_nothing_can_open_is_refused():
    with pytest.raises(ConfigError, match=r"nowhere://experts can't be used as a folder"):
        expert_folder("nowhere://experts")


def test_a_task_file_is_read_here_and_comes_along(job, tmp_path):
    task = job.task.load()
    moved = job.task.portable()
    (tmp_path / "numbers.jsonl").unlink()
    assert moved.load().digest == task.digest


def test_what_goes_elsewhere_knows_no_working_directory(base_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(base_folders["llama"])
    workshop = _ExpertWorkshop("base", "float32", expert_folder("out"), LORA, None, 0.0)
    there = workshop.portable()
    assert there.folder.path == tmp_path / "out"
    monkeypatch.chdir("/")
    assert there.base.load().id == "base"
