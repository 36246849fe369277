"""What commands say on the way, as JSON and by their exit code."""

import errno
import json
import logging

import pytest
from tqdm import tqdm

from command_line import BASE, TRAIN
from phatgoose.errors import EngineError, ExpertError, TaskError, TrainingError
from phatgoose.tasks.suites.registry import SuiteRecord, known_suites


@pytest.mark.parametrize(
    ("words", "level", "bars"),
    [
        (["--quiet", "routers"], logging.WARNING, False),
        (["routers", "--quiet"], logging.WARNING, False),
        (["routers", "--verbose"], logging.DEBUG, True),
    ],
)
def test_every_command_says_as_much_as_it_is_told_to(phat, monkeypatch, words, level, bars):
    monkeypatch.setattr(tqdm, "__init__", tqdm.__init__)  # which --quiet replaces
    assert phat(*words).code == 0
    with tqdm(total=1, disable=False) as bar:
        assert (logging.getLogger("phatgoose").level, not bar.disable) == (level, bars)


def test_results_are_json_on_request(here, phat):
    pool = json.loads(phat("pool", "experts", "--json", "-").out)
    assert [expert["name"] for expert in pool["experts"]] == ["counting", "reviews"]
    said = ["generate", "experts", "Film 3 is", "--router", "arrow", *BASE, "--max-new-tokens", 2]
    assert json.loads(phat(*said, "--json", "-").out)["prompt"] == "Film 3 is"
    shown = json.loads(phat(*said, "--show-experts", "--json", "-").out)
    assert shown["summary"].keys() == {"counting", "reviews"}
    planned = phat("train", "reviews.jsonl", *TRAIN, "--plan", "--json", "-")
    assert json.loads(planned.out)["tasks"][0]["name"] == "reviews"
    scored = phat("evaluate", "tiny-base", "--task", "unseen.jsonl", "--json", "-")
    assert json.loads(scored.out)["tasks"][0]["n"] == 6


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (TaskError("no task"), 2, "error: no task"),
        (TrainingError("diverged"), 1, "error: diverged"),
        (EngineError("lost"), 1, "error: lost"),
        (OSError(errno.ENOSPC, "No space left"), 1, "error: [Errno 28] No space left"),
        (PermissionError(13, "Denied", "x\ny"), 2, "error: 'x\\ny' can't be used: Denied."),
        (KeyboardInterrupt(), 130, "interrupted; train and gate go on with --resume, compare by i"),
    ],
)
def test_wrong_use_ends_with_2_and_failure_with_1_in_one_line(phat, monkeypatch, error, code, said):
    def fail():
        raise error

    def fail_because():
        raise ExpertError("It can't be done.") from error

    words = ["train", "theirs", "--base", "x", "--out", "y"]
    monkeypatch.setitem(known_suites(), "theirs", SuiteRecord(fail, trainable=True))
    outcome = phat(*words)
    assert (outcome.code, outcome.out) == (code, "")
    assert outcome.err.startswith(said)
    assert outcome.err.count("\n") == 1
    if isinstance(error, Exception):
        monkeypatch.setitem(known_suites(), "theirs", SuiteRecord(fail_because, trainable=True))
        assert phat(*words).code == code
