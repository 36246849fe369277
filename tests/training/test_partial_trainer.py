"""The trainer: in which order it visits examples, and its checkpoints."""

from __future__ import annotations

from dataclasses import replace

from phatgoose.tasks.encoding import TokenPair
from phatgoose.training.partial_trainer import newest_checkpoint, visiting_order
from training_runs import (
    PASS,
    TRAINING,
    assert_same_expert,
    interrupted,
    train,
)


def test_a_checkpoint_cut_short_is_dropped(llama, tmp_path, monkeypatch):
    training = replace(TRAINING, eval_every=1)
    whole = train(llama, tmp_path / "whole", training=training)
    interrupted(monkeypatch, llama, tmp_path / "cut", PASS, call=10, training=training)
    newest = tmp_path / ".cut.work" / "expert" / "checkpoint-3"
    (newest / "complete").unlink()
    (newest / "trainable.safetensors").write_bytes(b"torn")
    resumed = train(llama, tmp_path / "cut", training=training, resume=True)
    assert_same_expert(resumed, whole)


def test_every_pass_visits_each_example_once_and_batches_hold_similar_lengths():
    pairs = [TokenPair([5] * (1 + i * 7 % 10), [1]) for i in range(10)]
    order = visiting_order(pairs, batch=4, steps=5, seed=0)
    assert len(order) == 20
    assert sorted(order) == sorted([*range(10)] * 2)
    lengths = [pairs[index].length for index in order]
    assert all(lengths[i : i + 4] == sorted(lengths[i : i + 4]) for i in range(0, 20, 4))
    assert order == visiting_order(pairs, batch=4, steps=5, seed=0)
    assert order != visiting_order(pairs, batch=4, steps=5, seed=1)


def test_the_newest_complete_checkpoint_is_the_one_to_go_on_from(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for step in (2, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}" / "complete").touch()
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert not (tmp_path / "checkpoint-12").exists()
