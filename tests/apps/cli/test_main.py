"""The command line: the whole story on a tiny base, and one line for whatever can be wrong."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

import phatgoose
from command_line import (
    BASE,
    GATE_FLAGS,
    TRAIN,
    Outcome,
    open_row,
    review,
    snapshot,
    write_rows,
)
from phatgoose.apps.cli import app
from phatgoose.experts.expert import LAYOUT, Expert
from phatgoose.experts.kinds.peft import ADAPTER_WEIGHTS
from phatgoose.files.strict import sha256_of

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
SITE = "model.layers.0.self_attn.q_proj"


def change_vectors(expert: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    vectors = load_file(expert / LAYOUT.vectors)
    change(vectors)
    save_file(vectors, expert / LAYOUT.vectors)
    info = json.loads((expert / LAYOUT.info).read_text())
    info["vectors_sha256"] = sha256_of(expert / LAYOUT.vectors)
    (expert / LAYOUT.info).write_text(json.dumps(info))


def damage(folder: Path) -> None:
    """Everything that is wrong with the inputs below, beside the good ones."""
    (folder / "empty.jsonl").touch()
    (folder / "broken.jsonl").write_text(json.dumps(review(0)) + "\n{not json\n")
    write_rows(folder / "no-target.jsonl", [review(0), {"input": "x", "label": "y"}])
    write_rows(folder / "no-input.jsonl", [{"target": "y"}])
    write_rows(folder / "odd-target.jsonl", [review(0), review(1, target="so so")])
    write_rows(folder / "single.jsonl", [review(0)])
    write_rows(folder / "mixed.jsonl", [review(0), open_row(1)])
    (folder / "bad.toml").write_text("[training]\nlerning_rate = 1.0\n")
    (folder / "worse.toml").write_text("[training\n")
    (folder / "file").write_text("in the way")
    (folder / "pool.json").write_text("{}")
    (folder / "none").mkdir()
    reviews = folder / "experts" / "reviews"
    for name in ("cut", "nan", "gate", "changed", "foreign"):
        shutil.copytree(reviews, folder / "damaged" / name)
    shutil.copytree(reviews, folder / "twins" / "one")
    shutil.copytree(reviews, folder / "twins" / "two")
    weights = folder / "damaged" / "cut" / ADAPTER_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-50])
    change_vectors(folder / "damaged" / "nan", lambda v: v[f"gate.{SITE}"].fill_(float("nan")))
    gate = {f"gate.{SITE}": torch.zeros(7)}
    change_vectors(folder / "damaged" / "gate", lambda v: v.update(gate))
    shutil.copy(folder / "experts" / "counting" / ADAPTER_WEIGHTS, folder / "damaged" / "changed")
    info = folder / "damaged" / "foreign" / LAYOUT.info
    info.write_text(json.dumps({**json.loads(info.read_text()), "format_version": 99}))
    bare = Expert.from_peft(reviews, {}, name="bare", base=Expert.load(reviews).info.base)
    bare.save(folder / "bare")


@pytest.fixture(scope="module")
def damaged_workshop(workshop, tmp_path_factory) -> Path:
    folder = shutil.copytree(workshop, tmp_path_factory.mktemp("damaged") / "here")
    damage(folder)
    return folder


BAD_INPUTS = {
    # data
    "train on a missing file": (["train", "nowhere.jsonl", *TRAIN], "nowhere.jsonl does not exist"),
    "train on an empty file": (["train", "empty.jsonl", *TRAIN], "empty.jsonl has no examples"),
    "train on a broken line": (["train", "broken.jsonl", *TRAIN], "broken.jsonl, line 2"),
    "train without target": (["train", "no-target.jsonl", *TRAIN], "line 2: target is missing"),
    "train without input": (["train", "no-input.jsonl", *TRAIN], "line 1: input is missing"),
    "train on an odd target": (["train", "odd-target.jsonl", *TRAIN], "line 2: target 'so so'"),
    "train on one example": (["train", "single.jsonl", *TRAIN], "at least two"),
    "train on nothing": (["train", *TRAIN], "No task was given"),
    "train on one task twice": (
        ["train", "reviews.jsonl", "reviews.jsonl", *TRAIN],
        "Two tasks are named 'reviews'",
    ),
    "train on a good and a bad task": (
        ["train", "reviews.jsonl", "broken.jsonl", *TRAIN],
        "broken.jsonl, line 2",
    ),
    "evaluate on a missing file": (
        ["evaluate", "experts", "--task", "nowhere.jsonl", *BASE],
        "nowhere.jsonl does not exist",
    ),
    "evaluate on an empty file": (
        ["evaluate", "experts", "--task", "empty.jsonl", *BASE],
        "has no examples",
    ),
    "evaluate on a broken line": (
        ["evaluate", "experts", "--task", "broken.jsonl", *BASE],
        "line 2",
    ),
    "evaluate with an odd target": (
        ["evaluate", "experts", "--task", "odd-target.jsonl", *BASE],
        "not among the choices",
    ),
    "evaluate on mixed examples": (
        ["evaluate", "experts", "--task", "mixed.jsonl", *BASE],
        "with and without choices",
    ),
    "gate on a missing file": (
        ["gate", "experts/reviews", "--task", "nowhere.jsonl", "--out", "new/x", *BASE],
        "nowhere.jsonl does not exist",
    ),
    # settings
    "unknown key in a recipe": (
        ["train", "reviews.jsonl", "--recipe", "bad.toml", *TRAIN],
        "unknown setting 'lerning_rate'",
    ),
    "unknown key in a recipe for compose": (
        ["compose", "experts", "--recipe", "bad.toml", "--out", "new"],
        "unknown setting 'lerning_rate'",
    ),
    "broken recipe": (["train", "--recipe", "worse.toml", *TRAIN], "not valid TOML"),
    "missing recipe": (["train", "--recipe", "nowhere.toml", *TRAIN], "can't be read"),
    "rank out of range": (["train", "reviews.jsonl", *TRAIN, "--rank", "0"], "rank is 0"),
    "steps of a wrong type": (["train", "reviews.jsonl", *TRAIN, "--steps", "many"], "--steps"),
    "sites that match nothing": (
        ["train", "reviews.jsonl", *TRAIN, "--sites", "nothing"],
        "matches 'nothing'",
    ),
    "sites that are no pattern": (
        ["train", "reviews.jsonl", *TRAIN, "--sites", "("],
        "not a regular expression",
    ),
    "chat without a template": (
        ["train", "reviews.jsonl", *TRAIN, "--chat"],
        "no chat template",
    ),
    "unknown router": (
        ["compose", "experts", "--out", "new", "--router", "best", *BASE],
        "router is 'best', but must be one of ",
    ),
    "unknown kernel": (
        ["compose", "experts", "--out", "new", "--kernel", "fast", *BASE],
        "kernel is 'fast'",
    ),
    "k below one": (["compose", "experts", "--out", "new", "--k", "0", *BASE], "k is 0"),
    "unknown dtype": (["generate", "tiny-base", "hi", "--dtype", "int3"], "'int3'"),
    "no tokens to generate": (
        ["generate", "experts", "hi", "--max-new-tokens", "0", *BASE],
        "max",
    ),
    "no temperature to sample with": (
        ["generate", "experts", "hi", "--sample", "--temperature", "0", *BASE],
        "temperature",
    ),
    "an empty prompt": (["generate", "experts", "", *BASE], "prompt"),
    "no examples to evaluate": (
        ["evaluate", "experts", "--task", "unseen.jsonl", "--limit", "0", *BASE],
        "limit",
    ),
    "experts shown of an unrouted model": (
        ["generate", "tiny-base", "hi", "--show-experts"],
        "not routed",
    ),
    # experts, pools and bases
    "missing base": (["train", "reviews.jsonl", *TRAIN, "--base", "./nowhere"], "'./nowhere'"),
    "wrong base to compose": (
        ["compose", "experts", "--out", "new", "--base", "other-base"],
        "The base of the experts is",
    ),
    "wrong base to generate": (
        ["generate", "experts", "hi", "--base", "other-base"],
        "base of the experts",
    ),
    "wrong base to evaluate": (
        ["evaluate", "experts", "--task", "unseen.jsonl", "--base", "other-base"],
        "The base of the experts is",
    ),
    "truncated adapter": (["check", "damaged/cut"], "damaged/cut/adapter_model.safetensors is dam"),
    "truncated adapter in a pool": (["pool", "damaged/cut"], "damaged or truncated"),
    "truncated adapter to compose": (
        ["compose", "damaged/cut", "--out", "new", *BASE],
        "damaged or truncated",
    ),
    "NaN in a gate": (["check", "damaged/nan"], f"gate.{SITE} holds a value that is not finite"),
    "NaN in a pool": (["pool", "damaged/nan"], "not finite"),
    "gate of a wrong size": (["check", "damaged/gate"], f"{SITE}: the gate has shape (7,)"),
    "gate of a wrong size in a pool": (["pool", "damaged/gate"], "wanted (32,) and float32"),
    "another adapter than the hash says": (["check", "damaged/changed"], "SHA-256"),
    "unknown format version": (["check", "damaged/foreign"], "version 99 is unknown"),
    "expert without gates": (
        ["compose", "experts", "bare", "--out", "new", *BASE],
        "Expert 'bare' has no gates: run 'phatgoose gate' with the data",
    ),
    "two experts of one name": (["pool", "twins"], "Two experts are named 'reviews'"),
    "two experts of one name to compose": (
        ["compose", "experts", "twins/one", "--out", "new", *BASE],
        "Two experts are named 'reviews'",
    ),
    "zero experts": (["pool", "none"], "No expert was found in none"),
    "zero experts to compose": (["compose", "none", "--out", "new"], "No expert was found"),
    "zero experts left": (
        ["compose", "experts", "--out", "new", "--leave-out", "reviews", "--leave-out", "counting"],
        "No expert is left",
    ),
    "missing pool": (["pool", "nowhere"], "nowhere does not exist"),
    "unknown expert": (
        ["generate", "experts", "hi", "--keep", "nobody"],
        "no expert 'nobody'; it has counting, reviews",
    ),
    "missing model": (["generate", "./nowhere", "hi"], "No folder of that name is here"),
    "a name that is too long": (
        ["train", "reviews.jsonl", *TRAIN, "--multitask", "x" * 201],
        "at most 200, and begin with a letter or digit",
    ),
    "an import of a file": (["import", "reviews.jsonl", "--out", "new"], "is no folder"),
    "an import that may lose all": (
        ["import", "experts/reviews", "--out", "new", "--allow-loss", "7"],
        "allow_loss is 7.0, but must be from 0 to below 1",
    ),
    "manifest that could not be opened": (["pool", "experts", "--out", "a.txt"], "end in .json"),
    "check of a folder of experts": (["check", "experts"], "holds experts: name each (experts/"),
    "a manifest beside other places": (["pool", "pool.json", "bare"], "a manifest, which stands"),
    "one expert twice": (["pool", "experts", "experts/reviews"], "experts/reviews is named twice"),
    "a pool that is a file": (["pool", "reviews.jsonl"], "reviews.jsonl is no folder"),
    "one task twice": (
        ["evaluate", "experts", *["--task", "unseen.jsonl"] * 2, *BASE],
        "Two tasks are called 'unseen'",
    ),
    "a mixture fixed twice": (
        ["export", "experts", "--out", "new", "--prompt", "hi", "--task", "unseen.jsonl"],
        "give one of --prompt and --task",
    ),
    "check of what is no expert": (["check", "none"], "none is no expert directory"),
    "gate of what is no adapter": (
        ["gate", "none", "--task", "reviews.jsonl", "--out", "new/x", *BASE],
        "none is no PEFT adapter",
    ),
    # places
    "train into a file": (
        ["train", "reviews.jsonl", *TRAIN, "--out", "file/new"],
        "can't be written",
    ),
    "train onto an expert": (
        ["train", "reviews.jsonl", *TRAIN, "--out", "experts"],
        "experts/reviews exists already",
    ),
    "gate into a file": (
        ["gate", "bare", "--task", "reviews.jsonl", "--out", "file/x", *BASE, *GATE_FLAGS],
        "can't be written",
    ),
    "compose into a file": (
        ["compose", "experts", "--out", "file/new", *BASE],
        "can't be written",
    ),
    "compose onto a folder": (["compose", "experts", "--out", "none"], "none exists already"),
    "manifest into a file": (["pool", "experts", "--out", "file/pool.json"], "can't be written"),
    "scores into a file": (
        ["evaluate", "experts", "--task", "unseen.jsonl", "--json", "file/s.json", *BASE],
        "can't be written",
    ),
    # the command line itself
    "unknown command": (["trian"], "trian"),
    "unknown flag": (["pool", "experts", "--colour", "red"], "--colour"),
    "missing argument": (["compose", "experts"], "out"),
    "surplus argument": (["generate", "experts", "hi", "there"], "there"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_told_in_one_line_and_writes_nothing(
    case, damaged_workshop, phat, monkeypatch
):
    monkeypatch.chdir(damaged_workshop)
    before = snapshot(damaged_workshop)
    arguments, complaint = BAD_INPUTS[case]
    outcome = phat(*arguments)
    assert outcome.code == 2
    assert re.fullmatch(r"error: [^\n]+\n", outcome.err), outcome.err
    assert complaint in outcome.err
    assert "Traceback" not in outcome.err + outcome.out
    after = snapshot(damaged_workshop)
    shutil.rmtree(damaged_workshop / "new", ignore_errors=True)  # the next case starts afresh
    assert after.keys() == before.keys()


def test_several_problems_are_told_in_a_line_each(damaged_workshop, phat):
    damaged = damaged_workshop / "damaged"
    outcome = phat("check", damaged / "cut", damaged_workshop / "experts/reviews", damaged / "gate")
    assert outcome.code == 2
    assert outcome.out.startswith("ok")
    assert [line.split(":")[0] for line in outcome.err.splitlines()] == ["error", "error"]


def test_train_check_pool_compose_generate_and_evaluate_tell_one_story(here, phat):
    checked = phat("check", "experts/reviews", "experts/counting")
    assert checked.code == 0
    assert checked.out.count("14 sites, gates: yes, means: yes") == 2

    pooled = phat("pool", "experts", "--out", "lists/pool.json")
    assert pooled.code == 0
    assert "2 experts" in pooled.out
    assert (here / "lists" / "pool.json").is_file()

    composed = phat("compose", "lists/pool.json", "--out", "routed", "--k", 1, *BASE)
    assert composed.out == "2 experts at 14 sites, router phatgoose, k = 1 -> routed\n"
    alone = phat("compose", "experts", "--out", "whole", "--router", "arrow:form=mttl", *BASE)
    assert alone.out == "2 experts at 14 sites, router arrow:form=mttl -> whole\n"

    shutil.rmtree(here / "experts")  # a routed model needs them no longer
    answered = phat("generate", "routed", "Film 3 is", "--max-new-tokens", 4, *BASE)
    assert answered.code == 0
    assert answered.out.strip()

    scored = phat("evaluate", "routed", "--task", "unseen.jsonl", "--json", "out/s.json", *BASE)
    assert scored.code == 0
    scores = json.loads((here / "out" / "s.json").read_text())
    (row,) = scores["tasks"]
    assert (row["task"], row["n"]) == ("unseen", 6)
    assert row["metric"] == "rank classification accuracy"
    assert scores["mean"] == row["score"] == sum(p["correct"] for p in row["predictions"]) / 6
    assert 0 <= row["low"] <= row["score"] <= row["high"] <= 1
    assert f"{row['score']:.3f}" in scored.out
    for outcome in (checked, pooled, composed, answered, scored):
        assert outcome.err == ""


def test_the_version_is_the_packages(phat):
    assert phat("--version") == Outcome(0, f"phatgoose {phatgoose.__version__}\n", "")


def test_no_command_at_all_shows_the_commands(phat):
    outcome = phat()
    assert "Traceback" not in outcome.err
    assert all(name in outcome.out + outcome.err for name in COMMANDS)


def test_an_interruption_is_told_in_one_line(phat, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("phatgoose.experts.pool.Pool.open", interrupt)
    monkeypatch.setattr("phatgoose.tasks.suites.registry.open_tasks", interrupt)
    for arguments, told in (
        (["pool", "anywhere"], "interrupted\n"),
        (["train", "anything"], "interrupted; it goes on with --resume\n"),
        (["compare", "anywhere", "--suite", "bbh"], "interrupted; the same command again goes on"),
    ):
        outcome = phat(*arguments)
        assert outcome.code == 130
        assert outcome.err.startswith(told)
        assert outcome.err.count("\n") == 1


def process(*arguments: str, cwd: Path | None = None) -> Outcome:
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=cwd, timeout=60)
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_the_module_runs_as_a_program():
    version = process(sys.executable, "-m", "phatgoose", "--version")
    assert version == Outcome(0, f"phatgoose {phatgoose.__version__}\n", "")


def test_the_console_script_tells_an_error_in_one_line(tmp_path):
    script = Path(sys.executable).parent / "phatgoose"
    if not script.exists():
        pytest.skip("the package is not installed with its console script")
    outcome = process(str(script), "train", "--recipe", "nowhere.toml", cwd=tmp_path)
    assert outcome.code == 2
    assert re.fullmatch(r"error: Recipe nowhere\.toml can't be read[^\n]*\n", outcome.err)
    assert outcome.out == ""


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("phatgoose com", ["compact", "compare", "compose"]),
        ("phatgoose serve --max-b", ["--max-batch-tokens", "--max-body"]),
    ],
)
def test_the_shell_completes_commands_and_flags(typed, offered, monkeypatch):
    monkeypatch.setenv("_PHATGOOSE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    program = "import sys; sys.argv[0] = 'phatgoose'; from phatgoose.apps.cli import main; main()"
    outcome = process(sys.executable, "-c", program)
    assert (outcome.code, sorted(outcome.out.split())) == (0, offered)


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


def test_help_takes_well_under_a_second_and_a_half_of_work():
    """Of the processor's time: what the clock says depends on who else is at work."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert process(sys.executable, "-m", "phatgoose", "--help").code == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 1.5


def test_a_reader_that_goes_away_ends_the_command_without_a_word(here):
    """As with `| head -1`, by the status that shells know: what was to be done may not be."""
    with subprocess.Popen(
        [sys.executable, "-m", "phatgoose", "pool", "experts"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as running:
        running.stdout.close()
        complaint = running.stderr.read()
        assert running.wait() == 141
    assert complaint == b""
