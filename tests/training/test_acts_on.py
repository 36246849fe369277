"""Training with acts_on: an expert learns, and is measured, where it acts."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from phatgoose.base.identity import Base
from phatgoose.config import IA3, Bottleneck, Dora, GateTraining, Lora
from phatgoose.errors import ConfigError
from phatgoose.experts.expert import Expert
from phatgoose.experts.importing import import_adapter
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, routing_for
from phatgoose.tasks.batching import can_pack
from phatgoose.tasks.encoding import TokenPair
from phatgoose.tasks.task import Task
from phatgoose.training.train_expert import measure, train_gates
from tiny import logits_of, make_adapter, make_model
from training_runs import GATES, TASK, TRAINING, train


def pairs_of(base: Base, task: Task) -> list[TokenPair]:
    space = "" if base.is_encoder_decoder else " "
    return [
        TokenPair(
            base.tokenizer(e.input)["input_ids"],
            [*base.tokenizer(space + e.target, add_special_tokens=False)["input_ids"], 1],
        )
        for e in task.train
    ]


KINDS = {
    "lora": Lora(rank=2, alpha=4),
    "ia3": IA3(),
    "bottleneck": Bottleneck(size=3),
    "dora": Dora(rank=2, alpha=4),
}
LATE = replace(TRAINING, acts_on="3")


def validation_loss(base, expert, model) -> float:
    """The mean loss of the validation's target tokens, one text after the other, as served."""
    losses = []
    for pair in pairs_of(base, replace(TASK, train=TASK.validation)):
        with routing_for(model, [pair.prompt]):
            logits = logits_of(model, torch.tensor([pair.prompt + pair.target]))[0]
        told = logits[len(pair.prompt) - 1 : -1].log_softmax(-1)
        losses.append(-told[range(len(pair.target)), pair.target])
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize(("kind", "packs"), [*((kind, True) for kind in KINDS), ("lora", False)])
def test_what_is_trained_is_what_is_served(llama, tmp_path, kind, packs, monkeypatch):
    if not packs:
        # As of a model whose layers have windows, and wider ones than any text here.
        monkeypatch.setattr(llama.model.config, "sliding_window", 10**6, raising=False)
        assert not can_pack(llama.model)
    expert = train(llama, tmp_path / "e", training=LATE, peft=KINDS[kind])
    assert expert.info.tail == 3
    Expert.load(expert.directory)
    model = compose(Pool((expert,)), make_model("llama"), router="single")
    loss = validation_loss(llama, expert, model)
    assert loss == pytest.approx(expert.info.metrics["expert_validation_loss"], rel=1e-4)
    everywhere = replace(expert, info=replace(expert.info, acts_on=None))
    other = compose(Pool((everywhere,)), make_model("llama"), router="single")
    assert abs(validation_loss(llama, expert, other) - loss) > 1e-4


def test_encoder_decoders_are_refused(loaded_bases, tmp_path):
    with pytest.raises(ConfigError, match="encoder-decoder"):
        train(copy.deepcopy(loaded_bases["t5"]), tmp_path / "e", training=LATE)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:No fingerprint is recorded")
def test_gates_and_measuring_follow_the_expert(llama, tmp_path):
    adapter = make_adapter(llama, tmp_path / "adapter")
    plain = import_adapter(adapter, tmp_path / "plain", base=llama.id)
    late = replace(plain, info=replace(plain.info, acts_on={"tail": 3})).save(tmp_path / "late")
    settings, means = {"gate_training": GATES, "training": TRAINING}, []
    for each in (late, plain):
        out = tmp_path / "gated" / each.directory.name
        gated = train_gates(llama, each.directory, TASK, out=out, **settings)
        again = measure(gated, llama, TASK, GateTraining(means=True))
        assert gated.info.tail == again.info.tail == each.info.tail
        means.append(torch.cat([*again.means.values()]))
    assert not torch.allclose(*means)
