"""Work and experts, here and at URLs: complete or absent, whoever is killed or competes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from phatgoose.base.loading import Base
from phatgoose.errors import ConfigError, ExpertError
from phatgoose.experts.expert import LAYOUT, check_expert
from phatgoose.experts.kinds.peft import ADAPTER_WEIGHTS
from phatgoose.training.pool_jobs import ExpertJob, _ExpertWorkshop, train_experts
from phatgoose.training.train_expert import train_gates
from phatgoose.training.workdir import (
    SNAPSHOT,
    KeptWork,
    LocalFolder,
    discard_work,
    expert_folder,
    open_work,
    work_of,
)
from small_disks import FEW, TASK, everything, told, train
from training_jobs import LORA, job_in

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
def url(request, tmp_path) -> str:
    fsspec.filesystem("memory").rm("/", recursive=True) if request.param == "memory" else None
    return f"file://{tmp_path}/far" if request.param == "file" else "memory://far/experts"


def tensors_of(url: str, name: str, into: Path) -> dict[str, Any]:
    files, root = fsspec.core.url_to_fs(url)
    into.mkdir()
    for place in files.find(f"{root}/{name}"):
        files.get_file(place, str(into / place.rpartition("/")[2]))
    assert check_expert(into) == []
    return load_file(into / ADAPTER_WEIGHTS) | load_file(into / LAYOUT.vectors)


def names_in(url: str) -> set[str]:
    files, root = fsspec.core.url_to_fs(url)
    return {path.rpartition("/")[2] for path in files.ls(root, detail=False)}


def train_to(base: Base, job: ExpertJob, out: str) -> list[Any]:
    return list(train_experts(base, [job], out=out, peft=LORA))


class MachineLostError(BaseException):
    """The machine goes away."""


def interrupt_at(monkeypatch, copies: int) -> None:
    """After so many parts were kept, the process that trains is gone."""
    keep, kept = KeptWork.keep, []

    def keep_or_die(self, work):
        keep(self, work)
        kept.append(work)
        if len(kept) == copies:
            raise MachineLostError

    monkeypatch.setattr(KeptWork, "keep", keep_or_die)


def interrupted(base: Base, job: ExpertJob, url: str, monkeypatch, copies: int) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, copies)
        with pytest.raises(MachineLostError):
            train_to(base, job, url)


@pytest.fixture(scope="module")
def alone(originals, tmp_path_factory) -> tuple[Any, Path]:
    """What an uninterrupted training on this machine tells, and where its expert is."""
    folder = tmp_path_factory.mktemp("here")
    (finished,) = train_to(originals["llama"].copied(), job_in(folder), str(folder))
    return finished, folder / "numbers"


def with_seed(seed: int, job: ExpertJob) -> ExpertJob:
    return replace(job, training=replace(job.training, seed=seed))


@pytest.fixture(scope="module")
def alone_with_seven(originals, tmp_path_factory) -> tuple[Any, Path]:
    """The same with another seed."""
    folder = tmp_path_factory.mktemp("seven")
    (finished,) = train_to(originals["llama"].copied(), with_seed(7, job_in(folder)), str(folder))
    return finished, folder / "numbers"


def assert_same(trained: Any, url: str, wanted: tuple[Any, Path], into: Path) -> None:
    """What was trained and is at the URL is what `wanted` tells, to the bit."""
    told, folder = wanted
    assert trained.metrics["expert_best_step"] == told.metrics["expert_best_step"]
    tensors = load_file(folder / ADAPTER_WEIGHTS) | load_file(folder / LAYOUT.vectors)
    got = tensors_of(url, "numbers", into)
    assert tensors.keys() == got.keys()
    assert all(got[name].equal(tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("copies", [2, 5])  # in the middle of the expert, then of its gates
def test_a_training_goes_on_elsewhere_from_what_was_copied_up(
    url, job, llama, tmp_path, monkeypatch, copies, alone
):
    interrupted(llama, job, url, monkeypatch, copies)
    assert names_in(url) == {".numbers.work"}
    with pytest.raises(ExpertError, match="Unfinished work"):
        train_to(llama, job, url)
    (trained,) = train_to(llama, job.again(), url)
    assert trained.place == f"{url}/numbers"
    assert names_in(url) == {"numbers"}
    assert_same(trained, url, alone, tmp_path / "fetched")
    (again,) = train_to(llama, job.again(), url)
    assert again == trained


@pytest.mark.parametrize("copies", [1, 5])  # before the old run's second checkpoint; among gates
def test_a_restarted_training_keeps_nothing_of_the_old_one(
    url, job, llama, tmp_path, monkeypatch, copies, alone_with_seven
):
    seven = with_seed(7, job)
    interrupted(llama, job, url, monkeypatch, 2)
    interrupted(llama, replace(seven, restart=True), url, monkeypatch, copies)
    with pytest.raises(ConfigError, match="had other settings"):
        train_to(llama, job.again(), url)
    (trained,) = train_to(llama, seven.again(), url)
    assert_same(trained, url, alone_with_seven, tmp_path / "got")


def test_a_restart_that_is_lost_at_once_leaves_nothing_to_take_up(url, job, llama, monkeypatch):
    interrupted(llama, job, url, monkeypatch, 2)

    def die(out, identity, **how):
        assert not out.exists()
        raise MachineLostError

    monkeypatch.setattr("phatgoose.training.train_expert.open_work", die)
    with pytest.raises(MachineLostError):
        train_to(llama, replace(job, restart=True), url)
    assert names_in(url) == set()


def test_work_that_is_removed_only_in_part_counts_for_nothing(tmp_path, monkeypatch):
    kept = kept_in(tmp_path, {"run.json": "{}", "kept": "1234"})

    def rm(place, recursive=False):
        if Path(place).is_dir():
            raise PermissionError("not yours")
        Path(place).unlink()

    monkeypatch.setattr(kept.files, "rm", rm)
    with pytest.raises(PermissionError):
        kept.remove()
    assert {path.name for path in Path(kept.above).iterdir()} == {"run.json", "kept"}
    kept.fetch(tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()


def kept_in(folder: Path, near: dict[str, str]) -> KeptWork:
    """Work with these files, copied up by this process."""
    work = folder / "near"
    for name, content in near.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(content)
    kept = KeptWork(fsspec.filesystem("file"), f"{folder}/far/.numbers.work")
    kept.keep(work)
    return kept


def test_only_files_of_this_process_count_as_copied_up(tmp_path, monkeypatch):
    kept = kept_in(tmp_path, {"old": "1234", "gates/new": "1234"})
    puts = []
    put = type(kept.files).put_file
    monkeypatch.setattr(
        kept.files, "put_file", lambda near, far: (puts.append(near), put(kept.files, near, far))
    )
    work, far = tmp_path / "near", Path(kept.above)

    def copied() -> set[str]:
        names = {Path(near).name for near in puts} - {SNAPSHOT}
        puts.clear()
        return names

    kept.keep(work)
    assert copied() == set()
    (work / "gates" / "new").write_text("abcd")  # the same name and size
    kept.keep(work)
    assert copied() == {"new"}
    assert (far / "gates" / "new").read_text() == "abcd"
    fetched = KeptWork(kept.files, kept.above)
    fetched.fetch(tmp_path / "fetched")
    fetched.keep(tmp_path / "fetched")
    assert copied() == set()
    KeptWork(kept.files, kept.above).keep(work)  # of a run that knows nothing of this one
    assert copied() == {"old", "new"}


def test_a_snapshot_that_is_not_whole_counts_for_nothing_and_goes(tmp_path):
    kept = kept_in(tmp_path, {"run.json": "{}", "gates/kept": "1234"})
    work, above = tmp_path / "near", Path(kept.above)
    kept.fetch(tmp_path / "whole")
    assert (tmp_path / "whole" / "gates" / "kept").read_text() == "1234"
    (work / "gates" / "kept").unlink()
    (work / "gates" / "next").write_text("12345")
    kept.keep(work)
    assert {p.name for p in above.rglob("*")} == {"run.json", SNAPSHOT, "gates", "next"}
    damages = {
        "short": lambda: (above / "gates" / "next").write_text("12"),
        "lost": lambda: (above / "gates" / "next").unlink(),
        "cut": lambda: (above / SNAPSHOT).write_text('{"run.json":'),
    }
    for name, damage in damages.items():
        damage()
        kept.fetch(tmp_path / name)
        assert not (tmp_path / name).exists()
        assert not above.exists()
        kept.keep(work)
        assert (above / "gates" / "next").read_text() == "12345"


def test_several_processes_are_told_at_once_that_a_url_is_for_one(tmp_path, monkeypatch):
    kept = kept_in(tmp_path, {"run.json": "{}"})
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    folder = expert_folder(f"file://{tmp_path}/far")
    with (
        pytest.raises(ConfigError, match=r"far is for one process; 2 processes .* all of them see"),
        folder.training("numbers", 0.0, restart=True),
    ):
        pytest.fail("the training began")
    assert (Path(kept.above) / "run.json").exists()


def test_what_a_killed_copy_left_of_an_expert_is_removed(url, job, llama, tmp_path):
    files, root = fsspec.core.url_to_fs(url)
    save_file({"embeddings": torch.eye(2)}, tmp_path / LAYOUT.embeddings)
    left = {LAYOUT.embeddings, f"{LAYOUT.vectors}.unfinished-12", f"{LAYOUT.info}.unfinished-ab"}
    others = {"notes.txt", f"own/{LAYOUT.embeddings}"}
    for name in left | others:
        files.makedirs(f"{root}/numbers/{name}".rpartition("/")[0], exist_ok=True)
        files.put_file(str(tmp_path / LAYOUT.embeddings), f"{root}/numbers/{name}")
    train_to(llama, job, url)
    there = {path.partition("/numbers/")[2] for path in files.find(f"{root}/numbers")}
    assert there & left == set()
    assert others < there
    files.rm(f"{root}/numbers/own", recursive=True)
    assert tensors_of(url, "numbers", tmp_path / "fetched")


def test_an_expert_is_not_there_while_left_overs_are(tmp_path, monkeypatch):
    folder, place = expert_folder(f"file://{tmp_path}/far"), tmp_path / "far" / "numbers"
    place.mkdir(parents=True)
    (place / LAYOUT.embeddings).write_text("left")
    (tmp_path / "near").mkdir()
    for name in (LAYOUT.info, LAYOUT.vectors):
        (tmp_path / "near" / name).write_text("new")

    def rm_file(path):
        raise PermissionError("not yours")

    with monkeypatch.context() as patch:
        patch.setattr(folder.files, "rm_file", rm_file)
        with pytest.raises(PermissionError):
            folder._send(tmp_path / "near", str(place))
    assert not folder.has("numbers")
    folder._send(tmp_path / "near", str(place))
    assert names_in(f"{folder.url}/numbers") == {LAYOUT.info, LAYOUT.vectors}


def test_a_finished_expert_has_no_work_beside_it(tmp_path, monkeypatch):
    kept = kept_in(tmp_path, {"run.json": "{}"})
    folder = expert_folder(f"file://{tmp_path}/far")
    (tmp_path / "far" / "numbers").mkdir()
    about = '{"base": {"id": "tiny"}, "metrics": {"steps": 3}}'
    (tmp_path / "far" / "numbers" / LAYOUT.info).write_text(about)

    def rm(path, recursive):
        raise PermissionError("not yours")

    with monkeypatch.context() as patch:
        patch.setattr(folder.files, "rm", rm)
        assert folder.finished("numbers").metrics == {"steps": 3}
    assert Path(kept.above).exists()
    assert folder.finished("numbers").metrics == {"steps": 3}
    assert names_in(folder.url) == {"numbers"}


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


def test_a_store_that_takes_nothing_is_told_before_the_work(url, job, llama, monkeypatch):
    folder = expert_folder(url)
    monkeypatch.setattr(type(folder.files), "put_file", refuse)
    monkeypatch.setattr(
        "phatgoose.training.pool_jobs.train_expert", lambda *_, **__: pytest.fail("trained")
    )
    with pytest.raises(ExpertError, match=rf"^{url}/numbers can't be written: no credentials\.$"):
        train_to(llama, job, url)


@pytest.mark.parametrize(
    ("asked", "told"), [("exists", "read"), ("cat_file", "written"), ("mv", "written")]
)
def test_what_a_store_says_is_one_line(url, job, llama, monkeypatch, asked, told):
    folder = expert_folder(url)
    monkeypatch.setattr(type(folder.files), asked, refuse)
    with pytest.raises(ExpertError, match=rf"^{url}/numbers can't be {told}: no credentials\.$"):
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
