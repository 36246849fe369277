"""Tasks: every source, templates, splits, and each way in which data can be bad."""

import copy
import json
import os
import pickle
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from phatgoose.errors import TaskError
from phatgoose.tasks.loading import given_task, given_tasks, load_task, longest_field
from phatgoose.tasks.task import Chat, Example, Task

ROWS = [
    {"input": "Is it good?", "target": "yes", "choices": ["yes", "no"]},
    {"input": "Is it bad?", "target": "no", "choices": ["yes", "no"]},
]
EXAMPLES = (
    Example("Is it good?", "yes", ("yes", "no")),
    Example("Is it bad?", "no", ("yes", "no")),
)


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
    assert (task.train, task.name, task.source) == (EXAMPLES, "reviews", "reviews.jsonl")
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


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ([f"{'word ' * 40_000},b"], ("word " * 40_000, "b")),
        (['"a, ""b""', 'c",d'], ('a, "b"\nc', "d")),
    ],
    ids=["long", "quoted"],
)
def test_csv_cells_may_be_long_and_hold_commas_quotes_and_line_breaks(tmp_path, lines, wanted):
    path = write_lines(tmp_path / "a.csv", "input,target", *lines)
    assert load_task(path).train == (Example(*wanted),)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_files_that_begin_with_a_byte_order_mark_load(tmp_path, name):
    text = "input,target\nx,y\n" if name == "a.csv" else '{"input": "x", "target": "y"}\n'
    (tmp_path / name).write_text(text, encoding="utf-8-sig")  # as spreadsheets save it
    assert load_task(tmp_path / name).train == (Example("x", "y"),)


def test_rows_in_memory_become_examples():
    task = load_task(iter(ROWS), name="mine")
    assert (task.name, task.train, task.source) == ("mine", EXAMPLES, "memory")


def test_a_mapping_of_splits_becomes_splits_whatever_a_column_says():
    rows = [{**ROWS[0], "split": split} for split in ("train", "", "dev")]
    task = load_task({"train": ROWS[1:], "test": rows})
    assert (task.train, task.validation, task.test) == (EXAMPLES[1:], (), EXAMPLES[:1] * 3)


def test_hub_sources_without_datasets_tell_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'phatgoose[datasets]'" in complaint_about("hub:owner/data")


def test_numbers_are_taken_as_texts():
    row = {"input": 2, "target": 0, "choices": [0, 1], "references": [0]}
    assert load_task([row]).train == (Example("2", "0", ("0", "1"), ("0",)),)


def test_a_template_s_longest_field_is_known():
    row = {"text": "A long tale.", "question": "Who?", "names": ["Ann", "Bo"], "answer": "Bo"}
    task = load_task([row], template="{{ text }} {{ question }} {{ names }} ||| {{ answer }}")
    assert task.train[0].passage == (0, 12)
    assert load_task([{"input": "A long tale. Who?", "target": "Bo"}]).train[0].passage is None
    assert task.digest != replace(task, train=(replace(task.train[0], passage=None),)).digest


@pytest.mark.parametrize(
    ("row", "template", "choices", "wanted"),
    [
        (
            {"question": "Sky?", "answer": "blue"},
            "Q: {{ question }}\nA: ||| {{ answer }}",
            None,
            Example("Q: Sky?\nA:", "blue"),
        ),
        (
            {"text": "Great!", "label": 1, "good": "good"},
            "{{ text }} {{ answer_choices | join(' or ') }}? ||| {{ answer_choices[label] }}",
            "bad ||| {{ good }}",
            Example("Great! bad or good?", "good", ("bad", "good")),
        ),
        (
            {"input": "q", "target": "b", "other": "a"},
            None,
            "{{ other }} ||| b",
            Example("q", "b", ("a", "b")),
        ),
    ],
)
def test_a_template_renders_input_target_and_choices(row, template, choices, wanted):
    assert load_task([row], template=template, choices=choices).train == (wanted,)


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ question }}", "form 'input ||| target'"),
        ("a ||| b ||| c", "form 'input ||| target'"),
        ("{{ question ||| b", "not valid jinja2"),
        ("{{ nothing }} ||| b", "row 1: the template can't be filled: 'nothing' is undefined"),
        ("{{ question }} ||| {{ answer_choices[3] }}", "can't be filled"),
        ("{{ 1 / 0 }} ||| b", "can't be filled"),
        ("{{ question.__class__.__mro__ }} ||| b", "can't be filled"),
        ("{{ question }} ||| ", "target is missing or empty"),
    ],
)
def test_a_bad_template_is_refused_with_the_reason(template, complaint):
    assert complaint in complaint_about([{"question": "q"}], template=template)


