"""The suites of the papers: their lists, templates, prompts, right answers and divisions."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest

from odd_files import one_line_of
from paths import ROOT, SHARED
from phatgoose.errors import TaskError
from phatgoose.evaluation.metrics import METRICS
from phatgoose.files import read_table
from phatgoose.tasks.suites import bigbench, t0
from phatgoose.tasks.suites.flan import _split as division
from phatgoose.tasks.suites.flan import flan
from phatgoose.tasks.suites.p3 import P3Dataset, PromptTemplate, read_templates
from phatgoose.tasks.suites.t0 import t0_held_in, t0_held_out
from phatgoose.tasks.task import Example, Sources
from suite_data import save_copy, save_templates

pytestmark = pytest.mark.usefixtures("private_cache")

FILE = """
dataset: fruit
templates:
  11: !Template
    answer_choices: sour ||| sweet
    id: 11
    jinja: "How does {{fruit}} taste? ||| {{answer_choices[label]}}"
    metadata: !TemplateMetadata {metrics: [Accuracy], languages: [en], original_task: true}
    name: taste
    reference: ours
  22: !Template
    answer_choices: null
    jinja: "Name a fruit. ||| {{fruit}}"
    metadata: !TemplateMetadata {original_task: null}
    name: Any fruit
"""


def rendered(jinja, row, choices=None, name="test"):
    return PromptTemplate(name, jinja, choices).render(row)


def test_reads_templates_and_sorts_them_by_name(tmp_path):
    (tmp_path / "fruit/big").mkdir(parents=True)
    (tmp_path / "fruit/big/templates.yaml").write_text(FILE, encoding="utf-8")
    first, second = read_templates(tmp_path, "fruit/big")
    assert first == PromptTemplate("Any fruit", "Name a fruit. ||| {{fruit}}")
    assert second == PromptTemplate(
        "taste",
        "How does {{fruit}} taste? ||| {{answer_choices[label]}}",
        "sour ||| sweet",
        original_task=True,
    )


@pytest.mark.parametrize(
    "text",
    [
        FILE.replace("reference: ours", "reference: !!python/object/apply:os.system [echo]"),
        "",
        "templates: {a: {name: n, jinja: x, answer_choices: '{% if %}'}}",
        "[" * 5000,
        None,
    ],
)
def test_broken_files_are_refused_by_name(tmp_path, text):
    if text is not None:
        (tmp_path / "templates.yaml").write_text(text, encoding="utf-8")
    told = one_line_of(lambda: read_templates(tmp_path, "."), TaskError)
    assert f"templates.yaml {'does not exist.' if text is None else 'is not valid: '}" in told


OPTIONS = {"fruit": "a lemon", "label": 0, "options": ["red", " blue"], "key": 1}


@pytest.mark.parametrize(
    ("jinja", "choices", "wanted"),
    [
        (
            " Taste of\n{{fruit}}?  |||\n{{answer_choices[label]}} ",
            " sour|||sweet ",
            Example("Taste of\na lemon?", "sour", ("sour", "sweet")),
        ),
        (
            "Pick: {{answer_choices | join(', ')}} ||| {{answer_choices[key]}}",
            "{{options | join('|||')}}",
            Example("Pick: red, blue", "blue", ("red", "blue")),
        ),
        ("{% set _ = options.append(1) %}{{options | length}} ||| x", None, Example("3", "x")),
        (
            "{% for x in [1, 2] %}{{['a'] | choice}}{% endfor %} ||| {{answer_choices[0]}}",
            "{{['b'] | choice}}",
            Example("aa", "b", ("b",)),
        ),
        ("Q ||| red ||| ||| blue |||", None, Example("Q", "red", (), ("red", "blue"))),
    ],
)
def test_input_targets_and_choices_are_rendered_from_the_row(jinja, choices, wanted):
    row = {**OPTIONS, "options": list(OPTIONS["options"])}
    assert rendered(jinja, row, choices) == wanted
    assert row == OPTIONS


def test_separators_in_a_row_do_not_split():
    row = {"text": "a ||| b", "list": ["c ||| d", "e"], "deep": {"x": [{"y": "f|||g"}]}, "n": 3}
    jinja = "{{text}} {{deep.x[0].y}}{{n}} ||| {{list[0]}}"
    example = rendered(jinja, row, "{{list | join('|||')}}")
    assert example == Example("a ||| b f|||g3", "c ||| d", ("c ||| d", "e"))


def test_long_values_are_cut_as_promptsource_does():
    example = rendered("{{text}}! ||| {{text}}", {"text": "word " * 1000}, "{{text}}")
    assert len(example.input) <= 2048 + 1
    assert example.input.endswith("word...!")
    assert example.target.endswith("word...")
    assert len(example.choices[0]) == 4999


def test_choice_draws_the_same_for_the_same_row_and_differently_for_others():
    jinja, state = "{{range(1000) | choice}} {{range(1000) | choice}} ||| x", random.getstate()
    first = [rendered(jinja, {"n": n}).input for n in range(20)]
    assert first == [rendered(jinja, {"n": n}).input for n in range(20)]
    assert len({text for draws in first for text in draws.split()}) > 30
    assert first[0] != rendered(jinja, {"n": 0}, name="another").input
    assert random.getstate() == state


HELD_OUT = "rte hellaswag copa wic winogrande cb story_cloze anli_r1 anli_r2 anli_r3 wsc"
PICK = "{{answer_choices[label]}}"


def entry_of(name):
    return (t0_held_in() if name in t0_held_in().names else t0_held_out()).entry(name)


def read_copy(folder, table, templates=None, **splits):
    """A dataset of T0, as its `table` has it, read from a copy of these rows in `folder`."""
    save_copy(folder, table["hub"], table.get("config", ""), **splits)
    return entry_of(table["name"]).read(Sources(folder, templates or folder))


@pytest.fixture
def read(tmp_path):
    """Reads one of T0's datasets: its name, the place of its templates, these, its rows."""

    def task(name, path, *templates, **splits):
        save_templates(tmp_path, path, *templates)
        (table,) = (each for each in itertools.chain(*TABLES.values()) if each["name"] == name)
        return read_copy(tmp_path, table, **splits)

    return task


