"""Whatever can be wrong is told in one line, with exit status 2, and writes nothing."""

import json
import shlex
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from command_line import BASE, TRAIN, refused
from command_line import snapshot as snapshot_of
from phatgoose.apps.cli import main
from phatgoose.experts.adapter_files import ADAPTER_WEIGHTS
from phatgoose.experts.expert import LAYOUT, Expert
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
train t0hii TRAIN => Did you mean 't0hi'?
train reviews.jsonl --recipe bad.toml TRAIN => unknown setting 'lerning_rate'
train reviews.jsonl TRAIN --sites nothing => matches 'nothing'
train reviews.jsonl TRAIN --out file/new => can't be written
train reviews.jsonl TRAIN --out experts => experts/reviews exists already
train reviews.jsonl --peft oft BASE => 'oft' is not one of 'lora', 'ia3', 'bottleneck', 'dora'
train reviews.jsonl PLAN --base nobody/nothing => nobody/nothing
train reviews.jsonl TRAIN --workers 2 => --workers works only with --ray
gate bare --task reviews.jsonl --out new BASE --steps 3 => --steps
stats exprts --task reviews.jsonl => does not exist. Did you mean 'experts'?
stats experts/reviews => either the data (--task) or example prompts (--prompts)
stats experts/reviews --prompts Hi --template x => --template works only with --task
stats experts/reviews --prompts promts.txt => promts.txt does not exist
stats experts/reviews --prompts self BASE => no chat template to write prompts in
stats experts/reviews --prompts '' => no prompts, or one is empty
stats experts/reviews --prompts BYTES => not in UTF-8
train reviews.jsonl TRAIN --multitask m --mixture-most 0 => greater than or equal to 1
check damaged/cut => damaged/cut/adapter_model.safetensors is not valid
check damaged/gate => is (7,)
import none --out new => none/adapter_config.json does not exist
pool damaged/gate => wanted (32) torch.float32
pool none => No expert and no PEFT adapter in none
compose expert --out new => can be used. Did you mean 'experts'?
compose experts --out new --router arow BASE => Did you mean 'arrow'?
compose experts --out new --base other-base => The base of the experts is
compose experts bare --router phatgoose --out new BASE => Expert 'bare' has no gates
compose experts --out none => none exists already
add nowhere bare => nowhere/routed.json does not exist
remove routed x9 => 'x9' can't leave
export experts --out new --router phatgoose BASE => route by merged, single or fixed weights
export experts --engine vllm --k 4 --out new => --k works only without --engine
export experts --engine vllm --dtype float32 --out new => --dtype works only without --engine
generate tiny-base hi --dtype int3 => 'int3'
generate routed Film --router arrow BASE => routed is not a pool
generate experts hi --json file/x.json BASE => can't be written
generate experts '' BASE => prompt is empty
generate experts BYTES BASE => The prompt holds '\\udce9', which is no character
generate experts hi --answer yes BASE => --answer works only with --show-experts
generate experts hi BASE --router oracle --scores scores.json => goes by the task's name
evaluate experts --task unseen.jsonl --limit 0 BASE => limit is 0
analyse routed --task unseen.jsonl --k 2 BASE => routed is not a pool
analyse tiny-base --task unseen.jsonl => is not routed
COMPARE unseen.jsonl --methods base,auto => router is 'auto', but must be one of random
COMPARE '' => neither a known name
COMPARE nowhere => Suite 'nowhere' is neither a known name
COMPARE unseen.jsonl --reference experts/reviews => must have the form LABEL=MODEL
serve experts --upstream http://host --upstream host:8002 => must be the address of an engine
serve experts --upstream http://host:1 --base tiny-base => --base works only without --upstream
serve experts --upstream http://host:1 --dtype float32 => --dtype works only without --upstream
trian => trian
"""


def damage(folder: Path) -> None:
    """Everything that is wrong with the inputs above, beside the good ones."""
    scores = {"reviews": {"unseen": 0.5}, "counting": {"unseen": 0.4}}
    (folder / "scores.json").write_text(json.dumps({"experts": scores}))
    (folder / "bad.toml").write_text("[training]\nlerning_rate = 1.0\n")
    (folder / "file").write_text("in the way")
    (folder / "none").mkdir()
    reviews = folder / "experts" / "reviews"
    for name in ("cut", "gate"):
        shutil.copytree(reviews, folder / "damaged" / name)
    weights = folder / "damaged" / "cut" / ADAPTER_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-50])
    gate = folder / "damaged" / "gate"
    vectors = load_file(gate / LAYOUT.vectors) | {f"gate.{SITE}": torch.zeros(7)}
    save_file(vectors, gate / LAYOUT.vectors)
    info = json.loads((gate / LAYOUT.info).read_text())
    info["vectors_sha256"] = sha256_of(gate / LAYOUT.vectors)
    (gate / LAYOUT.info).write_text(json.dumps(info))
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
