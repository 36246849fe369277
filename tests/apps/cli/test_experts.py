"""`phatgoose train`, `gate`, `stats` and `check`: several tasks, every kind of expert."""

import json

import torch

from command_line import (
    BASE,
    GATE_FLAGS,
    TRAIN,
    write_rows,
)
from phatgoose.base import load_base
from phatgoose.experts.expert import Expert
from phatgoose.training import train_expert as statistics_module
from toy_embedders import embed


def test_chats_are_read_through_the_base_s_template_by_every_command(here, phat):
    base = load_base("tiny-base")
    base.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    )
    base.tokenizer.save_pretrained("tiny-base")
    rows = [
        [{"role": "user", "content": f"Film {i}?"}, {"role": "assistant", "content": "good"}]
        for i in range(8)
    ]
    write_rows(here / "chats.jsonl", [{"messages": row} for row in rows])
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


def test_multitask_trains_one_expert_on_all_tasks_and_names_them(here, phat):
    arguments = ["train", "reviews.jsonl", "counting.jsonl", *TRAIN, "--multitask", "all"]
    outcome = phat(*arguments)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("[1/1] all: validation loss")
    assert {path.name for path in (here / "new").iterdir()} == {"all"}
    record = Expert.load(here / "new" / "all").info.task
    assert record["source"] == "mixture of reviews.jsonl (7), counting.jsonl (7)"


def test_the_end_of_a_training_is_reported_as_json(here, phat):
    flags = [*TRAIN, "--peft", "dora", "--max-input-tokens", 3, "--json"]
    outcome = phat("train", "reviews.jsonl", *flags, "-")
    record = json.loads(outcome.out)
    (expert,) = record["experts"]
    assert (record["base"], expert["name"]) == ("tiny-base", "reviews")
    assert (expert["folder"], expert["trained_now"]) == ("new/reviews", True)
    made = Expert.load(here / "new" / "reviews")
    kept = made.info.metrics
    assert (made.kind, expert["metrics"]) == ("dora", kept)
    names = {"expert_steps", "expert_train_loss", "expert_validation_loss", "expert_seconds"}
    assert names | {"inputs_cut", "gate_steps"} <= kept.keys()
    assert "warning: reviews: 7 of 7 inputs cut to 3 tokens" in outcome.err
    assert "[1/1] reviews: validation loss" in outcome.err
    assert "; inputs cut: 7 ->" in outcome.err
    again = phat("train", "reviews.jsonl", *flags, "again.json", "--resume")
    assert "report -> again.json" in again.out
    assert json.loads((here / "again.json").read_text())["experts"] == [
        {**expert, "trained_now": False}
    ]


def test_stats_adds_statistics_to_an_expert(here, phat, monkeypatch):
    monkeypatch.setattr(statistics_module, "embed_texts", embed)
    assert phat("train", "reviews.jsonl", *TRAIN, "--no-means").code == 0
    trained = here / "new" / "reviews"
    before = Expert.load(trained)
    assert not before.means
    options = ["--task", "reviews.jsonl", "--dtype", "float32", "--statistics-examples", 3]
    outcome = phat("stats", "new/reviews", *options, "--embeddings")
    assert (outcome.code, outcome.err) == (0, "")
    wanted = "reviews, LoRA, 14 sites, gates: yes, means: yes, readings: yes, embeddings: yes"
    assert outcome.out == f"{wanted} -> new/reviews\n"
    assert f"new/reviews: {wanted}\n" in phat("check", "new/reviews").out
    after = Expert.load(trained)
    assert after.info.adapter_sha256 == before.info.adapter_sha256
    assert len(after.embeddings) == 3
