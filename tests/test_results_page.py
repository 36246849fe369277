"""The full table of results: what research/results/page.py makes of the comparisons kept."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace

import pytest

from made_comparison import SETTINGS, made_comparison
from paths import ROOT

WHERE = {"date": "2026-11-26T10:00:00+00:00", "commit": "abcdef123", "machine": "A Chip, 2 cores"}
PROGRAM = runpy.run_path(str(ROOT / "research" / "results" / "page.py"))


def comparison(**settings) -> dict:
    """A comparison.json, as read; a setting of None is left out."""
    kept = {name: value for name, value in {**SETTINGS, **WHERE, **settings}.items() if value}
    return json.loads(json.dumps(replace(made_comparison(), settings=kept).to_dict()))


def keep(folder, key: str, **settings) -> None:
    content = PROGRAM["kept_of"](comparison(**settings), key, "study.md", {})
    (folder / f"{key}.json").write_text(json.dumps(content))


def rows(page: str) -> list[list[str]]:
    return [line[2:-2].split(" | ") for line in page.splitlines() if line.startswith("| ")]


def test_the_page_is_what_the_program_writes():
    page = (ROOT / "research" / "results" / "README.md").read_text(encoding="utf-8")
    assert page == PROGRAM["page"](), "run: python research/results/page.py --write"


def test_bases_are_parts_pools_and_suites_columns(tmp_path):
    keep(tmp_path, "first")
    keep(tmp_path, "second")
    keep(tmp_path, "third", dtype="bfloat16")
    page = PROGRAM["page"](tmp_path)
    assert [line for line in page.splitlines() if line.startswith("## tiny")] == [
        "## tiny, bfloat16",
        "## tiny, float32",
    ]
    float32 = page.partition("## tiny, float32")[2]
    head, *body = rows(float32)
    link = "[{}](../../docs/study.md)".format
    columns = [f"{suite} (2), {link(pool)}" for pool in ("first", "second") for suite in SUITES]
    assert head == ["router", *columns]
    summaries = made_comparison().summaries
    own = summaries["phatgoose"]
    wanted = ["**PHATGOOSE**", *[own[suite].in_per_cent for suite in SUITES] * 2]
    assert wanted in body
    assert ["Oracle \\*", *[summaries["oracle"][s].in_per_cent for s in SUITES] * 2] in body
    differences = [summaries["base"][suite].difference_in_points for suite in SUITES]
    assert ["Base model", *differences * 2] in body


SUITES = ("one", "two")


def test_every_comparison_tells_where_it_comes_from(tmp_path):
    keep(tmp_path, "first")
    line = rows(PROGRAM["page"](tmp_path))[-1]
    assert line == [
        *("[first](../../docs/study.md)", "one, two", "2", "2", "10, 8", "2026-11-26", "abcdef123"),
        *("0.1.0+abc", "A Chip, 2 cores"),
    ]


def test_what_an_older_file_does_not_say_must_be_told():
    older = comparison(commit=None)
    with pytest.raises(SystemExit, match="doesn't say its commit; tell it by --commit"):
        PROGRAM["kept_of"](older, "title", "study.md", {"commit": None})
    kept = PROGRAM["kept_of"](older, "title", "study.md", {"commit": "fedcba"})
    assert kept["settings"]["commit"] == "fedcba"
