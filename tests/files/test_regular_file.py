"""Files of strangers' folders: regular ones only, and none outside of their folder."""

from __future__ import annotations

import os
from hashlib import sha256

import pytest

from phatgoose.errors import ExpertError, TaskError
from phatgoose.files.regular_file import regular_file, sha256_of


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
