"""What commands say on the way, as JSON and by their exit code."""

import errno
import json
import logging

import pytest
from tqdm import tqdm

from command_line import BASE, TRAIN
from phatgoose.errors import EngineError, ExpertError, TaskError, TrainingError


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        (["--quiet"], logging.WARNING),
        (["--verbose"], logging.DEBUG),
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_every_command_says_as_much_as_it_is_told_to(phat, monkeypatch, flags, level, before):
    seen = []
    monkeypatch.setattr(tqdm, "__init__", tqdm.__init__)  # which --quiet replaces

    def look():
        with tqdm(total=1, disable=False) as bar:
            seen.append((logging.getLogger("phatgoose").level, bool(bar.disable)))
        return {}

    monkeypatch.setattr("phatgoose.apps.cli.evaluation.listing", look)
    words = [*flags, "routers"] if before else ["routers", *flags]
    assert phat(*words).code == 0
    assert seen.pop() == (level, "--quiet" in flags)


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
    ("error", "code"),
    [
        (TaskError("no task"), 2),
        (ExpertError("no expert"), 2),
        (TrainingError("diverged"), 1),
        (EngineError("lost"), 1),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (FileNotFoundError(errno.ENOENT, "No such file"), 2),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_wrong_use_ends_with_2_and_failure_with_1(phat, monkeypatch, error, code, wrapped):
    def fail(*_):
        if not wrapped:
            raise error
        raise ExpertError("It can't be done.") from error

    monkeypatch.setattr("phatgoose.experts.pool.Pool.open", fail)
    assert phat("pool", "experts").code == code
