"""Experts in a folder or at a URL, and unfinished work: complete or absent, whoever competes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import fsspec
import pytest
from safetensors.torch import load

from phatgoose.errors import ConfigError, ExpertError
from phatgoose.experts.expert import LAYOUT
from phatgoose.experts.peft_files import ADAPTER_WEIGHTS
from phatgoose.training.pool_jobs import ExpertFolder, train_experts
from phatgoose.training.train_expert import open_work, train_gates
from phatgoose.training.trainer import work_of
from small_disks import FEW, TASK, everything, told, train
from training_jobs import SETTINGS

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
        with open_work(out, {"a": identity}, **{"resume": False, "restart": False, **how}) as work:
            names = sorted(path.name for path in work.iterdir())
            (work / "folder").mkdir(exist_ok=True)
            return names

    assert opened() == ["lock", "run.json"]
    assert "resume" in told(opened)
    assert opened(resume=True) == ["folder", "lock", "run.json"]
    with pytest.raises(ConfigError, match="other settings"):
        opened(2, resume=True)
    assert opened(2, restart=True) == ["lock", "run.json"]
    (work_of(out) / "run.json").unlink()  # as a killed restart leaves it
    assert opened(3) == ["lock", "run.json"]
    out.mkdir()
    assert "Another process has made" in told(lambda: opened(resume=True))


def test_work_beside_what_is_no_expert_stays_and_beside_an_expert_goes(llama, tmp_path):
    with open_work(tmp_path / "expert", {}, resume=False, restart=False) as work:
        (work / "checkpoint").touch()
    (tmp_path / "expert").mkdir()
    with pytest.raises(ExpertError, match="no expert directory"):
        train(llama, tmp_path / "expert", resume=True)
    assert (work / "checkpoint").exists()
    (tmp_path / "expert").rmdir()
    expert = train(llama, tmp_path / "expert", restart=True)
    work.mkdir()
    assert train(llama, tmp_path / "expert", resume=True).info == expert.info
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


def files_at(url: str) -> dict[str, bytes]:
    files, root = fsspec.core.url_to_fs(url)
    paths = files.ls(f"{root}/numbers", detail=False)
    return {path.rpartition("/")[2]: files.cat_file(path) for path in paths}


class StoreError(Exception):
    """What a store raises, by a name of its own."""


def refuse(*_, **__):
    raise StoreError("no credentials")


def test_a_finished_expert_is_put_at_a_url_whole_and_what_could_not_be_put_is_put_when_resumed(
    url, job, llama, tmp_path, monkeypatch
):
    folder, (files, _) = ExpertFolder(url), fsspec.core.url_to_fs(url)
    put = type(files).put_file

    def but_the_description(self, source, target, *arguments, **options):
        if source.endswith(LAYOUT.info):
            refuse()
        put(self, source, target, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(files), "put_file", but_the_description)
        with pytest.raises(
            ExpertError, match=rf"^{url} can't be written: no credentials\. .*resume"
        ):
            list(train_experts(llama, [job], out=url))
    assert not folder.has("numbers")
    monkeypatch.setattr("phatgoose.training.train_expert.fit", refuse)  # it is only copied
    (put_there,) = train_experts(llama, [job.again()], out=url)
    assert folder.has("numbers")
    assert everything(folder.path) == set()
    monkeypatch.undo()
    (info,) = train_experts(llama, [job.again()], out=url)
    assert info == put_there
    list(train_experts(llama, [job], out=str(tmp_path / "here")))
    wanted, got = files_at(f"file://{tmp_path}/here"), files_at(url)
    assert wanted.keys() == got.keys()
    for file in (ADAPTER_WEIGHTS, LAYOUT.vectors):
        for name, tensor in load(wanted[file]).items():
            assert tensor.equal(load(got[file])[name])


def test_a_store_that_cannot_be_read_or_is_none_is_told_before_the_work(
    url, job, llama, monkeypatch
):
    monkeypatch.setattr(type(fsspec.core.url_to_fs(url)[0]), "exists", refuse)
    with pytest.raises(ExpertError, match=rf"^{url} can't be read: no credentials\.$"):
        list(train_experts(llama, [job], out=url))
    with pytest.raises(ExpertError, match=r"^nowhere://experts can't be read"):
        list(train_experts(llama, [job], out="nowhere://experts"))


def test_finished_experts_come_first_with_a_warning_where_settings_differ(llama, job, tmp_path):
    (first,) = train_experts(llama, [job], out=str(tmp_path))
    other = replace(SETTINGS, training=replace(SETTINGS.training, seed=3))
    with pytest.warns(UserWarning, match=r"kept as it is, with other settings: seed 0, not 3\.$"):
        (again,) = train_experts(llama, [replace(job, settings=other)], out=str(tmp_path))
    assert again == first
