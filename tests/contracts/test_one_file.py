"""examples/one_file.py is the method on one page: it computes what the package computes."""

from __future__ import annotations

import re
import runpy
from types import SimpleNamespace

import pytest
import torch

from paths import ROOT
from phatgoose.config import GateTraining, Lora, Training
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.tasks.task import Example, Task
from phatgoose.training.train_expert import fresh_expert, train_expert
from tiny import logits_of, make_ids

PAGE = ROOT / "examples" / "one_file.py"
IDS = make_ids(rows=2, tokens=9)
ROWS = tuple(Example(f"say {word}:", word) for word in ("one", "two", "three", "four", "five"))


@pytest.fixture(scope="module")
def one():
    return SimpleNamespace(**runpy.run_path(str(PAGE)))


def routed_by_both(one, base, folders):
    """The logits of the experts in `folders`, routed by the page and by the package."""
    experts = [one.load_expert(folder, base.model) for folder in folders]
    with one.with_layers(base.model, one.compose(base.model, experts, k=2)), torch.no_grad():
        ours = base.model(input_ids=IDS).logits
    model = compose(Pool.open(folders), base, router="phatgoose", k=2)
    theirs = logits_of(model, IDS)
    detach(model)
    return ours, theirs


def assert_equal(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_experts_of_the_package_are_routed_alike(one, llama, llama_pool):
    assert_equal(*routed_by_both(one, llama, [each.directory for each in llama_pool.experts]))


@pytest.mark.filterwarnings("ignore:.*fingerprint")  # the page records none
def test_experts_of_the_page_are_routed_alike(one, llama, tmp_path):
    folders = [tmp_path / name for name in ("first", "second", "third")]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        expert = one.new_expert(llama.model, rank=4, alpha=8.0)
        for module in expert.values():
            module.B.data.normal_(std=0.2)
            module.v = torch.nn.Parameter(torch.randn(module.A.shape[1]))
        one.save_expert(folder, expert, base=llama.id)
    assert_equal(*routed_by_both(one, llama, folders))


def test_training_an_expert_and_its_gates_is_the_same(one, llama, tmp_path):
    shape, steps, gate_steps, rate = Lora(rank=4, alpha=8.0), 6, 5, 5e-3
    trained = train_expert(
        llama,
        Task("words", train=ROWS, validation=ROWS[:1]),
        out=tmp_path / "words",
        peft=shape,
        training=Training(steps=steps, batch_size=4, micro_batch_size=4, learning_rate=rate),
        gate_training=GateTraining(gate_steps=gate_steps, gate_learning_rate=rate, readings=False),
    )
    torch.manual_seed(0)
    with fresh_expert(llama, shape, joint=False) as fresh:
        begun = {site: part["A"].detach().clone() for site, part in fresh.parts.items()}
    expert = one.new_expert(llama.model, rank=4, alpha=8.0)
    for site, module in expert.items():
        module.A.data.copy_(begun[site])
    pairs = [one.tokens_of(llama.tokenizer, row.input, row.target) for row in ROWS]
    losses = one.train(llama.model, expert, pairs, steps, rate, batch=4)
    one.add_gates(expert)
    losses += one.train(llama.model, expert, pairs, gate_steps, rate, batch=4)
    metrics = trained.info.metrics
    wanted = [metrics["expert_train_loss"], metrics["gate_train_loss"]]
    assert [losses[steps - 1], losses[-1]] == pytest.approx(wanted, rel=1e-5)
    for site, module in expert.items():
        torch.testing.assert_close(module.A.data, trained.lora[site].A, rtol=0, atol=1e-5)
        torch.testing.assert_close(module.B.data, trained.lora[site].B, rtol=0, atol=1e-5)
        torch.testing.assert_close(module.v.data, trained.gates[site], rtol=0, atol=1e-5)


def test_it_is_one_page_of_its_own():
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    assert not re.search(r"^\s*(import|from) phatgoose", text, re.MULTILINE)
