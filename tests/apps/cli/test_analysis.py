"""`phatgoose analyse` and `phatgoose explain`, on a tiny pool."""

from __future__ import annotations

import json
import re

import pytest

from phatgoose.routing.compose import compose
from phatgoose.routing.saved.save import save

TASKS = ("--task", "first.jsonl", "--task", "second.jsonl", "--dtype", "float32")


def test_a_pool_is_analysed_under_several_routers(told, analysed, tmp_path):
    code, out, err = told(
        "analyse",
        analysed,
        *TASKS,
        "--against",
        "arrow,merged",
        "--scores",
        "scores.json",
        "--leave-one-out",
        "--limit",
        "3",
        "--out",
        "seen",
    )
    assert code == 0, err
    assert "report -> seen/report.html" in out
    for text in ("PHATGOOSE", "Arrow", "first", "second", "e1"):
        assert text in out
    numbers = json.loads((tmp_path / "seen" / "analysis.json").read_text())
    assert list(numbers["routers"]) == ["phatgoose", "arrow", "merged"]
    assert numbers["oracle"] == {"first": "e1", "second": "e2"}
    assert numbers["routers"]["arrow"]["scores"]["first"]["n"] == 3
    assert len(numbers["leave_one_out"]) == 4
    assert (tmp_path / "seen" / "figures" / "layers-phatgoose.png").is_file()
    page = (tmp_path / "seen" / "report.html").read_text()
    assert "How far from Oracle" in page
    assert "Which experts matter" in page


def test_a_suite_without_scores_or_texts(told, analysed, tmp_path):
    suite = tmp_path / "suite"
    suite.mkdir()
    (tmp_path / "first.jsonl").rename(suite / "first.jsonl")
    code, _, err = told(
        "analyse",
        analysed,
        "--suite",
        suite,
        "--dtype",
        "float32",
        "--no-score",
        "--examples",
        "0",
        "--keep",
        "e0",
        "--keep",
        "e3",
        "--out",
        "seen",
    )
    assert code == 0, err
    numbers = json.loads((tmp_path / "seen" / "analysis.json").read_text())
    assert numbers["experts"] == ["e0", "e3"]
    assert numbers["routers"]["phatgoose"]["scores"] == {}
    assert "first 0 is" not in (tmp_path / "seen" / "report.html").read_text()


def test_a_routed_models_folder_is_analysed_and_explained(
    told, analysed, llama, llama_pool, tmp_path
):
    save(compose(llama_pool, llama, router="arrow"), tmp_path / "routed")
    code, out, err = told("analyse", "routed", *TASKS, "--no-score")
    assert code == 0, err
    assert "Arrow" in out
    assert (tmp_path / "analysis" / "report.html").is_file()
    code, out, err = told("explain", "routed", "Is it?", "--dtype", "float32")
    assert code == 0, err
    assert "Is it?" in out


def test_what_looks_wrong_is_a_warning(told, analysed):
    code, _, err = told(
        "analyse",
        analysed,
        *TASKS,
        "--no-score",
        "--k",
        "1",
        "--keep",
        "e0",
        "--keep",
        "e1",
        "--router",
        "average-activation",
    )
    assert code == 0, err
    for line in err.splitlines():
        if "warning" in line:
            assert re.search(r"warning: average-activation: e\d", line)


def test_a_setting_that_the_router_ignores_is_told(told, analysed):
    reading = ("--router", "merged", "--k", "1", "--no-score", "--examples", "0")
    code, _, err = told("analyse", analysed, *TASKS, *reading)
    assert code == 0, err
    assert "warning: Router merged doesn't use --k." in err.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("POOL",), "Name what to read with --task or --suite"),
        (("BASE", *TASKS), "neither a pool nor a routed model"),
        (("POOL", *TASKS, "--against", "nothing"), "router is 'nothing'"),
        (("POOL", *TASKS, "--smoothing", "2"), "smoothing is 2.0"),
        (("POOL", *TASKS, "--data", "copies"), "--data is for --suite, which was not given"),
        (("POOL", *TASKS, "--results", "none.jsonl"), "none.jsonl don't exist"),
        (("POOL", *TASKS, "--no-score", "--leave-one-out"), "needs a pool of several"),
        (("POOL", *TASKS, "--against", "arrow:frm=1"), "router arrow: unknown setting 'frm'"),
        (("POOL", *TASKS, "--against", "oracle"), "Router oracle needs the scores"),
        (("POOL", *TASKS, "--scores", "first.jsonl"), "first.jsonl holds no scores"),
    ],
)
def test_what_cannot_be_analysed_is_told_in_a_line(told, analysed, llama, arguments, message):
    places = {"POOL": analysed, "BASE": llama.id}
    code, _, err = told("analyse", *(places.get(word, word) for word in arguments))
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err


@pytest.mark.parametrize("out", ["first.jsonl", "first.jsonl/report"])
def test_a_report_that_cannot_be_written_is_told_before_the_work(told, analysed, monkeypatch, out):
    monkeypatch.setattr(
        "phatgoose.analysis.analyse.analyse", lambda *_, **__: pytest.fail("worked")
    )
    code, _, err = told("analyse", analysed, *TASKS, "--out", out)
    assert code == 2
    assert f"{out}/report.html can't be written" in " ".join(err.split())
