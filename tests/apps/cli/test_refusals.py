"""Whatever can be wrong is told in one line, with exit status 2, and writes nothing."""

import json
import shlex
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from command_line import BASE, TRAIN, Outcome, refused, review, write_rows
from command_line import snapshot as snapshot_of
from phatgoose.apps.cli import main
from phatgoose.experts.expert import LAYOUT, Expert
from phatgoose.experts.peft_files import ADAPTER_WEIGHTS
from phatgoose.files import sha256_of

SITE = "model.layers.0.self_attn.q_proj"
WORDS = {  # what words in capitals stand for
    "TRAIN": TRAIN,
    "BASE": BASE,
    "PLAN": ["--base", "tiny-base", "--out", "new", "--plan"],
    "BYTES": ["caf\udce9"],
    "LONG": ["Once upon a time " * 20],  # longer than a file's name may be
    "COMPARE": ["compare", "experts", *BASE[2:], "--limit", "1", "--out", "new", "--suites"],
}
REFUSALS = """
train nowhere.jsonl TRAIN => nowhere.jsonl does not exist
train empty.jsonl TRAIN => empty.jsonl has no examples
train broken.jsonl TRAIN => broken.jsonl, line 2
train no-target.jsonl TRAIN => line 2 is not valid: target is missing
train TRAIN => No task was given
train reviews.jsonl reviews.jsonl TRAIN => Two tasks are named 'reviews'
train reviews.jsonl --recipe bad.toml TRAIN => unknown setting 'lerning_rate'
train --recipe nowhere.toml TRAIN => does not exist
train reviews.jsonl TRAIN --rank 0 => rank is 0
train reviews.jsonl TRAIN --steps many => --steps
train reviews.jsonl TRAIN --sites nothing => matches 'nothing'
train reviews.jsonl TRAIN --base ./nowhere => './nowhere'
train reviews.jsonl TRAIN --out file/new => can't be written
train reviews.jsonl TRAIN --out experts => experts/reviews exists already
train reviews.jsonl --peft oft BASE => 'oft' is not one of 'lora', 'ia3', 'bottleneck', 'dora'
train reviews.jsonl --peft ia3 --rank 4 BASE => unknown setting 'rank'; known are sites
train reviews.jsonl TRAIN --mixture-most 5 => --mixture-most is for --multitask NAME
train reviews.jsonl TRAIN --multitask a/b => 'a/b' can't name an expert
train reviews.jsonl TRAIN --measure => --measure is for --plan
train reviews.jsonl PLAN --base nobody/nothing => nobody/nothing
train reviews.jsonl TRAIN --workers 2 => --workers is for --engine ray
train reviews.jsonl PLAN --engine slurm => 'slurm' is not one of 'local', 'ray'
gate none --task reviews.jsonl --out new/x BASE => none/adapter_config.json does not exist
gate bare --task reviews.jsonl --out new BASE --steps 3 => --steps
stats exprts --task reviews.jsonl => does not exist. Did you mean 'experts'?
check damaged/cut => damaged/cut/adapter_model.safetensors is not valid
check damaged/gate => the gate is (7,)
check damaged/changed => SHA-256
check experts => experts/phatgoose.json does not exist
import none --out new => none/adapter_config.json does not exist
pool damaged/gate => wanted (32,) torch.float32
pool none => No expert was found in none
pool experts experts/reviews => Two experts are named 'reviews'
pool experts --colour red => --colour
compose experts --out new --router best BASE => router is 'best', but must be one of
compose experts --out new --kernel fast BASE => 'fast' is not one of 'auto', 'reference'
compose experts --out new --k 0 BASE => k is 0
compose experts --out new --base other-base => The base of the experts is
compose experts bare --router phatgoose --out new BASE => Expert 'bare' has no gates
compose experts --out new --leave-out reviews --leave-out counting => No expert is left
compose experts --out none => none exists already
compose experts => out
add nowhere bare => nowhere/routed.json does not exist
remove routed x9 => 'x9' can't leave
export experts --out new --router phatgoose BASE => --prompt or --task, or route by merged or single
export tiny-base --out new BASE => is not routed
export experts --out new --prompt BYTES BASE => The prompt holds
generate tiny-base hi --dtype int3 => 'int3'
generate experts hi --max-new-tokens 0 BASE => max
generate experts '' BASE => prompt is empty
generate experts BYTES BASE => The prompt holds '\\udce9', which is no character
generate experts hi --show-experts --answer BYTES BASE => The answer holds '\\udce9'
generate experts hi --answer yes BASE => --answer is for --show-experts
generate tiny-base hi --show-experts => not routed
generate experts hi --keep nobody => no expert 'nobody'; it has counting, reviews
generate experts hi BASE --router oracle --scores scores.json => goes by the task's name
generate LONG experts => No such folder is here
generate experts hi there => there
evaluate experts --task unseen.jsonl --limit 0 BASE => limit is 0
evaluate experts --task unseen.jsonl --task unseen.jsonl BASE => Two tasks are called 'unseen'
analyse experts => suite
analyse tiny-base --task unseen.jsonl => is not routed
analyse experts --task unseen.jsonl BASE --against nothing => router is 'nothing'
COMPARE unseen.jsonl --methods base,best => Method 'best' is unknown; known are all, base, random
COMPARE unseen.jsonl --methods base --methods retrieval => 'reviews' have no embeddings
COMPARE nowhere => Suite 'nowhere' is neither a known name
COMPARE unseen.jsonl --reference experts/reviews => must have the form LABEL=MODEL
COMPARE unseen.jsonl --reference mine=./nowhere => './nowhere' can't be loaded
COMPARE unseen.jsonl --methods base --reference merged=bare => Two rows would be called 'merged'
COMPARE unseen.jsonl --router arrow => --router
COMPARE unseen.jsonl --methods base --out file/x => can't be written
serve experts --upstream localhost:8001 => must be the address of an engine
serve experts --router nothing => nothing
serve experts --dtype float33 => float33
trian => trian
"""


