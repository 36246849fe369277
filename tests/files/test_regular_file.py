"""Files of strangers' folders: regular ones only, and none outside of their folder."""

from __future__ import annotations

import os
from hashlib import sha256

import pytest

from command_line import refused
from phatgoose.errors import ConfigError, EvaluationError, ExpertError, PoolError, TaskError
from phatgoose.evaluation.comparison.result_store import ResultStore
from phatgoose.experts.pool import Pool
from phatgoose.files.atomic import bring_back
from phatgoose.files.strict import refuse_pipes, regular_file, require_regular, sha256_of
from phatgoose.tasks.embeddings import load_embedder
from phatgoose.tasks.loading import load_task
from phatgoose.tasks.suites.p3 import read_templates
from phatgoose.tasks.suites.registry import local_suite


def test_a_file_and_a_link_inside_its_folder_will_do(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "b").symlink_to("a")
    assert regular_file(tmp_path / "b") == tmp_path / "b"
    assert sha256_of(tmp_path / "b") == sha256(b"content").hexdigest()


def test_a_link_out_of_its_folder_is_refused(tmp_path, victim):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").symlink_to(victim)
    with pytest.raises(TaskError, match="leads out of its folder"):
        regular_file(tmp_path / "folder" / "a", TaskError)


def test_what_is_no_file_is_refused_and_what_is_missing_is_not_found(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ExpertError, match="is not a regular file"):
            regular_file(path)
    with pytest.raises(FileNotFoundError):
        regular_file(tmp_path / "nothing")
    with pytest.raises(ExpertError, match="can't be read"):
        sha256_of(tmp_path / "nothing")


def test_a_file_has_a_size_and_may_lie_anywhere(tmp_path, victim):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").symlink_to(victim)
    assert require_regular(tmp_path / "folder" / "a", TaskError) == victim.stat().st_size
    with pytest.raises(TaskError, match=r"^My folder is not a regular file\.$"):
        require_regular(tmp_path, TaskError, "My folder")


READERS = {  # of files that a user names: what reads a path, and how it refuses
    "recipe.toml": (local_suite, TaskError),
    "task.jsonl": (load_task, TaskError),
    "task.csv": (load_task, TaskError),
    "results.jsonl": (ResultStore, EvaluationError),
    "templates.yaml": (lambda path: read_templates(path.parent, "."), TaskError),
    "modules.json": (lambda path: load_embedder(str(path.parent)), ConfigError),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", READERS)
def test_no_reader_waits_for_a_pipe(tmp_path, name):
    os.mkfifo(tmp_path / name)
    read, error = READERS[name]
    with pytest.raises(error, match=f"{name} is not a regular file"):
        read(tmp_path / name)


@pytest.mark.timeout(60)
def test_no_command_waits_for_a_recipe_that_is_a_pipe(phat, tmp_path):
    os.mkfifo(tmp_path / "a.toml")
    refused(phat("train", "--recipe", tmp_path / "a.toml"), "a.toml is not a regular file")


@pytest.mark.timeout(60)
def test_pipes_deep_in_a_folder_are_found_and_folders_and_files_are_none(tmp_path):
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text("{}")
    refuse_pipes(tmp_path, ConfigError)
    refuse_pipes(tmp_path / "nothing", ConfigError)
    os.mkfifo(tmp_path / "1_Pooling" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.safetensors is not a regular file"):
        refuse_pipes(tmp_path, ConfigError)


@pytest.mark.timeout(60)
def test_a_pipe_in_the_place_of_a_replaced_expert_holds_nobody_up(tmp_path):
    os.mkfifo(tmp_path / ".expert.replaced-abc")
    bring_back(tmp_path / "expert")
    with pytest.raises(PoolError, match="No expert was found"):
        Pool.open(tmp_path)
