"""`compare`: every cell, what follows from them, and what is used again when it goes on."""

import json
import os
import signal
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from comparisons import (
    CHOOSE,
    EXPERTS,
    PICK,
    REFERENCES,
    ROUTERS,
    SUITES,
    TASKS,
    TOKENS,
    cells_of,
    with_first,
    write_rows,
)
from forked import forked, kill_self, needs_fork
from phatgoose.base import load_base
from phatgoose.config import Formatting, Routing
from phatgoose.errors import ConfigError, EvaluationError, RoutingError, TaskError, WrongBaseError
from phatgoose.evaluation.comparison import cells as module
from phatgoose.evaluation.comparison import compare as comparing
from phatgoose.evaluation.comparison.compare import compare
from phatgoose.evaluation.comparison.methods import METHODS
from phatgoose.evaluation.comparison.result_store import ResultStore
from phatgoose.evaluation.evaluate import score
from phatgoose.routing.compose import compose
from phatgoose.routing.routers import prompt_router
from phatgoose.routing.routers.registry import ROUTERS as REGISTRY
from phatgoose.tasks.task import Entry, Suite

pytestmark = pytest.mark.usefixtures("toy_embedder")


def test_a_task_is_a_suite_of_its_own(setting, tasks, llama, tmp_path):
    task = next(iter(tasks.values()))
    found = compare(setting.pool, task, "base", out=tmp_path / "out", base=llama)
    assert dict(found.suites) == {task.name: (task.name,)}
    assert repr(found) == "<Comparison of base (datasets: 1)>"


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
    assert choices["best-individual"] == dict.fromkeys(TASKS, best)
    for task, chosen in choices["oracle"].items():
        assert results["oracle"][task] == experts[chosen][task]
    assert len(set(choices["oracle"].values())) > 1


def test_the_tables_are_written_with_all_that_was_set(done, setting):
    names = [".lock", "comparison.csv", "comparison.json", "comparison.md", "results.jsonl"]
    assert sorted(path.name for path in done.folder.iterdir()) == names
    assert (done.folder / "comparison.md").read_text() == done.comparison.to_markdown()
    settings = json.loads((done.folder / "comparison.json").read_text())["settings"]
    assert settings["base"]["id"] == str(setting.base)
    assert settings["base"]["fingerprint"] == load_base(setting.base).fingerprint
    wanted = {"dtype": "float32", "experts": ["e0", "e1", "e2"], "limit": None, "seed": 0}
    wanted |= {"k": None, "max_new_tokens": TOKENS, "token_budget": 4096}
    assert settings["kernel"] == "auto"
    assert wanted.items() <= settings.items()
    assert settings["code"] == module.code_version()
    assert datetime.now(UTC) - datetime.fromisoformat(settings["date"]) < timedelta(days=1)
    assert settings["machine"].endswith(f", {os.cpu_count()} cores")
    assert settings.keys() >= {"commit"}


def test_a_base_that_is_routed_already_is_refused(setting, llama, tmp_path):
    compose(setting.pool, llama, router="phatgoose")
    with pytest.raises(RoutingError, match="routed already"):
        setting.run(tmp_path / "out", ["base"], base=llama)
    assert hasattr(llama.model, "phatgoose")
    assert not (tmp_path / "out").exists()


SMALL = ("base", "phatgoose", "oracle")  # 5 rows on 4 datasets


def stop_time(patch: pytest.MonkeyPatch) -> None:
    """Nothing takes any time and all is made at once: so all files of two runs are the same."""
    patch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 0.0))
    where = {"date": "2026-11-26T10:00:00+00:00", "commit": None, "machine": "A Chip, 2 cores"}
    patch.setattr("phatgoose.evaluation.comparison.cells.circumstances", lambda *_: where)


