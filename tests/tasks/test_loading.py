"""Tasks: every source, templates, splits, mixtures, and each way in which data can be bad."""

import copy
import importlib
import json
import pickle
import re
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_hub import contents
from odd_files import one_line_of
from phatgoose.errors import TaskError
from phatgoose.tasks.loading import (
    LONGEST_PROMPT,
    MOST_BYTES,
    PARQUET_REVISION,
    given_tasks,
    load_task,
    prompts_beside,
    read_rows,
)
from phatgoose.tasks.task import Chat, Example, Sources, Task, draw, mix
from suite_data import save_copy

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.usefixtures("private_cache")

ROWS = [
    {"input": "Is it good?", "target": "yes", "choices": ["yes", "no"]},
    {"input": "Is it bad?", "target": "no", "choices": ["yes", "no"]},
]
EXAMPLES = tuple(Example(row["input"], row["target"], ("yes", "no")) for row in ROWS)


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="")
    return path


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    return write_lines(path, *(json.dumps(row, ensure_ascii=False) for row in rows))


def complaint_about(source: object, **options: str) -> str:
    return one_line_of(lambda: load_task(source, **options), TaskError)


def test_jsonl_rows_become_examples(tmp_path):
    lines = [json.dumps(row) for row in ROWS]
    path = write_lines(tmp_path / "reviews.jsonl", lines[0] + "\r", "", "  ", lines[1] + "\r")
    task = load_task(str(path))
    assert (task.train, task.name, task.source) == (EXAMPLES, "reviews", "reviews.jsonl")
    example = Example("one\u2028two\u2029three\u0085four", "\u2028end")  # no ends of lines
    path = write_rows(tmp_path / "b.jsonl", [{"input": example.input, "target": example.target}])
    assert load_task(path).train == (example,)


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        (["input,target,choices", 'a,yes,"yes ||| no"'], ("a", "yes", ("yes", "no"))),
        (["input,target", f"{'word ' * 40_000},b"], ("word " * 40_000, "b")),
        (["\ufeffinput,target,,", '"a, ""b""', 'c",d,,'], ('a, "b"\nc', "d")),  # a spreadsheet's
    ],
    ids=["choices", "long", "quoted"],
)
def test_csv_rows_become_examples(tmp_path, lines, wanted):
    assert load_task(write_lines(tmp_path / "a.csv", *lines)).train == (Example(*wanted),)


def test_a_mapping_of_splits_becomes_splits_whatever_a_column_says():
    rows = [{**ROWS[0], "split": split} for split in ("train", "", "dev")]
    with pytest.warns(UserWarning, match="splits left out: more"):
        task = load_task({"train": ROWS[1:], "test": rows, "more": rows})
    assert (task.train, task.validation, task.test) == (EXAMPLES[1:], (), EXAMPLES[:1] * 3)
    assert (task.name, task.source) == ("task", "memory")


OR = "{{ text }} {{ answer_choices | join(' or ') }}? ||| {{ answer_choices[label] }}"
ASKED = {"messages": [{"role": "user", "content": "Sky?"}]}
CHOICES = {"q": "Good?", "a": "yes ", "choices": ["yes ", "no"]}


@pytest.mark.parametrize(
    ("row", "template", "choices", "wanted"),
    [
        ({"q": "Sky?", "a": "no"}, "Q: {{ q }}\nA: ||| {{ a }}", None, ("Q: Sky?\nA:", "no")),
        ({"text": "Good", "label": 1, "b": "so"}, OR, "bad ||| {{ b }}", ("Good bad or so?", "so")),
        ({"input": "q", "target": "b ", "a": "a"}, None, "{{ a }} ||| b", ("q", "b", ("a", "b"))),
        (ASKED, "{{ messages[0].content }} ||| blue", None, ("Sky?", "blue")),
        (CHOICES, "{{ q }} ||| {{ a }}", None, ("Good?", "yes", ("yes", "no"))),
        ({"input": 2, "target": 0, "choices": [0, 1]}, None, None, ("2", "0", ("0", "1"))),
    ],
)
def test_a_template_renders_input_target_and_choices(row, template, choices, wanted):
    (example,) = load_task([row], template=template, choices=choices).train
    assert (example.input, example.target, example.choices)[: len(wanted)] == wanted


