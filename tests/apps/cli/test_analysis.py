"""`phatgoose analyse` and `phatgoose explain`, on a tiny pool."""

from __future__ import annotations

import json
import re
import warnings

import pytest

from phatgoose.apps.cli import main
from phatgoose.routing.compose import compose
from phatgoose.routing.saved.save import save
from routed_models import SCORES


@pytest.fixture
def phat(capsys):
    def run(*arguments):
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            for kind in (DeprecationWarning, PendingDeprecationWarning, ResourceWarning):
                warnings.simplefilter("ignore", kind)
            with pytest.raises(SystemExit) as caught:
                main([str(argument) for argument in arguments])
        streams = capsys.readouterr()
        return int(caught.value.code or 0), streams.out, streams.err

    return run


@pytest.fixture
def here(tmp_path, monkeypatch, llama, llama_pool):
    """A folder with two task files and scores of the experts; the pool's folder."""
    for name in ("first", "second"):
        rows = [
            {
                "input": f"{name} {i} is",
                "target": ("good", "bad")[i % 2],
                "choices": ["good", "bad"],
            }
            for i in range(4)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "scores.json").write_text(json.dumps({"experts": SCORES}))
    monkeypatch.chdir(tmp_path)
    return llama_pool.experts[0].directory.parent


TASKS = ("--task", "first.jsonl", "--task", "second.jsonl", "--dtype", "float32")


def test_a_pool_is_analysed_under_several_routers(phat, here, tmp_path):
    code, out, err = phat(
        "analyse",
        here,
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


def test_a_suite_without_scores_or_texts(phat, here, tmp_path):
    suite = tmp_path / "suite"
    suite.mkdir()
    (tmp_path / "first.jsonl").rename(suite / "first.jsonl")
    code, _, err = phat(
        "analyse",
        here,
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


def test_a_routed_models_folder_is_analysed_and_explained(phat, here, llama, llama_pool, tmp_path):
    save(compose(llama_pool, llama, router="arrow"), tmp_path / "routed")
    code, out, err = phat("analyse", "routed", *TASKS, "--no-score")
    assert code == 0, err
    assert "Arrow" in out
    assert (tmp_path / "analysis" / "report.html").is_file()
    code, out, err = phat("explain", "routed", "Is it?", "--dtype", "float32")
    assert code == 0, err
    assert "Is it?" in out


def test_what_looks_wrong_is_a_warning(phat, here):
    code, _, err = phat(
        "analyse",
        here,
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("POOL",), "Name what to read with --task or --suite"),
        (("BASE", *TASKS), "neither a pool nor a routed model"),
        (("POOL", *TASKS, "--against", "nothing"), "router is 'nothing'"),
        (("POOL", *TASKS, "--smoothing", "2"), "smoothing is 2.0"),
        (("POOL", *TASKS, "--results", "none.jsonl"), "none.jsonl don't exist"),
        (("POOL", *TASKS, "--no-score", "--leave-one-out"), "needs a pool, and scores"),
        (("POOL", *TASKS, "--scores", "first.jsonl"), "first.jsonl holds no scores"),
    ],
)
def test_what_cannot_be_analysed_is_told_in_a_line(phat, here, llama, arguments, message):
    places = {"POOL": here, "BASE": llama.id}
    code, _, err = phat("analyse", *(places.get(word, word) for word in arguments))
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_a_prompt_that_is_cut_is_told(phat, here):
    options = ("--answer", "yes", "--dtype", "float32", "--max-input-tokens", 4)
    code, _, err = phat("explain", here, "Is a heron a bird?", *options)
    assert code == 0
    assert "the prompt: 1 of 1 input (100 %) cut to 4 tokens, by 14 in the median." in err


def test_a_prompt_is_explained(phat, here, tmp_path):
    code, out, err = phat(
        "explain",
        here,
        "Is a heron a bird?",
        "--answer",
        "yes\x1b[31m",
        "--dtype",
        "float32",
        "--layer",
        "1",
        "--kind",
        "q_proj",
        "--table",
        "--json",
        "explained.json",
    )
    assert code == 0, err
    assert "Is a heron a bird? yes" in out
    assert "\x1b[31m" not in out  # an answer must not steer the terminal
    data = json.loads((tmp_path / "explained.json").read_text())
    assert "".join(row["token"] for row in data["tokens"]).startswith("Is a heron a bird? yes")
    for row in data["tokens"]:
        assert len(row["experts"]) == 2
        assert sum(row["experts"].values()) == pytest.approx(1, abs=1e-3)
    assert {row["part"] for row in data["tokens"]} == {"prompt", "answer"}
    assert data["trace"]["format"] == "phatgoose-trace-1"
    first = next(iter(data["tokens"][0]["experts"].items()))
    assert re.search(rf"I\s*│ prompt │ {first[0]} {first[1]:.2f}", out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", "--layer", "1"), "prompt is empty"),
        (("Hi", "--layer", "9"), "layers are 0, 1"),
        (("Hi", "--kind", "nothing"), "kinds self_attn.q_proj"),
        (("Hi", "--router", "oracle", "--scores", "scores.json"), "goes by the task's name"),
    ],
)
def test_what_cannot_be_explained_is_told_in_a_line(phat, here, arguments, message):
    code, _, err = phat("explain", here, *arguments, "--dtype", "float32")
    assert code == 2
    assert message in " ".join(err.split())
