"""The BIG-bench suites: their lists, prompts, right answers and metrics."""

import pytest

from phatgoose.evaluation.metrics import METRICS
from phatgoose.tasks.suites.bigbench import bbh, bbl
from phatgoose.tasks.task import Example, Sources
from suite_data import save_copy

pytestmark = pytest.mark.usefixtures("private_cache")

GENERATED = {
    "auto_debugging": ("exact-match", 31),
    "conlang_translation": ("rouge-l", 63),
    "linguistics_puzzles": ("exact-match", 127),
    "multistep_arithmetic_two": ("exact-match", 7),
    "object_counting": ("exact-match", 7),
    "operators": ("exact-match", 3),
    "parsinlu_reading_comprehension": ("exact-match", 127),
    "repeat_copy_logic": ("exact-match", 63),
    "word_sorting": ("exact-match", 127),
}


def question(text: str, targets: list[str], scores: str = "") -> dict:
    """A row of tasksource/bigbench; `scores` are "CHOICE:SCORE …"."""
    pairs = [pair.split(":") for pair in scores.split()]
    choices, marks = [pair[0] for pair in pairs], [int(pair[1]) for pair in pairs]
    choices = {"multiple_choice_targets": choices, "multiple_choice_scores": marks}
    return {"idx": 0, "inputs": text, "targets": targets, **choices}


def read(folder, name: str, rows: list[dict], suite=None):
    """The task `name` of two rows or more, the last of them in the validation split."""
    save_copy(folder, "tasksource/bigbench", name, train=rows[:-1], validation=rows[-1:])
    return (suite or bbh()).entry(name).read(Sources(folder))


def test_the_suites_are_those_of_the_papers_code_and_of_the_paper():
    hard, lite = bbh(complete=True), bbl(complete=True)
    assert {*hard.names} - {*bbh().names} == {"dyck_languages"}
    assert [len(suite.names) for suite in (hard, lite, bbh(), bbl())] == [23, 24, 22, 17]
    for entry in (*hard.entries, *lite.entries):
        metric, max_new_tokens = GENERATED.get(entry.name, ("accuracy", None))
        assert (entry.metrics, entry.max_new_tokens) == ((metric,), max_new_tokens)
        assert metric in METRICS


def test_all_rows_are_test_examples_with_the_papers_prompt(tmp_path):
    rows = [question("Is it?", ["Yes"], "Yes:1 No:0"), question("", ["No"], "Yes:0 No:1")]
    task = read(tmp_path, "navigate", rows)
    assert task.test == (
        Example("Is it?\nAnswer:", "Yes", ("Yes", "No"), ("Yes",)),
        Example("\nAnswer:", "No", ("Yes", "No"), ("No",)),
    )
    assert (task.name, task.train, task.validation) == ("navigate", (), ())


@pytest.mark.parametrize(
    ("name", "suite", "targets", "scores", "wanted"),
    [
        # every choice with score 1 is right
        ("reasoning_about_colored_objects", bbh, ["2", "two"], "2:1 two:1 3:0", ("2", "two")),
        # a target that is no choice gives way to the nearest right one
        ("strategyqa", bbl, ["No. It is too heavy."], "Yes:0 No:1", ("No",)),
        # without a score of 1 the nearest choice is right
        ("snarks", bbh, ["abcd"], "xbc:0 abx:0 ab:0 q:0", ("ab",)),
        ("snarks", bbh, ["abcd"], "ab:0 ax:0 xb:0", ("ab",)),
        # generated answers are compared with all targets, or with the first
        ("object_counting", bbh, ["5", "five"], "5:1", ("5", "five")),
        ("word_sorting", bbh, ["5", "five"], "5:1", ("5",)),
    ],
)
def test_right_answers(tmp_path, name, suite, targets, scores, wanted):
    task = read(tmp_path, name, [question("?", targets, scores)] * 2, suite())
    assert task.test[0].answers == wanted
    assert bool(task.test[0].choices) == (name not in GENERATED)
    assert task.test[0].target == (max(targets, key=len) if name in GENERATED else wanted[-1])
