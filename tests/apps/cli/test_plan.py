"""`train --plan`: what it prints and writes."""

import pytest

from command_line import refused, snapshot

pytestmark = pytest.mark.usefixtures("_offline")


def test_the_command_prints_a_plan_and_writes_nothing_else(planned_here, phat):
    before = snapshot(planned_here)
    flags = ["--steps", 10, "--batch-size", 4, "--dtype", "float32"]
    tasks = ["counting.jsonl", "reviews.jsonl", "t0hi/trec", "hub:a/b"]
    outcome = phat("train", *tasks, "--base", "tiny-base", *flags, "--plan")
    assert (outcome.code, outcome.err) == (0, "")
    assert snapshot(planned_here) == before
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in outcome.out.splitlines()
        if line.startswith("│")
    }
    assert list(rows) == ["counting", "reviews", "trec", "a--b", "total"]
    assert rows["counting"][:3] == ["counting.jsonl", "18", "10 + 100"]
    assert rows["trec"][:2] == ["CogComp/trec, prompts of P3", "5,452"]
    assert rows["a--b"][:2] == ["hub:a/b", ""]
    assert rows["a--b"][3].startswith("≤")
    assert rows["total"][0] == "4 tasks"
    assert "≤: data or tokenizer aren't here" in outcome.out


def test_finished_experts_are_left_out_when_resumed(planned_here, phat):
    (planned_here / "experts" / "counting").mkdir(parents=True)
    arguments = ["train", "counting.jsonl", "reviews.jsonl", "--base", "tiny-base", "--plan"]
    refused(phat(*arguments), "experts/counting exists already")
    outcome = phat(*arguments, "--resume")
    assert "1 experts to train" in outcome.out
    assert "1 experts are finished" in outcome.out