@pytest.mark.parametrize(
    ("template", "choices", "complaint"),
    [
        ("{{ question }}", None, "form 'input ... target', is not"),
        ("{{ nothing }} ||| b", None, "row 1 is not valid: 'nothing' is undefined"),
        ("{{ question.__class__.__mro__ }} ||| b", None, "unsafe"),
        ("{{ question }} ||| {{ none }}", None, "an empty field that it prints"),
        ("{{ question }} ||| b", "b ||| {{ empty }}", "choices.1: .* got ''"),
    ],
)
def test_a_bad_template_is_refused_with_the_reason(template, choices, complaint):
    row = {"question": "q", "none": None, "empty": ""}
    assert re.search(complaint, complaint_about([row], template=template, choices=choices))


TURNS = [("system", "Be brief."), ("user", "Sky?"), ("assistant", "blue"), ("user", "Sea?")]
MESSAGES = [{"role": role, "content": text} for role, text in (*TURNS, ("assistant", "green"))]
CALLS = {"role": "assistant", "content": "", "tool_calls": [{}]}
GOOD = '{"input": "Is it good?", "target": "yes"}'


@pytest.mark.parametrize(
    ("name", "lines", "complaint"),
    [
        ("a.txt", ["x"], ".csv or .parquet file"),
        ("a.jsonl", [], "no examples"),
        ("a.jsonl", [GOOD, "", '{"input": "a"'], "a.jsonl, line 3 is not valid: Expecting ',' "),
        ("a.jsonl", ["[" * 5000], "line 1 is not valid: it is nested too deeply"),
        ("a.jsonl", [json.dumps({**ROWS[0], "input": "Is it \ud83d"})], "input: .*unicode string"),
        ("a.csv", ["input,target", "a,b", "alone"], "line 3 is not valid: target is missing"),
        ("a.csv", ["input,target", "Hello, world,yes"], "line 2 has more cells"),
        ("a.csv", ["input,target", "a,b", 'Who?,"Ann', "x"], "unexpected end"),
        ("a.json", [f"[{GOOD}, 3]"], "a.json, row 2 is not valid: Input should be"),
        ("a.parquet", ["PAR1"], "a.parquet can't be read: |a.parquet is not valid: "),
    ],
)
def test_a_bad_file_is_refused_with_the_line(tmp_path, name, lines, complaint):
    assert re.search(complaint, complaint_about(write_lines(tmp_path / name, *lines)))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"target": float("nan")}, "target is missing or empty; the f"),
        ({"messages": MESSAGES[:-1]}, "role: Input should be .assistant"),
        ({"messages": [{"role": "user", "content": [{}]}, MESSAGES[-1]]}, "messages.0.content"),
        ({"messages": [CALLS]}, "tool_calls"),
        ({"target": None, "prompt": "a", "completion": CALLS}, "target: Input should be a"),
        ({"input": {"0": "Is it good?"}}, "input: Input should be a valid string, got {'0': "),
        ({"target": "maybe"}, r"target 'maybe' is not among the choices \['yes', 'no'\]"),
        ({"references": ["maybe"]}, "reference 'maybe' is not among the choices"),
        ({"choices": "yes ||| no |||"}, "choices.2: .* got ''"),
        ({"split": "dev"}, "split: Input should be 'train', 'validation' or 'test', got 'dev'"),
    ],
)
def test_a_bad_field_is_refused_with_its_row(change, complaint):
    row = change if {"messages", "prompt"} & {*change} else {**ROWS[0], **change}
    assert re.search(f"row 2 is not valid: .*{complaint}", complaint_about([ROWS[0], row]))


def test_rows_may_be_of_the_library_datasets_and_in_a_json_file_by_split(tmp_path):
    wanted, dataset = load_task(iter(ROWS)), datasets.Dataset.from_list(ROWS)
    assert load_task(dataset) == wanted
    split = load_task({"train": dataset, "test": dataset})
    assert (split.train, split.test) == (wanted.train, wanted.train)
    for content in ({"train": ROWS}, ROWS):
        (tmp_path / "a.json").write_text(json.dumps(content))
        assert load_task(tmp_path / "a.json").train == wanted.train


def test_tasks_may_be_named_where_they_are_wanted(tmp_path):
    file = write_lines(tmp_path / "one.jsonl", GOOD)
    (one,) = given_tasks(str(file))
    other = Task("other", train=one.train)
    assert given_tasks(other) == [other]
    assert given_tasks(iter([other, file])) == [other, one]
    odd = load_task(file.rename(tmp_path / "a\udcff\nb.jsonl"))  # not UTF-8, and two lines
    assert (odd.name, odd.source) == ("a  b", "a  b.jsonl")
    assert "must be a .jsonl, .json, .csv or .parquet file" in complaint_about("nosuch")
    assert "no/such.jsonl does not exist" in complaint_about("no/such.jsonl")


