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
    example = Example("one\u2028two\u2029three\u0085four", "\u2028end")  # no ends of lines
    path = write_rows(tmp_path / "b.jsonl", [{"input": example.input, "target": example.target}])
    assert load_task(path).train == (example,)


@pytest.mark.parametrize("choices", ['"yes ||| no"', '"[""yes"", ""no""]"'])
def test_csv_rows_become_examples(tmp_path, choices):
    lines = (f"Is it good?,yes,{choices}", f"Is it bad?,no,{choices}")
    path = write_lines(tmp_path / "reviews.csv", "input,target,choices", *lines)
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
        (["input,target", f"{'word ' * 40_000},b"], ("word " * 40_000, "b")),
        (["input,target", '"a, ""b""', 'c",d'], ('a, "b"\nc', "d")),
        (["\ufeffinput,target,,", "a,b,,"], ("a", "b")),  # as spreadsheets save it
    ],
    ids=["long", "quoted", "spreadsheet"],
)
def test_csv_files_may_be_odd(tmp_path, lines, wanted):
    assert load_task(write_lines(tmp_path / "a.csv", *lines)).train == (Example(*wanted),)


def test_a_mapping_of_splits_becomes_splits_whatever_a_column_says():
    rows = [{**ROWS[0], "split": split} for split in ("train", "", "dev")]
    with pytest.warns(UserWarning, match="splits left out: more"):
        task = load_task({"train": ROWS[1:], "test": rows, "more": rows})
    assert (task.train, task.validation, task.test) == (EXAMPLES[1:], (), EXAMPLES[:1] * 3)
    assert (task.name, task.source) == ("task", "memory")


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
            {"input": "q", "target": "b ", "other": "a"},
            None,
            "{{ other }} ||| b",
            Example("q", "b", ("a", "b")),
        ),
        (
            {"q": "Good?", "a": "yes ", "choices": ["yes ", "no"]},
            "{{ q }} ||| {% if a %}{{ a }}{% endif %}",
            None,
            Example("Good?", "yes", ("yes", "no")),
        ),
    ],
)
def test_a_template_renders_input_target_and_choices(row, template, choices, wanted):
    assert load_task([row], template=template, choices=choices).train == (wanted,)


