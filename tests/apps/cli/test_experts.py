"""`phatgoose train`, `gate`, `stats` and `check`: several tasks, every kind of expert."""

import json
import shutil

import torch

from command_line import BASE, GATE_FLAGS, TRAIN, Outcome, refused, review, write_rows
from phatgoose.base.loading import load_base
from phatgoose.experts.expert import Expert
from phatgoose.training import train_expert as statistics_module
from tiny import small_reader
from toy_embedders import use_toy_embedder


def test_chats_are_read_through_the_base_s_template_by_every_command(here, phat):
    base = load_base("tiny-base")
    base.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    )
    base.tokenizer.save_pretrained("tiny-base")
    turns = [{"role": "user", "content": "Film?"}, {"role": "assistant", "content": "good"}]
    write_rows(here / "chats.jsonl", [{"messages": turns}] * 8)
    outcome = phat("train", "chats.jsonl", *TRAIN)
    assert (outcome.code, outcome.err) == (0, "")
    expert = Expert.load(here / "new" / "chats")
    assert expert.info.hyperparameters["chat"] is True
    assert phat("train", "chats.jsonl", *TRAIN, "--resume").err == ""
    measured = ["--task", "chats.jsonl", "--statistics-examples", 4, *BASE]
    assert phat("stats", "new/chats", *measured).code == 0
    again = Expert.load(here / "new" / "chats")
    assert all(torch.equal(again.means[site], mean) for site, mean in expert.means.items())
    gated = ["--out", "gated", *BASE, *GATE_FLAGS]
    assert phat("gate", "new/chats", "--task", "chats.jsonl", *gated).code == 0
    assert phat("compose", "new", "--out", "routed", *BASE).code == 0
    scored = phat("compare", "new", "--suite", "chats.jsonl", *BASE[2:], "--max-new-tokens", 2)
    assert (scored.code, "trained with" in scored.err) == (0, False), scored.err
    assert "read with chat False" in phat("evaluate", "routed", "--task", "counting.jsonl").err


def test_one_expert_of_several_tasks_is_reported_as_json(here, phat):
    flags = [*TRAIN, "--peft", "dora", "--max-input-tokens", 3, "--multitask", "all", "--json"]
    outcome = phat("train", "reviews.jsonl", "counting.jsonl", *flags, "-")
    record = json.loads(outcome.out)
    (expert,) = record["experts"]
    assert (record["base"], expert["name"]) == ("tiny-base", "all")
    assert (expert["folder"], expert["trained_now"]) == ("new/all", True)
    (folder,) = (here / "new").iterdir()
    made = Expert.load(folder)
    assert made.info.task["source"] == "mixture of reviews.jsonl (7), counting.jsonl (7)"
    assert (made.kind, expert["metrics"]) == ("dora", made.info.metrics)
    names = {"expert_steps", "expert_train_loss", "expert_validation_loss", "expert_seconds"}
    assert names | {"inputs_cut", "gate_steps"} <= made.info.metrics.keys()
    assert "warning: all: 14 of 14 inputs cut to 3 tokens" in outcome.err
    assert "[1/1] all: validation loss" in outcome.err
    again = phat("train", "reviews.jsonl", "counting.jsonl", *flags, "again.json", "--resume")
    assert "report -> again.json" in again.out
    (kept,) = json.loads((here / "again.json").read_text())["experts"]
    assert kept == {**expert, "trained_now": False}


def test_stats_adds_statistics_to_an_expert(here, phat, monkeypatch):
    use_toy_embedder(monkeypatch)
    before = Expert.load("experts/reviews")
    options = ["--task", "reviews.jsonl", *BASE[2:], "--statistics-examples", 3, "--embeddings"]
    outcome = phat("stats", "experts/reviews", *options)
    parts = ("gates", "means", "prompt_statistics", "embeddings")
    wanted = ", ".join(["reviews, LoRA, 14 sites", *(f"{part}: yes" for part in parts)])
    assert outcome == Outcome(0, f"{wanted} -> experts/reviews\n", "")
    assert f"experts/reviews: {wanted}\n" in phat("check", "experts/reviews").out
    after = Expert.load("experts/reviews")
    assert after.info.adapter_sha256 == before.info.adapter_sha256
    assert len(after.embeddings) == 3


