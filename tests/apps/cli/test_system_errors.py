"""What the system refuses, such as a prompt where a file's name belongs, is told in one line."""

from __future__ import annotations

import pytest

from command_line import TRAIN, Outcome, refused, snapshot

LONG = "Once upon a time " * 20  # longer than a file's name may be


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", LONG, "experts"],
        ["explain", LONG, "experts"],
        ["evaluate", LONG, "--task", "unseen.jsonl"],
        ["evaluate", "experts", "--task", f"{LONG}.jsonl"],
        ["pool", LONG],
        ["compare", LONG, "--suite", "mine"],
        ["compare", "experts", "--suite", LONG, "--method", "phatgoose"],
        ["train", f"{LONG}.jsonl", *TRAIN],
    ],
    ids=lambda arguments: " ".join(arguments[:3]).replace(LONG, "LONG"),
)
def test_a_name_that_is_too_long_is_told_in_one_line(arguments, here, phat):
    before = snapshot(here)
    refused(phat(*arguments), "File name too long")
    assert snapshot(here) == before


@pytest.mark.parametrize(
    ("problem", "line"),
    [
        (
            PermissionError(13, "Permission denied", "x\ny"),
            r"'x\ny' can't be used: Permission denied.",
        ),
        (OSError("it broke\nin two"), "it broke"),
    ],
)
def test_what_the_system_refuses_is_told_in_one_line(phat, monkeypatch, problem, line):
    def refuse(*_: object) -> None:
        raise problem

    monkeypatch.setattr("phatgoose.experts.pool.Pool.open", refuse)
    assert phat("pool", "anywhere") == Outcome(2, "", f"error: {line}\n")