@pytest.mark.parametrize(
    ("template", "choices", "complaint"),
    [
        ("{{ question }}", None, "form 'input ||| target'"),
        ("a ||| b ||| c", None, "form 'input ||| target'"),
        ("{{ question ||| b", None, "not valid jinja2"),
        ("{{ nothing }} ||| b", None, "row 1: the template can't be filled: 'nothing' is undef"),
        ("{{ question }} ||| {{ answer_choices[3] }}", None, "can't be filled"),
        ("{{ 1 / 0 }} ||| b", None, "can't be filled"),
        ("{{ question.__class__.__mro__ }} ||| b", None, "can't be filled"),
        ("{{ question }} ||| ", None, "target is missing or empty"),
        ("{{ question }} ||| {{ none }}", None, "filled: a field that it prints is empty"),
        ("{{ question }} ||| b", "b ||| {{ none }}", "filled: a field that it prints is empty"),
        ("{{ question }} ||| b", "b ||| {{ empty }}", "one of the choices .* is empty"),
    ],
)
def test_a_bad_template_is_refused_with_the_reason(template, choices, complaint):
    row = {"question": "q", "none": None, "empty": ""}
    assert re.search(complaint, complaint_about([row], template=template, choices=choices))


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
        ("a.jsonl", ['{"input": "a", "target": "b", "split": 3}'], "line 1: split is 3, but must"),
        ("a.csv", ["input,target", "a,b", "alone"], "line 3: target is missing"),
        *(
            ("a.csv", ["input,target", "a,b", row], "a.csv, line 3: more cells than the header")
            for row in ("Hello, world,yes", "a,b,")
        ),
        *(
            ("a.csv", ["input,target", "a,b", *rows], "a.csv, the row from line 3: broken CSV")
            for rows in (['Who?,"Ann', "What?,a bird"], ['"To be" or not,yes'], ['Who?,"Ann" B'])
        ),
        ("a.csv", ["input,target,target", "a,b,c"], "a.csv: two columns have one name among input"),
        ("a.json", ['[{"input": "a"'], "a.json is not valid"),
        ("a.json", ["5"], "a.json is not valid"),
        ("a.json", ['{"train": [5]}'], "a.json is not valid"),
        ("a.json", ['{"input": ["a", "b"], "target": ["c"]}'], "a.json is not valid"),
        ("a.json", ['[{"input": "a", "target": "b"}, 3]'], "a.json, row 2: wanted an object"),
        ("a.json", ['{"input": "a"}'], "a.json, row 1: target is missing"),
        ("a.json", ['{"messages": 5, "n": 1}'], "a.json, row 1: a message must have"),
        ("a.parquet", ["PAR1"], "a.parquet is not valid"),
        ("a.jsonl", [json.dumps({**ROWS[0], "input": "Is it \ud83d"})], "input holds '.ud83d', ha"),
        ("a.jsonl", [json.dumps({**ROWS[0], "choices": ["yes", "\ude00"]})], "choices holds '.ude"),
    ],
)
def test_a_bad_file_is_refused_with_the_line(tmp_path, name, lines, complaint):
    assert re.search(complaint, complaint_about(write_lines(tmp_path / name, *lines)))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"target": None}, "row 2: target is missing or empty"),
        ({"target": []}, r"target must be a text, got \[\]"),
        ({"target": " \t"}, "target is missing or empty"),
        ({"input": {"0": "Is it good?"}}, "input must be a text, got {'0': "),
        ({"target": "maybe"}, r"target 'maybe' is not among the choices \['yes', 'no'\]"),
        ({"choices": "[yes]"}, "row 2: choices: broken JSON list"),
        ({"choices": 3}, "choices must be a list"),
        ({"choices": "yes ||| no |||"}, r"one of the choices \['yes', 'no', ''\] is empty"),
        ({"choices": ["yes", " "]}, "one of the choices"),
        ({"references": '["yes", "", "no"]'}, "one of the references"),
        ({"split": "dev"}, "split is 'dev', but must be train, validation, test"),
        ({"split": ["train"]}, r"row 2: split is \['train'\], but must be train"),
    ],
)
def test_a_bad_field_is_refused_with_its_row(change, complaint):
    assert re.search(complaint, complaint_about([ROWS[0], {**ROWS[0], **change}]))


def test_both_halves_of_a_character_are_one_as_json_may_escape_it(tmp_path):
    whole = json.dumps({**ROWS[0], "input": "\U0001f600"})
    assert "\\ud83d" in whole
    assert load_task(write_lines(tmp_path / "b.jsonl", whole)).train[0].input == "\U0001f600"


@pytest.mark.parametrize("name", ["datasets", "pyarrow"])
def test_a_missing_library_is_named_with_how_to_install_it(tmp_path, monkeypatch, name):
    for module in (name, f"{name}.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    source = "hub:owner/data" if name == "datasets" else tmp_path / "a.parquet"
    assert "pip install 'phatgoose[datasets]'" in complaint_about(source)


COLUMNS = {"input": ["a", "b"], "target": ["x", "y"], "choices": [["x", "z"], ["y"]]}


def frame(columns):
    return pytest.importorskip("pandas").DataFrame(columns)


def dataset(columns):
    return pytest.importorskip("datasets").Dataset.from_dict(columns)


def table(columns):
    return pytest.importorskip("pyarrow").table(columns)


@pytest.mark.parametrize("made", [dict, frame, dataset, table])
def test_columns_are_as_good_as_rows(tmp_path, made):
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in zip(*COLUMNS.values(), strict=True)]
    wanted = load_task(iter(rows))
    assert load_task(made(COLUMNS)) == wanted
    split = load_task({"train": made(COLUMNS), "test": made(COLUMNS)})
    assert (split.train, split.test) == (wanted.train, wanted.train)
    for indent, content in ((None, COLUMNS), (1, {"train": rows}), (1, rows)):
        (tmp_path / "a.json").write_text(json.dumps(content, indent=indent))
        assert load_task(tmp_path / "a.json").train == wanted.train
    write_rows(tmp_path / "a.json", rows)  # JSON Lines, named otherwise
    assert load_task(tmp_path / "a.json").train == wanted.train


