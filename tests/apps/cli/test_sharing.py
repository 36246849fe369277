"""`phatgoose import`, `push`, `pull`, `export`, and pools of an owner on the Hub."""

import json
import shutil
from pathlib import Path

import pytest

from command_line import BASE
from fake_hub import contents, pushed_now
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from tiny import make_adapter

# huggingface_hub 2.4 hands its own HTTP client an argument that this one advises against.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def test_the_commands_push_pull_and_import(hub, pair, llama, tmp_path, phat):
    def phatgoose(*arguments: object) -> str:
        outcome = phat(*arguments)
        assert (outcome.code, outcome.err) == (0, "")
        return outcome.out

    told = phatgoose("push", pair[0], "me/reviews")
    assert told.strip().endswith(f"-> hub:me/reviews@{pushed_now(hub)}")
    assert "e0: 14 sites" in phatgoose("pull", "me/reviews", "--out", tmp_path / "pulled")
    assert contents(tmp_path / "pulled") == contents(pair[0])
    assert "e0" in phatgoose("pool", "hub:me/reviews")
    hub.add("you/lora", contents(make_adapter(llama, tmp_path / "adapter")))
    told = phatgoose(*("import", "you/lora", "--base", llama.id, "--out", tmp_path / "theirs"))
    assert "theirs: 14 sites, LoRA of rank 4" in told
    assert "phatgoose stats" in told
    assert Expert.load(tmp_path / "theirs").gates == {}
    files = contents(make_adapter(llama, tmp_path / "adapter"))
    card = b"---\nwidget:\n- text: Is it good?\n- text: Or bad?\n- text: Or both?\n---\n"
    hub.add("you/asked", {**files, "README.md": card})
    hub.add("you/told", {**files, "examples.jsonl": b'{"prompt": "Is it good?"}\n' * 4})
    told = phatgoose("import", "you/asked", "you/told", "--base", llama.id, "--out", tmp_path / "p")
    assert [line.split("; ")[-1].split(" -> ")[0] for line in told.splitlines()[:2]] == [
        "statistics of 3 prompts",
        "statistics of 4 prompts",
    ]
    assert told.splitlines()[2] == f"next: 'phatgoose serve {tmp_path / 'p'}'"


def test_without_the_base_s_weights_only_the_fingerprint_is_missing(phat, llama, tmp_path):
    adapter = make_adapter(llama, tmp_path / "adapter")
    (adapter / "prompts.txt").write_text("Is it good?\nOr bad?\nOr both?\n")
    (tmp_path / "base").mkdir()
    shutil.copy(Path(llama.id) / "config.json", tmp_path / "base")
    outcome = phat("import", adapter, "--base", tmp_path / "base", "--out", tmp_path / "mine")
    assert (outcome.code, outcome.err) == (0, "")
    made, missing, following = outcome.out.splitlines()
    assert "; statistics of 3 prompts -> " in made
    named = Expert.load(tmp_path / "mine").info
    assert missing == f"no fingerprint: {named.base.id} is not here; --fingerprint fetches it"
    assert (named.base.fingerprint, str(named.reader)) == (None, "e5:4-11")
    assert following == f"next: 'phatgoose serve {tmp_path / 'mine'}'"


def test_many_adapters_are_imported_and_the_refused_listed(phat, llama, tmp_path):
    folders = [make_adapter(llama, tmp_path / "adapters" / name) for name in ("a", "b", "c")]
    config = json.loads((folders[1] / "adapter_config.json").read_text()) | {"use_qalora": True}
    (folders[1] / "adapter_config.json").write_text(json.dumps(config))
    outcome = phat("import", *folders, "--base-id", "you/base", "--out", tmp_path / "pool")
    assert outcome.code == 1
    assert [line.split(":")[0] for line in outcome.out.splitlines()] == ["a", "c", "next"]
    (told,) = outcome.err.splitlines()
    assert told.startswith(f"refused: {folders[1]} uses 'use_qalora'")
    outcome = phat("import", folders[0].parent, "--base-id", "you/base", "--out", tmp_path / "same")
    assert (outcome.code, Pool.open(tmp_path / "same").names) == (1, ("a", "c"))
    alone = phat("import", folders[1], "--out", tmp_path / "two")
    assert (alone.code, alone.out) == (2, "")


def test_a_pool_leaves_as_an_adapter_or_a_model(here, phat):
    merged = ["export", "experts", "--router", "merged", *BASE]
    outcome = phat(*merged, "--out", "adapter", "--rank", 1)
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0].startswith("PEFT LoRA of rank 1, 14 sites: ")
    assert "reviews 50.0 %" in lines[0]
    assert "lost by the cut (Frobenius norm):" in outcome.out
    config = json.loads((here / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (1, 1, {})
    outcome = phat(*merged, "--out", "whole", "--merged")
    assert outcome.out.startswith("merged model, 14 sites: ")
    assert (here / "whole" / "tokenizer.json").is_file()
    assert (here / "whole" / "model.safetensors").is_file()
