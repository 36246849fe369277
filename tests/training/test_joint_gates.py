"""Joint training: expert and gates in one go, against a naive loop written with hooks."""

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from phatgoose.config import GateTraining
from phatgoose.experts.alone import applied
from phatgoose.sites import find_sites
from phatgoose.training.train_expert import fresh_expert
from tiny import assert_same_logits, logits_of, make_ids, peft_model
from training_runs import ADAPTER, LORA, TASK, TRAINING, target_nll, train

JOINT = GateTraining(joint=True)


def naive(A, B, v):
    """Adds scale * B A u * sigmoid(v . u), as the paper writes it."""

    def add(_, args, y):
        (u,) = args
        sigma = 1 / (1 + torch.exp(-(u * v).sum(dim=-1, keepdim=True)))
        return y + sigma * LORA.alpha / LORA.rank * (u @ A.T @ B.T)

    return add


def test_loss_and_gradients_are_those_of_the_method(base):
    torch.manual_seed(0)
    with fresh_expert(base, LORA, joint=True) as fresh:
        factors = {site: (part["A"], part["B"], part.gate) for site, part in fresh.parts.items()}
        tensors = [nn.init.normal_(tensor, std=0.1) for at in factors.values() for tensor in at]
        got = target_nll(fresh.model.eval(), base, TASK.train).mean()
        got_gradients = torch.autograd.grad(got, tensors)
    for site, three in factors.items():
        base.model.get_submodule(site).register_forward_hook(naive(*three))
    wanted = target_nll(base.model, base, TASK.train).mean()
    torch.testing.assert_close(got, wanted)
    for one, other in zip(got_gradients, torch.autograd.grad(wanted, tensors), strict=True):
        assert other.any()
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def test_the_adapter_is_plain_lora_and_the_gates_are_ours(base, tmp_path):
    expert = train(base, tmp_path / "echo", gate_training=JOINT)
    endings = {key.rpartition(".lora_")[2] for key in load_file(expert.directory / ADAPTER)}
    assert endings == {"A.weight", "B.weight"}
    assert expert.gates.keys() == expert.lora.keys() == find_sites(base.model).keys()
    assert all(gate.any() for gate in expert.gates.values())
    ids = make_ids()
    got = logits_of(peft_model(base, expert.directory), ids)  # warnings are errors
    with applied(base.model, expert.lora):
        assert_same_logits(got, logits_of(base.model, ids))


def test_it_is_one_stage_and_says_so(llama, tmp_path):
    begun = []

    class Stages(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            begun.append(state.max_steps)

    expert = train(llama, tmp_path / "echo", gate_training=JOINT, callbacks=[Stages()])
    assert begun == [TRAINING.steps]
    assert expert.info.hyperparameters["joint"] is True
    assert not expert.info.hyperparameters.keys() & {"gate_steps", "gate_learning_rate"}
    assert expert.info.metrics["expert_steps"] == TRAINING.steps
    assert not any(key.startswith("gate_") for key in expert.info.metrics)
    assert expert.means.keys() == expert.lora.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["echo"]