@pytest.fixture
def no_time(monkeypatch) -> None:
    stop_time(monkeypatch)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def uninterrupted(setting, tmp_path_factory) -> dict[str, bytes]:
    """The files of a small comparison that nothing came between."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        stop_time(patch)
        setting.run(folder, SMALL, limit=2)
    return files(folder)


@pytest.mark.usefixtures("no_time")
@pytest.mark.parametrize("finished", [0, 1, 6, 19])
def test_an_interrupted_comparison_goes_on_where_it_stopped(
    setting, uninterrupted, tmp_path, monkeypatch, computed, finished
):
    watched = module.score

    def interrupted(*arguments, **options):
        if len(computed) == finished:
            raise KeyboardInterrupt
        return watched(*arguments, **options)

    monkeypatch.setattr(module, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        setting.run(tmp_path, SMALL, limit=2)
    monkeypatch.setattr(module, "score", watched)
    assert len(computed) == finished
    assert not list(tmp_path.glob("comparison.*"))
    setting.run(tmp_path, SMALL, limit=2)
    assert computed == cells_of(*SMALL[:2], *EXPERTS)  # each once, in all
    assert files(tmp_path) == uninterrupted


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.usefixtures("no_time")
def test_a_killed_comparison_goes_on_where_it_stopped(setting, tmp_path, computed):
    plain, whole, out = setting.suites[1], tmp_path / "whole", tmp_path / "out"
    setting.run(whole, SMALL, suites=plain, limit=2)
    add = ResultStore.add

    def add_or_die(store: ResultStore, *cell: Any) -> None:
        add(store, *cell)
        if len(store) == 4:
            os.truncate(store.path, store.path.stat().st_size - 40)  # not written to its end
            kill_self()

    def compare_and_die() -> None:
        ResultStore.add = add_or_die
        setting.run(out, SMALL, pool=setting.references["a pool"], suites=plain, limit=2)

    assert forked(compare_and_die) == -signal.SIGKILL
    assert (out / "results.jsonl").read_bytes().count(b"\n") == 3
    computed.clear()
    with pytest.warns(UserWarning, match="the last result was cut off"):
        setting.run(out, SMALL, suites=plain, limit=2)
    assert computed == cells_of(*SMALL[:2], *EXPERTS, tasks=("choose", "count"))[3:]
    assert files(out) == files(whole)


def test_a_finished_comparison_is_only_read(setting, done, out, computed):
    before = files(out)
    comparison = setting.run(out, references=setting.references)
    assert computed == []
    assert files(out) == before
    assert comparison.summaries == done.comparison.summaries


def test_more_methods_and_references_are_added(setting, tmp_path, computed):
    plain, pair = setting.suites[1], ("choose", "count")
    options = {"suites": plain, "limit": 2}
    setting.run(tmp_path, ["base"], **options)
    setting.run(tmp_path, ["base", "merged"], **options)
    references = {"expert": setting.references["an expert"]}
    setting.run(tmp_path, ["base", "merged"], references=references, **options)
    setting.run(tmp_path, ["merged", "best-individual"], **options)
    assert computed == cells_of("base", "merged", "e1", "e0", "e2", tasks=pair)


def test_more_suites_are_added(setting, out, tmp_path, computed):
    new = write_rows(tmp_path / "third" / "new.jsonl", CHOOSE[:2]).parent
    write_rows(new / "choose.jsonl", CHOOSE)
    comparison = setting.run(out, ["base", "phatgoose"], suites=[*setting.suites, new])
    assert computed == cells_of("base", "phatgoose", tasks=["new"])
    assert comparison.columns["third"] == ("choose", "new")
    assert comparison.columns["all datasets"] == (*TASKS, "new")


def test_another_k_leaves_what_does_not_depend_on_it(setting, out, computed):
    setting.run(out, routing=Routing(k=1, router="phatgoose"), suites=setting.suites[1])
    rows = [
        name for name, spec in REGISTRY.items() if spec.k not in (None, 1) and not spec.per_input
    ]
    assert computed == cells_of(*rows, tasks=SUITES["plain"])


LARGER = [name for name in TASKS if name != "count"]  # has three examples


@pytest.mark.filterwarnings("ignore:.* cut to 7 tokens")
@pytest.mark.parametrize(
    ("options", "tasks"),
    [
        ({"limit": 3}, LARGER),
        ({"limit": 3, "seed": 1}, LARGER),
        ({"limit": 9}, []),
        ({"max_new_tokens": TOKENS + 1}, ["count"]),  # choices and tasks of their own stay
        ({"formatting": Formatting(max_input_tokens=7)}, TASKS),
        ({"formatting": Formatting(truncation="right")}, TASKS),  # though none is cut
    ],
)
def test_other_examples_or_forms_are_scored_anew(setting, out, computed, options, tasks):
    setting.run(out, ["base"], **options)
    assert computed == cells_of("base", tasks=tasks)


def test_what_is_cut_is_told_once_a_dataset_and_kept_with_each_cell(setting, tmp_path):
    cut = Formatting(max_input_tokens=7)
    with pytest.warns(UserWarning, match="cut to 7 tokens") as told:
        setting.run(tmp_path, ["base", "merged"], suites=setting.suites[1], formatting=cut)
    lines = [str(warning.message) for warning in told]
    assert [line.split(":")[0] for line in lines] == ["choose"]
    for _, result in ResultStore(tmp_path / "results.jsonl").items():
        assert result["cuts"]["cut"] == (9 if result["task"] == "choose" else 0)


def test_another_precision_or_base_leaves_nothing(setting, out, computed):
    setting.run(out, ["base"], base=load_base(setting.base, dtype="bfloat16"))
    assert computed == cells_of("base")
    setting.run(out, ["base"], base=load_base(setting.references["a base"], dtype="float32"))
    assert computed == 2 * cells_of("base")


def test_edited_code_leaves_nothing(setting, out, computed, monkeypatch):
    place = "phatgoose.evaluation.comparison.cells.code_version"
    monkeypatch.setattr(place, lambda: "0.1.0+edited")
    comparison = setting.run(out, ["base"])
    assert computed == cells_of("base")
    assert comparison.settings["code"] == "0.1.0+edited"


def test_all_methods_score_the_same_examples(setting, tasks, tmp_path, monkeypatch):
    seen = {}

    def watched(model, task, *arguments):
        seen.setdefault(task.name, []).append(task.examples)
        return score(model, task, *arguments)

    monkeypatch.setattr(module, "score", watched)
    methods = ["base", "retrieval", "phatgoose", "oracle"]
    comparison = setting.run(tmp_path, methods, limit=2, seed=3)
    for name, drawn in seen.items():
        # The base, PHATGOOSE and three experts; Retrieval leaves each input to one of these.
        assert drawn == [tasks[name].evaluation_examples(2, 3)] * 5
        assert comparison.results["oracle"][name].n == 2
    other = setting.run(tmp_path, ["base"], limit=2, seed=4)
    assert other.settings["seed"] == 4
    assert any(drawn[0] != drawn[-1] for drawn in seen.values())


def test_rows_of_one_router_with_different_settings_stand_side_by_side(setting, tmp_path):
    methods = ["arrow", "arrow:temperature=0.010,form=peft", "base"]
    comparison = setting.run(tmp_path, methods, suites=setting.suites[1], limit=1)
    assert comparison.labels == {
        "base": "Base model",
        "arrow": "Arrow",
        "arrow:form=peft,temperature=0.01": "Arrow, form = peft, temperature = 0.01",
    }
    with pytest.warns(UserWarning, match="left out"):
        every = setting.run(
            tmp_path,
            ["all", "random:seed=1"],
            pool=with_first(setting.pool, embeddings=None),
            suites=setting.suites[1],
            limit=1,
        )
    assert {"random", "random:seed=1", "phatgoose"} <= every.results.keys()
    assert "retrieval" not in every.results


def test_rows_that_choose_by_readings_share_them(setting, tasks, tmp_path, monkeypatch):
    """The base reads each prompt once for all of them; scores are those of each row alone."""
    rows = ["discriminant", "discriminant:shrinkage=1", "discriminant:per_block=1"]
    alone = [setting.run(tmp_path / str(i), row) for i, row in enumerate(rows)]
    read, read_prompts = [], prompt_router.read_prompts

    def counted(model, prompts, *arguments, **options):
        read.extend(prompts)
        return read_prompts(model, prompts, *arguments, **options)

    monkeypatch.setattr(prompt_router, "read_prompts", counted)
    together = setting.run(tmp_path / "together", rows)
    assert len(read) == len({row.input for task in tasks.values() for row in task.test})
    for row, found in zip(together.results.values(), alone, strict=True):
        (wanted,) = found.results.values()
        for task, result in row.items():
            assert result.score == wanted[task].score
            assert result.ties == wanted[task].ties


def test_settings_that_a_method_does_not_have_are_refused_by_name(setting, tmp_path):
    options = {"methods": ["base", "phatgoose:affinity=raw"], "suites": setting.suites[1]}
    refused(
        ConfigError, "router phatgoose: unknown setting 'affinity'", setting, tmp_path, **options
    )


def test_suites_come_as_names_paths_or_suites_and_one_alone(setting, tasks, tmp_path):
    entry = Entry("pick", lambda sources: tasks["pick"])
    for suite in (Suite("own", (entry,)), [Suite("own", (entry,))]):
        assert setting.run(tmp_path, "base", suites=suite).columns == {"own": ("pick",)}
    for suite in (setting.suites[1], Path(setting.suites[1])):
        comparison = setting.run(tmp_path, ["base"], suites=suite, limit=1)
        assert comparison.columns == {"plain": ("choose", "count")}


def refused(error: type[Exception], complaint: str, setting: Any, folder: Path, **options) -> None:
    """The comparison is refused before anything is computed or written."""
    with pytest.raises(error, match=complaint):
        setting.run(folder / "refused", **{"methods": ["base", "merged"], **options})
    assert not (folder / "refused").exists()


def test_different_datasets_of_one_name_or_two_suites_of_one_name_are_refused(setting, tmp_path):
    write_rows(tmp_path / "other" / "choose.jsonl", CHOOSE[:5])
    write_rows(tmp_path / "other" / "plain" / "pick.jsonl", PICK)
    (tmp_path / "s.toml").write_text(
        f'[[tasks]]\nfile = "{setting.suites[1]}/choose.jsonl"\nmetrics = ["rouge-l"]\n'
    )
    for new, complaint in (
        ("other", "different datasets called 'choose'"),
        ("s.toml", "different datasets called 'choose'"),  # by its metrics
        ("other/plain", "Two suites are called 'plain'"),
    ):
        suites = [*setting.suites, tmp_path / new]
        refused(TaskError, complaint, setting, tmp_path, suites=suites)


def test_experts_and_routed_models_of_another_base_are_refused(setting, pool_of, tmp_path):
    foreign = pool_of("t5", (4, 4)).experts[0].directory
    another = load_base(setting.references["a base"], dtype="float32")
    old = {"old": setting.references["a routed model"]}
    for label, options in (
        ("joint", {"references": {"joint": foreign}}),
        ("Merged Experts", {"base": another}),
        ("old", {"base": another, "references": old, "methods": ["base"]}),
    ):
        refused(WrongBaseError, f"The base of {label} is", setting, tmp_path, **options)


def test_an_expert_that_is_called_like_a_method_is_refused(setting, tmp_path):
    first = setting.pool.experts[0]
    pool = with_first(setting.pool, info=replace(first.info, name="random"))
    options = {"methods": ["random", "oracle"], "pool": pool}
    refused(ConfigError, "both called 'random'", setting, tmp_path, **options)
    comparison = setting.run(tmp_path, ["random"], pool=pool, limit=1)  # nothing to mix up
    assert list(comparison.results) == ["random"]


def test_a_kept_result_without_its_parts_is_told():
    with pytest.raises(EvaluationError, match=r"A line of results.jsonl is no result"):
        comparing._result({"task": "pick", "metric": "accuracy"})