def test_stats_takes_prompts_themselves_and_files_of_them(here, phat):
    (here / "lines.txt").write_text("Film 1 is\n\n  Film 2 is \n")
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Film 4 is"}]
    rows = [{"prompt": "Film 3 is"}, {"messages": asked}, review(5)]
    write_rows(here / "rows.jsonl", rows)
    means = Expert.load("experts/reviews").means
    prompts = ["--prompts", "Film 0 is", "--prompts", "lines.txt", "--prompts", "rows.jsonl"]
    outcome = phat("stats", "experts/reviews", *prompts, *BASE[2:])
    assert (outcome.code, outcome.err) == (0, "")
    got = Expert.load("experts/reviews")
    assert got.info.prompts_read == 6
    assert all(torch.equal(got.means[site], means[site]) for site in means)
    texts = [word for number in range(6) for word in ("--prompts", f"Film {number} is")]
    assert phat("stats", "experts/reviews", *texts, *BASE[2:]).code == 0
    again = Expert.load("experts/reviews").prompt_statistics
    assert all(torch.equal(again[part], got.prompt_statistics[part]) for part in again)


def test_stats_records_the_gain_over_the_base(here, phat):
    before = Expert.load("experts/reviews")
    write_rows(here / "solved.jsonl", [review(number) for number in range(40, 70)])
    only = ["--no-means", "--no-readings", *BASE[2:]]
    outcome = phat("stats", "experts/reviews", "--task", "solved.jsonl", "--gain", *only)
    after = Expert.load("experts/reviews")
    gain = after.info.gain
    assert (outcome.code, outcome.err, gain.rows) == (0, "", 30)
    assert -1 <= gain.low <= gain.value <= gain.high <= 1
    assert f", gain over the base: {gain} -> experts/reviews\n" in outcome.out
    assert f"gain over the base: {gain}\n" in phat("check", "experts/reviews").out
    assert after.info.vectors_sha256 == before.info.vectors_sha256
    # It is kept, and measured again by itself where there are rows enough.
    assert phat("stats", "experts/reviews", "--prompts", "Film 1 is", *BASE[2:]).code == 0
    assert Expert.load("experts/reviews").info.gain == gain
    write_rows(here / "more.jsonl", [review(number) for number in range(40, 64)])
    for flags, rows in ((["--no-gain"], 30), ([], 24)):
        measured = ["--task", "more.jsonl", "--statistics-examples", 4, *flags, *BASE[2:]]
        assert phat("stats", "experts/reviews", *measured).code == 0
        assert Expert.load("experts/reviews").info.gain.rows == rows
    few = phat("stats", "experts/reviews", "--task", "unseen.jsonl", "--gain", *only)
    refused(few, "has 6 rows that expert 'reviews' wasn't trained on")
    prompts = ["--prompts", "Film 1 is", "--gain"]
    refused(phat("stats", "experts/reviews", *prompts), "--gain works only with --task")


def test_only_means_and_gains_need_the_base(here, phat):
    means = Expert.load("experts/reviews").means
    described = here / "experts" / "reviews" / "phatgoose.json"
    record = json.loads(described.read_text())
    described.write_text(json.dumps(record | {"base": record["base"] | {"id": str(here / "gone")}}))
    for flags, count in (
        (["--prompts", "Film 1 is", "--prompts", "Film 2 is", "--prompts", "Film 3 is"], 3),
        (["--task", "reviews.jsonl", "--no-means", "--reader", "minilm:1-1"], 7),
    ):
        outcome = phat("stats", "experts/reviews", *flags)
        assert (outcome.code, outcome.err) == (0, "")
        got = Expert.load("experts/reviews")
        assert got.info.prompts_read == count
        assert all(torch.equal(got.means[site], means[site]) for site in means)
    assert str(got.info.reader) == "minilm:1-1"
    assert got.info.reader.fingerprint == small_reader().reference.fingerprint
    before = described.read_bytes()
    task = ["--task", "reviews.jsonl"]
    refused(phat("stats", "experts/reviews", *task), "/gone")
    refused(phat("stats", "experts/reviews", *task, "--no-means", "--gain"), "/gone")
    assert described.read_bytes() == before


def test_train_records_the_reader(here, phat):
    outcome = phat("train", "reviews.jsonl", *TRAIN, "--reader", "minilm:1-1")
    assert (outcome.code, outcome.err) == (0, "")
    read = Expert.load("new/reviews").info
    assert (read.reader, read.prompts_read) == (small_reader().reference, 4)
    assert str(Expert.load("experts/reviews").info.reader) == "e5:4-11"  # the usual one
    unknown = phat("train", "reviews.jsonl", *TRAIN, "--out", "not", "--reader", "maxilm")
    refused(unknown, "There is no reader 'maxilm'")
    assert not (here / "not").exists()  # told before hours of training


