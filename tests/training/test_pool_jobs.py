"""Experts trained as jobs, here or elsewhere."""

from __future__ import annotations

from phatgoose.training.pool_jobs import _ExpertWorkshop
from phatgoose.training.workdir import expert_folder
from training_jobs import LORA


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
