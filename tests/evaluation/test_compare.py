"""`compare`: every run, what follows from them, and what is used again when it goes on."""

import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phatgoose
from comparisons import (
    CHOOSE,
    EXPERTS,
    PICK,
    REFERENCES,
    ROUTERS,
    SUITES,
    TASKS,
    TOKENS,
    by_hand,
    runs_in,
    runs_of,
    stored_in,
    write_rows,
)
from forked import forked, kill_self, needs_fork
from phatgoose.base import load_base
from phatgoose.config import Formatting, Routing
from phatgoose.errors import ConfigError, TaskError, WrongBaseError
from phatgoose.evaluation import compare as comparing
from phatgoose.evaluation.compare import METHODS, code_version
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.experts.pool import Pool
from phatgoose.jobs import Engine
from phatgoose.routing.compose import compose

pytestmark = pytest.mark.usefixtures("toy_embedder")


# Every run


@pytest.mark.parametrize("row", ["base", *ROUTERS, *REFERENCES, *EXPERTS])
def test_a_run_is_what_evaluate_says_of_the_model_composed_by_hand(
    done, setting, tasks, llama, row
):
    model = by_hand(row, setting, llama)
    results = (done.comparison.experts if row in EXPERTS else done.comparison.results)[row]
    stored = stored_in(done.folder)
    assert list(results) == list(TASKS)
    for name, result in results.items():
        (score,) = evaluate(model, tasks[name], max_new_tokens=TOKENS).scores
        for part in ("task", "metric", "score", "n", "low", "high", "ties", "by_metric"):
            assert getattr(result, part) == getattr(score, part), (name, part)
        answers = [prediction.answer for prediction in score.predictions]
        records = [line["result"] for line in stored if line["key"]["task"] == name]
        assert answers in [record["answers"] for record in records]


@pytest.mark.filterwarnings("ignore:.* cut to [237] tokens")
def test_settings_reach_every_model(setting, tasks, llama, tmp_path):
    options = {"formatting": Formatting(max_input_tokens=3), "token_budget": 9}
    options["max_new_tokens"] = 2
    row, routing = "phatgoose:eps=0.5", Routing(k=1, router="phatgoose")
    comparison = setting.run(tmp_path, [row], suites=setting.suites[1], routing=routing, **options)
    model = compose(setting.pool, llama, router=row, k=1)
    for name in ("choose", "count"):
        (alone,) = evaluate(model, tasks[name], **options).scores
        marks = [list(prediction.marks[0]) for prediction in alone.predictions]
        assert comparison.results[row][name].sample.statistics[0].tolist() == marks


# What follows


def test_the_rows_stand_in_the_order_of_the_paper_then_references_then_those_that_know(done):
    comparison = done.comparison
    derived = ["best-individual", "oracle"]
    assert list(comparison.results) == ["base", *ROUTERS, *REFERENCES, *derived]
    assert list(comparison.experts) == list(EXPERTS)
    labels = {name: label for name, label in METHODS.items() if name != "few-shot"}  # by name only
    assert comparison.labels == {**labels, **{label: label for label in REFERENCES}}
    assert comparison.columns == {**SUITES, "all datasets": TASKS}
    assert comparison.notes == ()


def test_oracle_is_the_best_expert_of_each_dataset_and_best_individual_that_of_all(done):
    experts, results = done.comparison.experts, done.comparison.results
    scores = {name: [row[task].score for task in TASKS] for name, row in experts.items()}
    best = max(EXPERTS, key=lambda name: np.mean(scores[name]))
    assert {task: row.score for task, row in results["oracle"].items()} == {
        task: max(row[i] for row in scores.values()) for i, task in enumerate(TASKS)
    }
    assert dict(results["best-individual"]) == dict(experts[best])
    choices = done.comparison.choices
    for task, chosen in choices["oracle"].items():
        assert results["oracle"][task] == experts[chosen][task]
    assert len(set(choices["oracle"].values())) > 1


# Going on


SMALL = ("base", "phatgoose", "oracle")  # 5 rows on 4 datasets


def without_seconds(folder: Path) -> list[Any]:
    """All that a comparison stored and wrote, but for how long it took."""
    text = (folder / "comparison.json").read_text() + (folder / "results.jsonl").read_text()
    return [re.sub(r'"seconds": [\d.]+', "", text), (folder / "comparison.md").read_text()[:-200]]


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_killed_comparison_goes_on_where_it_stopped(setting, tmp_path):
    path = tmp_path / "killed" / "results.jsonl"

    class Dying(Engine):
        def run(self, workshop: Any, jobs: Any, bar: Any) -> Any:
            for number, done in enumerate(super().run(workshop, jobs, bar)):
                if number == 4:
                    os.truncate(path, path.stat().st_size - 40)  # not written to its end
                    kill_self()
                yield done

    def compare_and_die() -> None:
        setting.run(path.parent, SMALL, limit=2, engine=Dying())

    assert forked(compare_and_die) == -signal.SIGKILL
    assert path.read_bytes().count(b"\n") == 3
    with pytest.warns(UserWarning, match="the last result was cut off"):
        setting.run(path.parent, SMALL, limit=2)
    setting.run(tmp_path / "whole", SMALL, limit=2)
    assert without_seconds(path.parent) == without_seconds(tmp_path / "whole")


def test_a_finished_comparison_is_only_read(setting, done, out):
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    comparison = setting.run(out, references=setting.references)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert comparison.summaries == done.comparison.summaries