def test_a_reader_of_one_s_own_is_named_wherever_a_pool_s_prompts_are_read(here, phat):
    """Without its name nothing is read, since an expert's record can say anything."""
    own = ["--reader", "tiny-base:0-1"]
    for name in ("reviews", "counting"):
        prompts = [word for number in range(3) for word in ("--prompts", f"{name} {number}")]
        assert phat("stats", f"experts/{name}", *prompts, *own).code == 0
        (here / "experts" / name / "prompts.txt").write_text(f"{name} 0\n{name} 1\n{name} 2\n")
    advice = "If you trust that one, name it (--reader)"
    assert advice in " ".join(phat("audit", "experts").out.split())
    audited = phat("audit", "experts", *own, "--json", "audit.json")
    assert advice not in " ".join(audited.out.split())
    assert "prompt_wins" in json.loads((here / "audit.json").read_text())["signs"]
    assert phat("compose", "experts/reviews", "--out", "routed", *own, *BASE).code == 0
    adapter = here / "adapters" / "bare"
    adapter.mkdir(parents=True)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(here / "experts" / "reviews" / file, adapter)
    (adapter / "prompts.txt").write_text("Is it?\nOr not?\nOr both?\n")
    imported = phat("import", adapter, "--base", "tiny-base", "--out", "bare", *own)
    assert (imported.code, imported.err) == (0, "")
    assert str(Expert.load("bare").info.reader).endswith("tiny-base:0-1")
    adapter = adapter.rename(adapter.parent / "later")
    refused(phat("add", "routed", "experts/counting", adapter), advice)
    added = phat("add", "routed", "experts/counting", adapter, *own)
    assert (added.code, added.out) == (0, "3 experts at 14 sites -> routed\n")


def test_example_prompts_are_kept_and_checked_and_data_are_not(here, phat):
    kept = here / "experts" / "reviews" / "prompts.txt"
    (here / "data.jsonl").write_text(json.dumps({"input": "secret", "target": "x"}))
    assert phat("stats", "experts/reviews", "--prompts", "data.jsonl").code == 0
    assert not kept.exists()
    refused(phat("pool", "experts", "--prompts"), "phatgoose stats EXPERT --prompts")
    for name in ("reviews", "counting"):
        prompts = [word for number in range(3) for word in ("--prompts", f"{name}\n {number}")]
        assert phat("stats", f"experts/{name}", *prompts).code == 0
    assert kept.read_text() == "reviews 0\nreviews 1\nreviews 2\n"
    checked = phat("pool", "experts", "--prompts", "--markdown", "check.md", "--json", "check.json")
    assert (checked.code, checked.err) == (0, "")
    told = json.loads((here / "check.json").read_text())
    assert len(told["prompts"]) == 6
    assert "| expert | prompts | kept |" in (here / "check.md").read_text()
    failed = phat("pool", "experts", "--prompts", "--check")
    assert failed.code == int(bool(told["findings"]))
    assert phat("pool", "experts", "--check").code == 2


def test_stats_shows_three_of_the_prompts_that_the_expert_writes(here, phat):
    base = load_base("tiny-base", dtype="float32")
    base.tokenizer.chat_template = "<u>{{ messages[0].content }}</u>"
    base.tokenizer.save_pretrained("tiny-base")
    task = statistics_module.written_prompts(Expert.load("experts/reviews"), base)
    outcome = phat("stats", "experts/reviews", "--prompts", "self", *BASE)
    told, *shown, _ = outcome.out.splitlines()
    assert (outcome.code, outcome.err, len(shown)) == (0, "", 3)
    assert "answers alone writes answers" in told
    assert all(line.isprintable() and len(line) < 110 for line in shown)
    got = Expert.load("experts/reviews")
    assert got.info.prompts_read == len(task.train)
    write_rows(here / "written.jsonl", [{"prompt": example.input} for example in task.train])
    assert phat("stats", "experts/reviews", "--prompts", "written.jsonl", *BASE[2:]).code == 0
    again = Expert.load("experts/reviews").prompt_statistics
    assert all(torch.equal(again[part], got.prompt_statistics[part]) for part in again)
