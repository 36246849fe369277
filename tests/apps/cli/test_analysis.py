"""`phatgoose analyse` and `explain`, on a tiny pool."""

import json

import pytest

from phatgoose.routing.compose import compose
from phatgoose.routing.saved import save

TASKS = ("--task", "first.jsonl", "--task", "second.jsonl", "--dtype", "float32")


def test_a_pool_is_analysed_under_several_routers(told, analysed, tmp_path):
    options = "--against arrow,merged --scores scores.json --leave-one-out --limit 3 --out seen"
    router = ("--router", "phatgoose")
    code, out, err = told("analyse", analysed, *TASKS, *router, *options.split())
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


def test_a_prompt_is_explained(told, analysed, tmp_path):
    options = ("--dtype", "float32", "--layer", "1", "--kind", "q_proj")
    options += ("--router", "phatgoose")
    answer = ("--answer", "yes\x1b[31m")  # it must not steer the terminal
    code, out, err = told(
        "explain", analysed, "Is a heron a bird?", *answer, *options, "--json", "explained.json"
    )
    assert code == 0, err
    assert "Is a heron a bird? yes" in out
    assert "\x1b[31m" not in out
    data = json.loads((tmp_path / "explained.json").read_text())
    assert "".join(row["token"] for row in data["tokens"]).startswith("Is a heron a bird? yes")
    for row in data["tokens"]:
        assert len(row["experts"]) == 2
        assert sum(row["experts"].values()) == pytest.approx(1, abs=1e-3)
    assert {row["part"] for row in data["tokens"]} == {"prompt", "answer"}
    assert data["trace"]["format"] == "phatgoose-trace-1"
    assert json.loads(out.splitlines()[-1]) == data["summary"]
    assert sum(data["summary"].values()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("router", ["discriminant"])
def test_what_is_chosen_for_the_whole_prompt_is_shown(told, analysed, tmp_path, router):
    """It is chosen by the prompt alone, whatever answer stands after it."""
    whole = []
    for answer in ("yes", "apples, pears and plums; 1 + 2 = 3"):
        options = ("--answer", answer, "--router", router, "--k", 2, "--dtype", "float32")
        code, out, err = told("explain", analysed, "Is a heron?", *options, "--json", "told.json")
        assert code == 0, err
        trace = json.loads((tmp_path / "told.json").read_text())["trace"]
        (first, one), (second, other) = trace["whole"]
        assert f"for the whole prompt: {first} {one:.2f}, {second} {other:.2f}" in out
        assert one + other == pytest.approx(1, abs=1e-3)
        whole.append(trace["whole"])
    assert whole[0] == whole[1]
