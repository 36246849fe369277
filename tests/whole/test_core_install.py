"""The core install: what an extra brings is asked for, and nothing else is missed.

All commands run in one process in which nothing can be imported that the core requirements don't
bring.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from command_line import FLAGS, Outcome, open_row, review, write_rows
from paths import ROOT
from phatgoose.errors import PhatgooseError
from phatgoose.files import read_table

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
    "compare": ["compare", "experts", "--suites", "words", "--methods", "base,phatgoose", *BASE],
}
HELP = {"--help": ["--help"], "train --help": ["train", "--help"]}


@dataclass(frozen=True)
class Asked:
    """A command that needs an extra, and how the error names the extra."""

    words: list[str]
    extra: str


def train(*words: str) -> list[str]:
    return ["train", *words, *BASE[:2], "--out", "more", *FLAGS]


ASKED = {
    "analyse": Asked(["analyse", "routed", "--task", "reviews.jsonl", *BASE], "figures"),
    "demo": Asked(["demo", "--base", "tiny-base", "--out", "demo"], "figures"),
    "ROUGE-L": Asked(["compare", "experts", "--suites", "rouge-l.toml", *BASE], "metrics"),
    "serve": Asked(["serve", "routed", "--base", "tiny-base"], "serve"),
    "lm-eval": Asked(["lm-eval", "--help"], "harness"),
    "datasets": Asked(train("hub:somebody/data"), "datasets"),
    "embeddings": Asked(train("reviews.jsonl", "--embeddings"), "retrieval"),
    "ray": Asked(train("reviews.jsonl", "--ray", "local"), "ray"),
}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def with_their_needs(requirements: list[str]) -> set[str]:
    """The names of installed distributions that these requirements bring."""
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    wanted = [(Requirement(text), "") for text in requirements]
    while wanted:
        requirement, asked_by = wanted.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": asked_by}):
            continue
        for extra in {"", *requirement.extras}:
            if (requirement.name, extra) in seen:
                continue
            seen.add((requirement.name, extra))
            try:
                needs = distribution(requirement.name).requires or []
            except PackageNotFoundError:
                continue
            found.add(canonical(requirement.name))
            wanted += [(Requirement(text), extra) for text in needs]
    return found


def modules_of(one: Distribution) -> set[str]:
    code = (file for file in one.files or () if file.suffix in {".py", ".so", ".pyd"})
    return {file.parts[0].partition(".")[0] for file in code}


def absent_modules() -> list[str]:
    """Top-level modules that are installed here, but not by a core install."""
    project = read_table(ROOT / "pyproject.toml", "Project", PhatgooseError)["project"]
    core = with_their_needs(project["dependencies"]) | {"phatgoose"}
    assert {"torch", "transformers", "peft", "typer"} <= core
    inside: set[str] = set(sys.stdlib_module_names)
    outside: set[str] = set()
    for one in distributions():
        (inside if canonical(one.name) in core else outside).update(modules_of(one))
    return sorted(outside - inside - {""})


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
    commands = WORK | HELP
    commands |= {f"{name} asks": asked.words for name, asked in ASKED.items()}
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


@pytest.mark.parametrize("name", [*WORK, *HELP])
def test_the_core_is_enough_for(name, outcomes):
    assert outcomes[name].code == 0, outcomes[name].err


@pytest.mark.parametrize("name", ASKED)
def test_one_line_says_which_extra_to_install(name, outcomes):
    code, err = outcomes[f"{name} asks"].code, outcomes[f"{name} asks"].err
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert code == 2, err
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert f"pip install 'phatgoose[{ASKED[name].extra}]'" in lines[0]
