"""`compare`: every run, what follows from them, and what is used again when it goes on."""

import json
import os
import re
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import phatgoose
from forked import forked, kill_self, needs_fork
from phatgoose.base.identity import Base
from phatgoose.base.loading import load_base
from phatgoose.config import Formatting, Routing
from phatgoose.errors import ConfigError, PoolError, TaskError, WrongBaseError
from phatgoose.evaluation.compare import (
    METHODS,
    code_version,
    compare,
    rows_of,
    single_rows,
)
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.evaluation.results import Comparison
from phatgoose.experts.pool import Pool
from phatgoose.jobs import Engine
from phatgoose.routing.compose import compose, detach, load, save
from phatgoose.tasks.suites.registry import open_suite
from phatgoose.tasks.task import Example, Task
from routed_models import with_embeddings
from tiny import logits_of, make_ids, make_model, make_tokenizer
from toy_embedders import use_toy_embedder

pytestmark = pytest.mark.usefixtures("toy_embedder")
OTHERS = ("base", "best-individual", "oracle")
ROUTERS = [name for name in METHODS if name not in OTHERS]
EXPERTS = ("e0", "e1", "e2")
REFERENCES = ("an expert", "a pool", "a routed model", "a base")
SUITES = {"mixed": ("choose", "pick", "say"), "plain": ("choose", "count")}
TASKS = ("choose", "pick", "say", "count")
TOKENS = 4  # of generated answers where a task says nothing
TOML = """
name = "mixed"
tasks = [
    { file = "plain/choose.jsonl" },
    { file = "pick.jsonl", metrics = ["accuracy"] },
    { file = "say.jsonl", metrics = ["rouge-l", "bleu"], max_new_tokens = 8 },
]
"""
WORDS = ("good", "bad", "so so", "none")
CHOOSE = [{"input": f"Film {i} is", "target": WORDS[i % 4], "choices": WORDS} for i in range(9)]
PICK = [{"input": f"{i} odd?", "target": "no", "choices": ["yes", "no"]} for i in range(7)]
SAY = [f"Tell me of {word}:" for word in (*WORDS, "more")]
COUNT = [f"{i} + 1 =" for i in range(3)]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({**row, "split": "test"}) + "\n" for row in rows))
    return path


def answers_of(inputs: Sequence[str], tokens: int, base: Base, pool: Pool) -> list[dict[str, Any]]:
    """Rows whose targets are what one model after the other answers: all score more than 0."""
    rows = []
    turns = ({"k": 1}, {"router": "merged"}, {"router": "single:expert=e1"}, {"k": 2}, {})
    for text, options in zip(inputs, turns, strict=False):
        model = compose(pool, base, **{"router": "phatgoose", **options})
        task = Task("t", test=(Example(text, "x"),))
        answer = evaluate(model, task, max_new_tokens=tokens).scores[0].predictions[0].answer
        rows.append({"input": text, "target": answer, "references": [answer, "something else"]})
        detach(base.model)
    return rows


@dataclass(frozen=True)
class Setting:
    base: Path
    pool: Pool
    suites: tuple[Path | str, ...]
    references: dict[str, Path | str]

    def run(self, out: Path, methods: Any = "all", **options: Any) -> Comparison:
        options.setdefault("base", load_base(self.base, dtype="float32"))
        options.setdefault("max_new_tokens", TOKENS)
        suites = options.pop("suites", self.suites)
        return compare(options.pop("pool", self.pool), suites, methods, out=out, **options)


def runs_of(*rows: str, tasks: Sequence[str] = TASKS) -> list[tuple[str, str]]:
    return [(row, task) for row in rows for task in tasks]


def runs_in(folder: Path, pool: Pool) -> list[tuple[str, str]]:
    """(router, expert or base; dataset) of every run that is stored, in their order."""
    experts = {row.identity["pool"][0]: row.name for row in single_rows(pool)}
    methods = [(line["key"]["method"], line["key"]["task"]) for line in stored_in(folder)]
    names = [(method.get("router", "base"), method, task) for method, task in methods]
    return [(experts[m["pool"][0]] if name == "single" else name, task) for name, m, task in names]