def test_cells_of_a_column_may_be_dicts():
    rows = {"question": ["Who?", "What?"], "answers": [{"text": ["me"]}, {"text": ["it"]}]}
    task = load_task(rows, template="{{question}} ||| {{answers.text[0]}}")
    assert task.train == (Example("Who?", "me"), Example("What?", "it"))


def test_an_empty_cell_of_pandas_is_no_text():
    """It is a float, NaN, whatever the column's other cells are, or one of pandas' own."""
    numpy = pytest.importorskip("numpy")
    pandas = pytest.importorskip("pandas")
    for missing in (float("nan"), numpy.float32("nan"), pandas.NA, pandas.NaT):
        row = {"input": "a", "target": "x", "choices": missing, "references": missing}
        assert load_task([row | {"split": missing}]).train == (Example("a", "x"),)
        for key in ("input", "target"):
            assert f"row 1: {key} is missing" in complaint_about([{**row, key: missing}])
        assert "one of the choices" in complaint_about([{**row, "choices": ["x", missing]}])
        asked = {"instruction": "Do.", "input": missing, "output": "o"}
        assert load_task([asked]).train == (Example("Do.", "o"),)
    assert load_task([{"input": "nan", "target": "NaT"}]).train == (Example("nan", "NaT"),)


def test_lists_may_be_arrays():
    numpy = pytest.importorskip("numpy")
    row = {"input": "a", "target": "x", "choices": numpy.array(["x", "y"])}
    assert load_task([row]).train == (Example("a", "x", ("x", "y")),)
    assert load_task([{**row, "choices": numpy.array([])}]).train == (Example("a", "x"),)
    assert "input must be a text" in complaint_about([{**row, "input": numpy.array(["a", "b"])}])


def test_tasks_may_be_named_where_they_are_wanted(tmp_path):
    file = write_lines(tmp_path / "one.jsonl", '{"input": "a", "target": "x"}')
    (one,) = given_tasks(file)
    other = Task("other", train=one.train)
    assert given_tasks(str(file)) == given_tasks([file]) == [one]
    assert given_tasks(other) == [other]
    assert given_tasks(iter([other, file])) == [other, one]
    assert given_task(file) == one
    with pytest.raises(TaskError, match=r"must be a .jsonl, .json, .csv or .parquet file"):
        given_task("nosuch")
    with pytest.raises(TaskError, match="does not exist"):
        given_task("no/such.jsonl")


@pytest.mark.parametrize("options", [{}, {"name": "cafe"}])
def test_a_file_whose_name_is_no_utf8_is_refused_in_a_line(tmp_path, options):
    path = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    try:
        write_rows(path, ROWS)
    except OSError:
        pytest.skip("this file system has no such names")
    message = complaint_about(path, **options)
    assert r"caf\udce9" in message
    assert "which is not UTF-8" in message


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"input": "\xff"}\n')
    assert "is not valid" in complaint_about(tmp_path / "a.jsonl")


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
    parquet = pytest.importorskip("pyarrow.parquet")
    if row.get("messages") is not PARTS:  # a column has one type
        import pyarrow

        parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
        (again,) = load_task(tmp_path / "a.parquet").train
        assert (again.input, again.content) == (wanted.input, wanted.content)


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
        (MESSAGES[:-1], "must end with what the assistant answers"),
        (MESSAGES[-1:], "must end with what the assistant answers"),
        ([{"role": "user", "content": " "}, MESSAGES[-1]], "must end with what the assistant ans"),
        ([], "must end with what the assistant answers"),
        ("Sky?", "must have a role and a content of text, .* got 'Sky"),
        (["Sky?"], "must have a role and a content of text, .* got 'Sky"),
        ([{"role": "user", "content": None}], "a role and a content of text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "which tool calls and pictures are"),
        ([{"role": "user", "content": ["text"]}], "which tool calls and pictures are"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "which tool calls and pict"),
    ],
)
def test_a_chat_that_cannot_be_used_is_refused_with_its_row(messages, complaint):
    assert re.search(f"row 1: .*{complaint}", complaint_about([{"messages": messages}]))


def test_an_unknown_form_is_refused_with_the_known_ones():
    message = complaint_about([{"question": "Sky?", "answer": "blue"}])
    assert "the fields there are question, answer. Wanted input and target; messages;" in message