PARTS = [*MESSAGES[:-1], {"role": "assistant", "content": [{"type": "text", "text": "green"}]}]


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"messages": MESSAGES}, Example(Chat(TURNS), "green")),
        (
            {"messages": PARTS, "choices": ["green", "red"]},
            Example(Chat(TURNS), "green", ("green", "red")),
        ),
        ({"prompt": "Sea?", "completion": " green\n"}, Example("Sea?", "green")),
        (
            {"prompt": MESSAGES[:-1], "completion": MESSAGES[-1:]},
            Example(Chat(TURNS), "green"),
        ),
        ({"instruction": "b\n", "input": "c", "output": "a"}, Example("b\n\nc", "a")),
        ({"instruction": "b", "input": None, "output": "a"}, Example("b", "a")),
        ({"input": "a", "target": "b", "messages": MESSAGES}, Example("a", "b")),
    ],
)
def test_forms_that_people_have_are_known_by_their_columns(tmp_path, row, wanted):
    (example,) = load_task([row]).train
    assert (example, example.content) == (wanted, wanted.content)
    if row.get("messages") is not PARTS:  # a column has one type
        table = pytest.importorskip("pyarrow").Table.from_pylist([row])
        importlib.import_module("pyarrow.parquet").write_table(table, tmp_path / "a.parquet")
        assert load_task(tmp_path / "a.parquet").train == (wanted,)


def test_a_chat_is_a_text_that_keeps_its_turns():
    chat = Chat(TURNS)
    assert chat == "Be brief.\n\nSky?\n\nblue\n\nSea?"
    for copied in (copy.deepcopy(chat), pickle.loads(pickle.dumps(chat))):
        assert (type(copied), copied.turns) == (Chat, tuple(TURNS))
    assert (chat + "!").turns[-1] == ("user", "Sea?!")
    one, other = Example(chat, "x"), Example(Chat([("user", str(chat))]), "x")
    assert other == one
    assert Task("t", (other,)).digest != Task("t", (one,)).digest


TRAIN = [{"text": "good", "label": 1}, {"text": "bad", "label": 0}]
TEST = [{"text": "fine", "label": 1}]