def by_hand(row: str, setting: Setting, base: Base) -> Any:
    """The model of a row, composed without `compare`."""
    if row in (*ROUTERS, *EXPERTS):
        router = row if row in ROUTERS else f"single:expert={row}"
        return compose(setting.pool, base, router=router)
    place = setting.references.get(row)
    return {
        "base": lambda: base,
        "an expert": lambda: compose(place, base, router="single"),
        "a pool": lambda: compose(place, base, router="phatgoose"),
        "a routed model": lambda: load(place, base),
        "a base": lambda: load_base(place, dtype="float32"),
    }[row]()


def stored_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_bytes().splitlines()]


@pytest.fixture(scope="module")
def setting(base_folders, pool_of, tmp_path_factory) -> Setting:
    """Three experts; two suites, a TOML file and a folder, that share a dataset; references."""
    folder, pool = tmp_path_factory.mktemp("setting"), pool_of("llama", (4, 4, 4))
    base = load_base(base_folders["llama"], dtype="float32")
    write_rows(folder / "plain" / "choose.jsonl", CHOOSE)
    write_rows(folder / "plain" / "count.jsonl", answers_of(COUNT, TOKENS, base, pool))
    write_rows(folder / "pick.jsonl", PICK)
    write_rows(folder / "say.jsonl", answers_of(SAY, 8, base, pool))
    (folder / "suite.toml").write_text(TOML)
    save(compose(pool.select(["e0", "e2"]), base, router="arrow", k=1), folder / "routed")
    make_model("llama", seed=1).save_pretrained(folder / "other")
    make_tokenizer(final_eos=False).save_pretrained(folder / "other")
    experts = pool.experts[0].directory.parent
    places = (experts / "e1", str(experts), folder / "routed", folder / "other")
    return Setting(
        base_folders["llama"],
        with_embeddings(pool),
        (folder / "suite.toml", str(folder / "plain")),
        dict(zip(REFERENCES, places, strict=True)),
    )


@pytest.fixture(scope="module")
def done(setting, tmp_path_factory) -> SimpleNamespace:
    """All methods and references on everything."""
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        use_toy_embedder(patch)
        comparison = setting.run(folder, references=setting.references)
    return SimpleNamespace(folder=folder, comparison=comparison)


@pytest.fixture
def out(done, tmp_path) -> Path:
    """A copy of the finished comparison's folder, to go on with."""
    return shutil.copytree(done.folder, tmp_path / "out")


@pytest.fixture
def tasks(setting) -> dict[str, Task]:
    loaded = [task for suite in setting.suites for task in open_suite(suite).load()]
    return {task.name: task for task in loaded}


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


def without_seconds(folder: Path) -> list[str]:
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
def test_other_examples_forms_precision_or_code_are_scored_again(setting, newly, out):
    for options, tasks in (
        ({"limit": 3}, LARGER),
        ({"limit": 9}, []),
        ({"max_new_tokens": TOKENS + 1}, ["count"]),  # choices and tasks of their own stay
        ({"formatting": Formatting(max_input_tokens=7)}, TASKS),
        ({"base": load_base(setting.base, dtype="bfloat16")}, TASKS),
    ):
        assert newly(["base"], **options) == runs_of("base", tasks=tasks)
    results = out / "results.jsonl"
    results.write_text(results.read_text().replace(code_version(), "0.1.0+older"))
    assert newly(["base"]) == runs_of("base")


