"""Where experts go: directories, and fsspec's folders, which keep unfinished work too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest
from safetensors.torch import load_file

from phatgoose.base.loading import Base
from phatgoose.errors import ConfigError, ExpertError
from phatgoose.experts.expert import LAYOUT, check_expert
from phatgoose.experts.kinds.peft_files import ADAPTER_WEIGHTS
from phatgoose.training.destination import SNAPSHOT, RemoteFolder, expert_folder
from phatgoose.training.pool_jobs import ExpertJob, train_experts
from training_jobs import LORA, job_in


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


def train(base: Base, job: ExpertJob, out: str) -> list[Any]:
    return list(train_experts(base, [job], out=out, peft=LORA))


class MachineLostError(Exception):
    """The machine goes away."""


def interrupt_at(monkeypatch, copies: int) -> None:
    """After so many parts were kept, the process that trains is gone."""
    keep, kept = RemoteFolder._keep, []

    def keep_or_die(self, work, above):
        keep(self, work, above)
        kept.append(work)
        if len(kept) == copies:
            raise MachineLostError

    monkeypatch.setattr(RemoteFolder, "_keep", keep_or_die)


@pytest.fixture(scope="module")
def alone(originals, tmp_path_factory) -> tuple[Any, Path]:
    """What an uninterrupted training on this machine tells, and where its expert is."""
    folder = tmp_path_factory.mktemp("here")
    (finished,) = train(originals["llama"].copied(), job_in(folder), str(folder))
    return finished, folder / "numbers"


@pytest.mark.parametrize("copies", [2, 5])  # in the middle of the expert, then of its gates
def test_a_training_goes_on_elsewhere_from_what_was_copied_up(
    url, job, llama, tmp_path, monkeypatch, copies, alone
):
    with monkeypatch.context() as patch:
        interrupt_at(patch, copies)
        with pytest.raises(MachineLostError):
            train(llama, job, url)
    assert names_in(url) == {".numbers.work"}
    with pytest.raises(ExpertError, match="Unfinished work"):
        train(llama, job, url)
    (trained,) = train(llama, job.again(), url)
    assert trained.place == f"{url}/numbers"
    assert trained.metrics["expert_best_step"] == alone[0].metrics["expert_best_step"]
    assert names_in(url) == {"numbers"}
    wanted = load_file(alone[1] / ADAPTER_WEIGHTS)
    wanted |= load_file(alone[1] / LAYOUT.vectors)
    got = tensors_of(url, "numbers", tmp_path / "fetched")
    assert wanted.keys() == got.keys()
    assert all(got[name].equal(tensor) for name, tensor in wanted.items())
    (again,) = train(llama, job.again(), url)
    assert again == trained


def test_a_snapshot_that_is_not_whole_counts_for_nothing(tmp_path):
    folder = expert_folder(f"file://{tmp_path}/far")
    work = tmp_path / "near"
    (work / "gates").mkdir(parents=True)
    (work / "run.json").write_text("{}")
    (work / "gates" / "kept").write_text("1234")
    above = f"{folder.root}/.numbers.work"
    folder._keep(work, above)
    folder._fetch(above, tmp_path / "whole")
    assert (tmp_path / "whole" / "gates" / "kept").read_text() == "1234"
    (work / "gates" / "kept").unlink()
    (work / "gates" / "next").write_text("12345")
    folder._keep(work, above)
    assert {p.name for p in Path(above).rglob("*")} == {"run.json", SNAPSHOT, "gates", "next"}
    (Path(above) / "gates" / "next").write_text("12")
    folder._fetch(above, tmp_path / "short")
    assert not (tmp_path / "short").exists()
    (Path(above) / SNAPSHOT).write_text('{"run.json":')
    folder._fetch(above, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


def test_an_expert_is_there_when_its_description_is(tmp_path):
    folder = expert_folder(f"file://{tmp_path}")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / ADAPTER_WEIGHTS).write_text("")
    assert not folder.has("half")
    (tmp_path / "half" / LAYOUT.info).write_text("{")
    assert folder.has("half")
    with pytest.raises(ExpertError, match="half can't be read"):
        folder.finished("half")


def test_a_folder_that_nothing_can_open_is_refused():
    with pytest.raises(ConfigError, match=r"nowhere://experts can't be used as a folder"):
        expert_folder("nowhere://experts")
