"""The files that people look for: the citation and the image."""

from __future__ import annotations

import re
import tomllib

import yaml

import phatgoose
from paths import ROOT


def test_the_citation_has_the_version_and_licence_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert str(citation["version"]) == phatgoose.__version__ == project["version"]
    assert citation["license"] == "Apache-2.0"


def test_the_image_is_pinned_and_has_no_rights():
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    base, *stages = re.findall(r"^FROM (.+)$", dockerfile, re.M)
    assert re.fullmatch(r"python:3\.\d+-slim@sha256:[0-9a-f]{64} AS python", base)
    assert {stage.split()[0] for stage in stages} == {"python"}
    (user,) = re.findall(r"^USER (.+)$", dockerfile, re.M)
    assert user not in {"root", "0"}
