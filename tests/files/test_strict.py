"""Strangers' files: regular ones only, read strictly or refused in one line; what is quoted."""

import json
import os
import time
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odd_files import nested, one_line_of
from phatgoose.apps.cli.options import read_recipe
from phatgoose.errors import ConfigError, EvaluationError, ExpertError, PoolError, TaskError
from phatgoose.evaluation.replay import read_marks
from phatgoose.evaluation.results import ResultStore
from phatgoose.experts.pool import Pool
from phatgoose.files import (
    MOST_TOML_BYTES,
    bring_back,
    half_character,
    one_line,
    parse_yaml,
    read_json_object,
    read_toml,
    refuse_pipes,
    regular_file,
    require_regular,
    sha256_of,
    shortened,
)
from phatgoose.tasks.embeddings import load_embedder
from phatgoose.tasks.loading import load_task
from phatgoose.tasks.suites.p3 import read_templates
from phatgoose.tasks.suites.registry import open_suite


def test_a_file_and_a_link_inside_its_folder_will_do(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "b").symlink_to("a")
    assert regular_file(tmp_path / "b") == tmp_path / "b"
    assert sha256_of(tmp_path / "b") == sha256(b"content").hexdigest()


def test_what_is_no_file_is_refused_and_what_is_missing_is_not_found(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ExpertError, match="is not a regular file"):
            regular_file(path)
    with pytest.raises(FileNotFoundError):
        regular_file(tmp_path / "nothing")
    with pytest.raises(ExpertError, match="can't be read"):
        sha256_of(tmp_path / "nothing")


def test_a_link_out_of_its_folder_is_refused_but_has_a_size(tmp_path, victim):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").symlink_to(victim)
    with pytest.raises(TaskError, match="leads out of its folder"):
        regular_file(tmp_path / "folder" / "a", TaskError)
    assert require_regular(tmp_path / "folder" / "a", TaskError) == victim.stat().st_size
    with pytest.raises(TaskError, match=r"^My folder is not a regular file\.$"):
        require_regular(tmp_path, TaskError, "My folder")


READERS = {  # of files that a user names: what reads a path, and how it refuses
    "recipe.toml": (read_recipe, ConfigError),
    "suite.toml": (open_suite, TaskError),
    "task.jsonl": (load_task, TaskError),
    "task.csv": (load_task, TaskError),
    "results.jsonl": (ResultStore, EvaluationError),
    "templates.yaml": (lambda path: read_templates(path.parent, "."), TaskError),
    "marks.parquet": (read_marks, EvaluationError),
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


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "wanted an object"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_json_is_read_strictly(tmp_path, text, complaint):
    (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ExpertError, match=complaint):
        read_json_object(tmp_path / "a.json")


@pytest.mark.parametrize("depth", [500, 100_000])
def test_deep_toml_is_one_line(tmp_path, depth):
    file = tmp_path / "a.toml"
    for text in (f"base = {nested(depth)}", "a." * depth + "b = 1", f"base = {'{a=' * depth}"):
        file.write_text(text)
        one_line_of(lambda: read_recipe(file), ConfigError)
        one_line_of(lambda: open_suite(file), TaskError)


YAML_READERS = {  # file names, and what reads a text that stands in the file
    "recipe.yaml": (read_recipe, "{}"),
    "templates.yaml": (lambda path: read_templates(path.parent, "."), "{}"),
}


@pytest.mark.parametrize("name", YAML_READERS)
@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (f"a: {nested(2000)}", "nesting depth"),
        (f"a: {nested(200)}", "nested too deeply"),
        ("- " * 100_000, "nested too deeply"),
        ("a: 1" + ":1" * 100_000, "a number is too long"),
        ("a: 1" + ":1" * 300 + ".5", "a number is too long"),
        ("a: !!int ''", "!!int are not read"),
        (f"a: &a [*a, {', '.join(['*a'] * 9)}]", "aliases"),
        ("a: " + "9" * 5000, "4300 digits"),
        ("#" * (MOST_TOML_BYTES + 1), f"at most {MOST_TOML_BYTES}"),
    ],
)
def test_yaml_is_bounded_wherever_it_is_read(tmp_path, name, text, complaint):
    read, form = YAML_READERS[name]
    (tmp_path / name).write_text(form.format(text))
    began = time.process_time()
    assert complaint in one_line_of(lambda: read(tmp_path / name))
    assert time.process_time() - began < 1


def test_what_begins_as_a_number_is_a_text_where_it_goes_on():
    text = "148e8e91-4f38-4427: 2e-4\nb: 1e5x\nc: -.5E+3"
    assert parse_yaml(text) == {"148e8e91-4f38-4427": 2e-4, "b": "1e5x", "c": -500.0}


def test_huge_toml_is_refused_unread(tmp_path):
    (tmp_path / "a.toml").write_text("#" * (MOST_TOML_BYTES + 1))
    told = one_line_of(lambda: read_toml(tmp_path / "a.toml", "Recipe", ConfigError))
    assert f"at most {MOST_TOML_BYTES}" in told
    (tmp_path / "a.toml").write_text("a = " + "9" * 5000)
    assert "not valid TOML" in one_line_of(lambda: read_recipe(tmp_path / "a.toml"))
    (tmp_path / "a.toml").write_text(f"base = [{', '.join(['1'] * 100_000)}]")
    one_line_of(lambda: read_recipe(tmp_path / "a.toml"), ConfigError)
    one_line_of(lambda: open_suite(tmp_path / "a.toml"), TaskError)


@given(st.text())
def test_whole_characters_are_encoded(text):
    assert half_character(text) is None


def test_the_first_half_is_found():
    assert half_character(json.loads(r'"a\ud83d b\ude00"')) == "\ud83d"
    assert half_character(b"caf\xe9".decode(errors="surrogateescape")) == "\udce9"


def test_a_text_of_others_is_one_printable_line_of_bounded_length():
    assert one_line("a\nb\x1b[31mc") == "a b [31mc"
    assert one_line("x" * 400) == "x" * 300 + "…"
    assert shortened("y" * 100) == "'" + "y" * 79 + "…"
