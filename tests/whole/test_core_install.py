"""The core install: what an extra brings is asked for, and nothing else is missed.

All commands run in one process in which nothing can be imported that the core requirements don't
bring.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import astuple
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from command_line import FLAGS, Outcome, open_row, review, write_rows
from paths import ROOT
from phatgoose.errors import PhatgooseError
from phatgoose.files import read_table
from phatgoose.names import MINILM

PROGRAM = """
import contextlib, io, json, sys
given = json.load(sys.stdin)
sys.modules.update(dict.fromkeys(given["absent"]))
import phatgoose
for name in phatgoose.__all__:
    getattr(phatgoose, name)
from phatgoose.apps.cli import main
outcomes = []
for words in given["commands"]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as end:
            outcomes.append([end.code, out.getvalue(), err.getvalue()])
json.dump(outcomes, open("outcomes.json", "w"))
"""

BASE = ["--base", "tiny-base", "--dtype", "float32"]
WORK = {
    "train": ["train", "reviews.jsonl", "counting.jsonl", *BASE[:2], "--out", "experts", *FLAGS],
    "check": ["check", "experts/reviews", "experts/counting"],
    "pool": ["pool", "experts"],
    "compose": ["compose", "experts", *BASE, "--out", "routed"],
    "generate": ["generate", "routed", "Film 3 is", *BASE, "--max-new-tokens", "2"],
    "evaluate": ["evaluate", "routed", "--task", "counting.jsonl", *BASE],
    "help": ["train", "--help"],
    "compare": ["compare", "experts", "--suites", "words", "--methods", "base,phatgoose", *BASE],
}


MORE = [*BASE[:2], "--out", "more", *FLAGS]
ASKED = {  # what needs an extra, and which
    "figures": ["analyse", "routed", "--task", "reviews.jsonl", *BASE],
    "metrics": ["compare", "experts", "--suites", "rouge-l.toml", *BASE],
    "serve": ["serve", "routed", "--base", "tiny-base"],
    "harness": ["lm-eval", "--help"],
    "datasets": ["train", "hub:somebody/data", *MORE],
    "retrieval": ["train", "reviews.jsonl", "--embeddings", *MORE],
    "ray": ["train", "reviews.jsonl", "--ray", "local", *MORE],
}


def with_their_needs(requirements: Iterable[str]) -> set[str]:
    """The names of distributions that these requirements bring."""
    needs: set[tuple[str, str]] = set()  # of a distribution and an extra, or ""
    left = [(Requirement(text), "") for text in requirements]
    while left:
        requirement, asked_by = left.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": asked_by}):
            continue
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} - {extra for n, extra in needs if n == name}:
            needs.add((name, extra))
            with suppress(PackageNotFoundError):  # one for another system
                left += [(Requirement(text), extra) for text in requires(name) or []]
    return {name for name, _ in needs}


def absent_modules() -> list[str]:
    """Top-level modules that are installed here, but not by a core install.

    The reader's files stay, in the place of the Hub, from which a core install has them.
    """
    project = read_table(ROOT / "pyproject.toml", "Project", PhatgooseError)["project"]
    core = with_their_needs(project["dependencies"]) | {"phatgoose"}
    assert {"torch", "transformers", "peft", "typer"} <= core
    return [
        module
        for module, owners in packages_distributions().items()
        if core.isdisjoint(map(canonicalize_name, owners)) and module != MINILM
    ]


@pytest.fixture(scope="module")
def outcomes(base_folders, tmp_path_factory) -> dict[str, Outcome]:
    here: Path = tmp_path_factory.mktemp("core")
    shutil.copytree(base_folders["llama"], here / "tiny-base")
    write_rows(here / "reviews.jsonl", [review(i) for i in range(8)])
    write_rows(here / "counting.jsonl", [open_row(i) for i in range(8)])
    (here / "words").mkdir()
    write_rows(here / "words" / "films.jsonl", [review(i) for i in range(20, 24)])
    task = '[[tasks]]\nfile = "counting.jsonl"\nmetrics = ["exact-match", "rouge-l"]\n'
    (here / "rouge-l.toml").write_text(f'name = "rouge-l"\n{task}')
    commands = WORK | ASKED
    given = {"absent": absent_modules(), "commands": list(commands.values())}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(given),
        cwd=here,
        env={**os.environ, "XDG_CACHE_HOME": str(here / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((here / "outcomes.json").read_text())
    return dict(zip(commands, (Outcome(*each) for each in found), strict=True))


@pytest.mark.parametrize("name", WORK)
def test_the_core_is_enough_for(name, outcomes):
    assert outcomes[name].code == 0, outcomes[name].err


@pytest.mark.parametrize("extra", ASKED)
def test_one_line_says_which_extra_to_install(extra, outcomes):
    code, _, err = astuple(outcomes[extra])
    (line,) = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert (code, line[:7]) == (2, "error: ")
    assert f"pip install 'phatgoose[{extra}]'" in line
