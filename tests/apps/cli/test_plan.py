"""`train --plan` and `compose --plan`: what they print and write, and what they refuse."""

import json
import re

import pytest

from command_line import BASE, refused, snapshot
from phatgoose.base.sites import find_sites
from phatgoose.config import Routing
from phatgoose.routing.compose import detach
from phatgoose.routing.open_model import open_model

pytestmark = pytest.mark.usefixtures("_offline")


def test_the_command_prints_a_plan_and_writes_nothing_else(planned_here, phat):
    before = snapshot(planned_here)
    flags = ["--steps", 10, "--batch-size", 4, "--tflops", 2, "--dtype", "float32"]
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
    assert rows["a--b"][:2] == ["hub:a/b", "?"]
    assert rows["a--b"][3].startswith("≤")
    assert rows["total"][0] == "4 tasks"
    assert "at 2 TFLOP/s" in outcome.out


def test_a_plan_for_workers_is_written_as_json(planned_here, phat):
    flags = ["--base", "tiny-base", "--steps", 10, "--tokens-per-second", 50, "--workers", 2]
    flags += ["--gpus-per-worker", 0.5, "--plan", "--json", "out/plan.json"]
    outcome = phat("train", "counting.jsonl", "reviews.jsonl", *flags)
    assert (outcome.code, outcome.err) == (0, "")
    assert "plan -> out/plan.json" in outcome.out
    assert "On 2 workers (1 GPUs): " in outcome.out
    record = json.loads((planned_here / "out" / "plan.json").read_text())
    assert [task["name"] for task in record["tasks"]] == ["counting", "reviews"]
    assert record["totals"]["tokens"] == sum(task["tokens"] for task in record["tasks"])
    slowest = max(task["seconds"] for task in record["tasks"])
    assert record["schedule"] == {"workers": 2, "seconds": slowest}
    assert record["sites"] == 14


@pytest.mark.parametrize(("task", "own"), [("t0hi/ag_news", 16), ("t0hi/wiki_hop", 2)])
def test_a_dataset_is_planned_as_it_is_trained_at_its_own_micro_batch(
    planned_here, phat, task, own
):
    (planned_here / "r.toml").write_text("[training]\nmicro_batch_size = 8\n")

    def memory(*flags):
        options = [*flags, "--base", "google/t5-xl-lm-adapt", "--dtype", "bfloat16", "--plan"]
        assert phat("train", task, *options, "--json", "plan.json").code == 0
        return json.loads((planned_here / "plan.json").read_text())["memory_bytes"]

    assert memory() == memory("--micro-batch-size", own)
    assert memory() != memory("--micro-batch-size", 8)  # the settings' default
    assert memory("--recipe", "r.toml") == memory("--micro-batch-size", 8)


def test_a_mixture_is_planned_as_one_expert(planned_here, phat):
    flags = ["--base", "tiny-base", "--multitask", "all", "--mixture-most", 10, "--plan"]
    outcome = phat("train", "counting.jsonl", "reviews.jsonl", *flags)
    assert "1 experts to train" in outcome.out
    assert re.search(r"│ all +│ mixture of 2 tasks +│ +20 │", outcome.out)


def test_finished_experts_are_left_out_when_resumed(planned_here, phat):
    (planned_here / "experts" / "counting").mkdir(parents=True)
    arguments = ["train", "counting.jsonl", "reviews.jsonl", "--base", "tiny-base", "--plan"]
    refused(phat(*arguments), "experts/counting exists already")
    outcome = phat(*arguments, "--resume")
    assert "1 experts to train" in outcome.out
    assert "1 experts are finished" in outcome.out


def test_the_plan_says_what_memory_is_of_and_what_each_setting_would_save(planned_here, phat):
    base = ["train", "hub:a/b", "--base", "google/t5-xl-lm-adapt", "--dtype", "float32", "--plan"]
    told = phat(*base).out
    assert "Memory is the peak in a training step, with micro_batch_size 8" in told
    assert "GPUs: 24 GB fits micro_batch_size 1, 40 GB" in told
    less = next(line for line in told.splitlines() if line.startswith("Settings that take less: "))
    found = dict(re.findall(r"(--[a-z0-9-]+(?: \w+)?) ([\d.]+[MG])B", less))
    flags = ("--micro-batch-size 1", "--dtype bfloat16", "--max-input-tokens 256", "--load-in-4bit")
    assert set(found) == set(flags)
    for flag in flags:
        assert f"Peak memory of each: {found[flag]}B;" in phat(*base, *flag.split()).out
    together = phat(*base, *" ".join(flags).split()).out
    assert f"together {re.search('Peak memory of each: (.*?)B;', together)[1]}B." in less
    small = phat("train", "counting.jsonl", "--base", "tiny-base", "--plan").out
    assert "GPUs: 24 GB fits, 40 GB fits, 80 GB fits." in small
    assert "take less" not in small


@pytest.mark.parametrize(
    ("router", "k"), [("phatgoose", 2), ("arrow", 2), ("discriminant", 1), ("merged", None)]
)
def test_compose_plans_what_the_routed_model_takes(here, phat, router, k):
    before = snapshot(here)
    asked = ["compose", "experts", "--router", router, *BASE, "--plan"]
    planned = phat(*asked, "--json", "-")
    assert (planned.code, planned.err) == (0, "")
    record = json.loads(planned.out)
    outcome = phat(*asked)
    assert snapshot(here) == before
    model = open_model("experts", dtype="float32", routing=Routing(router=router)).model
    layers = model.phatgoose.layers
    kept = [t for each in layers.values() for t in each.buffers() if t.is_floating_point()]
    by_prompt = model.phatgoose.prompt_router
    kept += by_prompt.tables.tensors.values() if by_prompt else []
    memory = record["memory_bytes"]["float32"]
    assert memory["base"] == sum(p.nbytes for p in model.parameters())
    assert memory["pool"] == pytest.approx(sum(t.nbytes for t in kept), rel=0.01)
    assert (record["router"], record["k"], record["sites"]) == (router, k, len(layers))
    sites = find_sites(detach(model)).values()
    n, d = sum(site.in_features for site in sites), sum(site.out_features for site in sites)
    used = 2 if k is None else k  # of rank 2; merged uses both
    wanted = used * 2 * (n + d) + (2 * n if router in ("phatgoose", "arrow") else 0)
    whole = sum(site.in_features * site.out_features for site in sites)
    assert record["added_computation"] == pytest.approx(wanted / whole)
    assert f"a token takes {wanted / whole:.1%} more multiplications" in outcome.out
    assert ("a prompt one more pass" in outcome.out) == (by_prompt is not None)
    assert "--dtype bfloat16 (" in outcome.out
    assert ("--k 1 (" in outcome.out) == (k == 2)


def test_compose_either_plans_or_writes(here, phat):
    refused(phat("compose", "experts", "--plan", "--out", "x", *BASE), "give one of them")
    refused(phat("compose", "experts", *BASE), "--out FOLDER writes a routed model")
    written = phat("compose", "experts", "--out", "x", *BASE, "--json", "-")
    record = json.loads(written.out)
    assert (record["folder"], record["experts"]) == ("x", ["counting", "reviews"])
