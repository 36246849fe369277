"""Every cell of a comparison is what evaluate says of the model composed by hand."""

from __future__ import annotations

import json

import pytest

from comparisons import (
    EXPERTS,
    REFERENCES,
    ROUTERS,
    TASKS,
    TOKENS,
    by_hand,
    stored_in,
)
from phatgoose.base.loading import load_base
from phatgoose.config import Formatting, Routing
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.routers import prompt_router as base_reader
from phatgoose.tasks.suites.entries import Entry, Suite
from phatgoose.tasks.task import Example, Task

pytestmark = pytest.mark.usefixtures("toy_embedder")


@pytest.mark.parametrize("row", ["base", *ROUTERS, *REFERENCES, *EXPERTS])
def test_a_cell_is_what_evaluate_says_of_the_model_composed_by_hand(
    done, setting, tasks, llama, row
):
    model = by_hand(row, setting, llama)
    results = (done.comparison.experts if row in EXPERTS else done.comparison.results)[row]
    stored = stored_in(done.folder)
    assert list(results) == list(TASKS)
    for name, result in results.items():
        (score,) = evaluate(model, tasks[name], max_new_tokens=TOKENS).scores
        for part in ("task", "metric", "score", "n", "low", "high", "ties"):
            assert getattr(result, part) == getattr(score, part), (name, part)
        assert result.sample.by_metric == score.by_metric
        answers = [prediction.answer for prediction in score.predictions]
        records = [line["result"] for line in stored if line["key"]["task"] == name]
        assert answers in [record["answers"] for record in records]


def test_the_models_of_the_test_differ(done):
    means = [row["all datasets"].mean for row in done.comparison.summaries.values()]
    assert len(set(means)) >= len(means) - 3
    assert all(any(row[task].score for row in done.comparison.results.values()) for task in TASKS)
    results = done.comparison.results["phatgoose"]
    assert results["say"].metric == "ROUGE-L + BLEU"
    assert results["count"].metric == "exact match"
    assert results["choose"].metric == results["pick"].metric == "rank classification accuracy"


def test_no_cell_is_computed_twice(done):
    keys = [json.dumps(line["key"], sort_keys=True) for line in stored_in(done.folder)]
    rows = 1 + len(ROUTERS) + len(EXPERTS) + 2  # of the references, two are rows already
    assert len(keys) == len(set(keys)) == rows * len(TASKS)


def test_a_sequence_to_sequence_base_is_compared_alike(
    setting, tasks, base_folders, pool_of, tmp_path
):
    pool, base = pool_of("t5", (4, 4)), load_base(base_folders["t5"], dtype="float32")
    plain = setting.suites[1]
    methods = ["base", "merged", "phatgoose", "oracle"]
    comparison = setting.run(tmp_path, methods, pool=pool, base=base, suites=plain, limit=4)
    for row, options in (
        ("base", None),
        ("merged", {"router": "merged"}),
        ("phatgoose", {"k": 2}),
        ("e1", {"router": "single:expert=e1"}),
    ):
        model = compose(pool, base, **options) if options else base
        for name in ("choose", "count"):
            (score,) = evaluate(model, tasks[name], limit=4, max_new_tokens=TOKENS).scores
            rows = {**comparison.results, **comparison.experts}
            assert rows[row][name].score == score.score
            assert (rows[row][name].low, rows[row][name].high) == (score.low, score.high)
        if options:
            detach(base.model)


@pytest.mark.filterwarnings("ignore:.* cut to [237] tokens")
def test_settings_reach_every_model(setting, tasks, llama, tmp_path):
    routing, formatting = Routing(k=1), Formatting(max_input_tokens=3)
    options = {"routing": routing, "formatting": formatting, "max_new_tokens": 2, "token_budget": 9}
    methods = ["uniform-top-k:eps=0.5", "phatgoose:eps=0.5"]
    comparison = setting.run(tmp_path, methods, suites=setting.suites[1], **options)
    for row in methods:
        model = compose(setting.pool, llama, router=row, k=1)
        for name in ("choose", "count"):
            (alone,) = evaluate(
                model, tasks[name], formatting=formatting, max_new_tokens=2, token_budget=9
            ).scores
            marks = [list(prediction.marks[0]) for prediction in alone.predictions]
            assert comparison.results[row][name].sample.statistics[0].tolist() == marks
        detach(llama.model)


def test_what_examples_were_made_of_is_kept_with_their_marks(setting, tmp_path):
    examples = tuple(Example(f"a{i}", "yes", ("yes", "no"), row=i // 2) for i in range(6))
    task = Task("templates", test=examples)
    suite = Suite("S", (Entry("templates", lambda _: task),))
    for _ in range(2):  # the second time from the store
        (result,) = setting.run(tmp_path, ["base"], suites=[suite]).results["base"].values()
        assert result.sample.rows is not None
        assert result.sample.rows.tolist() == [0, 0, 1, 1, 2, 2]


def test_rows_that_go_by_the_same_readings_read_each_prompt_once(setting, tmp_path, monkeypatch):
    read, read_prompts = [], base_reader.read_prompts

    def counted(model, prompts, reading):
        read.extend(prompts)
        return read_prompts(model, prompts, reading)

    monkeypatch.setattr(base_reader, "read_prompts", counted)
    rows = ["discriminant:place=end", "discriminant-phatgoose", "joint-discriminant"]
    setting.run(tmp_path, rows, routing=Routing(k=2))
    assert len(read) == len(set(map(tuple, read))) > 0