def test_the_suites_have_the_papers_datasets():
    suite, held_out = t0_held_in(), t0_held_out()
    assert held_out.names == tuple(HELD_OUT.split())
    assert {entry.metrics for entry in held_out.entries} == {("accuracy",)}
    assert {name for entry in suite.entries for name in entry.metrics} <= set(METRICS)
    for entry in suite.entries:
        assert (entry.max_new_tokens is None) == (entry.metrics == ("accuracy",))
    counts = {entry.name: entry.train_examples for entry in suite.entries}
    assert (counts["mrpc"], counts["wiki_hop"]) == (3668 * 7, 43738 * 9)
    assert counts["paws"] == counts["gigaword"] == counts["app_reviews"] == 500_000


def test_held_in_task(read):
    rows = [{"sentence1": f"left {i}", "sentence2": f"right {i}", "label": i % 2} for i in range(5)]
    asked = (
        *("mrpc", "glue/mrpc"),
        ("b same", "{{sentence1}} = {{sentence2}}? ||| " + PICK, "no|||yes", True),
        ("a same", "{{sentence2}}? ||| " + PICK, "false ||| true", True),
        ("c write", "Rephrase {{sentence1}} ||| {{sentence2}}", None, False),
    )
    task = read(*asked, train=rows[:3], validation=rows)
    assert (task.metrics, task.max_new_tokens, task.test) == (("accuracy",), None, ())
    assert task.validation_origin == "split validation"
    assert len(task.train) == 3 * 3
    assert task.train[3:6] == (
        Example("right 1?", "true", ("false", "true")),
        Example("left 1 = right 1?", "yes", ("no", "yes")),
        Example("Rephrase left 1", "right 1"),
    )
    inputs = ["right 0?", "left 1 = right 1?", "right 2?", "left 3 = right 3?", "right 4?"]
    assert [example.input for example in task.validation] == inputs
    assert task.digest == read(*asked, train=rows[:3], validation=rows).digest


def test_generated_answers_are_compared_with_the_rows_own(read):
    row = {"question": "Q?", "answers": {"text": ["one", "1", " "]}, "summary": " B. "}
    find = ("find", "{{question}} ||| {{answers.text[0]}}", None, True)
    for name, answers in (("quoref", ("one", "1")), ("xsum", (" B. ",))):
        task = read(name, name, find, train=[row], validation=[row] * 2)
        assert task.train[0].references == ()
        for example in task.validation:
            assert (example.choices, example.answers) == ((), answers)


def test_held_out_tasks_have_every_row_in_every_original_template(read):
    task = read(
        *("anli_r2", "anli"),
        ("b", "B {{premise}} ||| " + PICK, "x|||y|||z", True),
        ("a", "A {{premise}} ||| " + PICK, "l|||m|||n", True),
        ("c", "C {{premise}} ||| " + PICK, "x|||y|||z", False),
        dev_r2=[{"premise": "p", "label": 2}, {"premise": "q", "label": 0}],
    )
    assert task.test == (
        Example("A p", "n", ("l", "m", "n")),
        Example("B p", "z", ("x", "y", "z")),
        Example("A q", "l", ("l", "m", "n")),
        Example("B q", "x", ("x", "y", "z")),
    )
    assert [example.row for example in task.test] == [0, 0, 1, 1]
    assert (task.train, task.validation, task.metrics) == ((), (), ("accuracy",))


