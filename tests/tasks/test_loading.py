"""Tasks: every source, templates, splits, and each way in which data can be bad."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phatgoose.errors import TaskError
from phatgoose.tasks.loading import given_task, given_tasks, load_task
from phatgoose.tasks.task import Example, Task

ROWS = [
    {"input": "Is it good?", "target": "yes", "choices": ["yes", "no"]},
    {"input": "Is it bad?", "target": "no", "choices": ["yes", "no"]},
]
EXAMPLES = (
    Example("Is it good?", "yes", ("yes", "no")),
    Example("Is it bad?", "no", ("yes", "no")),
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="")
    return path


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    return write_lines(path, *(json.dumps(row, ensure_ascii=False) for row in rows))


def complaint_about(source: object, **options: str) -> str:
    with pytest.raises(TaskError) as caught:
        load_task(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_jsonl_rows_become_examples(tmp_path):
    path = write_rows(tmp_path / "reviews.jsonl", ROWS)
    task = load_task(path)
    assert task.train == EXAMPLES
    assert (task.name, task.source) == ("reviews", "reviews.jsonl")


def test_blank_lines_and_windows_line_ends_are_no_rows(tmp_path):
    lines = [json.dumps(row) for row in ROWS]
    path = write_lines(tmp_path / "a.jsonl", lines[0] + "\r", "", "  ", lines[1] + "\r")
    assert load_task(str(path)).train == EXAMPLES


@pytest.mark.parametrize("choices", ['"yes ||| no"', '"[""yes"", ""no""]"'])
def test_csv_rows_become_examples(tmp_path, choices):
    path = write_lines(
        tmp_path / "reviews.csv",
        "input,target,choices",
        f"Is it good?,yes,{choices}",
        f"Is it bad?,no,{choices}",
    )
    assert load_task(path).train == EXAMPLES


@pytest.mark.parametrize(
    ("choices", "wanted"),
    [
        ("[A] x ||| [B] y", ("[A] x", "[B] y")),
        ("[yes] ||| [no]", ("[yes]", "[no]")),
        ('["[A] x", "y]"] ', ("[A] x", "y]")),
    ],
)
def test_choices_may_begin_with_a_bracket(choices, wanted):
    row = {"input": "a", "target": wanted[0], "choices": choices}
    assert load_task([row]).train[0].choices == wanted


def test_a_list_that_is_no_json_is_refused():
    assert "row 1: choices: broken JSON list" in complaint_about([{**ROWS[0], "choices": "[yes]"}])


def test_csv_cells_may_be_as_long_as_json_s(tmp_path):
    text = "word " * 40_000
    path = write_lines(tmp_path / "a.csv", "input,target", f"{text},b")
    assert load_task(path).train == (Example(text, "b"),)


def test_csv_cells_may_hold_commas_quotes_and_line_breaks(tmp_path):
    path = write_lines(tmp_path / "a.csv", "input,target", '"a, ""b""', 'c",d')
    assert load_task(path).train == (Example('a, "b"\nc', "d"),)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_files_that_begin_with_a_byte_order_mark_load(tmp_path, name):
    text = "input,target\nx,y\n" if name == "a.csv" else '{"input": "x", "target": "y"}\n'
    (tmp_path / name).write_text(text, encoding="utf-8-sig")  # as spreadsheets save it
    assert load_task(tmp_path / name).train == (Example("x", "y"),)


def test_a_file_is_recorded_without_the_folders_that_it_lies_in(tmp_path):
    path = write_lines(tmp_path / "reviews.csv", "input,target", "Is it good?,yes")
    assert load_task(path).source == load_task(str(path)).source == "reviews.csv"


def test_rows_in_memory_become_examples():
    task = load_task(iter(ROWS), name="mine")
    assert (task.name, task.train, task.source) == ("mine", EXAMPLES, "memory")


def test_a_mapping_of_splits_becomes_splits():
    task = load_task({"train": ROWS[:1], "test": ROWS[1:]})
    assert (task.train, task.validation, task.test) == (EXAMPLES[:1], (), EXAMPLES[1:])


def test_a_mapping_s_splits_count_whatever_a_column_says():
    rows = [{**ROWS[0], "split": split} for split in ("train", "", "dev")]
    task = load_task({"train": ROWS[1:], "test": rows})
    assert (task.train, task.test) == (EXAMPLES[1:], EXAMPLES[:1] * 3)


def test_a_split_of_what_is_no_row_is_refused():
    with pytest.raises(TaskError, match="train row 1: wanted a dict with fields, got 'text'"):
        load_task({"train": ["text"]})


def test_a_dataset_dict_becomes_splits():
    datasets = pytest.importorskip("datasets")
    parts = {"train": ROWS, "validation": ROWS[1:]}
    loaded = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()})
    task = load_task(loaded)
    assert (task.train, task.validation, task.test) == (EXAMPLES, EXAMPLES[1:], ())


def test_a_dataset_alone_is_training_data():
    datasets = pytest.importorskip("datasets")
    assert load_task(datasets.Dataset.from_list(ROWS)).train == EXAMPLES


def test_hub_sources_without_datasets_tell_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'phatgoose[datasets]'" in complaint_about("hub:owner/data")


def test_rows_say_which_split_they_belong_to(tmp_path):
    rows = [{**ROWS[0], "split": split} for split in ("test", "train", "validation", "test")]
    task = load_task(write_rows(tmp_path / "a.jsonl", rows))
    assert [len(task.train), len(task.validation), len(task.test)] == [1, 1, 2]


def test_numbers_are_taken_as_texts():
    row = {"input": 2, "target": 0, "choices": [0, 1], "references": [0]}
    assert load_task([row]).train == (Example("2", "0", ("0", "1"), ("0",)),)


def test_a_template_renders_input_and_target():
    task = load_task(
        [{"question": "Sky?", "answer": "blue"}], template="Q: {{ question }}\nA: ||| {{ answer }}"
    )
    assert task.train == (Example("Q: Sky?\nA:", "blue"),)


def test_a_template_s_longest_field_is_known():
    row = {"text": "A long tale.", "question": "Who?", "names": ["Ann", "Bo"], "answer": "Bo"}
    task = load_task([row], template="{{ text }} {{ question }} {{ names }} ||| {{ answer }}")
    assert task.train[0].passage == (0, 12)
    assert load_task([{"input": "A long tale. Who?", "target": "Bo"}]).train[0].passage is None
    assert task.digest != replace(task, train=(replace(task.train[0], passage=None),)).digest


def test_a_template_may_pick_the_target_among_rendered_choices():
    task = load_task(
        [{"text": "Great!", "label": 1, "good": "good"}],
        template="{{ text }} Is it {{ answer_choices | join(' or ') }}? ||| "
        "{{ answer_choices[label] }}",
        choices="bad ||| {{ good }}",
    )
    assert task.train == (Example("Great! Is it bad or good?", "good", ("bad", "good")),)


def test_choices_alone_may_be_a_template():
    task = load_task([{"input": "q", "target": "b", "other": "a"}], choices="{{ other }} ||| b")
    assert task.train[0].choices == ("a", "b")


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ question }}", "form 'input ||| target'"),
        ("a ||| b ||| c", "form 'input ||| target'"),
        ("{{ question ||| b", "not valid jinja2"),
        ("{{ nothing }} ||| b", "'nothing' is undefined"),
        ("{{ question }} ||| {{ answer_choices[3] }}", "can't be filled"),
        ("{{ 1 / 0 }} ||| b", "can't be filled"),
        ("{{ question.__class__.__mro__ }} ||| b", "can't be filled"),
        ("{{ question }} ||| ", "target is missing or empty"),
    ],
)
def test_a_bad_template_is_refused_with_the_reason(template, complaint):
    assert complaint in complaint_about([{"question": "q"}], template=template)


def test_an_unknown_field_of_a_template_is_refused_with_the_line(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"q": "1"}, {"p": "2"}])
    message = complaint_about(path, template="{{ q }} ||| x")
    assert "line 2" in message
    assert "'q'" in message


@pytest.mark.parametrize("name", ["nowhere.jsonl", "nowhere.csv"])
def test_a_missing_file_is_refused_by_name(tmp_path, name):
    assert f"{name} does not exist" in complaint_about(tmp_path / name)


def test_an_unknown_kind_of_file_is_refused_with_the_known_ones(tmp_path):
    assert ".jsonl or .csv" in complaint_about(write_lines(tmp_path / "a.txt", "x"))


@pytest.mark.parametrize(("name", "header"), [("a.jsonl", ""), ("a.csv", "input,target")])
def test_an_empty_file_is_refused(tmp_path, name, header):
    assert "no examples" in complaint_about(write_lines(tmp_path / name, header))


def test_no_rows_in_memory_are_refused():
    assert "no examples" in complaint_about([])


@pytest.mark.parametrize("line", ['{"input": "a"', "input: a", '{"input": "a"} {}', "{'input': 1}"])
def test_a_broken_json_line_is_refused_with_its_number(tmp_path, line):
    path = write_lines(tmp_path / "a.jsonl", json.dumps(ROWS[0]), "", line)
    message = complaint_about(path)
    assert "a.jsonl, line 3" in message
    assert "broken JSON" in message


@pytest.mark.parametrize("line", ["[1, 2]", '"text"', "null", "7"])
def test_a_line_that_is_no_object_is_refused_with_its_number(tmp_path, line):
    assert "line 1: wanted an object" in complaint_about(write_lines(tmp_path / "a.jsonl", line))


def test_a_row_in_memory_that_is_no_mapping_is_refused():
    assert "row 2" in complaint_about([ROWS[0], "text"])


@pytest.mark.parametrize("missing", ["input", "target"])
def test_a_missing_field_is_refused_with_the_fields_there_are(tmp_path, missing):
    row = {key: value for key, value in ROWS[0].items() if key != missing}
    message = complaint_about(write_rows(tmp_path / "a.jsonl", [ROWS[1], {**row, "idx": 4}]))
    assert f"line 2: {missing} is missing or empty" in message
    assert "choices, idx" in message


@pytest.mark.parametrize("value", [None, "", [], {}])
def test_a_target_that_is_no_text_is_refused(value):
    assert "target is missing or empty" in complaint_about([{"input": "a", "target": value}])


def test_a_short_csv_row_is_refused_with_its_line(tmp_path):
    path = write_lines(tmp_path / "a.csv", "input,target", "a,b", "alone")
    assert "line 3: target is missing" in complaint_about(path)


@pytest.mark.parametrize("row", ["Hello, world,yes", "a,b,"])
def test_a_csv_row_of_more_cells_than_names_is_refused_with_its_line(tmp_path, row):
    path = write_lines(tmp_path / "a.csv", "input,target", "a,b", row)
    message = complaint_about(path)
    assert "a.csv, line 3: more cells than the header names" in message
    assert "double quotes" in message


@pytest.mark.parametrize(
    "rows", [['Who?,"Ann', "What?,a bird"], ['"To be" or not,yes'], ['Who?,"Ann" B']]
)
def test_quotes_that_do_not_match_are_refused_with_their_line(tmp_path, rows):
    message = complaint_about(write_lines(tmp_path / "a.csv", "input,target", "a,b", *rows))
    assert "a.csv, the row from line 3: broken CSV" in message
    assert "quotes within it are doubled" in message


def test_a_csv_column_s_name_may_stand_there_once(tmp_path):
    path = write_lines(tmp_path / "a.csv", "input,target,target", "a,b,c")
    assert "a.csv: 2 columns are named 'target'" in complaint_about(path)
    unnamed = write_lines(tmp_path / "b.csv", "input,target,,", "a,b,,")  # as spreadsheets save it
    assert load_task(unnamed).train == (Example("a", "b"),)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"input": "Is it \ud83d"}, "input"),
        ({"target": "\ude00"}, "target"),
        ({"choices": ["yes", "n\ud83do"]}, "choices"),
        ({"references": ["yes", "n\ud83do"]}, "references"),
    ],
)
def test_half_a_character_is_refused_with_its_line(tmp_path, change, field):
    lines = [json.dumps(row) for row in (ROWS[0], {**ROWS[0], **change})]
    message = complaint_about(write_lines(tmp_path / "a.jsonl", *lines))
    assert f"line 2: {field} holds '\\ud" in message
    assert "half a character" in message
    whole = json.dumps({**ROWS[0], "input": "\U0001f600"})  # both halves, as JSON may escape it
    assert "\\ud83d" in whole
    assert load_task(write_lines(tmp_path / "b.jsonl", whole)).train[0].input == "\U0001f600"


@pytest.mark.parametrize("field", ["choice", "reference"])
@pytest.mark.parametrize("texts", ["yes ||| no |||", "yes |||  ||| no", '["yes", "", "no"]'])
def test_an_empty_text_of_a_list_is_refused_with_its_place(texts, field):
    message = complaint_about([ROWS[0], {**ROWS[0], f"{field}s": texts}])
    place = 3 if texts.endswith("|||") else 2
    assert f"row 2: {field} {place} of 3 is empty" in message


def test_an_empty_choice_of_a_template_is_refused():
    choices = "yes ||| no ||| {{ third }}"
    rows = [{**ROWS[0], "third": "perhaps"}, {**ROWS[0], "third": ""}]
    assert "row 2: choice 3 of 3 is empty" in complaint_about(rows, choices=choices)
    assert load_task(rows[:1], choices=choices).train[0].choices == ("yes", "no", "perhaps")


def test_a_target_outside_the_choices_is_refused_with_both(tmp_path):
    rows = [ROWS[0], {**ROWS[1], "target": "maybe"}]
    message = complaint_about(write_rows(tmp_path / "a.jsonl", rows))
    assert "line 2: target 'maybe' is not among the choices ['yes', 'no']" in message


def test_choices_that_are_no_list_are_refused():
    assert "choices must be a list" in complaint_about([{**ROWS[0], "choices": 3}])


def test_an_unknown_split_is_refused_with_the_known_ones():
    message = complaint_about([{**ROWS[0], "split": "dev"}])
    assert "'dev'" in message
    assert "train, validation, test" in message


@pytest.mark.parametrize("split", [["train"], {"name": "train"}, 3])
def test_a_split_that_is_no_text_is_refused(split):
    message = complaint_about([ROWS[0], {**ROWS[0], "split": split}])
    assert f"row 2: split is {split!r}, but must be train, validation, test" in message


COLUMNS = {"input": ["a", "b"], "target": ["x", "y"], "choices": [["x", "z"], ["y"]]}


def frame(columns):
    return pytest.importorskip("pandas").DataFrame(columns)


def table(columns):
    return pytest.importorskip("datasets").Dataset.from_dict(columns)


@pytest.mark.parametrize("made", [dict, frame, table])
def test_columns_are_as_good_as_rows(made):
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in zip(*COLUMNS.values(), strict=True)]
    wanted = load_task(rows)
    assert load_task(made(COLUMNS)) == wanted
    split = load_task({"train": made(COLUMNS), "test": made(COLUMNS)})
    assert (split.train, split.test) == (wanted.train, wanted.train)


def test_empty_cells_of_a_frame_are_no_values():
    rows = frame({"input": ["a", "b"], "target": ["x", "y"], "choices": [["x"], None]})
    assert [example.choices for example in load_task(rows).train] == [("x",), ()]
    with pytest.raises(TaskError, match="memory, row 2: target is missing or empty"):
        load_task(frame({"input": ["a", "b"], "target": ["x", float("nan")]}))


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ({"input": ["a"], "target": ["x", "y"]}, "different numbers of cells: input 1, target 2"),
        ({"input": "a", "target": "x"}, "put a single row into a list"),
        ({"input": 5}, "input is 5, but a dict holds a column"),
        ({"text": ["a"]}, "the fields there are text"),
        ({"train": {"input": "a", "target": "x"}}, "memory, train: input is 'a'"),
        ({}, "has no examples"),
        (5, "wanted rows .* got 5"),
        (None, "wanted rows"),
        (Task("t"), "wanted rows"),
        ([5], "row 1: wanted a dict with fields, got 5"),
    ],
)
def test_what_is_neither_rows_nor_columns_is_refused_in_words(rows, complaint):
    with pytest.raises(TaskError, match=complaint):
        load_task(rows)


@pytest.mark.parametrize("name", ["template", "choices", "name"])
def test_what_must_be_a_text_is_refused_as_anything_else(name):
    with pytest.raises(TaskError, match=rf"{name} is \['a'\], but must be a text"):
        load_task(COLUMNS, **{name: ["a"]})


def test_columns_of_one_name_are_refused_in_a_frame_too():
    both = frame({"input": ["a"], "target": ["x"], "more": ["y"]})
    both.columns = ["input", "target", "target"]
    with pytest.raises(TaskError, match="2 columns are named 'target'"):
        load_task(both)


def test_tasks_may_be_named_where_they_are_wanted(tmp_path):
    file = tmp_path / "one.jsonl"
    file.write_text('{"input": "a", "target": "x"}\n')
    (one,) = given_tasks(file)
    other = Task("other", train=one.train)
    assert given_tasks(str(file)) == given_tasks([file]) == [one]
    assert given_tasks(other) == [other]
    assert given_tasks(iter([other, file])) == [other, one]
    assert given_task(file) == one


@pytest.mark.parametrize(
    ("named", "complaint"),
    [
        ("nosuch", "must be a .jsonl or .csv file"),
        ("no/such.jsonl", "does not exist"),
        (5, "not 5"),
        ([5], "not 5"),
        ([{"input": "a", "target": "x"}], "load_task makes a Task of rows"),
        ({"input": ["a"]}, "not a dict; load_task makes a Task of that"),
    ],
)
def test_what_names_no_task_is_refused_in_words(named, complaint):
    with pytest.raises(TaskError, match=complaint):
        given_tasks(named)
    with pytest.raises(TaskError):
        given_task(named)


def test_a_file_whose_name_is_too_long_is_refused_in_a_line(tmp_path):
    message = complaint_about(tmp_path / f"{'a' * 300}.jsonl")
    assert "can't be read: File name too long" in message
    assert len(message) < 200


@pytest.mark.parametrize("options", [{}, {"name": "cafe"}])
def test_a_file_whose_name_is_no_utf8_is_refused_in_a_line(tmp_path, options):
    path = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    try:
        write_rows(path, ROWS)
    except OSError:
        pytest.skip("this file system has no such names")
    message = complaint_about(path, **options)
    assert "can't be a name in results, for it is not UTF-8; rename" in message
    assert r"caf\udce9" in message


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"input": "\xff"}\n')
    assert "can't be read" in complaint_about(tmp_path / "a.jsonl")


def test_line_separators_inside_strings_do_not_end_a_row(tmp_path):
    example = Example("one\u2028two\u2029three\u0085four", "\u2028end")
    row = {"input": example.input, "target": example.target}
    path = write_rows(tmp_path / "a.jsonl", [row, row])
    assert "one\u2028two" in path.read_text(encoding="utf-8")
    assert load_task(path).train == (example, example)


@settings(max_examples=60)
@given(st.lists(st.tuples(TEXTS, TEXTS, st.lists(TEXTS, max_size=3)), min_size=1, max_size=4))
def test_any_text_survives_jsonl(tmp_path_factory, rows):
    wanted = [Example(i, t, (t, *more) if more else ()) for i, t, more in rows]
    path = tmp_path_factory.getbasetemp() / "round_trip.jsonl"
    write_rows(path, [{"input": e.input, "target": e.target, "choices": e.choices} for e in wanted])
    assert list(load_task(path).train) == wanted


def test_an_empty_cell_of_pandas_is_no_text():
    """It is a float, NaN, whatever the column's other cells are, or one of pandas' own."""
    numpy = pytest.importorskip("numpy")
    pandas = pytest.importorskip("pandas")
    for missing in (float("nan"), numpy.float32("nan"), pandas.NA, pandas.NaT):
        check_that_it_is_missing(missing)
    assert load_task([{"input": "nan", "target": "NaT"}]).train == (Example("nan", "NaT"),)


def check_that_it_is_missing(missing):
    row = {"input": "a", "target": "x", "choices": missing, "references": missing}
    assert load_task([row]).train == (Example("a", "x"),)
    for key in ("input", "target"):
        with pytest.raises(TaskError, match=f"row 1: {key} is missing"):
            load_task([{**row, key: missing}])
    with pytest.raises(TaskError, match="choice 2 of 2 is empty"):
        load_task([{**row, "choices": ["x", missing]}])


def test_lists_may_be_arrays():
    numpy = pytest.importorskip("numpy")
    row = {"input": "a", "target": "x", "choices": numpy.array(["x", "y"])}
    assert load_task([row]).train == (Example("a", "x", ("x", "y")),)
    assert load_task([{**row, "choices": numpy.array([])}]).train == (Example("a", "x"),)
    with pytest.raises(TaskError, match="input is missing"):
        load_task([{**row, "input": numpy.array(["a", "b"])}])
