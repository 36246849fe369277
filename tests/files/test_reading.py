"""Files are regular ones, read strictly or refused in one line; what is quoted of them."""

import json
import os
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Literal

import pytest
from annotated_types import Interval

from odd_files import nested, one_line_of
from phatgoose.apps.cli.options import read_recipe
from phatgoose.errors import ConfigError, EvaluationError, ExpertError, TaskError
from phatgoose.evaluation.replay import read_marks
from phatgoose.evaluation.results import ResultStore
from phatgoose.files import (
    one_line,
    read_json,
    read_table,
    regular_file,
    sha256_of,
    shortened,
)
from phatgoose.tasks.loading import load_task
from phatgoose.tasks.suites.p3 import read_templates


def test_a_link_inside_its_folder_or_to_a_hub_caches_own_blobs_will_do_and_no_other(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "b").symlink_to("a")
    assert sha256_of(tmp_path / "b") == sha256(b"content").hexdigest()
    blobs = [tmp_path / f"models--me--{name}" / "blobs" / "1" for name in "xy"]
    for blob in blobs:
        blob.parent.mkdir(parents=True)
        blob.touch()
    for place in ("snapshots/abc", "snapshots/abc/inner"):
        folder = tmp_path / "models--me--x" / place
        folder.mkdir(parents=True)
        (folder / "own").symlink_to(blobs[0])
        (folder / "other").symlink_to(blobs[1])
        assert regular_file(folder / "own")
        refused = one_line_of(lambda at=folder: regular_file(at / "other"))
        assert "leads out of its folder" in refused


READERS = {  # of files that a user names: what reads a path, and how it refuses
    "expert.json": (regular_file, ExpertError),
    "recipe.toml": (read_recipe, ConfigError),
    "task.jsonl": (load_task, TaskError),
    "task.csv": (load_task, TaskError),
    "results.jsonl": (ResultStore, EvaluationError),
    "templates.yaml": (lambda path: read_templates(path.parent, "."), TaskError),
    "marks.parquet": (read_marks, EvaluationError),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", READERS)
def test_no_reader_waits_for_a_pipe(tmp_path, name):
    os.mkfifo(tmp_path / name)
    read, error = READERS[name]
    with pytest.raises(error, match=f"{name} .*it is not a regular file"):
        read(tmp_path / name)


@dataclass(frozen=True)
class Place:
    floor: Annotated[int, Interval(ge=0)]


@dataclass(frozen=True)
class Visit:
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012
    version: Literal[1]
    place: Place
    rooms: tuple[float, ...] = ()


WHOLE = {"version": 1, "place": {"floor": 3}}


def test_a_kind_is_all_that_checks_a_json_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**WHOLE, "rooms": [1, 2.5]}))
    assert read_json(path, Visit) == Visit(1, Place(3), (1.0, 2.5))
    assert read_json(path) == {**WHOLE, "rooms": [1, 2.5]}


def changed(**changes: object) -> str:
    return json.dumps(WHOLE | changes)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (changed(version=2), "is not valid: version: Input should be 1, got 2."),
        (changed(place={"floor": "3"}), "floor: Input should be a valid integer, got '3'."),
        (changed(place={"floor": -1}), "floor: Input should be greater than or equal to 0, got -1"),
        (changed(other=1), "is not valid: other: Unexpected keyword argument, got 1."),
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": 1e999}', "1e999 is not a JSON number, or too large"),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff\xfe", "can't decode"),
        (" " * (1 << 24) + "{}", "at most 16777216 bytes"),
        (changed(rooms=["x"] * (1 << 19)), "262144 values are read"),
        (None, "a.json does not exist. Make one."),
    ],
    ids=range(12),
)
def test_json_is_read_strictly_or_refused_in_one_line(tmp_path, text, complaint):
    path = tmp_path / "a.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = one_line_of(lambda: read_json(path, Visit, TaskError, " Make one."), TaskError)
    assert said.startswith(str(path))
    assert complaint in said


@pytest.mark.parametrize("text", [f"base = {nested(100_000)}", "a = " + "9" * 5000, "a = "])
def test_what_is_no_recipe_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "a.toml").write_text(text)
    said = one_line_of(lambda: read_table(tmp_path / "a.toml", "Recipe", ConfigError), ConfigError)
    assert "a.toml is not valid: " in said


def test_a_text_of_others_is_one_printable_line_of_bounded_length():
    assert one_line("a\nb\x1b[31mc") == "a b [31mc"
    assert one_line("x" * 400) == "x" * 300 + "…"
    assert shortened("y" * 100) == "'" + "y" * 79 + "…"
