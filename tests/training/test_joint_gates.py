"""Joint training: expert and gates in one go, against a naive loop written with hooks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from phatgoose.config import GateTraining
from phatgoose.experts.expert import Expert
from phatgoose.experts.kind import ModifiedLinear, applied
from phatgoose.sites import find_sites
from phatgoose.training.train_expert import fresh_expert
from tiny import assert_same_logits, logits_of, make_ids, peft_model
from training_runs import (
    ADAPTER,
    LORA,
    TASK,
    TRAINING,
    interrupt,
    on_call,
    target_nll,
    trained,
    with_graph,
)
from training_runs import train as train_default

JOINT = GateTraining(joint=True)
Factors = dict[str, dict[str, Tensor]]  # site -> A, B, v


def train(base, out, **options) -> Expert:
    return train_default(base, out, **{"gate_training": JOINT, **options})


def factors_in(model: nn.Module) -> Factors:
    """What is trained, as it stands in the model: master copies and gates, by site."""
    found: Factors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            site, _, part = name.partition(".trained.")
            found.setdefault(site, {})["v" if part == "gate" else part] = parameter
    return found


def copies_of(factors: Factors) -> Factors:
    return {
        site: {key: tensor.detach().clone().requires_grad_() for key, tensor in parts.items()}
        for site, parts in factors.items()
    }


class Naive:
    """W u + scale * B A u * sigmoid(v . u) by a hook at each site, as the paper writes it."""

    def __init__(self, model: nn.Module, factors: Factors, scale: float) -> None:
        self.scale = scale
        self.handles = [
            model.get_submodule(site).register_forward_hook(self.hook(**parts))
            for site, parts in factors.items()
        ]

    def hook(self, A: Tensor, B: Tensor, v: Tensor) -> Callable[..., Tensor]:
        def add(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            u = args[0]
            sigma = 1 / (1 + torch.exp(-(u * v).sum(dim=-1, keepdim=True)))
            return y + sigma * self.scale * (u @ A.T @ B.T)

        return add

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def nll(model, base) -> Tensor:
    return target_nll(model, base, TASK.train, with_graph).mean()


def fill(factors: Factors, *keys: str, std: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parts in factors.values():
            for key in keys:
                parts[key].copy_(std * torch.randn(parts[key].shape, generator=generator))


def gradients(loss: Tensor, factors: Factors) -> list[Tensor]:
    return torch.autograd.grad(loss, [t for parts in factors.values() for t in parts.values()])


def test_loss_and_gradients_are_those_of_the_method(base):
    with fresh_expert(base, LORA, joint=True) as fresh:
        model = fresh.model
        fill(factors_in(model), "A", "B", "v")
        copies = copies_of(factors_in(model))
        got = nll(model.eval(), base)
        got_gradients = gradients(got, factors_in(model))
    naive = Naive(base.model, copies, LORA.alpha / LORA.rank)
    wanted = nll(base.model, base)
    wanted_gradients = gradients(wanted, copies)
    naive.remove()
    torch.testing.assert_close(got, wanted)
    assert len(got_gradients) == 3 * len(copies)
    for one, other in zip(got_gradients, wanted_gradients, strict=True):
        assert other.any()
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def test_the_adapter_is_plain_lora_and_the_gates_are_ours(base, tmp_path):
    expert = trained(base, tmp_path / "echo", train)
    endings = {key.rpartition(".lora_")[2] for key in load_file(expert.directory / ADAPTER)}
    assert endings == {"A.weight", "B.weight"}
    assert expert.gates.keys() == expert.lora.keys() == find_sites(base.model).keys()
    assert all(gate.any() for gate in expert.gates.values())
    ids = make_ids()
    got = logits_of(peft_model(base, expert.directory), ids)  # warnings are errors
    with applied(base.model, expert.lora, ModifiedLinear):
        assert_same_logits(got, logits_of(base.model, ids))


def test_it_is_one_stage_and_says_so(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(*on_call("phatgoose.training.train_expert.fit", 2, interrupt))
    expert = train(llama, tmp_path / "echo")
    assert expert.info.hyperparameters["joint"] is True
    assert not expert.info.hyperparameters.keys() & {"gate_steps", "gate_learning_rate"}
    assert expert.info.metrics["expert_steps"] == TRAINING.steps
    assert not any(key.startswith("gate_") for key in expert.info.metrics)
    assert expert.means.keys() == expert.lora.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["echo"]
