"""The command line: the whole story on a tiny base, and one line for whatever can be wrong."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from command_line import BASE, Outcome


def test_train_check_pool_compose_generate_and_evaluate_tell_one_story(here, phat, caplog):
    checked = phat("check", "experts/reviews", "experts/counting")
    assert checked.code == 0
    assert checked.out.count("14 sites, gates: yes, means: yes") == 2

    pooled = phat("pool", "experts")
    assert pooled.code == 0
    assert "2 experts" in pooled.out

    composed = phat("compose", "experts", "--out", "routed", "--k", 1, *BASE)
    assert composed.out == "2 experts at 14 sites, router discriminant, k = 1 -> routed\n"
    assert caplog.messages[-1] == ("Router auto is discriminant.")
    alone = phat("compose", "experts", "--out", "whole", "--router", "arrow:form=peft", *BASE)
    assert alone.out == "2 experts at 14 sites, router arrow:form=peft, k = 2 -> whole\n"

    for command, who, count in (("remove", "counting", 1), ("add", "experts/counting", 2)):
        changed = phat(command, "routed", who)
        assert (changed.code, changed.out) == (0, f"{count} experts at 14 sites -> routed\n")

    shutil.rmtree(here / "experts")  # a routed model needs them no longer
    answered = phat("generate", "routed", "Film 3 is", "--max-new-tokens", 4, *BASE)
    assert answered.code == 0
    assert answered.out.strip()

    scored = phat("evaluate", "routed", "--task", "unseen.jsonl", "--json", "out/s.json", *BASE)
    assert scored.code == 0
    scores = json.loads((here / "out" / "s.json").read_text())
    assert scores["router"] == "discriminant"
    (row,) = scores["tasks"]
    assert scores["mean"] == row["score"] == sum(p["correct"] for p in row["predictions"]) / 6
    assert f"{row['score']:.3f}" in scored.out
    for outcome in (checked, pooled, answered, scored):
        assert outcome.err == ""


def process(*arguments: str) -> Outcome:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    "code",
    ["import phatgoose", "from phatgoose.apps.cli import main; main(['--help'])"],
    ids=["import", "help"],
)
def test_nothing_heavy_is_loaded_before_it_is_needed(code):
    heavy = ["torch", "transformers", "peft", "numpy", "datasets", "matplotlib", "scipy"]
    report = f"print('loaded:', [name for name in {heavy} if name in sys.modules])"
    lines = f"import sys\ntry:\n  {code}\nfinally:\n  {report}"
    outcome = process(sys.executable, "-c", lines)
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[-1] == "loaded: []"


def test_a_reader_that_goes_away_ends_the_command_without_a_word():
    """As with `| head -1`, by the status that shells know: what was to be done may not be."""
    with subprocess.Popen(
        [sys.executable, "-m", "phatgoose", "routers"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as running:
        running.stdout.close()
        complaint = running.stderr.read()
        assert running.wait() == 141
    assert complaint == b""