def test_pairs_left_out_are_counted_in_one_warning(read):
    rows = [{"premise": "p", "hypothesis": h, "label": 0} for h in ("h", "no", "YES")]
    targets = (PICK, "{{hypothesis}}", "", "{{['yes', 'no'][label // label]}}", "{{premise.a.b}}")
    several = [
        (name, "{{premise}} ||| " + target, "yes|||no", True)
        for name, target in zip("abcde", targets, strict=True)
    ]
    with pytest.warns(UserWarning, match="cb: ") as caught:
        task = read("cb", "super_glue/cb", *several, validation=rows)
    assert len(caught) == 1
    told = str(caught[0].message)
    assert "11 of 15 pairs of a row and a prompt template are left out" in told
    assert "First failure: template 'd', " in told
    assert [example.target for example in task.test] == ["yes", "yes", "no", "yes"]


@pytest.mark.parametrize(
    ("jinja", "original", "reason"),
    [
        ("{{premise}} ||| {{label}}", True, "rte: 1 of 1 pairs"),
        ("{{text}} ||| no", True, "has no field text, which the template 't' needs; .* label"),
        ("a ||| b", False, "0 of 0 pairs"),
    ],
)
def test_datasets_without_examples_are_refused(read, jinja, original, reason):
    validation = [{"premise": "p", "label": 0}]
    with pytest.raises(TaskError, match=reason):
        read("rte", "super_glue/rte", ("t", jinja, "yes|||no", original), validation=validation)


# The real templates, on made-up records

P3 = SHARED / "data/p3_templates"
RECORDS = json.loads((ROOT / "tests/support/p3_records.json").read_text(encoding="utf-8"))
TREC = {"text": "What is the capital of Peru ?", "coarse_label": 4, "fine_label": 32}
TABLES = read_table(Path(t0.__file__).with_suffix(".toml"), "Suite", TaskError)


@pytest.mark.real
@pytest.mark.skipif(not P3.is_dir(), reason=f"no P3 templates in {P3}")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("table", TABLES["held_in"], ids=lambda table: table["name"])
def test_real_held_in_tasks(table, tmp_path):
    name = "/".join(filter(None, (table["hub"].split("/")[-1], table.get("config"))))
    record = TREC if "prompt" in table else RECORDS[name]
    rows = [record] * (10_013 if table.get("set_apart") else 13)
    splits = dict.fromkeys(("train", table.get("validation", "validation")), rows)
    task = read_copy(tmp_path, table, P3, **splits)
    for example in task.validation:
        assert bool(example.choices) == (task.metrics == ("accuracy",))
    fields = ("name", "hub", "config", "ignored", "prompt", "prompt_choices")
    dataset = P3Dataset(**{key: table[key] for key in fields if key in table})
    templates = dataset.prompt_templates(Sources(templates=P3))
    assert len(templates) == table["train_templates"]
    assert 0 < len(task.train) <= 13 * len(templates)


REPOSITORY = "r-three/Phatgoose_flanv2_offline"
IRONY = "FLANV2/NIV2/Irony Detection"


def row(number: int, kind: str | None = "zs_noopt") -> dict[str, str | None]:
    return {"inputs": f"Q{number}", "targets": f"A{number}", "_template_type": kind, "_task": "t"}


def irony(folder, rows):
    save_copy(folder, REPOSITORY, IRONY, train=rows)
    return flan().entry("niv2_irony_detection").read(Sources(folder))


def test_the_suite_has_the_papers_166_datasets_in_its_order():
    suite = flan()
    assert len(suite.names) == len(set(suite.names)) == 166
    assert suite.names[:36] == t0_held_in().names
    families = [name.split("_")[0] for name in suite.names]
    assert families[36:72] == ["flan2021"] * 36
    assert families[72:147] == ["niv2"] * 75
    added = "wsc copa hellaswag wic race_high race_middle web_questions"
    assert " ".join(suite.names[147:154]) == added
    assert families[154:] == ["dialog"] * 4 + ["flan2021"] * 8
    race, questions = suite.entry("race_high"), suite.entry("web_questions")
    assert (race.metrics, race.train_examples) == (("accuracy",), 62445 * 8)
    assert (questions.metrics, questions.max_new_tokens) == (("rouge-l",), 31)


def test_only_zero_shot_rows_with_input_and_target_are_kept_as_they_are(tmp_path):
    kinds = ["zs_opt", "fs_opt", "zs_noopt", "fs_noopt", None]
    rows = [row(i, kind) for i, kind in enumerate(kinds)]
    rows += [{**row(5), "inputs": " \n"}, {**row(6), "targets": ""}, {**row(7), "targets": None}]
    rows += [{**row(0), "inputs": " Is this\nirony? ", "targets": "no "}]
    task = irony(tmp_path, rows)
    wanted = {Example("Q0", "A0"), Example("Q2", "A2"), Example(" Is this\nirony? ", "no ")}
    assert set(task.train) == wanted
    assert (task.metrics, task.max_new_tokens) == (("rouge-l",), 3)
    assert (task.validation, task.test) == ((), ())  # a tenth of three is none


