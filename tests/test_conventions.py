"""The files that people look for: workflows, the citation, the image."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch

import pytest
import yaml

import phatgoose
from paths import ROOT

PINNED = re.compile(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("workflow", sorted(ROOT.glob(".github/workflows/*.yml")))
def test_workflows_may_only_read_and_their_actions_are_pinned(workflow):
    used = re.findall(r"uses: *(.+)", workflow.read_text(encoding="utf-8"))
    assert used
    assert [action for action in used if not PINNED.fullmatch(action)] == []
    content = yaml.safe_load(workflow.read_text(encoding="utf-8"))
    assert content["permissions"] == {"contents": "read"}
    for step in (step for job in content["jobs"].values() for step in job["steps"]):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"] == {"persist-credentials": False}


def test_the_lowest_versions_are_those_of_the_project():
    script = ROOT / ".ci" / "lowest_versions.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    lowest = dict(line.partition(";")[0].split("==") for line in done.stdout.splitlines())
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["serve"], *extras["figures"]]
    for name in {re.split(r"[\[>]", text)[0] for text in wanted}:
        assert any(text.startswith(f"{name}>={lowest[name]}") for text in wanted), name
    assert not {"pytest", "mypy", "phatgoose"} & lowest.keys()
    for named in re.findall(r"phatgoose\[(.+?)\]", str(extras)):  # or no wheel can be built
        assert set(named.split(",")) <= extras.keys()


def test_the_citation_has_the_version_and_licence_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == phatgoose.__version__ == PROJECT["version"]
    assert citation["license"] == "Apache-2.0"


def test_the_image_has_its_files_is_pinned_and_has_no_rights():
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    copies = re.findall(r"^(?:COPY|ADD) (.+)$", dockerfile, re.M)
    sources = [source for copy in copies for source in copy.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source.removeprefix("./"), name) for name in kept), source
    base, *stages = re.findall(r"^FROM (.+)$", dockerfile, re.M)
    assert re.fullmatch(r"python:3\.\d+-slim@sha256:[0-9a-f]{64} AS python", base)
    assert {stage.split()[0] for stage in stages} == {"python"}
    (user,) = re.findall(r"^USER (.+)$", dockerfile, re.M)
    assert user not in {"root", "0"}
    assert "/healthz" in dockerfile.partition("HEALTHCHECK")[2]
