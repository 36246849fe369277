"""The trainer: losses, checkpoints, the order of examples, callbacks, and bases of 4 bits."""

import logging
import re
from dataclasses import replace

import pytest
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from phatgoose.base.identity import quantisation
from phatgoose.base.loading import load_base
from phatgoose.errors import ExpertError
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose
from phatgoose.tasks.encoding import TokenPair
from phatgoose.tasks.task import Task
from phatgoose.training.trainer import visited
from tiny import VOCABULARY, logits_of, make_ids, make_tokenizer, peft_model
from training_runs import TASK, TRAINING, target_nll, train, words


@pytest.mark.parametrize(("kind", "micro"), [("llama", 1), ("t5", 3)], indirect=["kind"])
def test_losses_are_means_over_all_target_tokens(base, tmp_path, micro):
    """Of the one batch before it is learnt, then of the validation's examples."""
    for module in base.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    first = target_nll(base.model, base, TASK.train).mean().item()
    training = replace(TRAINING, steps=1, batch_size=6, micro_batch_size=micro, eval_every=1)
    expert = train(base, tmp_path / "echo", training=training)
    assert expert.info.metrics["expert_train_loss"] == pytest.approx(first, abs=1e-3)
    wanted = target_nll(peft_model(base, expert.directory), base, TASK.validation).mean().item()
    assert expert.info.metrics["expert_validation_loss"] == pytest.approx(wanted, abs=1e-4)


def test_the_best_checkpoint_is_kept(llama, tmp_path, caplog):
    task = Task("liar", words("yes", "yes", "yes", "yes"), validation=words("no", "maybe"))
    training = replace(TRAINING, steps=10, learning_rate=0.1)
    with caplog.at_level(logging.INFO, "phatgoose.training.trainer"):
        expert = train(llama, tmp_path / "liar", task, training)
    logged = re.findall(r"step (\d+) of 10, validation loss ([\d.]+)", caplog.text)
    best, least = min(logged, key=lambda line: float(line[1]))
    assert (len(logged), best != "10") == (5, True)
    assert expert.info.metrics["expert_best_step"] == int(best)
    loss = target_nll(peft_model(llama, expert.directory), llama, task.validation).mean().item()
    assert loss == pytest.approx(float(least), abs=1e-3)


# A run's forward passes: per LoRA step 2; after steps 2 and 4 one validation; 2 per gate step.
@pytest.mark.parametrize(
    ("passes", "told"),
    [
        (2, "expert: training diverged, the loss is nan at step 2 of 4; lower the learning rate"),
        (4, "expert: training diverged, the validation loss is nan at step 2 of 4"),
        (12, "gates: training diverged, the loss is nan at step 2 of 2"),
    ],
)
def test_a_training_that_diverges_stops_at_once(llama, tmp_path, passes, told):
    calls = []

    def broken(layer, inputs, outputs):
        calls.append(1)
        return outputs * (float("nan") if len(calls) > passes else 1.0)

    handle = llama.model.get_input_embeddings().register_forward_hook(broken)
    with pytest.raises(ExpertError, match=f"echo: {told}"):
        train(llama, tmp_path / "echo")
    handle.remove()
    assert not (tmp_path / "echo").exists()
    assert not llama.model.training  # whose dropout would be at work in what the user does next


def test_every_pass_visits_each_example_once_and_batches_hold_similar_lengths():
    pairs = [TokenPair([5] * (1 + i * 7 % 10), [i]) for i in range(10)]
    order = visited(pairs, batch=4, steps=5, seed=0)
    assert sorted(pair.target[0] for pair in order) == sorted([*range(10)] * 2)
    lengths = [pair.length for pair in order]
    assert all(lengths[i : i + 4] == sorted(lengths[i : i + 4]) for i in range(0, 20, 4))
    assert order == visited(pairs, batch=4, steps=5, seed=0)
    assert order != visited(pairs, batch=4, steps=5, seed=1)


def test_the_rate_rises_and_stays_and_a_callback_hears_of_both_trainings(llama, tmp_path):
    rates = []  # of every step, and how many steps its training has

    class Rates(TrainerCallback):
        def on_step_begin(self, args, state, control, lr_scheduler=None, **_):
            rates.append((lr_scheduler.get_last_lr()[0], state.max_steps))

    training = replace(TRAINING, steps=20)
    train(llama, tmp_path / "echo", training=training, callbacks=[Rates()])
    assert rates[:20] == [(0.0, 20), *[(training.learning_rate, 20)] * 19]
    assert [steps for _, steps in rates[20:]] == [2, 2]  # of the gates


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
    assert all(expert.lora[site].B.any() and gate.any() for site, gate in expert.gates.items())
    for each in (plain, base):
        routed = compose(Pool.open(expert.directory), each, router="phatgoose")
        assert logits_of(routed, make_ids()).isfinite().all()
