"""The BIG-bench suites: their lists, prompts, right answers and metrics."""

from __future__ import annotations

import pytest

from phatgoose.errors import TaskError
from phatgoose.evaluation.metrics import METRICS
from phatgoose.tasks.suites.bigbench import bbh, bbl
from phatgoose.tasks.suites.entries import Sources
from phatgoose.tasks.task import Example

datasets = pytest.importorskip("datasets")

BBH_22 = [
    "boolean_expressions",
    "causal_judgment",
    "date_understanding",
    "disambiguation_qa",
    "formal_fallacies_syllogisms_negation",
    "geometric_shapes",
    "hyperbaton",
    "logical_deduction",
    "movie_recommendation",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "penguins_in_a_table",
    "reasoning_about_colored_objects",
    "ruin_names",
    "salient_translation_error_detection",
    "snarks",
    "sports_understanding",
    "temporal_sequences",
    "tracking_shuffled_objects",
    "web_of_lies",
    "word_sorting",
]
BBL_17 = [
    "bbq_lite_json",
    "conceptual_combinations",
    "conlang_translation",
    "formal_fallacies_syllogisms_negation",
    "hindu_knowledge",
    "known_unknowns",
    "linguistics_puzzles",
    "logic_grid_puzzle",
    "logical_deduction",
    "novel_concepts",
    "operators",
    "play_dialog_same_or_different",
    "repeat_copy_logic",
    "strange_stories",
    "strategyqa",
    "vitaminc_fact_verification",
    "winowhy",
]
LEFT_OUT_OF_BBL = {
    "auto_debugging",
    "code_line_description",
    "emoji_movie",
    "language_identification",
    "misconceptions_russian",
    "parsinlu_reading_comprehension",
    "symbol_interpretation",
}
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


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


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


def test_the_lists_are_those_of_the_papers_code():
    assert (bbh().name, bbl().name) == ("bbh", "bbl")
    assert list(bbh().names) == BBH_22
    assert list(bbl().names) == BBL_17


def test_the_complete_lists_are_the_papers_23_and_24():
    hard, lite = bbh(complete=True), bbl(complete=True)
    assert (hard.name, lite.name) == ("bbh-23", "bbl-24")
    assert len(hard.names) == 23
    assert set(hard.names) == {*BBH_22, "dyck_languages"}
    assert [name for name in hard.names if name != "dyck_languages"] == BBH_22
    assert len(lite.names) == 24
    assert set(lite.names) == {*BBL_17} | LEFT_OUT_OF_BBL
    assert [name for name in lite.names if name not in LEFT_OUT_OF_BBL] == BBL_17


def test_metrics_and_lengths_are_those_of_the_papers_code():
    for entry in (*bbh(complete=True).entries, *bbl(complete=True).entries):
        metric, max_new_tokens = GENERATED.get(entry.name, ("accuracy", None))
        assert entry.metrics == (metric,)
        assert metric in METRICS
        assert entry.max_new_tokens == max_new_tokens
        assert 1 <= entry.micro_batch_size <= 32


def test_all_rows_are_test_examples_with_the_papers_prompt(tmp_path):
    rows = [
        question("Is it?", ["Yes"], {"Yes": 1, "No": 0}),
        question("", ["No"], {"Yes": 0, "No": 1}),
        question("Q: Was it?\nA:", ["No"], {"Yes": 0, "No": 1}),
    ]
    task = read(tmp_path, "navigate", rows)
    assert task.name == "navigate"
    assert (task.train, task.validation) == ((), ())
    assert task.test == (
        Example("Is it?\nAnswer:", "Yes", ("Yes", "No"), ("Yes",)),
        Example("\nAnswer:", "No", ("Yes", "No"), ("No",)),
        Example("Q: Was it?\nA:\nAnswer:", "No", ("Yes", "No"), ("No",)),
    )
    assert (task.metrics, task.max_new_tokens) == (("accuracy",), None)
    assert task.source == "tasksource/bigbench, navigate"