def write(path: Path, rows: list[dict]) -> None:
    """Rows as the parquet or JSON Lines file that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        write_rows(path, rows)


def read(data: Path | None, dataset: str, config: str | None, split: str) -> list[dict]:
    return list(read_rows(Sources(data), dataset, config, split))


def complaint(data: Path | None, dataset: str, config: str | None, split: str) -> str:
    return one_line_of(lambda: read_rows(Sources(data), dataset, config, split), TaskError)


@pytest.mark.parametrize(
    ("files", "dataset", "config", "split"),
    [  # files with TRAIN and with TEST, and what asks for TRAIN
        (["d/mrpc/train.jsonl", "d/qqp/train.jsonl"], "d", "mrpc", "train"),
        (["d/d/val/0000.parquet", "d/d/train/0000.parquet"], "d", "d", "val"),  # an export
        (["d/d/challenge/0000.parquet", "d/d/train/0000.parquet"], "d", None, "challenge"),
        (["d/2016/test.jsonl", "d/2016/validation.jsonl"], "d", "2016", "test"),
    ],
)
def test_a_split_is_found_by_the_names_of_files_and_folders(
    tmp_path, files, dataset, config, split
):
    for file, rows in zip(files, (TRAIN, TEST), strict=True):
        write(tmp_path / file, rows)
    assert read(tmp_path, dataset, config, split) == TRAIN


@pytest.mark.parametrize(
    ("file", "content", "config", "split", "words"),
    [
        (None, b"", "c", "train", "--local-dir "),
        ("train.jsonl", b'{"a": 1}', None, "test", "Should be one of ['train']"),
        ("d.py", b"raise SystemExit", None, "train", PARQUET_REVISION),  # what to copy
        ("train.jsonl", b"this is nothing {", None, "train", "me/d: JSON parse error"),
    ],
)
def test_what_is_missing_or_broken_is_told(tmp_path, file, content, config, split, words):
    if file:
        (tmp_path / "me/d" / file).parent.mkdir(parents=True)
        (tmp_path / "me/d" / file).write_bytes(content)
    assert words in complaint(tmp_path, "me/d", config, split)


@pytest.fixture
def online(hub, monkeypatch):
    """The hub on this machine, for datasets too."""
    pages = f"{hub.url}/datasets/{{repo_id}}/resolve/{{revision}}/{{path}}"
    values = {"HF_ENDPOINT": hub.url, "HUB_DATASETS_URL": pages, "HF_HUB_OFFLINE": False}
    for name, value in values.items():
        monkeypatch.setattr(datasets.config, name, value)
    return hub


def test_without_copies_rows_come_from_the_hub(online, tmp_path):
    write(tmp_path / "plain/train.jsonl", TRAIN)
    online.add("me/plain", contents(tmp_path / "plain") | {"README.md": b"# Rows"})
    assert read(None, "me/plain", None, "train") == TRAIN
    task = load_task("hub:me/plain@main", template="{{ text }}? ||| {{ label }}")
    assert (task.name, task.source) == ("me--plain", "hub:me/plain@main")
    assert [example.input for example in task.train] == ["good?", "bad?"]
    save_copy(tmp_path, "saved", "A/B", train=TEST)
    online.add("me/many", contents(tmp_path / "saved") | {"C/state.json": b"{}"})
    assert read(None, "me/many", "A/B", "train") == TEST  # a folder inside a repository
    assert not any("/C/" in request for request in online.requests)


def test_a_dataset_that_needs_a_script_comes_from_the_hubs_export(online, tmp_path):
    write(tmp_path / "quail/one/val/0000.parquet", TRAIN)
    write(tmp_path / "quail/one/train/0000.parquet", TEST)
    online.add("me/quail", {"README.md": b"# Rows", "quail.py": b"raise SystemExit"})
    online.add("me/quail", contents(tmp_path / "quail"), PARQUET_REVISION)
    for config in ("one", None):
        assert read(None, "me/quail", config, "val") == TRAIN
        assert read(None, "me/quail", config, "train") == TEST
    message = complaint(None, "me/nothing", None, "x")
    assert "can't be loaded from the Hub: Dataset 'me/nothing' doesn't exist" in message
    with pytest.raises(TaskError, match="hub:me/nothing does not exist"):
        load_task("hub:me/nothing")


def rows(name: str, count: int) -> tuple[Example, ...]:
    return tuple(Example(f"{name} {i}", str(i)) for i in range(count))


def make_task(name: str, train: int, validation: int = 0, test: int = 0) -> Task:
    return Task(name, rows(name, train), rows(f"{name} v", validation), rows(f"{name} t", test))


def origins(examples: tuple[Example, ...]) -> Counter[str]:
    return Counter(example.input.split()[0] for example in examples)


@settings(max_examples=30)
@given(st.integers(2, 80), st.integers(0, 5))
def test_a_made_validation_split_takes_from_training_and_loses_nothing(count, seed):
    task = make_task("task", count)
    split = task.with_validation(seed)
    assert split.train
    assert split.validation
    assert sorted(split.train + split.validation, key=str) == sorted(task.train, key=str)
    assert split == task.with_validation(seed)
    assert split.with_validation(9) is split  # one that is there is kept


def test_evaluation_takes_test_then_validation_then_train():
    task = make_task("task", 3, 2, 1)
    for part in ("test", "validation", "train"):
        assert task.evaluation_examples() == getattr(task, part) != ()
        task = replace(task, **{part: ()})


def test_validation_examples_are_those_a_task_has_or_would_set_apart():
    own, divided = make_task("a", 20, 3), make_task("b", 20)
    mixed = mix([own, divided], "both", seed=4)
    apart = divided.with_validation(4)
    assert set(mixed.validation) == {*own.validation, *apart.validation}
    assert mixed.train == own.train + apart.train
    assert "seed 4" in mixed.validation_origin


def test_no_task_has_most_of_the_validation_examples_because_it_is_large():
    tasks = [make_task("a", 9, 9000), make_task("b", 9, 2), make_task("c", 9, 600)]
    mixed = mix(tasks, "all")
    assert origins(mixed.validation) == {"a": 500, "b": 2, "c": 500}
    drawn = origins(draw(mixed.validation, 50, seed=0))
    assert min(drawn["a"], drawn["c"]) > 15
    assert mixed.validation[:500] != tasks[0].validation[:500]  # a draw, not the head of the file


def card(front: str, text: str = "# Adapter") -> str:
    return f"---\nbase_model: me/base\n{front}\n---\n{text}\n"


def block(heading: str, content: str, language: str = "") -> str:
    return f"## {heading}\n\nSo:\n\n```{language}\n{content}\n```\n\n## More\n```\nls\n```"


CHAT = """
- messages:
  - {role: system, content: Be brief.}
  - {role: user, content: Hi}
  - {role: assistant, content: Sure.}
  - {role: user, content: "Is it good?"}
