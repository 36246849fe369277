"""The version of the code that decides a score: what changes it, and what doesn't."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import phatgoose
from phatgoose.evaluation.comparison import cells as versions
from phatgoose.evaluation.comparison.cells import code_version


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A copy of the package's source."""
    folder = tmp_path_factory.mktemp("copy") / "phatgoose"
    ignored = shutil.ignore_patterns("__pycache__")
    return shutil.copytree(Path(phatgoose.__file__).parent, folder, ignore=ignored)


@pytest.fixture
def version_with(package, monkeypatch) -> Callable[[str, str, str], str]:
    """`version_with(file, old, new)`: the code's version with that edit, undone afterwards."""
    monkeypatch.setattr(versions, "PACKAGE", package)

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
        patch.setattr(versions, "PACKAGE", package)
        return code_version.__wrapped__()


def test_the_version_names_the_release_and_is_the_same_every_time():
    assert code_version() == code_version() == code_version.__wrapped__()
    assert re.fullmatch(rf"{re.escape(phatgoose.__version__)}\+[0-9a-f]{{12}}", code_version())


def test_the_same_code_elsewhere_is_the_same_version(unedited):
    assert unedited == code_version()


def test_comments_docstrings_and_layout_do_not_count(version_with, package, unedited):
    text = (package / "evaluation/evaluate.py").read_text(encoding="utf-8")
    edited = text
    for old, new in (
        ("TOKEN_BUDGET = 4096\n", "# A comment.\n\nTOKEN_BUDGET = (\n    4096  # and one\n)\n"),
        ('"""Zero-shot evaluation', '"""Zero-shot scores'),  # a module's docstring
        ('"""What the model answered', '"""The words that the model answered'),  # a class's
        ('"""The unweighted mean', '"""The plain mean'),  # a method's
        ('    """Wilson\'s interval of a share of right answers, else a bootstrap."""\n', ""),
    ):
        assert old in edited
        edited = edited.replace(old, new, 1)
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
    *("experts.pool", "experts.expert", "experts.kinds.peft", "base.loading", "base.sites"),
    *("routing.layers", "routing.kernels.choice", "routing.kernels.plain"),
    *("routing.routers.registry", "routing.routers.arrow", "routing.routers.router"),
    *("routing.routers.phatgoose", "routing.routers.fixed", "routing.routers.configs"),
    *("routing.routers.oracle", "tasks.embeddings", "config"),
    *("tasks.encoding", "evaluation.likelihood", "tasks.batching"),
    *("evaluation.metrics", "evaluation.intervals", "tasks.task"),
)
OTHER = ("apps", "tasks.suites", "training", "evaluation.comparison", "analysis", "jobs")


def test_what_decides_a_score_is_found_by_its_imports():
    found = versions._imported_by(versions.SCORING)
    assert found >= set(DECISIVE)
    assert not {module for module in found if module.startswith(OTHER)}