def test_more_methods_references_and_suites_are_added(setting, tmp_path):
    options = {"suites": setting.suites[1], "limit": 2}
    out = tmp_path / "out"
    setting.run(out, ["base", "merged"], **options)
    references = {"expert": setting.references["an expert"]}
    setting.run(out, ["base", "merged"], references=references, **options)
    setting.run(out, ["merged", "best-individual"], **options)
    expected = runs_of("base", "merged", "e1", "e0", "e2", tasks=("choose", "count"))
    assert runs_in(out, setting.pool) == expected
    new = write_rows(tmp_path / "third" / "new.jsonl", CHOOSE[:2]).parent
    write_rows(new / "choose.jsonl", CHOOSE)
    comparison = setting.run(out, ["base"], suites=[setting.suites[1], new], limit=2)
    assert runs_in(out, setting.pool) == [*expected, ("base", "new")]
    assert comparison.columns["third"] == ("choose", "new")
    assert comparison.columns["all datasets"] == ("choose", "count", "new")


@pytest.fixture
def newly(setting, out):
    """`newly(methods, …)`: the runs that this comparison adds to those of everything."""

    def added(*arguments: Any, **options: Any) -> list[tuple[str, str]]:
        count = len(stored_in(out))
        setting.run(out, *arguments, **options)
        return runs_in(out, setting.pool)[count:]

    return added


LARGER = [name for name in TASKS if name != "count"]  # has three examples


@pytest.mark.filterwarnings("ignore:.* cut to 7 tokens")
@pytest.mark.parametrize(
    ("options", "tasks"),
    [
        ({"limit": 3}, LARGER),
        ({"limit": 9}, []),
        ({"max_new_tokens": TOKENS + 1}, ["count"]),  # choices and tasks of their own stay
        ({"formatting": Formatting(max_input_tokens=7)}, TASKS),
    ],
)
def test_other_examples_or_forms_are_scored_again(newly, options, tasks):
    assert newly(["base"], **options) == runs_of("base", tasks=tasks)


def test_another_precision_or_code_leaves_nothing(setting, newly, monkeypatch):
    other = load_base(setting.base, dtype="bfloat16")
    assert newly(["base"], base=other) == runs_of("base")
    monkeypatch.setattr(comparing, "code_version", lambda: "0.1.0+edited")
    assert newly(["base"]) == runs_of("base")


def test_the_version_names_the_release_and_what_decides_a_score(tmp_path, monkeypatch):
    version = code_version()
    assert re.fullmatch(rf"{re.escape(phatgoose.__version__)}\+[0-9a-f]{{12}}", version)
    monkeypatch.setattr(comparing, "PACKAGE", tmp_path)
    for folder in ("apps", "evaluation", "routing/kernels"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("__init__.py", "evaluation/metrics.py", "routing/kernels/native.cpp"):
        (tmp_path / name).touch()
    versions = [code_version.__wrapped__()]
    for name, text in (
        ("apps/cli.py", "x = 2\n"),
        ("evaluation/metrics.py", "# a comment\n"),
        ("evaluation/metrics.py", "x = 2\n"),
        ("routing/kernels/native.cpp", "x = 2\n"),
    ):
        (tmp_path / name).write_text(text)
        versions.append(code_version.__wrapped__())
    assert versions[0] == versions[1] == versions[2]
    assert len(set(versions)) == 3


def test_rows_of_one_router_with_different_settings_stand_side_by_side(setting, tmp_path):
    methods = ["arrow", "arrow:temperature=0.010,form=peft", "base"]
    comparison = setting.run(tmp_path, methods, suites=setting.suites[1], limit=1)
    assert comparison.labels == {
        "base": "Base model",
        "arrow": "Arrow",
        "arrow:form=peft,temperature=0.01": "Arrow, form=peft, temperature=0.01",
    }
    first, *rest = setting.pool.experts
    pool = Pool((replace(first, embeddings=None), *rest))
    with pytest.warns(UserWarning, match="was left out: Expert 'e0' has no embeddings"):
        every = setting.run(
            tmp_path, ["all", "random:seed=1"], pool=pool, suites=setting.suites[1], limit=1
        )
    assert {"random", "random:seed=1", "phatgoose"} <= every.results.keys()
    assert "retrieval" not in every.results


def test_it_is_refused_before_anything_is_computed_or_written(setting, pool_of, tmp_path):
    write_rows(tmp_path / "other" / "choose.jsonl", CHOOSE[:5])
    write_rows(tmp_path / "plain" / "pick.jsonl", PICK)
    foreign = pool_of("t5", (4, 4)).experts[0].directory
    another = load_base(setting.references["a base"], dtype="float32")
    other, plain = ([*setting.suites, tmp_path / name] for name in ("other", "plain"))
    for error, message, options in (
        (TaskError, "different datasets called 'choose'", {"suites": other}),
        (ConfigError, "Two suites would be called 'plain'", {"suites": plain}),
        (ConfigError, "unknown; known are all", {"methods": ["phatgose"]}),
        (WrongBaseError, "The base of joint is", {"references": {"joint": foreign}}),
        (WrongBaseError, "The base of the experts is", {"base": another}),
    ):
        with pytest.raises(error, match=message):
            setting.run(tmp_path / "refused", **{"methods": ["base", "merged"], **options})
        assert not (tmp_path / "refused").exists()