"""


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (card("widget:\n- text: Is it good?\n- example_title: B\n  text: Or bad?"), 2),
        (card("widget:\n- Is it good?"), 1),
        (card("widget:\n  text: Is it good?"), 1),
        (card(f'widget:{CHAT}- messages: [{{role: user, content: "Or bad?"}}]'), 2),
        (card("widget:\n- output: {url: a.png}\n- [7]\n- text: {a: b}\n- text: Is it good?"), 1),
        (card("widget:\n- src: a.flac\n- messages: [{role: user, content: [{type: image}]}]"), 0),
        (card("widget:\n- text: What is your favorite condiment?"), 0),
        (block("Example prompt", "Is it good?"), 1),
        (card("widget: []", block("Some inputs", "Is it good?", "text")), 1),
        (block("Prompt format", "Is it good?"), 0),
        (block("Example", "import peft", "python"), 0),
        (block("Example", "Input: Is it good?\nOutput: yes"), 0),
        (block("Prompt", "Is it {what}?"), 0),
        ("```python\n# Example input\nx = 1\n```\n\n```\nls\n```\n", 0),
        ("# A card without any", 0),
    ],
)
def test_a_card_s_widget_or_its_blocks_of_prompts_are_read(tmp_path, text, wanted):
    (tmp_path / "README.md").write_text(text)
    assert prompts_beside(tmp_path) == ("Is it good?", "Or bad?")[:wanted]


def test_files_of_prompts_go_before_a_card_and_few_are_read(tmp_path):
    (tmp_path / "README.md").write_text(card("widget: [text: of the card]"))
    turns = [{"role": "user", "content": "Is it good?"}]
    rows = [{"input": "a"}, {"prompt": "b"}, {"messages": turns}, ROWS[0]]
    write_rows(tmp_path / "examples.jsonl", rows)
    assert prompts_beside(tmp_path) == ("a", "b", "Is it good?", "Is it good?")
    write_lines(tmp_path / "prompts.txt", "", " one ", "x" * 5000, *(["more"] * 100))
    got = prompts_beside(tmp_path)
    assert (got[:2], len(got)) == (("one", "x" * LONGEST_PROMPT), 64)


BOMB = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 30)]
BOMB = ["l0: &l0 [a]", *BOMB, "widget: [messages: *l29]"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("prompts.txt", b"\xff\x00binary"),
        ("prompts.txt", b"a\n" * MOST_BYTES),
        ("prompts.txt", b" \n"),
        ("examples.jsonl", b'{"output": "no input"}\n'),
        ("examples.jsonl", b"[" * 10**5),
        ("README.md", card("widget: " + "[" * 30_000).encode()),
        ("README.md", card("\n".join(BOMB)).encode()),
        ("README.md", card("widget: !!python/object/apply:os.system [ls]").encode()),
        ("README.md", card("widget: [a").encode()),
        ("README.md", b"\xff\xfe---"),
    ],
)
def test_what_no_prompts_can_be_read_of_is_a_warning_of_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.warns(UserWarning, match="No prompts are read beside") as told:
        assert prompts_beside(tmp_path) == ()
    assert "\n" not in str(told[0].message)


@pytest.mark.parametrize(
    "card", [f"{'`' * 2**14}\n" + "x\n" * 2**13, f"# {'e' * 2**14}\n" + "```\na\n```\n" * 1500]
)
def test_long_fences_and_headings_are_not_searched_again_and_again(tmp_path, card):
    (tmp_path / "README.md").write_text(card)
    begin = time.process_time()
    assert prompts_beside(tmp_path) == ()
    assert time.process_time() - begin < 1


def test_a_link_to_elsewhere_is_not_read(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret").write_text("my secret")
    (tmp_path / "inside" / "prompts.txt").symlink_to(tmp_path / "secret")
    with pytest.warns(UserWarning, match="leads out of its folder"):
        assert prompts_beside(tmp_path / "inside") == ()
