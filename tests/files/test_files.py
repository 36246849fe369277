"""Files are regular ones, read strictly or refused in one line, and appear whole or not at all."""

import json
import os
import stat
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal

import pytest
from annotated_types import Interval

from odd_files import KEPT, everything, one_line_of
from phatgoose.apps.cli.options import read_recipe
from phatgoose.errors import ConfigError, EvaluationError, ExpertError, PhatgooseError, TaskError
from phatgoose.evaluation.replay import read_marks
from phatgoose.evaluation.results import ResultStore
from phatgoose.files import (
    new_directory,
    one_line,
    read_json,
    regular_file,
    require_writable,
    sha256_of,
    shortened,
    user_cache,
    write_text,
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
class Visit:
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012
    version: Literal[1]
    floor: Annotated[int, Interval(ge=0)]
    rooms: tuple[float, ...] = ()


WHOLE = {"version": 1, "floor": 3}


def test_a_kind_is_all_that_checks_a_json_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**WHOLE, "rooms": [1, 2.5]}))
    assert read_json(path, Visit) == Visit(1, 3, (1.0, 2.5))
    assert read_json(path) == {**WHOLE, "rooms": [1, 2.5]}


def changed(**changes: object) -> str:
    return json.dumps(WHOLE | changes)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (changed(version=2), "is not valid: version: Input should be 1, got 2."),
        (changed(floor="3"), "floor: Input should be a valid integer, got '3'."),
        (changed(floor=-1), "floor: Input should be greater than or equal to 0, got -1"),
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


def test_a_text_of_others_is_one_printable_line_of_bounded_length():
    assert one_line("a\nb\x1b[31mc") == "a b [31mc"
    assert one_line("x" * 400) == "x" * 300 + "…"
    assert shortened("y" * 100) == "'" + "y" * 79 + "…"


def test_a_link_in_the_place_of_a_result_is_replaced(tmp_path, victim):
    (tmp_path / "table.json").symlink_to(victim)
    write_text(tmp_path / "table.json", "mine", PhatgooseError)
    assert (tmp_path / "table.json").read_text() == "mine"
    assert not (tmp_path / "table.json").is_symlink()
    assert victim.read_text() == KEPT
    assert everything(tmp_path) == {"table.json", victim.name} or victim.parent != tmp_path


def test_of_two_that_write_one_folder_the_first_stays_and_the_other_is_told(tmp_path):
    target = tmp_path / "expert"

    def write(text: str, meanwhile: str | None = None, overwrite: bool = False) -> None:
        with new_directory(target, ExpertError, overwrite=overwrite) as work:
            (work / "file").write_text(text)
            if meanwhile is not None:
                write(meanwhile)

    assert "can't be written" in one_line_of(lambda: write("second", meanwhile="first"))
    assert "exists already" in one_line_of(lambda: write("second"))
    assert (target / "file").read_text() == "first"
    assert everything(tmp_path) == {"expert", "expert/file"}
    write("second", overwrite=True)
    assert (target / "file").read_text() == "second"


def test_new_folders_have_the_usual_permissions_and_replaced_ones_keep_theirs(tmp_path):
    os.umask(mask := os.umask(0))
    (tmp_path / "private").mkdir(0o700)
    for target, wanted in ((tmp_path / "new", 0o777 & ~mask), (tmp_path / "private", 0o700)):
        with new_directory(target, ExpertError, overwrite=True) as work:
            (work / "file").write_text("x")
        assert stat.S_IMODE(target.stat().st_mode) == wanted
        assert stat.S_IMODE((target / "file").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("way", [".", "../moods/../moods", "../link"])
def test_a_folder_is_replaced_by_any_path_that_leads_to_it(tmp_path, monkeypatch, way):
    (tmp_path / "moods").mkdir()
    (tmp_path / "moods" / "old").touch()
    (tmp_path / "link").symlink_to("moods")
    monkeypatch.chdir(tmp_path / "moods")
    with new_directory(Path(way), ExpertError, overwrite=True) as work:
        (work / "new").touch()
    replaced, kept = ("link", {"moods/old"}) if way == "../link" else ("moods", {"moods/new"})
    assert [path.name for path in (tmp_path / replaced).iterdir()] == ["new"]
    assert kept < everything(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"link", "moods"}


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_replacement_that_fails_at_the_last_moment_keeps_the_old(tmp_path, monkeypatch, error):
    target, rename = tmp_path / "expert", os.rename
    target.mkdir()
    (target / "old").write_text(KEPT)

    def fail(source, place):
        if Path(place) == target and Path(source).name == "new":
            raise error
        rename(source, place)

    def replace() -> None:
        with new_directory(target, ExpertError, overwrite=True):
            pass

    monkeypatch.setattr("os.rename", fail)
    with pytest.raises((ExpertError, KeyboardInterrupt)) as stopped:
        replace()
    assert all(str(part) in str(stopped.value) for part in error.args[1:])
    assert (target / "old").read_text() == KEPT
    assert everything(tmp_path) == {"expert", "expert/old"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes in folders")
def test_pipes_and_devices_are_refused_and_stay(tmp_path):
    (tmp_path / "sink").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "sink", tmp_path / "pipe", Path("/dev/stdout")):
        for write in (partial(write_text, path, "mine"), partial(require_writable, path)):
            with pytest.raises(PhatgooseError, match="can't be written"):
                write(PhatgooseError)
    assert (tmp_path / "sink").is_symlink()
    assert (tmp_path / "pipe").is_fifo()
    assert everything(tmp_path) == {"sink", "pipe"}


def test_what_is_not_json_is_told_with_what_is_there(tmp_path):
    (tmp_path / "notes.json").write_text("hello there")
    (tmp_path / "rows.jsonl").write_text('{"input": "a", "target": "b"}\nhello there\n')
    wanted = "Expecting value: line 1 column 1 .*; wanted JSON, got 'hello there"
    with pytest.raises(ExpertError, match=f"notes.json is not valid: {wanted}"):
        read_json(tmp_path / "notes.json")
    with pytest.raises(TaskError, match=f"rows.jsonl, line 2 is not valid: {wanted}"):
        load_task(tmp_path / "rows.jsonl")


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    wanted = {"folder": "it is no file; name one"}
    wanted |= dict.fromkeys(("file/new.json", "file/in/new.json"), "file is no folder; name one")
    for place, why in wanted.items():
        with pytest.raises(PhatgooseError, match=f"{place} can't be written: .*{why}"):
            require_writable(tmp_path / place, PhatgooseError)
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(PhatgooseError, match="may not be written to; name another"):
        require_writable(tmp_path / "x.json", PhatgooseError)
    monkeypatch.undo()
    require_writable(tmp_path / "new" / "folder" / "x.json", PhatgooseError)
    assert everything(tmp_path) == {"folder", "file"}


def test_the_cache_is_where_xdg_says_or_below_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for named, place in (("/absolute", Path("/absolute")), ("relative", tmp_path / ".cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", named)
        assert user_cache() == place / "phatgoose"
