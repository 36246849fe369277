"""What people know from other trainers: callbacks, 4 bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
)

from phatgoose.base import load_base, quantisation
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose
from tiny import VOCABULARY, logits_of, make_ids, make_tokenizer
from training_runs import (
    TRAINING,
    train,
)


class Rates(TrainerCallback):
    """The rate of every step, and how many steps its training has."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.stages: list[int] = []

    def on_step_begin(self, args, state, control, lr_scheduler=None, **_):
        self.rates.append(lr_scheduler.get_last_lr()[0])
        self.stages.append(state.max_steps)


def test_the_rate_rises_and_stays_and_a_callback_hears_of_both_trainings(llama, tmp_path):
    heard = Rates()
    training = replace(TRAINING, steps=20)
    train(llama, tmp_path / "echo", training=training, callbacks=[heard])
    assert heard.stages == [20] * 20 + [2] * 2  # the expert's, then the gates'
    wanted = [0.0, *[1.0] * 19]
    assert heard.rates[:20] == pytest.approx([training.learning_rate * share for share in wanted])


def test_an_expert_is_trained_on_a_base_of_four_bits_for_the_base_of_those_weights(tmp_path):
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}  # blocks of 64
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    config = LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=4, **sizes, **ids)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    make_tokenizer(final_eos=False).save_pretrained(tmp_path / "base")
    plain, base = (load_base(tmp_path / "base", dtype=dtype) for dtype in ("float32", "4bit"))
    assert (quantisation(base.model), base.fingerprint) == ("Params4bit", plain.fingerprint)
    expert = train(base, tmp_path / "echo")
    assert expert.info.base == plain.reference
    assert all(module.B.any() for module in expert.lora.values())
    assert all(gate.any() for gate in expert.gates.values())
    for each in (plain, base):
        routed = compose(Pool.open(expert.directory), each, router="phatgoose")
        assert logits_of(routed, make_ids()).isfinite().all()
