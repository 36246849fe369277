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
    half_character,
    one_line,
    parse_yaml,
    read_json,
    regular_file,
    require_regular,
    sha256_of,
    shortened,
)
from phatgoose.tasks.loading import load_task
from phatgoose.tasks.suites.p3 import read_templates
from phatgoose.tasks.suites.registry import open_suite


def test_a_file_and_a_link_inside_its_folder_will_do(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "b").symlink_to("a")
    assert regular_file(tmp_path / "b") == tmp_path / "b"
    assert sha256_of(tmp_path / "b") == sha256(b"content").hexdigest()


@pytest.mark.parametrize("folder", ["snapshots/abc", "snapshots/abc/inner"])
def test_in_a_hub_cache_links_lead_to_the_same_repositorys_blobs(tmp_path, folder):
    for repository in ("models--me--x", "models--me--y"):
        (tmp_path / repository / folder).mkdir(parents=True)
        (tmp_path / repository / "blobs").mkdir()
        (tmp_path / repository / "blobs" / "1").touch()
    place = tmp_path / "models--me--x" / folder
    (place / "own").symlink_to(tmp_path / "models--me--x" / "blobs" / "1")
    (place / "other").symlink_to(tmp_path / "models--me--y" / "blobs" / "1")
    assert regular_file(place / "own")
    with pytest.raises(ExpertError, match="leads out of its folder"):
        regular_file(place / "other")


def test_what_is_no_file_is_refused_and_what_is_missing_is_not_found(tmp_path, victim):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").symlink_to(victim)
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ExpertError, match="is not a regular file"):
            regular_file(path)
    with pytest.raises(FileNotFoundError):
        regular_file(tmp_path / "nothing")
    with pytest.raises(ExpertError, match="does not exist"):
        sha256_of(tmp_path / "nothing")
    with pytest.raises(TaskError, match="leads out of its folder"):
        regular_file(tmp_path / "folder" / "a", TaskError)
    assert require_regular(tmp_path / "folder" / "a", TaskError) == victim.stat().st_size


READERS = {  # of files that a user names: what reads a path, and how it refuses
    "recipe.toml": (read_recipe, ConfigError),
    "suite.toml": (open_suite, TaskError),
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
    with pytest.raises(error, match=f"{name} is not a regular file"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": 1e999}', "1e999 is not a JSON number, or too large"),
        ("[" * 100_000, "nested too deeply"),
        (f'{{"a": {nested(100)}}}', "nested too deeply"),
        ("[]", "wanted an object"),
        (b"\xff\xfe", "is not valid: 'utf-8' codec can't decode"),
        (" " * (1 << 24) + "{}", "at most 16777216 are read"),
    ],
    ids=range(8),
)
def test_json_is_read_strictly(tmp_path, text, complaint):
    (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ExpertError, match=complaint):
        read_json(tmp_path / "a.json")


@dataclass(frozen=True)
class Place:
    floor: Annotated[int, Interval(ge=0)]
    room: str = "1"

    def __post_init__(self):
        if self.room == "13":
            raise ValueError("room is 13")


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


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"version": 2}, "version: Input should be 1, got 2."),
        ({"place": {}}, "place.floor: Field required."),
        ({"place": {"floor": "3"}}, "place.floor: Input should be a valid integer, got '3'."),
        ({"place": {"floor": -1}}, "place.floor: Input should be greater than or equal to 0, got"),
        ({"place": {"floor": 1, "room": "13"}}, "place: room is 13."),
        ({"rooms": [1, None]}, "rooms.1: Input should be a valid number, got None."),
        ({"other": 1}, "other: Unexpected keyword argument, got 1."),
    ],
)
def test_what_is_not_of_the_kind_is_told_in_one_line(tmp_path, change, complaint):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**WHOLE, **change}))
    told = one_line_of(lambda: read_json(path, Visit, TaskError), TaskError)
    assert told.startswith(f"{path} is not valid: {complaint}")


def test_a_missing_file_is_told_with_a_hint(tmp_path):
    path = tmp_path / "a.json"
    told = one_line_of(lambda: read_json(path, Visit, TaskError, " Make one."), TaskError)
    assert told == f"{path} does not exist. Make one."


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", f"base = {nested(100_000)}"),
        ("a.toml", "a = " + "9" * 5000),
        ("a.toml", "a = "),
        ("a.yaml", f"a: {nested(2000)}"),
        ("a.yaml", "a: " + "9" * 5000),
        ("a.yaml", "a: ]"),
        ("a.yaml", "- a"),
    ],
    ids=range(7),
)
def test_what_is_no_recipe_is_told_in_one_line(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert "is not valid: " in one_line_of(lambda: read_recipe(tmp_path / name), ConfigError)


def test_what_begins_as_a_number_is_a_text_where_it_goes_on():
    text = "148e8e91-4f38-4427: 2e-4\nb: 1e5x\nc: -.5E+3"
    assert parse_yaml(text) == {"148e8e91-4f38-4427": 2e-4, "b": "1e5x", "c": -500.0}


def test_half_a_character_is_found_and_whole_ones_are_none():
    assert half_character("a😀é") is None
    assert half_character(json.loads(r'"a\ud83d b\ude00"')) == "\ud83d"
    assert half_character(b"caf\xe9".decode(errors="surrogateescape")) == "\udce9"


def test_a_text_of_others_is_one_printable_line_of_bounded_length():
    assert one_line("a\nb\x1b[31mc") == "a b [31mc"
    assert one_line("x" * 400) == "x" * 300 + "…"
    assert shortened("y" * 100) == "'" + "y" * 79 + "…"