GOOD = '{"input": "Is it good?", "target": "yes"}'


@pytest.mark.parametrize(
    ("name", "lines", "complaint"),
    [
        ("a.txt", ["x"], ".csv or .parquet file"),
        ("a.jsonl", [], "no examples"),
        ("a.csv", ["input,target"], "no examples"),
        *(
            ("a.jsonl", [GOOD, "", line], "a.jsonl, line 3: broken JSON")
            for line in ('{"input": "a"', "input: a", '{"input": "a"} {}', "{'input': 1}")
        ),
        *(
            ("a.jsonl", [line], "line 1: wanted an object")
            for line in ("[1, 2]", '"text"', "null", "7")
        ),
        ("a.jsonl", [GOOD, '{"target": "a", "i": 4}'], "line 2: input is missing or empty; the f"),
        ("a.jsonl", [GOOD, '{"input": "a", "i": 4}'], "target is missing .* there are input, i"),
        ("a.csv", ["input,target", "a,b", "alone"], "line 3: target is missing"),
        *(
            ("a.csv", ["input,target", "a,b", row], "a.csv, line 3: more cells than the header")
            for row in ("Hello, world,yes", "a,b,")
        ),
        *(
            ("a.csv", ["input,target", "a,b", *rows], "a.csv, the row from line 3: broken CSV")
            for rows in (['Who?,"Ann', "What?,a bird"], ['"To be" or not,yes'], ['Who?,"Ann" B'])
        ),
        ("a.csv", ["input,target,target", "a,b,c"], "a.csv: 2 columns are named 'target'"),
    ],
)
def test_a_bad_file_is_refused_with_the_line(tmp_path, name, lines, complaint):
    assert re.search(complaint, complaint_about(write_lines(tmp_path / name, *lines)))


def test_csv_columns_without_a_name_are_left_alone(tmp_path):
    unnamed = write_lines(tmp_path / "b.csv", "input,target,,", "a,b,,")  # as spreadsheets save it
    assert load_task(unnamed).train == (Example("a", "b"),)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"target": None}, "row 2: target is missing or empty"),
        ({"target": []}, r"target must be a text, got \[\]"),
        ({"target": " \t"}, "target is missing or empty"),
        ({"input": {"0": "Is it good?"}}, "input must be a text, got {'0': "),
        ({"choices": ["yes", " "]}, "choice 2 of 2 is empty"),
        ({"target": "maybe"}, r"target 'maybe' is not among the choices \['yes', 'no'\]"),
        ({"choices": "[yes]"}, "row 2: choices: broken JSON list"),
        ({"choices": 3}, "choices must be a list"),
        ({"choices": "yes ||| no |||"}, "row 2: choice 3 of 3 is empty"),
        ({"choices": "yes |||  ||| no"}, "row 2: choice 2 of 3 is empty"),
        ({"references": '["yes", "", "no"]'}, "row 2: reference 2 of 3 is empty"),
        ({"split": "dev"}, "split is 'dev', but must be train, validation, test"),
        ({"split": ["train"]}, r"row 2: split is \['train'\], but must be train"),
    ],
)
def test_a_bad_field_is_refused_with_its_row(change, complaint):
    assert re.search(complaint, complaint_about([ROWS[0], {**ROWS[0], **change}]))


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


def test_an_empty_choice_of_a_template_is_refused():
    choices = "yes ||| no ||| {{ third }}"
    rows = [{**ROWS[0], "third": "perhaps"}, {**ROWS[0], "third": ""}]
    assert "row 2: choice 3 of 3 is empty" in complaint_about(rows, choices=choices)
    assert load_task(rows[:1], choices=choices).train[0].choices == ("yes", "no", "perhaps")


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


def test_cells_of_a_column_may_be_dicts():
    rows = {"question": ["Who?", "What?"], "answers": [{"text": ["me"]}, {"text": ["it"]}]}
    task = load_task(rows, template="{{question}} ||| {{answers.text[0]}}")
    assert [(example.input, example.target) for example in task.train] == [
        ("Who?", "me"),
        ("What?", "it"),
    ]


def test_empty_cells_of_a_frame_are_no_values():
    rows = frame({"input": ["a", "b"], "target": ["x", "y"], "choices": [["x"], None]})
    assert [example.choices for example in load_task(rows).train] == [("x",), ()]
    split = frame({"input": ["a", "b"], "target": ["x", "y"], "split": ["test", float("nan")]})
    assert [len(each) for each in (load_task(split).train, load_task(split).test)] == [1, 1]
    with pytest.raises(TaskError, match="memory, row 2: target is missing or empty"):
        load_task(frame({"input": ["a", "b"], "target": ["x", float("nan")]}))
    with pytest.raises(TaskError, match="memory, row 2: completion is empty"):
        load_task(frame({"prompt": ["a", "b"], "completion": ["x", float("nan")]}))