def test_the_version_names_the_release_and_what_decides_a_score(tmp_path):
    version = code_version()
    assert re.fullmatch(rf"{re.escape(phatgoose.__version__)}\+[0-9a-f]{{12}}", version)
    for folder in ("apps", "evaluation", "routing/kernels"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("__init__.py", "evaluation/metrics.py", "routing/kernels/native.cpp"):
        (tmp_path / name).touch()
    versions = [code_version.__wrapped__(tmp_path)]
    for name, text in (
        ("apps/cli.py", "x = 2\n"),
        ("evaluation/metrics.py", "# a comment\n"),
        ("evaluation/metrics.py", "x = 2\n"),
        ("routing/kernels/native.cpp", "x = 2\n"),
    ):
        (tmp_path / name).write_text(text)
        versions.append(code_version.__wrapped__(tmp_path))
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
        (TaskError, "No task is given", {"suites": []}),
        (TaskError, "different datasets called 'choose'", {"suites": other}),
        (ConfigError, "Two suites are called 'plain'", {"suites": plain}),
        (ConfigError, "Did you mean .phatgoose", {"methods": ["phatgose"]}),
        (PoolError, "has no expert 'e9'", {"methods": ["merged", "single:expert=e9"]}),
        (WrongBaseError, "The base of joint is", {"references": {"joint": foreign}}),
        (WrongBaseError, "The base of the experts is", {"base": another}),
    ):
        with pytest.raises(error, match=message):
            setting.run(tmp_path / "refused", **{"methods": ["base", "merged"], **options})
        assert not (tmp_path / "refused").exists()


ROUTING = Routing(router="phatgoose")
TOP_K = {"random", "average-activation", "arrow", "phatgoose"}
EMBEDDED = {"retrieval", "centroid"}
COMPOSED = {*TOP_K, *EMBEDDED, "merged"}


def identities(pool: Pool, **settings: object) -> dict[str, Any]:
    """By name what tells the results of the rows apart that the tables below know."""
    routing = replace(ROUTING, **settings)
    rows = (*rows_of(pool, ["base", *COMPOSED], routing), *single_rows(pool))
    return {row.name: row.identity for row in rows}


def test_the_base_is_the_same_bit_by_bit_after_an_error(setting, llama):
    before = logits_of(llama.model, make_ids())
    for row in rows_of(setting.pool, ["phatgoose", "merged"], ROUTING):
        with pytest.raises(KeyboardInterrupt), row.model(llama):
            raise KeyboardInterrupt
        assert torch.equal(logits_of(llama.model, make_ids()), before)


# What tells results apart


@pytest.mark.parametrize(
    ("settings", "matter_to"),
    [
        ({"k": 1}, {*TOP_K, "centroid"}),
        ({"k": 2}, {"retrieval", "centroid"}),
        ({"kernel": "reference"}, COMPOSED),
        ({"router": "merged"}, set()),
    ],
    ids=["k=1", "k=2", "kernel", "router"],
)
def test_a_setting_matters_to_the_rows_that_use_it(setting, settings, matter_to):
    changed = identities(setting.pool, **settings)
    rows = identities(setting.pool).items()
    assert {name for name, identity in rows if changed[name] != identity} == matter_to


@pytest.mark.parametrize(
    ("part", "matter_to"),
    [
        ("gates", {"phatgoose"}),
        ("means", {"average-activation"}),
        ("embeddings", EMBEDDED),
        ("embedder", EMBEDDED),
        ("scale", {*COMPOSED, "e1"}),
        ("name", {"e1"}),  # that row is gone; all others stand
        ("order", COMPOSED),
    ],
)
def test_a_part_of_an_expert_matters_to_the_rows_that_use_it(setting, part, matter_to):
    first, expert, last = setting.pool.experts
    if part in ("gates", "means"):
        vectors = dict(getattr(expert, part))
        site = sorted(vectors)[3]
        changes = {part: {**vectors, site: vectors[site] + 1e-6}}
    elif part == "embeddings":
        changes = {part: expert.embeddings.flip(0).roll(1, -1)}
    elif part in ("embedder", "name"):
        changes = {"info": replace(expert.info, **{part: "other"})}
    elif part == "scale":  # adapter_config.json's lora_alpha: the weights' file stays the same
        loras = expert.lora.items()
        changes = {"modules": {site: replace(x, scale=3 * x.scale) for site, x in loras}}
    else:
        first, last, changes = last, first, {}
    changed = identities(Pool((first, replace(expert, **changes), last)))
    rows = identities(setting.pool).items()
    assert {name for name, identity in rows if changed.get(name) != identity} == matter_to
