"""The BIG-bench suites: their lists, prompts, right answers and metrics."""

import pytest

from phatgoose.errors import TaskError
from phatgoose.evaluation.metrics import METRICS
from phatgoose.tasks.suites.bigbench import bbh, bbl
from phatgoose.tasks.task import Example, Sources

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.usefixtures("private_cache")

BBH_22 = """
boolean_expressions causal_judgment date_understanding disambiguation_qa
formal_fallacies_syllogisms_negation geometric_shapes hyperbaton logical_deduction
movie_recommendation multistep_arithmetic_two navigate object_counting penguins_in_a_table
reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks
sports_understanding temporal_sequences tracking_shuffled_objects web_of_lies word_sorting
"""
BBL_17 = """
bbq_lite_json conceptual_combinations conlang_translation formal_fallacies_syllogisms_negation
hindu_knowledge known_unknowns linguistics_puzzles logic_grid_puzzle logical_deduction
novel_concepts operators play_dialog_same_or_different repeat_copy_logic strange_stories strategyqa
vitaminc_fact_verification winowhy
"""
LEFT_OUT_OF_BBL = """
auto_debugging code_line_description emoji_movie language_identification misconceptions_russian
parsinlu_reading_comprehension symbol_interpretation
"""
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


def question(text: str, targets: list[str], scores: dict[str, int] | None = None) -> dict:
    """A row of tasksource/bigbench."""
    return {
        "idx": 0,
        "inputs": text,
        "targets": targets,
        "multiple_choice_targets": list(scores or {}),
        "multiple_choice_scores": list((scores or {}).values()),
    }


def save(folder, name: str, split: str, rows: list[dict], dataset="tasksource/bigbench") -> None:
    path = folder / dataset / name / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(path)


def read(folder, name: str, rows: list[dict], suite=None):
    """The task `name` of two rows or more, the last of them in the validation split."""
    save(folder, name, "train", rows[:-1])
    save(folder, name, "validation", rows[-1:])
    return (suite or bbh()).entry(name).read(Sources(folder))


def test_the_lists_are_those_of_the_papers_code_and_of_the_paper():
    left_out = set(LEFT_OUT_OF_BBL.split())
    assert list(bbh().names) == BBH_22.split()
    assert list(bbl().names) == BBL_17.split()
    hard, lite = bbh(complete=True).names, bbl(complete=True).names
    assert (len(hard), len(lite)) == (23, 24)
    assert [name for name in hard if name != "dyck_languages"] == BBH_22.split()
    assert [name for name in lite if name not in left_out] == BBL_17.split()
    assert {*lite} - {*BBL_17.split()} == left_out


def test_metrics_and_lengths_are_those_of_the_papers_code():
    for entry in (*bbh(complete=True).entries, *bbl(complete=True).entries):
        metric, max_new_tokens = GENERATED.get(entry.name, ("accuracy", None))
        assert (entry.metrics, entry.max_new_tokens) == ((metric,), max_new_tokens)
        assert metric in METRICS
        assert 1 <= entry.micro_batch_size <= 32


def test_all_rows_are_test_examples_with_the_papers_prompt(tmp_path):
    rows = [
        question("Is it?", ["Yes"], {"Yes": 1, "No": 0}),
        question("", ["No"], {"Yes": 0, "No": 1}),
        question("Q: Was it?\nA:", ["No"], {"Yes": 0, "No": 1}),
    ]
    task = read(tmp_path, "navigate", rows)
    assert (task.name, task.train, task.validation) == ("navigate", (), ())
    assert task.test == (
        Example("Is it?\nAnswer:", "Yes", ("Yes", "No"), ("Yes",)),
        Example("\nAnswer:", "No", ("Yes", "No"), ("No",)),
        Example("Q: Was it?\nA:\nAnswer:", "No", ("Yes", "No"), ("No",)),
    )
    assert (task.metrics, task.max_new_tokens) == (("accuracy",), None)
    assert task.source == "tasksource/bigbench, navigate"


@pytest.mark.parametrize(
    ("name", "suite", "targets", "scores", "wanted"),
    [
        # every choice with score 1 is right
        ("reasoning_about_colored_objects", bbh, ["2", "two"], "2:1 two:1 3:0", ("2", "two")),
        # a target that is no choice gives way to the nearest right one
        ("strategyqa", bbl, ["No. It is too heavy."], "Yes:0 No:1", ("No",)),
        ("strategyqa", bbl, ["Yes, for it is light."], "Yes:1 No:0", ("Yes",)),
        # without a score of 1 the nearest choice is right
        ("snarks", bbh, ["abcd"], "xbc:0 abx:0 ab:0 q:0", ("ab",)),
        ("snarks", bbh, ["abcd"], "ab:0 ax:0 xb:0", ("ab",)),
        # generated answers are compared with all targets, or with the first
        ("object_counting", bbh, ["5", "five"], "5:1", ("5", "five")),
        ("word_sorting", bbh, ["5", "five"], "5:1", ("5",)),
    ],
)
def test_right_answers(tmp_path, name, suite, targets, scores, wanted):
    pairs = (pair.split(":") for pair in scores.split())
    rows = [question("?", targets, {choice: int(score) for choice, score in pairs})] * 2
    task = read(tmp_path, name, rows, suite())
    assert task.test[0].answers == wanted
    assert bool(task.test[0].choices) == (name not in GENERATED)
    assert task.test[0].target == (max(targets, key=len) if name in GENERATED else wanted[-1])


@pytest.mark.parametrize(
    ("name", "targets", "choices"),
    [
        ("boolean_expressions", ["True", "False"], ("True", "False")),
        ("web_of_lies", ["No", "Yes"], ("Yes", "No")),
        ("multistep_arithmetic_two", ["-12", "7"], ()),
    ],
)
def test_three_tasks_are_those_of_bbhs_authors(tmp_path, name, targets, choices):
    rows = [{"input": f"{target}?", "target": target} for target in targets]
    save(tmp_path, name, "test", rows, "lukaemon/bbh")
    task = bbh().entry(name).read(Sources(tmp_path))
    assert task.test == tuple(Example(f"{t}?\nAnswer:", t, choices) for t in targets)
    assert task.source == "lukaemon/bbh, " + name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"targets": None}, "field targets is missing"),
        ({"multiple_choice_targets": []}, "there are no choices"),
        ({"multiple_choice_scores": [1]}, "2 choices but 1 scores"),
        ({"targets": []}, "there are no targets"),
    ],
)
def test_rows_that_can_not_be_scored_are_refused(tmp_path, change, words):
    good = question("?", ["a"], {"a": 1, "b": 0})
    where = "tasksource/bigbench, snarks, validation row 1"
    with pytest.raises(TaskError, match=f"{where}: {words}"):
        read(tmp_path, "snarks", [good, good | change])


def test_what_is_missing_or_no_choice_is_refused(tmp_path):
    save(tmp_path, "web_of_lies", "test", [{"input": "?", "target": "Maybe"}], "lukaemon/bbh")
    save(tmp_path, "snarks", "train", [question("?", ["a"], {"a": 1})])
    for name, words in (
        ("web_of_lies", "row 1: target 'Maybe' is not among the choices"),
        ("snarks", "Split validation of dataset tasksource/bigbench"),
        ("navigate", "Couldn't find any data file at .*navigate"),
        ("dyck_languages", "Suite bbh has no dataset 'dyck_languages'"),
    ):
        with pytest.raises(TaskError, match=words):
            bbh().entry(name).read(Sources(tmp_path))
