"""Cells of a comparison, and the version of the code and the machine that scored them."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

import phatgoose
from comparisons import EXPERTS, REFERENCES, ROUTERS, TASKS, TOKENS, by_hand, stored_in
from phatgoose.base import load_base
from phatgoose.config import Formatting, Routing
from phatgoose.evaluation.comparison import cells as module
from phatgoose.evaluation.comparison.cells import circumstances, code_version
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.routers import prompt_router as base_reader
from phatgoose.tasks.task import Entry, Example, Suite, Task

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
        model = compose(pool, base, **{"router": "phatgoose", **options}) if options else base
        for name in ("choose", "count"):
            (score,) = evaluate(model, tasks[name], limit=4, max_new_tokens=TOKENS).scores
            rows = {**comparison.results, **comparison.experts}
            assert rows[row][name].score == score.score
            assert (rows[row][name].low, rows[row][name].high) == (score.low, score.high)
        if options:
            detach(base.model)


@pytest.mark.filterwarnings("ignore:.* cut to [237] tokens")
def test_settings_reach_every_model(setting, tasks, llama, tmp_path):
    routing, formatting = Routing(k=1, router="phatgoose"), Formatting(max_input_tokens=3)
    options = {"routing": routing, "formatting": formatting, "max_new_tokens": 2, "token_budget": 9}
    methods = ["average-activation:eps=0.5", "phatgoose:eps=0.5"]
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

    def counted(model, prompts, reading, **options):
        read.extend(prompts)
        return read_prompts(model, prompts, reading, **options)

    monkeypatch.setattr(base_reader, "read_prompts", counted)
    rows = ["discriminant:shrinkage=1", "discriminant:per_block=1", "discriminant"]
    setting.run(tmp_path, rows, routing=Routing(k=2, router="phatgoose"))
    assert len(read) == len(set(map(tuple, read))) > 0


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A copy of the package's source."""
    folder = tmp_path_factory.mktemp("copy") / "phatgoose"
    ignored = shutil.ignore_patterns("__pycache__")
    return shutil.copytree(Path(phatgoose.__file__).parent, folder, ignore=ignored)


@pytest.fixture
def version_with(package, monkeypatch) -> Callable[[str, str, str], str]:
    """`version_with(file, old, new)`: the code's version with that edit, undone afterwards."""
    monkeypatch.setattr(module, "PACKAGE", package)

    def version(file: str, old: str, new: str) -> str:
        text = (package / file).read_text(encoding="utf-8")
        assert old in text
        try:
            (package / file).write_text(text.replace(old, new, 1), encoding="utf-8")
            return code_version.__wrapped__()
        finally:
            (package / file).write_text(text, encoding="utf-8")

    return version


@pytest.fixture(scope="module")
def unedited(package) -> str:
    """The version of the copy as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PACKAGE", package)
        return code_version.__wrapped__()


def test_the_version_names_the_release_and_is_the_same_every_time():
    assert code_version() == code_version() == code_version.__wrapped__()
    assert re.fullmatch(rf"{re.escape(phatgoose.__version__)}\+[0-9a-f]{{12}}", code_version())


def test_comments_docstrings_and_layout_do_not_count(version_with, package, unedited):
    text = (package / "evaluation/evaluate.py").read_text(encoding="utf-8")
    edited = re.sub(r'""".*?"""', '"""Other words."""', text, flags=re.DOTALL)
    budget = "# A comment.\n\nTOKEN_BUDGET = (\n    4096  # and one\n)\n"
    edited = edited.replace("TOKEN_BUDGET = 4096\n", budget)
    assert version_with("evaluation/evaluate.py", text, edited) == unedited


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("evaluation/evaluate.py", "TOKEN_BUDGET = 4096", "TOKEN_BUDGET = 4097"),
        ("routing/compose.py", "READ_AT_ONCE = 2**26", "READ_AT_ONCE = 2**25"),
        ("evaluation/intervals.py", "REPLICATES = 2000", "REPLICATES = 1000"),
        ("routing/kernels/plain.py", "import torch\n", "import torch as pytorch\n"),
        ("routing/routers/phatgoose.py", "def standardise(", "def standardize("),
        ("routing/routers/phatgoose.py", "class Phatgoose(", "class PHATGOOSE("),
        ("routing/routers/fixed.py", "class Merged(", "class MergedExperts("),
    ],
)
def test_a_change_of_what_the_code_does_counts(version_with, unedited, file, old, new):
    assert version_with(file, old, new) != unedited


@pytest.mark.parametrize(
    "file",
    ["evaluation/comparison/compare.py", "training/train_expert.py", "tasks/suites/registry.py"],
)
def test_code_that_no_score_depends_on_does_not_count(version_with, unedited, file):
    assert version_with(file, "import", "import this\nimport") == unedited


DECISIVE = (
    *("evaluation.evaluate", "routing.open_model", "routing.compose", "routing.saved.load"),
    *("experts.pool", "experts.expert", "experts.peft_files", "base", "sites"),
    *("routing.layers", "routing.kernels.choice", "routing.kernels.plain"),
    *("routing.routers.registry", "routing.routers.arrow", "routing.routers.router"),
    *("routing.routers.phatgoose", "routing.routers.fixed", "routing.routers.configs"),
    *("routing.routers.fixed", "tasks.embeddings", "config"),
    *("tasks.encoding", "evaluation.likelihood", "tasks.batching"),
    *("evaluation.metrics", "evaluation.intervals", "tasks.task"),
)
OTHER = ("apps", "tasks.suites", "training", "evaluation.comparison", "analysis", "jobs")


def test_what_decides_a_score_is_found_by_its_imports():
    found = module._imported_by(module.SCORING)
    assert found >= set(DECISIVE)
    assert not {module for module in found if module.startswith(OTHER)}


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="no git")


def found() -> dict[str, str | None]:
    return circumstances(torch.device("cpu"), Path(__file__))


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A package in a folder of its own."""
    folder = tmp_path / "src" / "package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    monkeypatch.setattr(module, "PACKAGE", folder)
    return folder


def git(checkout, *words: str) -> str:
    who = {
        f"GIT_{role}_{what}": "x" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    done = subprocess.run(
        ["git", "-C", checkout, *words],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **who},
    )
    return done.stdout.strip()


@needs_git
def test_the_commit_is_that_of_the_checkout_and_says_when_files_differ(checkout):
    git(checkout, "init", "-q")
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "first")
    head = git(checkout, "rev-parse", "--short=9", "HEAD")
    assert found()["commit"] == head
    (checkout / "__init__.py").write_text("changed = True\n")
    assert found()["commit"] == f"{head}+changes"


@needs_git
def test_a_package_installed_in_somebody_elses_checkout_has_no_commit(checkout):
    git(checkout.parent, "init", "-q")
    git(checkout.parent, "commit", "-q", "--allow-empty", "-m", "theirs")
    assert found()["commit"] is None


def test_without_git_or_a_checkout_there_is_no_commit(checkout, monkeypatch):
    assert found()["commit"] is None
    monkeypatch.setenv("PATH", "")
    assert found()["commit"] is None


def test_the_date_is_that_of_the_last_finished_cell_in_utc(tmp_path):
    results = tmp_path / "results.jsonl"
    results.write_text("{}")
    when = datetime(2026, 11, 26, 10, 0, 5, tzinfo=UTC)
    os.utime(results, (when.timestamp(),) * 2)
    made = circumstances(torch.device("cpu"), results)
    assert made["date"] == "2026-11-26T10:00:05+00:00"