@pytest.mark.parametrize("empty", ["nan", "<NA>"])
def test_empty_inputs_beside_instructions_are_none(empty):
    pandas = pytest.importorskip("pandas")
    inputs = ["x", float("nan")] if empty == "nan" else pandas.array(["x", None], dtype="string")
    rows = frame({"instruction": ["a", "b"], "input": inputs, "output": ["o", "p"]})
    assert [each.input for each in load_task(rows).train] == ["a\n\nx", "b"]


def test_an_empty_field_that_a_template_prints_is_refused(tmp_path):
    path = tmp_path / "short.csv"
    path.write_text("q,a\nwhat,yes\nwho\n")  # the last row lacks a cell
    refused = "the template can't be filled: a field that it prints is empty"
    assert refused in complaint_about(path, template="{{ q }} ||| {{ a }}")
    told = load_task(path, template="{{ q }} ||| {% if a %}{{ a }}{% else %}no one{% endif %}")
    assert [each.target for each in told.train] == ["yes", "no one"]
    rows = [{**ROWS[0], "third": None}]
    assert refused in complaint_about(rows, choices="yes ||| no ||| {{ third }}")


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
        ("nosuch", "must be a .jsonl, .json, .csv or .parquet file"),
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
    with pytest.raises(TaskError, match="input must be a text"):
        load_task([{**row, "input": numpy.array(["a", "b"])}])


@pytest.mark.parametrize(
    ("values", "text", "wanted"),
    [
        ({"a": "long one", "b": "short"}, "short, then long one.", "long one"),
        ({"a": "changed by a filter", "b": "short"}, "CHANGED BY A FILTER short", "short"),
        ({"a": "twice", "b": "one"}, "twice, twice, one", "one"),
        (
            {"a": ["x", {"deep": " nested text\n"}], "b": 3},
            "in it nested text stands",
            "nested text",
        ),
        ({"a": "absent", "b": "", "c": None}, "nothing of it", None),
    ],
)
def test_the_longest_value_that_stands_in_a_text_once(values, text, wanted):
    found = longest_field(values, text)
    assert (None if found is None else text[slice(*found)]) == wanted


TURNS = [("system", "Be brief."), ("user", "Sky?"), ("assistant", "blue"), ("user", "Sea?")]
MESSAGES = [{"role": role, "content": text} for role, text in (*TURNS, ("assistant", "green"))]
PARTS = [*MESSAGES[:-1], {"role": "assistant", "content": [{"type": "text", "text": "green"}]}]


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"messages": MESSAGES}, Example(Chat(TURNS), "green")),
        (
            {"messages": PARTS, "choices": ["green", "red"]},
            Example(Chat(TURNS), "green", ("green", "red")),
        ),
        ({"prompt": MESSAGES[:-1], "completion": MESSAGES[-1:]}, Example(Chat(TURNS), "green")),
        ({"prompt": "Sea?", "completion": " green\n"}, Example("Sea?", "green")),
        ({"prompt": 3, "completion": 4}, Example("3", "4")),
        (
            {"prompt": "Good?", "completion": " yes", "choices": [" yes", " no"]},
            Example("Good?", "yes", ("yes", "no")),
        ),
        ({"instruction": "Add.", "input": "1 + 2", "output": 3}, Example("Add.\n\n1 + 2", "3")),
        ({"instruction": "Even?", "input": 0, "output": "yes"}, Example("Even?\n\n0", "yes")),
        ({"instruction": "So?", "input": False, "output": "no"}, Example("So?\n\nFalse", "no")),
        ({"instruction": "Greet.", "input": "", "output": "Hi"}, Example("Greet.", "Hi")),
        ({"instruction": "Greet.", "output": "Hi"}, Example("Greet.", "Hi")),
        ({"input": "a", "target": "b", "messages": MESSAGES}, Example("a", "b")),
    ],
)
def test_forms_that_people_have_are_known_by_their_columns(tmp_path, row, wanted):
    (found,) = load_task([row]).train
    assert (found, found.content) == (wanted, wanted.content)
    assert load_task(write_rows(tmp_path / "a.jsonl", [row])).train == (wanted,)
    (tmp_path / "a.json").write_text(json.dumps([row], indent=1))
    assert load_task(tmp_path / "a.json").train == (wanted,)
    parquet = pytest.importorskip("pyarrow.parquet")
    if row.get("messages") is not PARTS:  # a column has one type
        import pyarrow

        parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
        (again,) = load_task(tmp_path / "a.parquet").train
        assert (again.input, again.content) == (wanted.input, wanted.content)


