"""`phatgoose explain`, on a tiny pool."""

from __future__ import annotations

import json
import re

import pytest


def test_a_prompt_that_is_cut_is_told(told, analysed):
    options = ("--answer", "yes", "--dtype", "float32", "--max-input-tokens", 4)
    code, _, err = told("explain", analysed, "Is a heron a bird?", *options)
    assert code == 0
    assert "the prompt: 1 of 1 input (100 %) cut to 4 tokens, by 14 in the median." in err


def test_a_prompt_is_explained(told, analysed, tmp_path):
    code, out, err = told(
        "explain",
        analysed,
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
    "router", ["discriminant:temperature=0.2", "discriminant-phatgoose:shortlist=2"]
)
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", "--layer", "1"), "prompt is empty"),
        (("caf\udce9",), r"The prompt holds '\udce9', which is no character"),
        (("Hi", "--answer", "caf\udce9"), r"The answer holds '\udce9', which is no character"),
        (("Hi", "--layer", "9"), "layers are 0, 1"),
        (("Hi", "--kind", "nothing"), "kinds self_attn.q_proj"),
        (("Hi", "--router", "oracle", "--scores", "scores.json"), "goes by the task's name"),
    ],
)
def test_what_cannot_be_explained_is_told_in_a_line(told, analysed, arguments, message):
    code, _, err = told("explain", analysed, *arguments, "--dtype", "float32")
    assert code == 2
    assert message in " ".join(err.split())
