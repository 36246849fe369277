"""The files that people look for: workflows, templates, the citation, the image."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

import phatgoose
from paths import ROOT
from phatgoose.errors import PhatgooseError
from phatgoose.files import read_table

WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
PINNED = re.compile(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")

each_workflow = pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps_of(workflow: Path) -> Iterator[dict[str, Any]]:
    for job in read(workflow)["jobs"].values():
        yield from job["steps"]


def targets_of(line: str) -> list[str]:
    """The targets that a line of shell asks make for."""
    words = line.split()
    if words[:1] != ["make"]:
        return []
    return [word for word in words[1:] if "=" not in word and not word.startswith("-")]


@each_workflow
def test_every_action_is_pinned_by_digest_with_its_version_beside_it(workflow):
    used = re.findall(r"uses: *(.+)", workflow.read_text(encoding="utf-8"))
    assert used
    for action in used:
        assert PINNED.fullmatch(action), f"{workflow.name}: {action}"


@each_workflow
def test_workflows_may_only_read_unless_a_job_says_so(workflow):
    assert read(workflow)["permissions"] == {"contents": "read"}
    for step in steps_of(workflow):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"] == {"persist-credentials": False}


def commands_with_make() -> list[tuple[str, str]]:
    found = [
        (workflow.name, line.strip())
        for workflow in WORKFLOWS
        for step in steps_of(workflow)
        for line in step.get("run", "").splitlines()
    ]
    hooks = read(ROOT / ".pre-commit-config.yaml")["repos"][0]["hooks"]
    found += [(".pre-commit-config.yaml", hook["entry"]) for hook in hooks]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    return found + [(".ci/run", line) for line in script if line.startswith("make ")]


@pytest.mark.parametrize(("file", "line"), commands_with_make())
def test_what_they_run_are_targets_of_the_makefile(file, line):
    targets = targets_of(line)
    assert targets, f"{file} runs {line!r}: make it a target, so that everybody can run it"
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:", MAKEFILE, re.M), f"{file}: make {target}"


def lowest_versions() -> list[str]:
    script = ROOT / ".ci" / "lowest_versions.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_lowest_versions_are_those_of_the_project():
    project = read_table(ROOT / "pyproject.toml", "Project", PhatgooseError)["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["serve"], *extras["figures"]]
    names = {re.split(r"[\[>]", text)[0] for text in wanted}
    found = dict(line.partition(";")[0].split("==") for line in lowest_versions())
    assert names <= found.keys()
    assert not {"pytest", "mypy", "phatgoose"} & found.keys()
    for name in names:
        assert any(text.startswith(f"{name}>={found[name]}") for text in wanted), name


def test_the_citation_has_the_version_and_licence_of_the_package():
    citation = read(ROOT / "CITATION.cff")
    assert str(citation["version"]) == phatgoose.__version__
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text("utf-8")
    assert citation["license"] == "Apache-2.0"
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2402.05859"


DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")


def sources_of_the_image() -> list[str]:
    copies = re.findall(r"^(?:COPY|ADD) (.+)$", DOCKERFILE, re.M)
    return [source for copy in copies for source in copy.split()[:-1]]


def test_the_image_is_built_of_files_that_exist_and_are_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    assert sources_of_the_image()
    for source in sources_of_the_image():
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source.removeprefix("./"), name) for name in kept), source


def test_the_image_is_pinned_has_no_rights_and_tells_its_health():
    base, *stages = re.findall(r"^FROM (.+)$", DOCKERFILE, re.M)
    assert re.fullmatch(r"python:3\.\d+-slim@sha256:[0-9a-f]{64} AS python", base)
    assert {stage.split()[0] for stage in stages} == {"python"}
    (user,) = re.findall(r"^USER (.+)$", DOCKERFILE, re.M)
    assert user not in {"root", "0"}
    assert "/healthz" in DOCKERFILE.partition("HEALTHCHECK")[2]