def test_every_choice_with_score_1_is_right(tmp_path):
    rows = [question("How many?", ["2", "two"], {"2": 1, "two": 1, "3": 0})] * 2
    task = read(tmp_path, "reasoning_about_colored_objects", rows)
    assert task.test[0].target == "two"
    assert task.test[0].answers == ("2", "two")


def test_a_target_that_is_no_choice_gives_way_to_the_nearest_right_one(tmp_path):
    rows = [
        question("Can it?", ["No. It is too heavy."], {"Yes": 0, "No": 1}),
        question("Can it?", ["Yes, for it is light."], {"Yes": 1, "No": 0}),
    ]
    task = read(tmp_path, "strategyqa", rows, bbl())
    assert [example.target for example in task.test] == ["No", "Yes"]
    assert [example.answers for example in task.test] == [("No",), ("Yes",)]


def test_without_a_score_of_1_the_nearest_choice_is_right(tmp_path):
    rows = [
        question("?", ["abcd"], {"xbc": 0, "abx": 0, "ab": 0, "q": 0}),
        question("?", ["abcd"], {"ab": 0, "ax": 0, "xb": 0}),
    ]
    task = read(tmp_path, "snarks", rows)
    assert [example.answers for example in task.test] == [("ab",), ("ab",)]


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("object_counting", ("5", "five")),
        ("word_sorting", ("5",)),
    ],
)
def test_generated_answers_are_compared_with_all_targets_or_the_first(tmp_path, name, answers):
    rows = [question("How many?", ["5", "five"], {"5": 1})] * 2
    task = read(tmp_path, name, rows)
    assert task.test[0] == Example("How many?\nAnswer:", "five", (), answers)
    assert (task.metrics, task.max_new_tokens) == (("exact-match",), GENERATED[name][1])


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
    assert task.test[0].answers == (targets[0],)
    assert task.source == "lukaemon/bbh, " + name


def complaint(folder, name: str, rows: list[dict]) -> str:
    with pytest.raises(TaskError) as caught:
        read(folder, name, rows)
    return str(caught.value)


def test_rows_that_can_not_be_scored_are_refused(tmp_path):
    good = question("?", ["a"], {"a": 1, "b": 0})
    where = "tasksource/bigbench, snarks, validation row 1"
    broken = {key: value for key, value in good.items() if key != "targets"}
    assert f"{where}: field targets is missing" in complaint(
        tmp_path / "a", "snarks", [good, broken]
    )
    broken = {**good, "multiple_choice_targets": []}
    assert f"{where}: there are no choices" in complaint(tmp_path / "b", "snarks", [good, broken])
    broken = {**good, "multiple_choice_scores": [1]}
    assert f"{where}: 2 choices but 1 scores" in complaint(tmp_path / "c", "snarks", [good, broken])
    broken = {**good, "targets": []}
    assert f"{where}: there are no targets" in complaint(tmp_path / "d", "snarks", [good, broken])


def test_a_target_outside_the_fixed_choices_is_refused(tmp_path):
    save(tmp_path, "web_of_lies", "test", [{"input": "?", "target": "Maybe"}], "lukaemon/bbh")
    with pytest.raises(TaskError, match="row 1: target 'Maybe' is not among the choices"):
        bbh().entry("web_of_lies").read(Sources(tmp_path))


def test_a_missing_split_and_a_missing_dataset_are_refused(tmp_path):
    save(tmp_path, "snarks", "train", [question("?", ["a"], {"a": 1})])
    with pytest.raises(TaskError, match="Split validation of dataset tasksource/bigbench"):
        bbh().entry("snarks").read(Sources(tmp_path))
    with pytest.raises(TaskError, match="no configuration navigate; it has snarks"):
        bbh().entry("navigate").read(Sources(tmp_path))
    with pytest.raises(TaskError, match="Suite bbh has no dataset 'dyck_languages'"):
        bbh().entry("dyck_languages")