def damage(folder: Path) -> None:
    """Everything that is wrong with the inputs above, beside the good ones."""
    (folder / "empty.jsonl").touch()
    (folder / "broken.jsonl").write_text(json.dumps(review(0)) + "\n{not json\n")
    write_rows(folder / "no-target.jsonl", [review(0), {"input": "x", "label": "y"}])
    scores = {"reviews": {"unseen": 0.5}, "counting": {"unseen": 0.4}}
    (folder / "scores.json").write_text(json.dumps({"experts": scores}))
    (folder / "bad.toml").write_text("[training]\nlerning_rate = 1.0\n")
    (folder / "file").write_text("in the way")
    (folder / "none").mkdir()
    reviews = folder / "experts" / "reviews"
    for name in ("cut", "gate", "changed"):
        shutil.copytree(reviews, folder / "damaged" / name)
    weights = folder / "damaged" / "cut" / ADAPTER_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-50])
    gate = folder / "damaged" / "gate"
    vectors = load_file(gate / LAYOUT.vectors) | {f"gate.{SITE}": torch.zeros(7)}
    save_file(vectors, gate / LAYOUT.vectors)
    info = json.loads((gate / LAYOUT.info).read_text())
    info["vectors_sha256"] = sha256_of(gate / LAYOUT.vectors)
    (gate / LAYOUT.info).write_text(json.dumps(info))
    shutil.copy(folder / "experts" / "counting" / ADAPTER_WEIGHTS, folder / "damaged" / "changed")
    bare = Expert.from_peft(reviews, {}, name="bare", base=Expert.load(reviews).info.base)
    bare.save(folder / "bare")


@pytest.fixture(scope="module")
def damaged(workshop, tmp_path_factory) -> Path:
    folder = shutil.copytree(workshop, tmp_path_factory.mktemp("damaged") / "here")
    damage(folder)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.chdir(folder)
        with pytest.raises(SystemExit) as caught:
            main(["compose", "experts", "--out", "routed", *BASE])
    assert caught.value.code == 0
    (folder / "routed" / ".lock").touch()  # which stays
    return folder


@pytest.mark.parametrize("case", REFUSALS.strip().splitlines())
def test_bad_input_is_told_in_one_line_and_writes_nothing(case, damaged, phat, monkeypatch):
    if case.startswith("serve"):
        pytest.importorskip("fastapi", reason="needs phatgoose[serve]")
    monkeypatch.chdir(damaged)
    before = snapshot_of(damaged)
    line, _, complaint = case.partition(" => ")
    words = [each for word in shlex.split(line) for each in WORDS.get(word, [word])]
    finds = line.startswith("check")
    refused(phat(*words), complaint, code=1 if finds else 2)
    after = snapshot_of(damaged)
    shutil.rmtree(damaged / "new", ignore_errors=True)  # the next case starts afresh
    assert after.keys() == before.keys()


@pytest.mark.parametrize("place", ["routed", "tiny-base"])
@pytest.mark.parametrize(
    "command",
    [
        "generate PLACE Film",
        "evaluate PLACE --task reviews.jsonl",
        "analyse PLACE --task reviews.jsonl",
        "export PLACE --out new",
    ],
)
def test_a_router_is_chosen_for_pools_alone(damaged, phat, monkeypatch, place, command):
    monkeypatch.chdir(damaged)
    words = command.replace("PLACE", place).split()
    refused(phat(*words, "--router", "arrow", *BASE), f"{place} is")


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "experts", "--task", "reviews.jsonl"],
        ["generate", "experts", "Film"],
        ["analyse", "experts", "--task", "reviews.jsonl"],
        ["train", "reviews.jsonl", "--out", "new", "--plan", "--measure"],
    ],
)
def test_a_file_that_cannot_be_written_is_told_before_the_work(damaged, phat, monkeypatch, command):
    monkeypatch.chdir(damaged)
    work = ("apps.cli.options.ModelOptions.open", "analysis.analyse.analyse")
    for each in (*work, "apps.plan.measured"):
        monkeypatch.setattr(f"phatgoose.{each}", lambda *_, **__: pytest.fail("worked"))
    place = ["--out", "file"] if command[0] == "analyse" else ["--json", "file/x.json"]
    refused(phat(*command, "--base", "tiny-base", *place), "can't be written")


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
