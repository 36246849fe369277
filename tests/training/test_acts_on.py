"""Training with acts_on: an expert learns, and is measured, where it acts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from phatgoose.config import IA3, Bottleneck, Dora, Formatting, GateTraining, Lora
from phatgoose.errors import ConfigError
from phatgoose.experts.expert import Expert, check_expert
from phatgoose.experts.importing import import_adapter
from phatgoose.experts.peft_files import ADAPTER_CONFIG, INVOCATION
from phatgoose.experts.pool import Pool
from phatgoose.passes import ActsOn
from phatgoose.routing.compose import compose
from phatgoose.routing.composition import composition_of, routing_for
from phatgoose.tasks import batching
from phatgoose.tasks.encoding import Encoder
from phatgoose.training.train_expert import measure, train_gates
from tiny import assert_same_logits, copied_model, logits_of, make_adapter, pairs_of, peft_model
from training_runs import GATES, TASK, TRAINING, train

TEMPLATE = "{% for m in messages %}[user] {{ m['content'] }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}[goose] {% endif %}"
KINDS = {
    "lora": Lora(rank=2, alpha=4),
    "ia3": IA3(),
    "bottleneck": Bottleneck(size=3),
    "dora": Dora(rank=2, alpha=4),
}


def trained_on(base, out, acts_on, **options) -> Expert:
    return train(base, out, training=replace(TRAINING, acts_on=acts_on), **options)


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
        monkeypatch.setattr(batching, "can_pack", lambda _: False)
    options = {"peft": KINDS[kind], "gate_training": GateTraining(gate_steps=2)}
    expert = trained_on(llama, tmp_path / "e", "3", **options)
    assert expert.acts_on == ActsOn(tail=3)
    assert check_expert(expert.directory) == []
    base = copied_model("llama")
    model = compose(Pool((expert,)), base, router="single")
    loss = validation_loss(llama, expert, model)
    assert loss == pytest.approx(expert.info.metrics["expert_validation_loss"], rel=1e-4)
    everywhere = replace(expert, info=replace(expert.info, acts_on=None))
    other = compose(Pool((everywhere,)), copied_model("llama"), router="single")
    assert abs(validation_loss(llama, expert, other) - loss) > 1e-4


# The chat template's generation prompt, an invocation sequence that PEFT knows too.


def test_a_generation_prompt_is_an_invocation_that_peft_reads(llama, tmp_path):
    llama.tokenizer.chat_template = TEMPLATE
    chat = Formatting(chat=True)
    expert = trained_on(llama, tmp_path / "e", "generation-prompt", formatting=chat)
    tokens = llama.tokenizer("[goose] ", add_special_tokens=False)["input_ids"]
    assert expert.acts_on == ActsOn(invocation=tuple(tokens))
    config = json.loads((expert.directory / ADAPTER_CONFIG).read_text())
    assert config[INVOCATION] == tokens
    model = compose(Pool((expert,)), copied_model("llama"), router="single")
    peft = peft_model(llama, expert.directory)
    prompts = [Encoder.of(llama, chat).prompt(text) for text in ("say bee", "a longer one", "x")]
    ids = batching.pad_left([*prompts, prompts[0][:9]], 0)  # the last has no generation prompt
    mask = batching.pad_left([[1] * len(prompt) for prompt in [*prompts, prompts[0][:9]]], 0)
    real = mask.bool()
    positions = batching.position_ids(mask)
    inputs = {"attention_mask": mask, "position_ids": positions}
    assert_same_logits(logits_of(model, ids, **inputs)[real], logits_of(peft, ids, **inputs)[real])
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
    assert torch.equal(model.generate(ids, **settings), peft.generate(input_ids=ids, **settings))


def test_encoder_decoders_are_refused(originals, tmp_path):
    with pytest.raises(ConfigError, match="encoder-decoder"):
        trained_on(originals["t5"].copied(), tmp_path / "e", "answer")
    assert not list(tmp_path.iterdir())


# Adapters of PEFT's, and what an expert records.


@pytest.mark.filterwarnings("ignore:No fingerprint is recorded")
def test_an_imported_alora_keeps_its_invocation_through_gates_and_measuring(llama, tmp_path):
    tokens = llama.tokenizer("say", add_special_tokens=False)["input_ids"]
    adapter = make_adapter(llama, tmp_path / "adapter", **{INVOCATION: tokens})
    imported = import_adapter(adapter, tmp_path / "imported", base=llama.id)
    gated = train_gates(
        llama, imported.directory, TASK, out=tmp_path / "e", gate_training=GATES, training=TRAINING
    )
    again = measure(gated, llama, TASK, GateTraining())
    plain = train_gates(
        llama, adapter, TASK, out=tmp_path / "plain", gate_training=GATES, training=TRAINING
    )
    for expert in (imported, gated, again, plain):
        assert expert.acts_on == ActsOn(invocation=tuple(tokens))
    assert check_expert(again.directory) == []
    assert again.info.hyperparameters["imported_from"] == "adapter"
    (entry,) = Pool((again,)).records()
    assert entry["acts_on"] == {"invocation_tokens": tokens}
    model = compose(Pool((again,)), copied_model("llama"), router="single")
    assert composition_of(model).acting == (again.acts_on,)