@pytest.mark.parametrize(
    "content",
    [
        {"input": ["a", "b"], "target": ["c", "d"]},
        {"train": [{"input": "a", "target": "c"}, {"input": "b", "target": "d"}]},
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_object_has_columns_or_splits(tmp_path, content, indent):
    (tmp_path / "a.json").write_text(json.dumps(content, indent=indent))
    assert load_task(tmp_path / "a.json").train == (Example("a", "c"), Example("b", "d"))


def test_a_table_of_pyarrow_has_rows():
    pyarrow = pytest.importorskip("pyarrow")
    assert load_task(pyarrow.Table.from_pylist(ROWS)).train == EXAMPLES


def test_one_row_may_take_several_lines_of_json(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"messages": MESSAGES}, indent=1))
    assert load_task(tmp_path / "a.json").train == (Example(Chat(TURNS), "green"),)


def test_a_chat_in_which_no_one_asks_is_refused():
    empty = [{"role": "user", "content": " "}, MESSAGES[-1]]
    assert "nothing is said in messages before" in complaint_about([{"messages": empty}])


@pytest.mark.parametrize("choices", [None, "yes ||| no"])
def test_white_space_around_a_template_s_answers_is_no_difference(choices):
    row = {"q": "Good?", "a": "yes ", "choices": ["yes ", "no"]}
    task = load_task([row], template="{{ q }} ||| {{ a }}", choices=choices)
    assert task.train == (Example("Good?", "yes", ("yes", "no"), passage=(0, 5)),)


def test_a_chat_is_a_text_that_keeps_its_turns():
    (found,) = load_task([{"messages": MESSAGES}]).train
    assert found.input == "Be brief.\n\nSky?\n\nblue\n\nSea?"
    assert found.input.turns == tuple(TURNS)
    for copied in (copy.deepcopy(found.input), pickle.loads(pickle.dumps(found.input))):
        assert (type(copied), copied.turns) == (Chat, tuple(TURNS))
    assert (found.input + "!").turns[-1] == ("user", "Sea?!")
    other = replace(found, input=Chat([("user", str(found.input))]))
    assert other == found
    assert Task("t", (other,)).digest != Task("t", (found,)).digest


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        (MESSAGES[:-1], "must end with what the assistant says .* system, user, assistant, user"),
        (MESSAGES[-1:], "must end with what the assistant says to others; the roles there are as"),
        ([], "there are none"),
        ("Sky?", "messages must be a list of turns, got 'Sky"),
        (["Sky?"], "must have role and content, got 'Sky"),
        ([{"role": "user", "content": None}], "a role and a content of text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "which tool calls and pictures are"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "which tool calls and pict"),
    ],
)
def test_a_chat_that_cannot_be_used_is_refused_with_its_row(messages, complaint):
    assert re.search(f"row 1: .*{complaint}", complaint_about([{"messages": messages}]))


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"question": "Sky?", "answer": "blue"}, Example("Sky?", "blue")),
        ({"text": "Great!", "category": "good"}, Example("Great!", "good")),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Sky?"},
                    {"from": "gpt", "value": "blue"},
                ]
            },
            Example("Sky?", "blue"),
        ),
    ],
)
def test_an_unknown_form_is_refused_with_the_template_that_reads_it(row, wanted):
    message = complaint_about([row])
    assert (
        f"the fields there are {', '.join(row)}. Known are input and target; messages;" in message
    )
    template = re.search("--template '(.*)'", message)[1]
    assert load_task([row], template=template).train == (wanted,)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.json", '[{"input": "a"', "a.json: broken JSON"),
        ("a.json", '[{"input": "a", "target": "b"}, 3]', "a.json, row 2: wanted a dict"),
        ("a.json", '{"input": "a"}', "a.json, line 1: target is missing"),
        ("a.parquet", "PAR1", "a.parquet can't be read"),
    ],
)
def test_json_and_parquet_that_are_broken_are_refused_in_a_line(tmp_path, name, content, complaint):
    (tmp_path / name).write_text(content)
    assert complaint in complaint_about(tmp_path / name)


def test_parquet_without_pyarrow_tells_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert "pip install 'phatgoose[datasets]'" in complaint_about(tmp_path / "a.parquet")