def test_the_division_is_that_of_the_papers_code(tmp_path):
    task = irony(tmp_path / "small", [row(i) for i in range(57)])
    order = np.random.RandomState(1234).choice(57, size=57, replace=False)  # its src/data/flat.py
    assert [example.input for example in task.validation] == [f"Q{i}" for i in order[:5]]
    assert [example.input for example in task.train] == [f"Q{i}" for i in order[5:]]
    assert task.validation_origin == "5 of 57 examples, seed 1234"
    task = division(task, range(520_000))  # numbers for the examples of a large dataset
    order = np.random.RandomState(1234).choice(520_000, size=520_000, replace=False)
    drawn = np.random.default_rng(42).choice(510_000, size=500_000, replace=False)
    assert task.validation == tuple(order[:10_000])
    assert task.train == tuple(order[10_000:][drawn])


GENERATED = {"auto_debugging": 31, "conlang_translation": 63, "linguistics_puzzles": 127}
GENERATED |= {"multistep_arithmetic_two": 7, "object_counting": 7, "operators": 3}
GENERATED |= {"parsinlu_reading_comprehension": 127, "repeat_copy_logic": 63, "word_sorting": 127}


def question(text: str, targets: list[str], scores: str = "") -> dict:
    """A row of tasksource/bigbench; `scores` are "CHOICE:SCORE …"."""
    pairs = [pair.split(":") for pair in scores.split()]
    choices, marks = [pair[0] for pair in pairs], [int(pair[1]) for pair in pairs]
    choices = {"multiple_choice_targets": choices, "multiple_choice_scores": marks}
    return {"idx": 0, "inputs": text, "targets": targets, **choices}


def read_big(folder, name: str, rows: list[dict], suite: str = "bbh"):
    """BIG-bench's task `name` of two rows or more, the last in the validation split."""
    save_copy(folder, "tasksource/bigbench", name, train=rows[:-1], validation=rows[-1:])
    return bigbench.suite(suite).entry(name).read(Sources(folder))


def test_the_suites_are_those_of_the_papers_code_and_of_the_paper():
    hard, lite, bbh, bbl = map(bigbench.suite, ("bbh-23", "bbl-24", "bbh", "bbl"))
    assert {*hard.names} - {*bbh.names} == {"dyck_languages"}
    assert [len(suite.names) for suite in (hard, lite, bbh, bbl)] == [23, 24, 22, 17]
    for entry in (*hard.entries, *lite.entries):
        metric = "exact-match" if entry.name in GENERATED else "accuracy"
        metric = "rouge-l" if entry.name == "conlang_translation" else metric
        assert (entry.metrics, entry.max_new_tokens) == ((metric,), GENERATED.get(entry.name))


def test_all_rows_are_test_examples_with_the_papers_prompt(tmp_path):
    rows = [question("Is it?", ["Yes"], "Yes:1 No:0"), question("", ["No"], "Yes:0 No:1")]
    task = read_big(tmp_path, "navigate", rows)
    assert task.test == (
        Example("Is it?\nAnswer:", "Yes", ("Yes", "No"), ("Yes",)),
        Example("\nAnswer:", "No", ("Yes", "No"), ("No",)),
    )
    assert (task.name, task.train, task.validation) == ("navigate", (), ())


@pytest.mark.parametrize(
    ("name", "suite", "targets", "scores", "wanted"),
    [
        # every choice with score 1 is right
        ("reasoning_about_colored_objects", "bbh", ["2", "two"], "2:1 two:1 3:0", ("2", "two")),
        # a target that is no choice gives way to the nearest right one
        ("strategyqa", "bbl", ["No. It is too heavy."], "Yes:0 No:1", ("No",)),
        # without a score of 1 the nearest choice is right
        ("snarks", "bbh", ["abcd"], "xbc:0 abx:0 ab:0 q:0", ("ab",)),
        ("snarks", "bbh", ["abcd"], "ab:0 ax:0 xb:0", ("ab",)),
        # generated answers are compared with all targets, or with the first
        ("object_counting", "bbh", ["5", "five"], "5:1", ("5", "five")),
        ("word_sorting", "bbh", ["5", "five"], "5:1", ("5",)),
    ],
)
def test_right_answers(tmp_path, name, suite, targets, scores, wanted):
    task = read_big(tmp_path, name, [question("?", targets, scores)] * 2, suite)
    assert task.test[0].answers == wanted
    assert bool(task.test[0].choices) == (name not in GENERATED)
    assert task.test[0].target == (max(targets, key=len) if name in GENERATED else wanted[-1])
