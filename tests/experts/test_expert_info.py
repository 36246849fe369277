"""phatgoose.json: what it must hold, and names that are none."""

from __future__ import annotations

import json

import pytest

from changed_experts import (
    make,
    problem_of,
    set_info,
)
from phatgoose.errors import ExpertError
from phatgoose.experts.expert import FORMAT_VERSION, LAYOUT, Expert, check_expert


@pytest.mark.parametrize("name", ["../up", "a/b", "a b", ".hidden", "-dash", "ä", "a\n", "a:b"])
def test_names_that_could_leave_a_folder_or_break_a_card_are_refused(adapter, name):
    with pytest.raises(ExpertError, match="can't name an expert"):
        make(adapter, name=name)


@pytest.mark.parametrize("name", ["a", "A-1", "reviews_v2.1", "9lives"])
def test_ordinary_names_are_accepted(adapter, name):
    assert make(adapter, name=name).name == name


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, None, "1"])
def test_an_unknown_format_version_is_refused_with_the_known_one(directory, version):
    set_info(directory, format_version=version)
    problem = problem_of(directory)
    assert f"format version {version!r} is unknown" in problem
    assert f"version {FORMAT_VERSION}" in problem


@pytest.mark.parametrize("text", ["{", "[]", "3", "null", '"expert"', "\x00"])
def test_a_broken_description_is_refused(directory, text):
    (directory / LAYOUT.info).write_text(text)
    assert str(directory / LAYOUT.info) in problem_of(directory)


@pytest.mark.parametrize("key", ["name", "base", "adapter_sha256"])
def test_a_description_that_lacks_a_field_is_refused(directory, key):
    path = directory / LAYOUT.info
    info = json.loads(path.read_text())
    del info[key]
    path.write_text(json.dumps(info))
    assert key in problem_of(directory)


def test_a_description_with_an_unknown_field_is_refused_by_name(directory):
    set_info(directory, colour="red")
    assert "colour" in problem_of(directory)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", 5),
        ("name", "../../etc"),
        ("base", "tiny"),
        ("base", {"id": 5}),
        ("base", {"id": "tiny", "fingerprint": 5}),
        ("adapter_sha256", None),
        ("vectors_sha256", 5),
        ("task", []),
        ("metrics", "good"),
        ("embedder", 5),
    ],
)
def test_a_description_with_a_field_of_a_wrong_type_is_refused(directory, key, value):
    set_info(directory, **{key: value})
    assert check_expert(directory)
    with pytest.raises(ExpertError):
        Expert.load(directory)
